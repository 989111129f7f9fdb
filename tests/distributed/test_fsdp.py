"""FSDP2 and an output matrix whose logits are never there: what works, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fastkd
from tests.distributed import scaling
from tests.distributed.ranks import Ranks


class Head(nn.Linear):
    def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor, num_items: Tensor | None = None) -> Tensor:
        student = fastkd.LinearLogits(hidden, self.weight, self.bias)
        return fastkd.kd_loss(student, teacher, labels, num_items=num_items, backend="torch", **scaling.KEYWORDS)  # type: ignore[arg-type]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(scaling.WIDTH, 16)
        self.head = Head(16, scaling.TOKENS)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.head(self.trunk(x).tanh(), *rest)  # type: ignore[no-any-return]


def within_forward(group: ProcessGroup, head_apart: bool) -> scaling.Gradients:
    model, mesh = Model(), DeviceMesh.from_group(group, "cpu")
    if head_apart:
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = scaling.part(scaling.make_batch(), group.rank(), group.size())
    num_items = fastkd.global_items(batch[2], group=group)
    (model(*batch, num_items) * group.size()).backward()
    return scaling.gradients(model)


@pytest.mark.parametrize("head_apart", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_loss_within_forward(ranks: Ranks, size: int, head_apart: bool) -> None:
    model = Model()
    model(*scaling.make_batch()).backward()
    expected = scaling.gradients(model)
    for found in ranks.run(within_forward, head_apart, size=size):
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def outside_of_forward(group: ProcessGroup) -> str:
    model = fully_shard(Model(), mesh=DeviceMesh.from_group(group, "cpu"))
    x, teacher, labels = scaling.make_batch()
    hidden = torch.randn(*x.shape[:-1], 16)
    try:
        fastkd.kd_loss(fastkd.LinearLogits(hidden, model.head.weight), teacher, labels, hard_weight=0.5)
    except TypeError as error:
        return str(error)
    return ""


def test_loss_outside_of_forward(ranks: Ranks) -> None:
    for message in ranks.run(outside_of_forward, size=2):
        assert "fully_shard" in message and "inside the forward" in message
