"""``DTensor``s as what the loss is computed from: tensors of this rank, a place, and the way back.

A mesh dimension that shards the vocabulary makes slices of it; one that shards rows gives this rank some of them; on
one that replicates, every rank does the same. What a gradient is of stays as it was: ``to_local`` gives it the
placements of its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fastkd import _slices
from fastkd._request import WHOLE, Place
from fastkd.sources import LinearLogits, TopK

Placements: TypeAlias = "tuple[Placement, ...]"


class _SumOfGradients(torch.autograd.Function):
    """What is whole on ranks that have other rows: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: tuple[str, ...]) -> Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _slices.summed_over(grads[0], ctx.groups), None


class Spread(NamedTuple):
    """How the student's logits lie on a mesh; all that goes with them must lie alike."""

    mesh: DeviceMesh
    shape: torch.Size  # of the rows
    placements: Placements  # of the logits
    rows: Placements  # of what has one entry a row
    place: Place
    in_slices: int  # columns of all of them; 0 of a vocabulary that is whole
    row_groups: tuple[str, ...]

    def student(self, source: Any) -> Any:
        if not isinstance(source, LinearLogits):
            return source.to_local(grad_placements=self.placements)
        local = self._product("student_logits", source)
        weight, bias = (self._whole(t) for t in local[1:3])
        return local._replace(weight=weight, bias=bias)

    def teacher(self, source: Any) -> Any:
        name = "teacher_logits"
        if isinstance(source, TopK):
            ids, log_probs = (
                self._local(f"{name}.{part}", getattr(source, part), self.rows) for part in source._fields[:2]
            )
            return source._replace(ids=ids, log_probs=log_probs)
        if isinstance(source, LinearLogits):
            return self._product(name, source)
        return self._local(name, source, self.placements)

    def vectors(self, given: Sequence[Tensor | None]) -> list[Tensor | None]:
        names = ("labels", "mask", "soft_mask", "token_weights")
        return [t if t is None else self._local(name, t, self.rows) for name, t in zip(names, given, strict=True)]

    def loss(self, loss: Tensor, per_row: bool) -> Tensor:
        """A loss per row lies as the rows do; a sum over them is added up, and on every rank."""
        if per_row:
            stride = torch.empty(self.shape, device="meta").stride()
            return DTensor.from_local(loss, self.mesh, self.rows, shape=self.shape, stride=stride)
        parts = [Partial() if isinstance(p, Shard) else Replicate() for p in self.rows]
        return DTensor.from_local(loss, self.mesh, parts).redistribute(placements=[Replicate()] * self.mesh.ndim)

    def replicated(self, number: Tensor) -> Tensor:
        return DTensor.from_local(number, self.mesh, [Replicate()] * self.mesh.ndim)

    def _whole(self, tensor: Any) -> Any:
        return tensor if tensor is None else _SumOfGradients.apply(tensor, self.row_groups)  # type: ignore[no-untyped-call]

    def _product(self, name: str, source: LinearLogits) -> LinearLogits:
        bias = None if source.bias is None else self._local(f"{name}.bias", source.bias, self._matrix)
        return source._replace(
            hidden=self._local(f"{name}.hidden", source.hidden, self.rows),
            weight=self._local(f"{name}.weight", source.weight, self._matrix),
            bias=bias,
        )

    @property
    def _matrix(self) -> Placements:
        """Of a matrix, its rows being the columns of the logits."""
        columns = [place != of_rows for place, of_rows in zip(self.placements, self.rows, strict=True)]
        return tuple(Shard(0) if of_columns else Replicate() for of_columns in columns)

    def _local(self, name: str, tensor: Tensor, placements: Placements) -> Tensor:
        if not isinstance(tensor, DTensor):
            if isinstance(tensor, Tensor) and any(isinstance(p, Shard) for p in placements):
                raise ValueError(f"{name}: got a tensor with DTensors, must be one of placements {placements} too")
            return tensor
        if tensor.device_mesh != self.mesh:
            raise ValueError(f"{name}: got a DTensor on {tensor.device_mesh}, must be on student_logits' {self.mesh}")
        if tuple(tensor.placements) != placements:
            raise ValueError(
                f"{name}: got placements {tuple(tensor.placements)}, must be {placements} beside student_logits' "
                f"{self.placements}: redistribute(placements={list(placements)})"
            )
        return tensor.to_local(grad_placements=placements)


