"""A teacher that runs once: what it says of the student's batches goes to disk, and is read from there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastkd
from fastkd.cache import Cache, Writer
from fastkd.demo.losses import CACHED_K


class CachedTeacher:
    """What a teacher said of one batch after another, in the order in which they were written."""

    def __init__(self, path: Path) -> None:
        self.cache, self.next = Cache(path), 0

    def read(self, inputs: Tensor) -> fastkd.TopK:
        """Of the next batch, a row a token."""
        numbers = range(self.next, self.next + len(inputs))
        self.next = numbers.stop
        topk = self.cache.batch(numbers, inputs)
        return topk._replace(ids=topk.ids.flatten(0, -2), log_probs=topk.log_probs.flatten(0, -2))

    @property
    def bytes_a_token(self) -> float:
        shards = list(self.cache.shards())
        return sum(shard.bytes for shard in shards) / sum(shard.tokens for shard in shards)


@torch.no_grad()
def write(path: Path, teacher: nn.Module, inputs: Iterable[Tensor], temperature: float, classes: int) -> None:
    """Have the teacher read all batches, and write its most probable tokens."""
    with Writer(path, k=CACHED_K, temperature=temperature, vocab_size=classes, teacher="the demo's") as writer:
        for batch in inputs:
            writer.add(batch, fastkd.top_k(teacher(batch), CACHED_K, temperature=temperature))
