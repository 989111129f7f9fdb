"""What the ranks run: a call on this rank's columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastkd
from tests import interpreter


def own_slice(whole: Tensor, group: ProcessGroup, dim: int = -1) -> Tensor:
    """Of dimension ``dim``, which the size divides."""
    return whole.chunk(group.size(), dim)[group.rank()].contiguous()


def sliced_loss(group: ProcessGroup, cases: list[tuple[Tensor, Any, Tensor | None, dict[str, Any]]]) -> list[Any]:
    """(loss, gradient of this rank's columns) of each case."""
    results = []
    for student, teacher, labels, keywords in cases:
        keywords = dict(keywords)
        grad_output = keywords.pop("grad_output", None)
        if keywords.get("backend") == "triton":
            interpreter.mend()
        leaf = own_slice(student, group).requires_grad_()
        of_teacher = own_slice(teacher, group) if type(teacher) is Tensor else teacher
        given = leaf * 1.0 if keywords.get("inplace_backward") else leaf
        loss = fastkd.kd_loss(given, of_teacher, labels, vocab_group=group, **keywords)
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad_output is None else grad_output)
        results.append((loss.detach(), grad))
    return results


def linear_loss(group: ProcessGroup, cases: list[tuple[Any, Any, Tensor | None, dict[str, Any]]]) -> list[Any]:
    """(loss, gradients of hidden states, of this rank's part of the matrix and of the bias) of each case."""
    results = []
    for student, teacher, labels, keywords in cases:
        student = _sliced_product(student, group)
        if isinstance(teacher, fastkd.LinearLogits):
            teacher = _sliced_product(teacher, group)
        elif isinstance(teacher, Tensor):
            teacher = own_slice(teacher, group)
        leaves = [t.requires_grad_() for t in student[:3] if isinstance(t, Tensor)]
        loss = fastkd.kd_loss(student, teacher, labels, vocab_group=group, **keywords)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaves)))
    return results


def _sliced_product(source: fastkd.LinearLogits, group: ProcessGroup) -> fastkd.LinearLogits:
    bias = None if source.bias is None else own_slice(source.bias, group, 0)
    return source._replace(hidden=source.hidden.clone(), weight=own_slice(source.weight, group, 0), bias=bias)


def dtensor_loss(
    group: ProcessGroup, shape: tuple[int, ...], placements: list[Any], cases: list[tuple[Any, ...]]
) -> list[Any]:
    """(loss, parts, gradient) as whole tensors, and the placements of loss and gradient, of each case."""
    mesh = init_device_mesh("cpu", shape)
    last = cases[0][0].dim() - 1
    of_rows = [Replicate() if p == Shard(last) else p for p in placements]
    results = []
    for student, teacher, labels, keywords in cases:
        leaf = distribute_tensor(student, mesh, placements).requires_grad_()
        if isinstance(teacher, fastkd.TopK):
            teacher = teacher._replace(
                ids=distribute_tensor(teacher.ids, mesh, of_rows),
                log_probs=distribute_tensor(teacher.log_probs, mesh, of_rows),
            )
        else:
            teacher = distribute_tensor(teacher, mesh, placements)
        keywords = {
            name: distribute_tensor(value, mesh, of_rows) if isinstance(value, Tensor) else value
            for name, value in keywords.items()
        }
        if labels is not None:
            labels = distribute_tensor(labels, mesh, of_rows)
        parts = fastkd.kd_loss(leaf, teacher, labels, return_parts=True, **keywords)
        parts.loss.sum().backward()
        results.append(
            ([part.full_tensor().detach() for part in parts], leaf.grad.full_tensor(),
             parts.loss.placements, leaf.grad.placements)
        )  # fmt: skip
    return results
