"""Labels outside the vocabulary: found on a CPU at every call, on a GPU when asked, since looking synchronises."""

from __future__ import annotations

import os

import torch
from torch import Tensor

ALWAYS = os.environ.get("FASTKD_CHECK_LABELS", "0") not in ("", "0")


def check_labels(labels: Tensor, vocab_size: int, *, ignore_index: int = -100, mask: Tensor | None = None) -> None:
    """Raise if a row that counts has a label outside ``[0, vocab_size)``. Synchronises with the device.

    ``FASTKD_CHECK_LABELS=1`` makes :func:`fastkd.kd_loss` do this at every call, on a GPU too.

    Args:
        labels: ``(...)`` int64.
        vocab_size: number of tokens.
        ignore_index: rows with this label do not count.
        mask: ``(...)`` bool; rows where it is False do not count.

    Raises:
        TypeError: labels that are no int64 tensor, or a mask that is none.
        ValueError: a mask of another shape or dtype; a bad label, naming the first, its row and how many there are.
    """
    _check(labels, vocab_size, counted(labels, ignore_index, mask))


def counted(labels: Tensor, ignore_index: int, mask: Tensor | None) -> Tensor:
    """Which rows count, of arguments that are as they must be."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels: got {getattr(labels, 'dtype', type(labels).__name__)}, must be an int64 tensor")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, must be a tensor")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
        raise ValueError(
            f"mask: got {mask.dtype} {tuple(mask.shape)}, must be bool {tuple(labels.shape)}, as labels are"
        )
    counts = labels != ignore_index
    return counts if mask is None else counts & mask


def check_rows(labels: Tensor, vocab_size: int, hard_scale: Tensor, soft_scale: Tensor | None) -> None:
    """The same for the row operation: a row counts when one of its scales is not 0."""
    # The extremes settle the common case, in which every label is good.
    if labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low.item() >= 0 and high.item() < vocab_size:
        return
    counts = hard_scale != 0
    _check(labels, vocab_size, counts if soft_scale is None else counts | (soft_scale != 0))


def _check(labels: Tensor, vocab_size: int, counts: Tensor) -> None:
    bad = ((labels < 0) | (labels >= vocab_size)) & counts
    rows = torch.nonzero(bad.reshape(-1))
    if rows.numel():
        row = int(rows[0])
        raise ValueError(
            f"labels: got {int(labels.reshape(-1)[row])} in row {row} ({rows.numel()} such rows that count), "
            f"must be in [0, {vocab_size}), or ignore_index, or masked"
        )
