"""Sequences of token ids: where they lie in a padded batch, and how one is told from another."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkd import _validate

DIGEST_BYTES = 16


def check_batch(input_ids: Tensor, mask: Tensor | None) -> None:
    """(B, L) integers, and a bool mask of them, or None."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: got {type(input_ids).__name__}, must be a tensor")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids: got {input_ids.dtype}, must be int64 or int32")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, must be (batch, length)")
    if mask is not None:
        _validate.check_per_row("mask", mask, input_ids[..., None], (torch.bool,), "input_ids")


def on_cpu(input_ids: Tensor) -> NDArray[np.int32]:
    return input_ids.to("cpu", torch.int32).contiguous().numpy()


def runs(input_ids: Tensor, mask: Tensor | None) -> list[tuple[int, int]]:
    """Where each sequence begins and ends in its row of the batch.

    Raises:
        ValueError: there is padding within a sequence.
    """
    batch, length = input_ids.shape
    if mask is None:
        return [(0, length)] * batch
    counts = mask.sum(1)
    starts = mask.to(torch.uint8).argmax(1) if length else counts
    columns = torch.arange(length, device=mask.device)
    inside = (columns >= starts[:, None]) & (columns < (starts + counts)[:, None])
    if not torch.equal(inside, mask):
        row = int((inside != mask).any(1).nonzero()[0])
        raise ValueError(f"mask: row {row} has padding between its tokens, must be one run of True a row")
    return [(start, start + count) for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]


def digest(tokens: NDArray[np.int32]) -> bytes:
    """BLAKE2b of a sequence's ids as little-endian int32."""
    return hashlib.blake2b(tokens.astype("<i4", copy=False).data, digest_size=DIGEST_BYTES).digest()
