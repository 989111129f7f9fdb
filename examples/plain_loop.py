"""Distillation in a plain loop: what is shifted, what counts, and one mean over accumulated batches.

    python examples/plain_loop.py

A small GRU learns to write Python, byte by byte, from the standard library's sources: once from the text alone, once
also from a larger one that has read more. Logits are never all there: the loss takes hidden states and the head's
matrix. Half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastkd

VOCAB, LENGTH, BATCH, ACCUMULATED = 256, 64, 8, 2
LOSS = fastkd.KDLoss(hard_weight=0.1, soft_weight=0.9)


class LanguageModel(nn.Module):
    """Token ids (batch, length) -> the logits of the token after each, not yet computed."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.body = nn.Embedding(VOCAB, 32), nn.GRU(32, width, batch_first=True)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, ids: Tensor) -> fastkd.LinearLogits:
        return fastkd.LinearLogits(self.body(self.embedding(ids))[0], self.head.weight, self.head.bias)


def read_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and others."""
    library = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:80])
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def batches(text: Tensor, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences of unequal length: ids padded with 0; labels, which are the ids that come next, with -100."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator).tolist()
        lengths = torch.randint(LENGTH // 4, LENGTH + 1, (BATCH,), generator=generator).tolist()
        rows = [text[start : start + length + 1] for start, length in zip(starts, lengths, strict=True)]
        ids = pad_sequence([row[:-1] for row in rows], batch_first=True)
        yield ids, pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)


def train(student: LanguageModel, teacher: LanguageModel | None, text: Tensor, steps: int, rate: float) -> float:
    """Seconds a step takes."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    start, found = time.perf_counter(), batches(text, steps * ACCUMULATED, seed=1)
    for _ in range(steps):
        step = [next(found) for _ in range(ACCUMULATED)]
        # One denominator for all of them: a mean of means would weigh a byte by how short its batch is.
        num_items = torch.stack([(labels != -100).sum() for _, labels in step]).sum()
        for ids, labels in step:
            if teacher is None:  # the text alone: its soft term has no weight, and any logits do
                logits = student(ids)
                loss = fastkd.kd_loss(logits, logits, labels, hard_weight=1.0, soft_weight=0.0, num_items=num_items)
            else:
                with torch.no_grad():
                    its = teacher(ids)
                loss = LOSS(student(ids), its, labels, num_items=num_items)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor) -> float:
    """Bits a byte, of text that it has not read."""
    total = count = torch.tensor(0.0)
    for ids, labels in batches(text, 20, seed=2):
        logits = model(ids)
        total = total + fastkd.kd_loss(logits, logits, labels, hard_weight=1.0, soft_weight=0.0, reduction="sum")
        count = count + (labels != -100).sum()
    return (total / count).item() / torch.tensor(2.0).log().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="of the student; the teacher has three times as many")
    steps = parser.parse_args(arguments).steps
    text, held_out = read_text()
    teacher = LanguageModel(width=128, seed=1)
    train(teacher, None, text, 3 * steps, rate=5e-3)
    found = {"teacher": evaluate(teacher, held_out)}
    for name, its in (("student, from the text", None), ("student, distilled", teacher)):
        student = LanguageModel(width=64, seed=2)
        seconds = train(student, its, text, steps, rate=1e-2)
        found[name] = evaluate(student, held_out)
        print(f"{name}: {1e3 * seconds:.0f} ms a step")
    for name, bits in found.items():
        print(f"{name}: {bits:.3f} bits a byte")
    return found


if __name__ == "__main__":
    main()
