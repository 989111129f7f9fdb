"""Distillation with Lightning, over accumulated batches of unequal size.

    pip install -e ".[lightning]"
    python examples/lightning_module.py

A small network learns to say which byte comes after 12 others in Python's own sources: once from the text, once also
from a large one that has read more. It prints both in as many steps; under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.integrations.lightning import KDModule

VOCAB, CONTEXT = 256, 12


def make_data() -> tuple[TensorDataset, TensorDataset]:
    """Contexts and what follows them, to train on, and others; spaces that follow a space are not to be learnt."""
    library = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:80])
    windows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().unfold(0, CONTEXT + 1, 5)
    inputs, labels = windows[:, :-1], windows[:, -1].clone()
    labels[(inputs[:, -1] == 32) & (labels == 32)] = -100
    held_out = len(inputs) // 20
    return TensorDataset(inputs[:-held_out], labels[:-held_out]), TensorDataset(inputs[-held_out:], labels[-held_out:])


def make_network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(VOCAB, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, width), nn.ReLU(), nn.Linear(width, VOCAB)
    )


class FromText(KDModule):
    """What it is without a teacher: the soft term has no weight, and any logits do."""

    def distil(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = batch
        logits = self.student(inputs)
        return logits, logits.detach(), labels


def main(given: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="of the student; the teacher has eight times as many")
    steps = parser.parse_args(given).steps
    warnings.filterwarnings("ignore", module="lightning")
    train, held_out = make_data()
    found = {}

    def run(name: str, module: KDModule, steps: int) -> None:
        torch.manual_seed(0)
        trainer = Trainer(
            max_steps=steps, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(train, batch_size=128, shuffle=True))
        (measured,) = trainer.validate(module, DataLoader(held_out, batch_size=1024), verbose=False)
        found[name] = measured["val_hard"] / math.log(2)
        print(f"{name}: {found[name]:.3f} bits a byte")

    optimizer = partial(torch.optim.AdamW, lr=4e-3)
    text_alone = fastkd.KDLoss(hard_weight=1.0, soft_weight=0.0)
    teacher = make_network(512, seed=1)
    run("teacher", FromText(teacher, nn.Identity(), text_alone, optimizer), 8 * steps)
    run("student, from the text", FromText(make_network(64, seed=2), nn.Identity(), text_alone, optimizer), steps)

    loss_fn = fastkd.KDLoss(hard_weight=0.1, soft_weight=0.9)
    run("student, distilled", KDModule(make_network(64, seed=2), teacher, loss_fn, optimizer), steps)
    return found


if __name__ == "__main__":
    main()
