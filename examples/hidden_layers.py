"""Hold a student to its teacher's hidden layers too, and start it as a copy of some. Does it help, on a small text?

    pip install -e ".[transformers]"
    python examples/hidden_layers.py --steps 60

A teacher of 4 layers is trained on one half of a text that is on every machine, byte by byte. Then students of 2 layers
learn from it, all in as many steps: from its logits; from these and its hidden layers; and that, begun as a copy of
every second of its layers. What is printed is their loss on the other half.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fastkd

TEACHER_LAYERS, STUDENT_LAYERS, WIDTH = 4, 2, 64
LENGTH, BATCH, TEMPERATURE, HIDDEN_WEIGHT = 48, 8, 2.0, 0.5


def make_model(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def make_text() -> tuple[Tensor, Tensor]:
    """What to train on, and what is held out: bytes of the module argparse."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return text[: len(text) // 2], text[len(text) // 2 :]


def train(
    text: Tensor, steps: int, parameters: Iterable[Parameter], loss_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """On windows of the text, the same ones each time; the loss is of input_ids and of the token after each."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        begins = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        windows = text[begins + torch.arange(LENGTH + 1)]
        loss = loss_of(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out(model: LlamaForCausalLM, text: Tensor) -> float:
    """Nats a byte."""
    windows = text[: 64 * (LENGTH + 1)].view(64, LENGTH + 1)
    return float(F.cross_entropy(model(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()))


def distil(teacher: LlamaForCausalLM, text: Tensor, steps: int, hidden: bool, copied: bool) -> LlamaForCausalLM:
    student = make_model(STUDENT_LAYERS, seed=2)
    pairs = fastkd.layer_map(STUDENT_LAYERS, TEACHER_LAYERS)
    if copied:
        report = fastkd.copy_layers(teacher, student, pairs, teacher_layers="model.layers")
        print(str(report).partition("\n")[0])  # the rest says which
    hidden_loss = fastkd.HiddenLoss(pairs, WIDTH, WIDTH, kind="cosine")

    def loss_of(input_ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = teacher(input_ids, output_hidden_states=True)
        ours = student(input_ids, output_hidden_states=True)
        loss = fastkd.kd_loss(
            ours.logits, theirs.logits, labels, temperature=TEMPERATURE, hard_weight=0.1, soft_weight=0.9
        )
        if hidden:
            loss = loss + HIDDEN_WEIGHT * hidden_loss(ours.hidden_states, theirs.hidden_states)
        return loss

    train(text, steps, [*student.parameters(), *hidden_loss.parameters()], loss_of)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of each student; the teacher has twice as many")
    steps = parser.parse_args().steps
    text, other = make_text()

    teacher = make_model(TEACHER_LAYERS, seed=1)
    train(text, 2 * steps, teacher.parameters(), lambda input_ids, labels: F.cross_entropy(
        teacher(input_ids).logits.flatten(0, 1), labels.flatten()
    ))  # fmt: skip
    results = {"the teacher": teacher}
    results["student, logits"] = distil(teacher, text, steps, hidden=False, copied=False)
    results["student, logits and hidden layers"] = distil(teacher, text, steps, hidden=True, copied=False)
    results["the same, begun as a copy"] = distil(teacher, text, steps, hidden=True, copied=True)
    for name, model in results.items():
        print(f"{name:<36} held-out loss {held_out(model, other):.3f}")


if __name__ == "__main__":
    main()
