"""Sequences to write: each follows from its number, and no two are the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import cache

K, VOCAB = 3, 50
SETTINGS: dict[str, Any] = {"k": K, "temperature": 2.0, "vocab_size": VOCAB, "teacher": "a teacher"}


def sequence(number: int, k: int = K, vocab_size: int = VOCAB) -> tuple[Tensor, fastkd.TopK]:
    """3 to 9 tokens; the first row of every other sequence lacks its last token."""
    generator = torch.Generator().manual_seed(number)
    length = 3 + number % 7
    input_ids = torch.randint(vocab_size, (length,), generator=generator)
    ids = torch.rand(length, vocab_size, generator=generator).topk(k).indices
    log_probs = torch.rand(length, k, generator=generator).log() - math.log(k)
    if number % 2 == 0:
        ids[0, -1], log_probs[0, -1] = -1, -math.inf
    return input_ids, fastkd.TopK(ids, log_probs, temperature=2.0)


def write(path: Path, numbers: Iterable[int], **settings: Any) -> None:
    """As one writer that closes. By default every shard has two sequences or so."""
    with cache.Writer(path, **{**SETTINGS, "shard_bytes": 120, **settings}) as writer:
        for number in numbers:
            writer.add(*sequence(number))


def check(found: fastkd.TopK, number: int, dtype: torch.dtype = torch.float16) -> None:
    """Bit for bit what was written as this sequence."""
    expected = sequence(number)[1]
    assert found.ids.dtype == torch.int32
    assert found.log_probs.dtype == dtype
    assert torch.equal(found.ids.long(), expected.ids), number
    assert torch.equal(found.log_probs, expected.log_probs.to(dtype)), number
    assert found[2:] == (2.0, "bucket")
