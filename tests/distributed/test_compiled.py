"""A compiled function has its exchanges within one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastkd
from tests.cases import inputs
from tests.distributed.programs import own_slice
from tests.distributed.ranks import Ranks


def losses(group: ProcessGroup, kind: str) -> list[Any]:
    """(loss, gradient) of the function compiled, and of the function."""
    torch.manual_seed(0)
    student, teacher, labels = inputs((5,), 24)
    mesh = init_device_mesh("cpu", (group.size(),)) if kind == "dtensor" else None
    module = fastkd.KDLoss(hard_weight=0.5, vocab_group=group, divergence=fastkd.JSD(0.3))

    def loss(z: Tensor, u: Tensor, y: Tensor) -> Tensor:
        if kind == "module":
            return module(z, u, y)
        if kind == "linear":
            source = fastkd.LinearLogits(u[:, :8], torch.cat((z, z)).T[:, :8])
            return fastkd.kd_loss(source, source, y, hard_weight=0.5, vocab_group=group)
        return fastkd.kd_loss(z, u, y, hard_weight=0.5, vocab_group=None if mesh else group)

    def arguments() -> tuple[Tensor, Tensor]:
        if mesh:
            return tuple(distribute_tensor(t, mesh, [Shard(1)]) for t in (student, teacher))  # type: ignore[return-value]
        return own_slice(student, group), own_slice(teacher, group)

    results = []
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        z, u = arguments()
        leaf = z.detach().clone().requires_grad_()
        value = function(leaf, u, labels)
        (grad,) = torch.autograd.grad(value, leaf)
        results.append([t.full_tensor() if mesh else t for t in (value.detach(), grad)])
    return results


@pytest.mark.parametrize("kind", ["logits", "module", "linear", "dtensor"])
def test_one_graph(ranks: Ranks, kind: str) -> None:
    for compiled, plain in ranks.run(losses, kind, size=4 if kind == "dtensor" else 2):
        for one, other in zip(compiled, plain, strict=True):
            torch.testing.assert_close(one, other)
