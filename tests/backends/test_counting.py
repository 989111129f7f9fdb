"""Every backend on rows that count and rows that do not: ignore_index, masks, token weights, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastkd
from tests.assertions import check_call, check_gradient, check_loss, expect, run
from tests.cases import DIVERGENCES, STRUCTURES, inputs, keywords

BOTH: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("by", ["ignore_index", "own_ignore_index", "mask", "both", "mask_without_labels"])
def test_rows_that_do_not_count(backend: str, device: str, by: str, reduction: str) -> None:
    student, teacher, labels = inputs((2, 3), 127, device=device)
    mask = torch.tensor([[True, False, True], [True, True, False]], device=device)
    extra: dict[str, Any] = {"mask": mask} if by in ("mask", "both", "mask_without_labels") else {}
    if by in ("ignore_index", "both"):
        labels[0, 0] = labels[1, 2] = -100
    if by == "own_ignore_index":
        labels[0, 0] = labels[1, 2] = 5  # a legal token, ignored all the same
        extra["ignore_index"] = 5
    if by == "mask_without_labels":
        check_call(student, teacher, backend=backend, reduction=reduction, temperature=2.0, **extra)
    else:
        check_call(student, teacher, labels, backend=backend, reduction=reduction, **extra, **BOTH)


@pytest.mark.parametrize("terms", [{"hard_weight": 0.0}, {"hard_weight": 0.5, "soft_weight": 0.0}], ids=str)
def test_ignore_index_masks_either_term(backend: str, device: str, terms: dict[str, float]) -> None:
    """With a hard weight of 0 labels only say which rows count, for the soft term."""
    student, teacher, labels = inputs((4,), 127, device=device)
    labels[1] = -100
    check_call(student, teacher, labels, backend=backend, **terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_weights(backend: str, device: str, reduction: str, dtype: torch.dtype) -> None:
    """They multiply a row's loss and leave the mean's denominator alone. 0 and negative ones too."""
    student, teacher, labels = inputs((4,), 127, device=device)
    weights = torch.tensor([0.5, 0.0, -1.0, 3.0], dtype=dtype, device=device)
    labels[3] = -100
    check_call(student, teacher, labels, token_weights=weights, backend=backend, reduction=reduction, **BOTH)


def test_weight_of_a_row_that_does_not_count(backend: str, device: str) -> None:
    """It may be NaN."""
    student, teacher, labels = inputs((2,), 127, device=device)
    mask = torch.tensor([True, False], device=device)
    weights = torch.tensor([0.5, torch.nan], device=device)
    loss, grad = run(student, teacher, labels, mask=mask, token_weights=weights, backend=backend, **BOTH)
    weights[1] = 1.0
    check_loss(loss, expect(student, teacher, labels, mask=mask, token_weights=weights, **BOTH)[0])
    assert (grad[1] == 0).all()


def test_row_that_does_not_count_has_no_gradient(backend: str, device: str) -> None:
    """Whatever comes from above: the square root of its loss of 0 has a derivative of infinity."""
    student, teacher, labels = inputs((3,), 33, device=device)
    labels[1] = -100
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, labels, hard_weight=0.5, reduction="none", backend=backend)
    loss.sqrt().sum().backward()
    assert leaf.grad is not None and not leaf.grad[1].any() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_row_that_does_not_count_is_not_read(backend: str, device: str, filling: float, name: str) -> None:
    """Whatever it holds and its label says, its loss and gradient are 0 and the other rows' are right."""
    student, teacher, labels = inputs((3,), 127, device=device)
    student[1] = teacher[1] = filling
    labels[1] = 10**9
    mask = torch.tensor([True, False, True], device=device)
    for reduction in ("mean", "none"):
        arguments = {"mask": mask, "reduction": reduction}
        loss, grad = run(student, teacher, labels, backend=backend, **arguments, **keywords(name))
        expected, expected_grad = expect(student, teacher, labels, divergence=name, **arguments, **BOTH)
        check_loss(loss, expected)
        check_gradient(grad, expected_grad)
        assert (grad[1] == 0).all()


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_shows_in_its_row(backend: str, device: str, name: str, whose: str) -> None:
    """A row that counts and holds a NaN has a NaN loss, and the others do not notice."""
    student, teacher, labels = inputs((3,), 127, device=device)
    expected, expected_grad = expect(student[:1], teacher[:1], labels[:1], reduction="none", **BOTH, divergence=name)
    spoilt = student if whose == "student" else teacher
    spoilt[1, 20] = spoilt[2, 126] = torch.nan
    loss, grad = run(student, teacher, labels, backend=backend, reduction="none", **keywords(name))
    check_loss(loss[:1], expected)
    check_gradient(grad[:1], expected_grad)
    assert loss[1:].isnan().all()


@pytest.mark.parametrize("filling", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_shows_in_the_gradient(backend: str, device: str, name: str, whose: str, filling: float) -> None:
    """Where a loss scaler looks for it: a gradient of numbers would be a step. +inf is what float16 overflows to."""
    student, teacher, _ = inputs((2,), 127, device=device)
    (student if whose == "student" else teacher)[1, 20] = filling
    for reduction in ("none", "sum"):
        loss, grad = run(
            student, teacher, None, backend=backend, divergence=DIVERGENCES[name].argument, reduction=reduction
        )
        assert loss.sum().isnan()
        assert grad[0].isfinite().all() and grad[1].isnan().all()


@pytest.mark.parametrize("column", [0, 5, 126])
def test_nan_shows_in_the_hard_term(backend: str, device: str, column: int) -> None:
    student, teacher, _ = inputs((1,), 127, device=device)
    student[0, column] = torch.nan
    for label in (5, 6):
        labels = torch.tensor([label], device=device)
        loss, _ = run(student, teacher, labels, hard_weight=1.0, soft_weight=0.0, backend=backend)
        assert loss.isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("by", ["labels", "mask"])
def test_no_row_counts(backend: str, device: str, by: str, reduction: str) -> None:
    """Loss 0 with a graph, gradient 0, though every row holds NaN."""
    student, teacher, labels = inputs((3,), 127, device=device)
    student[:], teacher[:] = torch.nan, torch.nan
    labels[:] = -100 if by == "labels" else 3
    mask = None if by == "labels" else torch.zeros(3, dtype=torch.bool, device=device)
    student.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, labels, mask=mask, backend=backend, reduction=reduction, **BOTH)
    assert loss.requires_grad
    loss.sum().backward()
    assert (loss == 0).all()
    assert (student.grad == 0).all()


def test_no_row_counts_and_no_items(backend: str, device: str) -> None:
    """An empty step of a gradient accumulation."""
    student, teacher, labels = inputs((2,), 127, device=device)
    labels[:] = -100
    items = torch.tensor(0, device=device)
    loss, grad = run(student, teacher, labels, num_items=items, backend=backend, **BOTH)
    assert loss == 0
    assert (grad == 0).all()


def test_parts_of_no_row(backend: str, device: str) -> None:
    student, teacher, labels = inputs((2,), 127, device=device)
    labels[:] = -100
    parts = fastkd.kd_loss(student, teacher, labels, return_parts=True, backend=backend, **BOTH)
    assert [part.item() for part in parts] == [0.0, 0.0, 0.0]
