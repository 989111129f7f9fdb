"""What the ranks run: a call on this rank's columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import fastkd


def own_slice(whole: Tensor, group: ProcessGroup, dim: int = -1) -> Tensor:
    """Of dimension ``dim``, which the size divides."""
    return whole.chunk(group.size(), dim)[group.rank()].contiguous()


def sliced_loss(group: ProcessGroup, cases: list[tuple[Tensor, Any, Tensor | None, dict[str, Any]]]) -> list[Any]:
    """(loss, gradient of this rank's columns) of each case."""
    results = []
    for student, teacher, labels, keywords in cases:
        keywords = dict(keywords)
        grad_output = keywords.pop("grad_output", None)
        leaf = own_slice(student, group).requires_grad_()
        of_teacher = own_slice(teacher, group) if type(teacher) is Tensor else teacher
        loss = fastkd.kd_loss(leaf, of_teacher, labels, vocab_group=group, **keywords)
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad_output is None else grad_output)
        results.append((loss.detach(), grad))
    return results
