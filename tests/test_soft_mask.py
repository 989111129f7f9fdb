"""Rows of their own for each term: labels and mask say which the hard term counts, soft_mask which the soft term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from tests import reference
from tests.assertions import check_call, check_gradient, check_loss, expect, run
from tests.cases import DIVERGENCES, STRUCTURES, inputs, keywords
from tests.test_functional import record_operators

BOTH: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
# Both terms, the hard one, the soft one, neither: by labels and mask, and by soft_mask.
LABELLED = [True, True, False, False, True]
MASK = [True, True, True, True, False]
SOFT = [True, False, True, False, True]


def rows(device: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """student, teacher, labels; and the keywords mask, soft_mask"""
    student, teacher, labels = inputs((5,), 127, dtype, device=device)
    labels[~torch.tensor(LABELLED, device=device)] = -100
    masks = {"mask": torch.tensor(MASK, device=device), "soft_mask": torch.tensor(SOFT, device=device)}
    return (student, teacher, labels), masks


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_each_term_has_rows_of_its_own(backend: str, device: str, name: str, reduction: str) -> None:
    """Value and gradient, over the definition."""
    given, masks = rows(device)
    check_call(*given, backend=backend, divergence=name, reduction=reduction, **masks, **BOTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_storage(backend: str, device: str, dtype: torch.dtype) -> None:
    """Also where the gradient waits for backward."""
    given, masks = rows(device, dtype=dtype)
    check_call(*given, backend=backend, label_smoothing=0.1, **masks, **BOTH)


@pytest.mark.parametrize("weights", [{"hard_weight": 0.0}, {"hard_weight": 0.5, "soft_weight": 0.0}], ids=str)
def test_one_term_alone(backend: str, device: str, weights: dict[str, float]) -> None:
    given, masks = rows(device)
    check_call(*given, backend=backend, **masks, **weights)


def test_two_calls_in_one() -> None:
    """Masked-language-model distillation: the masked tokens' cross-entropy, and every token's divergence."""
    student, teacher, labels = inputs((2, 3), 17)
    labels[:, 1:] = -100
    attention = torch.tensor([[True, True, True], [True, True, False]])
    once = run(student, teacher, labels, hard_weight=0.5, soft_weight=2.0, soft_mask=attention, temperature=2.0)
    hard = run(student, teacher, labels, hard_weight=0.5, soft_weight=0.0)
    soft = run(student, teacher, None, soft_weight=2.0, mask=attention, temperature=2.0)
    for one, *two in zip(once, hard, soft, strict=True):
        torch.testing.assert_close(one, sum(two), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_term_that_does_not_count_a_row_is_not_in_it(backend: str, device: str, reduction: str) -> None:
    """Though that term is infinite there: a label's logit of −inf, teacher's mass where the student has none."""
    (student, teacher, labels), masks = rows(device)
    student[1, 3] = student[2, 0] = -torch.inf  # the hard term alone counts row 1, the soft term alone row 2
    teacher[2, 0] = -torch.inf
    arguments = {"reduction": reduction, **masks, **BOTH}
    assert run(student, teacher, labels, backend=backend, **arguments)[0].isfinite().all()
    check_call(student, teacher, labels, backend=backend, **arguments)
    labels[2] = 10**9  # ignored by the mask
    masks["mask"][2] = False
    loss, grad = run(student, teacher, labels, backend=backend, **arguments)
    labels[2] = -100
    expected, expected_grad = expect(student, teacher, labels, **arguments)
    check_loss(loss, expected)
    check_gradient(grad, expected_grad)


def test_a_row_that_neither_term_counts_is_not_read(backend: str, device: str) -> None:
    (student, teacher, labels), masks = rows(device)
    student[3] = teacher[3] = torch.nan
    loss, grad = run(student, teacher, labels, backend=backend, **masks, **BOTH)
    expected, expected_grad = expect(student, teacher, labels, **masks, **BOTH)
    check_loss(loss, expected)
    check_gradient(grad, expected_grad)
    assert (grad[3] == 0).all()


@pytest.mark.parametrize("counted", ["hard", "soft", "none"])
def test_a_term_that_counts_no_row_is_0(backend: str, device: str, counted: str) -> None:
    (student, teacher, labels), masks = rows(device)
    if counted != "hard":
        labels[:] = -100
    if counted != "soft":
        masks["soft_mask"][:] = False
    check_call(student, teacher, labels, backend=backend, **masks, **BOTH)


@pytest.mark.parametrize("items", [(7, 11), (0, 3), (2.5, torch.tensor([[4]]))], ids=str)
def test_num_items_is_a_pair(device: str, items: Any) -> None:
    """The denominators of the two means; 0 makes a mean 0."""
    given, masks = rows(device)
    loss, grad = run(*given, num_items=items, **masks, **BOTH)
    weights = {**BOTH, "hard_weight": 0.0} if items[0] == 0 else BOTH
    expected, expected_grad = expect(*given, num_items=items, **masks, **weights)
    check_loss(loss, expected)
    check_gradient(grad, expected_grad)


def test_token_weights_weigh_both_terms(backend: str, device: str) -> None:
    given, masks = rows(device)
    weights = torch.tensor([0.5, -1.0, 3.0, torch.nan, 0.0], device=device)
    loss, grad = run(*given, token_weights=weights, backend=backend, **masks, **BOTH)
    weights[3] = 1.0
    expected, expected_grad = expect(*given, token_weights=weights, **masks, **BOTH)
    check_loss(loss, expected)
    check_gradient(grad, expected_grad)


@pytest.mark.parametrize("weights", [{}, {"hard_weight": 0.0}, {"soft_weight": 0.0}], ids=str)
def test_parts_are_means_over_their_own_rows(device: str, weights: dict[str, float]) -> None:
    given, masks = rows(device)
    arguments = {**BOTH, **weights, **masks}
    parts = fastkd.kd_loss(*given, return_parts=True, **arguments)
    arguments["divergence"] = DIVERGENCES["forward_kl"].definition
    for actual, expected in zip(parts, reference.kd_loss(*given, **arguments), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-8)


def test_without_labels_it_is_the_mask(device: str) -> None:
    (student, teacher, _), masks = rows(device)
    soft_mask = masks["soft_mask"]
    left, right = (
        run(student, teacher, None, num_items=6, temperature=2.0, **mask)
        for mask in ({"mask": soft_mask}, {"soft_mask": soft_mask})
    )
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(backend: str, device: str, reduction: str) -> None:
    given, masks = rows(device)
    grads = []
    for inplace in (False, True):
        leaf = given[0].clone().requires_grad_()
        arguments = keywords("jsd(0.5)") | masks
        arguments |= {"reduction": reduction, "inplace_backward": inplace, "backend": backend}
        loss = fastkd.kd_loss(leaf * 1, *given[1:], **arguments)
        loss.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_one_pass(device: str) -> None:
    """One call of the row operation, one gradient."""
    given, masks = rows(device)
    leaf = given[0].requires_grad_()
    calls = record_operators(lambda: fastkd.kd_loss(leaf, *given[1:], **masks, **BOTH).backward())
    assert {name: len(arguments) for name, arguments in calls.items()} == {"fastkd::kd_rows": 1}
