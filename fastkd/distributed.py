"""What a loss over many ranks is divided by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastkd import _labels


@torch.no_grad()
def global_items(
    labels: Tensor, *, ignore_index: int = -100, mask: Tensor | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """The number of rows that count over all ranks: ``num_items`` of a mean that is the same however rows are split.

    One all-reduce, of a number that stays on its device. ``docs/distributed.md`` says which group it is taken over and
    which factor the loss then needs.

    Args:
        labels: ``(...)`` int64, this rank's; on the device of the group's backend.
        ignore_index: rows with this label do not count.
        mask: ``(...)`` bool; rows where it is False do not count.
        group: the ranks that have other rows; None: all. Where nothing is distributed, this process is all there is.

    Returns:
        A 0-d int64 tensor, to be added up over the micro-batches of an accumulated gradient.

    Raises:
        TypeError: labels that are no int64 tensor.
        ValueError: a mask of another shape or dtype.

    Example:
        >>> import torch, fastkd
        >>> fastkd.global_items(torch.tensor([3, -100, 5]))
        tensor(2)
    """
    count = _labels.counted(labels, ignore_index, mask).count_nonzero()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count, group=group)
    return count
