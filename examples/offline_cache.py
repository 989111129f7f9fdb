"""Distil from a teacher that is not there: it runs once and writes a cache, and the student trains from that.

    pip install -e ".[cache]" && python examples/offline_cache.py --out FOLDER --steps 60

Kill it, and start it again: the teacher goes on with the sequence after the last complete shard, the student with the
step after its last checkpoint, and what comes out is what an undisturbed run gives, bit for bit. (The teacher is tiny
and untrained; the rest is as it is for large ones.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastkd
from fastkd import cache

VOCAB, K, TEMPERATURE = 256, 32, 2.0
BATCH, SHARD_BYTES, CHECKPOINT_EVERY = 8, 2**17, 5


class LanguageModel(nn.Module):
    """The next token out of the mean of those so far."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        means = self.embedding(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(torch.tanh(self.body(means)))


def make_rows(count: int = 64) -> list[dict[str, Any]]:
    """A dataset as Hugging Face's are, rows with ``input_ids``: lines of a text that is on every machine, by bytes."""
    lines = [line for line in Path(argparse.__file__).read_bytes().splitlines() if len(line) > 10]
    return [{"input_ids": list(line)} for line in lines[:count]]


@torch.no_grad()
def write_cache(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Have the teacher read what it has not read yet, and again what came after the last complete shard."""
    teacher = LanguageModel(width=64, seed=1)
    teacher.head.weight.mul_(60.0)  # so that it prefers some tokens
    about = {"k": K, "temperature": TEMPERATURE, "vocab_size": VOCAB, "teacher": "an untrained one"}
    with cache.Writer(folder, **about, shard_bytes=SHARD_BYTES) as writer:
        print(f"the teacher goes on with row {len(writer)} of {len(rows)}")
        while len(writer) < len(rows):
            batch = cache.pad(rows[len(writer) : len(writer) + BATCH])
            topk = fastkd.top_k(teacher(batch["input_ids"]), K, temperature=TEMPERATURE)
            writer.add(batch["input_ids"], topk, batch["attention_mask"].bool())


def batches(data: cache.CachedDataset, step: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """From a step on, without end: an epoch's order follows from its number, so that a resumed run has the same."""
    while True:
        epoch, done = divmod(step, len(data) // BATCH)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
        rest = order[done * BATCH : len(data) // BATCH * BATCH]
        for batch in DataLoader(data, BATCH, sampler=rest, collate_fn=data.collate):
            yield step, batch
            step += 1


def train(data: cache.CachedDataset, checkpoint: Path, steps: int) -> nn.Module:
    """Train the student until it has done so many steps, from its checkpoint on if there is one."""
    student, done = LanguageModel(width=32, seed=2), 0
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    print(f"the student goes on with step {done} of {steps}")
    for step, batch in batches(data, done):
        if step >= steps:
            break
        input_ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        labels = F.pad(input_ids.masked_fill(~mask, -100)[:, 1:], (0, 1), value=-100)
        loss = fastkd.kd_loss(
            student(input_ids), batch["teacher"], labels, temperature=TEMPERATURE, hard_weight=0.1, soft_weight=0.9
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step == steps - 1:
            part = checkpoint.with_suffix(".part")
            torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}, part)
            os.replace(part, checkpoint)  # under its name it is whole
    return student


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache and the checkpoint")
    parser.add_argument("--steps", type=int, default=60, help="how many the student has done in the end (default 60)")
    options, rows = parser.parse_args(arguments), make_rows()
    write_cache(options.out / "cache", rows)
    found = cache.Cache(options.out / "cache")
    size, tokens = (sum(getattr(shard, name) for shard in found.shards()) for name in ("bytes", "tokens"))
    print(f"the cache has {tokens} tokens, of {size / tokens:.0f} bytes each")
    return train(cache.CachedDataset(rows, found), options.out / "checkpoint.pt", options.steps)


if __name__ == "__main__":
    main()