def spread_of(student: Any, vocab_group: ProcessGroup | None) -> Spread:
    """How these logits lie, or those of these hidden states and this matrix.

    Raises:
        ValueError: placements that cannot be honoured; it says which can.
        TypeError: a tensor, where the other arguments are DTensors.
    """
    if vocab_group is not None:
        raise ValueError("vocab_group: got one with DTensors, whose placements say it; must be None")
    if isinstance(student, LinearLogits):
        return _spread_of_product("student_logits", student)
    if not isinstance(student, DTensor):
        raise TypeError(
            f"student_logits: got {type(student).__name__} with DTensors beside it, must be one too: "
            "DTensor.from_local(student_logits, mesh, placements)"
        )
    return _of_placements("student_logits", student.device_mesh, tuple(student.placements), student.shape)


def _spread_of_product(name: str, source: LinearLogits) -> Spread:
    hidden, weight = source[:2]
    if not isinstance(hidden, DTensor) or not isinstance(weight, DTensor):
        raise TypeError(
            f"{name}: got a DTensor and a tensor for hidden and weight, where nothing says that all ranks have the "
            "same rows; must both be DTensors. Of a matrix split by tensor parallelism: "
            "DTensor.from_local(hidden, mesh, [Replicate()]). One split by fully_shard has to be whole while the loss "
            "is computed: do so inside the forward of the module that it is a parameter of"
        )
    if hidden.device_mesh != weight.device_mesh:
        raise ValueError(f"{name}.weight: got a mesh other than hidden's: {weight.device_mesh}, {hidden.device_mesh}")
    placements: list[Any] = []
    last = hidden.dim() - 1
    for of_hidden, of_weight in zip(hidden.placements, weight.placements, strict=True):
        if isinstance(of_hidden, Replicate) and type(of_weight) is Shard and of_weight.dim == 0:
            placements.append(Shard(last))
        elif isinstance(of_weight, Replicate) and of_hidden != Shard(last):
            placements.append(of_hidden)
        else:
            raise ValueError(
                f"{name}.weight: got placement {of_weight} with {of_hidden} of hidden on the same mesh dimension; must "
                "be Shard(0) with Replicate(), a matrix in slices, or Replicate(), with any of hidden's rows"
            )
    shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
    return _of_placements(name, hidden.device_mesh, tuple(placements), shape)


def _of_placements(name: str, mesh: DeviceMesh, placements: Placements, shape: torch.Size) -> Spread:
    """Of logits of this shape."""
    last = len(shape) - 1
    rows: list[Placement] = []
    row_groups: list[str] = []
    group: ProcessGroup | None = None
    for dim, placement in enumerate(placements):
        if not (isinstance(placement, Replicate) or type(placement) is Shard):
            raise ValueError(
                f"{name}: got placement {placement}, must be Shard({last}), a vocabulary in slices, Shard of another "
                f"dimension, or Replicate(): redistribute(placements=...)"
            )
        if isinstance(placement, Replicate):
            rows.append(placement)
        elif placement.dim % (last + 1) != last:
            rows.append(placement)
            row_groups.append(mesh.get_group(dim).group_name)
        elif group is not None:
            raise ValueError(f"{name}: got a vocabulary in slices over two mesh dimensions, must be over one")
        else:
            rows.append(Replicate())
            group = mesh.get_group(dim)
    place = WHOLE if group is None else _slices.place_of(group, -(-shape[-1] // group.size()))
    in_slices = shape[-1] if place.group else 0
    return Spread(mesh, shape[:-1], placements, tuple(rows), place, in_slices, tuple(row_groups))
