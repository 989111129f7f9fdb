"""DTensors: what their placements say is done, or refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastkd
from tests import reference
from tests.assertions import check_gradient, check_loss
from tests.cases import DIVERGENCES
from tests.distributed.programs import dtensor_loss
from tests.distributed.ranks import Ranks

LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "slices": ((4,), [Shard(2)]),
    "slices and batch": ((2, 2), [Shard(0), Shard(2)]),
    "slices and sequence": ((2, 2), [Shard(1), Shard(2)]),
    "slices first": ((2, 2), [Shard(2), Shard(0)]),
    "slices and copies": ((2, 2), [Replicate(), Shard(2)]),
    "sequence": ((4,), [Shard(1)]),
    "batch and sequence": ((2, 2), [Shard(0), Shard(1)]),
}


@pytest.mark.parametrize("columns", [40, 37, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient(ranks: Ranks, layout: str, columns: int) -> None:
    """Slices and rows need not be even, and a rank may have none; parts are means over the global tensor as well."""
    shape, placements = LAYOUTS[layout]
    student, teacher = torch.randn(4, 5, columns), torch.randn(4, 5, columns)
    labels = torch.randint(0, columns, (4, 5))
    labels[0, :4] = labels[3] = -100
    cases, names = [], []
    for name in ("forward_kl", "tvd"):
        for reduction in ("mean", "sum", "none"):
            keywords = {"hard_weight": 0.5, "reduction": reduction, "backend": "torch", "label_smoothing": 0.1}
            if reduction == "mean":
                keywords |= {"mask": torch.rand(4, 5) > 0.2, "token_weights": torch.rand(4, 5)}
            cases.append((student, teacher, labels, keywords | {"divergence": DIVERGENCES[name].argument}))
            names.append(name)
    results = ranks.run(dtensor_loss, shape, placements, cases)
    for name, (_, _, _, keywords), *of_ranks in zip(names, cases, *results, strict=True):
        keywords = {key: value for key, value in keywords.items() if key != "backend"}
        leaf = student.double().requires_grad_()
        expected = reference.kd_loss(
            leaf, teacher, labels, **keywords | {"divergence": DIVERGENCES[name].definition}
        )  # fmt: skip
        (grad,) = torch.autograd.grad(expected.loss.sum(), leaf)
        for parts, of_leaf, of_loss, of_grad in of_ranks:
            for part, exact in zip(parts, expected, strict=True):
                check_loss(part, exact.detach())
            check_gradient(of_leaf, grad)
            assert [p.dim % 3 if isinstance(p, Shard) else p for p in of_grad] == [
                p.dim % 3 if isinstance(p, Shard) else p for p in placements
            ]
            if keywords["reduction"] != "none":
                assert all(p == Replicate() for p in of_loss)


def test_listed_tokens(ranks: Ranks) -> None:
    student, teacher = torch.randn(4, 5, 40), fastkd.top_k(torch.randn(4, 5, 40), 6)
    labels = torch.randint(0, 40, (4, 5))
    keywords = {"hard_weight": 0.5, "backend": "torch"}
    results = ranks.run(dtensor_loss, (2, 2), [Shard(0), Shard(2)], [(student, teacher, labels, keywords)])
    leaf = student.double().requires_grad_()
    listed = reference.Listed(teacher.ids, teacher.log_probs, teacher.tail)
    expected = reference.kd_loss(leaf, listed, labels, hard_weight=0.5).loss
    (grad,) = torch.autograd.grad(expected, leaf)
    for ((parts, of_leaf, _, _),) in results:
        check_loss(parts[0], expected.detach())
        check_gradient(of_leaf, grad)


def of_product(group: ProcessGroup, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Any:
    mesh = init_device_mesh("cpu", (2, 2))
    leaves = [
        distribute_tensor(tensor, mesh, placements).requires_grad_()
        for tensor, placements in (
            (hidden, [Shard(0), Replicate()]), (weight, [Replicate(), Shard(0)]), (bias, [Replicate(), Shard(0)])
        )
    ]  # fmt: skip
    source = fastkd.LinearLogits(*leaves)
    labels = distribute_tensor(labels, mesh, [Shard(0), Replicate()])
    loss = fastkd.kd_loss(source, source, labels, hard_weight=0.5, backend="torch")
    loss.backward()
    same = [leaf.grad.placements == leaf.placements for leaf in leaves]
    return loss.full_tensor().detach(), [leaf.grad.full_tensor() for leaf in leaves], same


def test_products(ranks: Ranks) -> None:
    """A matrix in slices over one mesh dimension and rows over the other, over which its gradient is summed."""
    hidden, weight, bias = torch.randn(6, 8), torch.randn(13, 8), torch.randn(13)
    labels = torch.tensor([0, 5, -100, 12, -100, -100])
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    expected = reference.kd_loss(logits, logits.detach(), labels, hard_weight=0.5).loss
    grads = torch.autograd.grad(expected, exact)
    for loss, of_leaves, same in ranks.run(of_product, hidden, weight, bias, labels):
        check_loss(loss, expected.detach())
        for found, grad in zip(of_leaves, grads, strict=True):
            check_gradient(found, grad)
        assert all(same)


def refused(group: ProcessGroup, call: Callable[[Any, ProcessGroup], Any]) -> str:
    mesh = init_device_mesh("cpu", (group.size(),))
    try:
        call(mesh, group)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sharded(mesh: Any, dim: int = 1, columns: int = 8) -> DTensor:
    return distribute_tensor(torch.zeros(4, columns), mesh, [Shard(dim)])


def partial_logits(mesh: Any, group: ProcessGroup) -> None:
    logits = DTensor.from_local(torch.zeros(4, 8), mesh, [Partial()])
    fastkd.kd_loss(logits, logits)


def teacher_that_lies_otherwise(mesh: Any, group: ProcessGroup) -> None:
    fastkd.kd_loss(sharded(mesh), distribute_tensor(torch.zeros(4, 8), mesh, [Replicate()]))


def teacher_of_a_tensor(mesh: Any, group: ProcessGroup) -> None:
    fastkd.kd_loss(sharded(mesh), torch.zeros(4, 8))


def student_of_a_tensor(mesh: Any, group: ProcessGroup) -> None:
    fastkd.kd_loss(torch.zeros(4, 8), sharded(mesh))


def labels_of_all_rows(mesh: Any, group: ProcessGroup) -> None:
    fastkd.kd_loss(sharded(mesh, 0), sharded(mesh, 0), torch.zeros(4, dtype=torch.int64), hard_weight=0.5)


def a_group_as_well(mesh: Any, group: ProcessGroup) -> None:
    fastkd.kd_loss(sharded(mesh), sharded(mesh), vocab_group=group)


def another_mesh(mesh: Any, group: ProcessGroup) -> None:
    other = init_device_mesh("cpu", (1, group.size()))
    teacher = distribute_tensor(torch.zeros(4, 8), other, [Replicate(), Shard(1)])
    fastkd.kd_loss(sharded(mesh), teacher)


def rows_and_matrix_alike(mesh: Any, group: ProcessGroup) -> None:
    source = fastkd.LinearLogits(sharded(mesh, 0), distribute_tensor(torch.zeros(6, 8), mesh, [Shard(0)]))
    fastkd.kd_loss(source, source)


def a_part_of_each_hidden_state(mesh: Any, group: ProcessGroup) -> None:
    source = fastkd.LinearLogits(sharded(mesh, 1), distribute_tensor(torch.zeros(6, 8), mesh, [Replicate()]))
    fastkd.kd_loss(source, source)


def no_group(mesh: Any, group: ProcessGroup) -> None:
    fastkd.kd_loss(torch.zeros(4, 8), torch.zeros(4, 8), vocab_group=mesh)


def hidden_states(mesh: Any, group: ProcessGroup) -> None:
    fastkd.hidden_loss(sharded(mesh), sharded(mesh))


REFUSED = {
    partial_logits: r"student_logits: got placement .*, must be Shard\(1\).*redistribute",
    teacher_that_lies_otherwise: r"teacher_logits: got placements .*redistribute\(placements=\[Shard\(dim=1\)\]\)",
    teacher_of_a_tensor: "teacher_logits: got a tensor with DTensors",
    student_of_a_tensor: "student_logits: got Tensor with DTensors.*from_local",
    labels_of_all_rows: "labels: got a tensor with DTensors",
    a_group_as_well: "vocab_group: got one with DTensors",
    another_mesh: "teacher_logits: got a DTensor on .*must be on student_logits'",
    rows_and_matrix_alike: "student_logits.weight: got placement .*Replicate",
    a_part_of_each_hidden_state: r"student_logits.weight: got placement .* with .*, with any of hidden's rows",
    no_group: "vocab_group: got DeviceMesh, must be a process group",
    hidden_states: "student_hidden: got a DTensor",
}


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
def test_refused(ranks: Ranks, call: Callable[[Any, ProcessGroup], Any]) -> None:
    for message in ranks.run(refused, call, size=4):
        with pytest.raises(AssertionError, match=REFUSED[call]):
            raise AssertionError(message)
