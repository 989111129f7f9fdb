"""Every backend on the z-loss, weight·lse(student)² a row at temperature 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastkd
from tests import reference
from tests.assertions import check_call, check_gradient, check_loss
from tests.backends.test_rows import skip_unsupported
from tests.cases import DTYPES, STRUCTURES, inputs

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "z_loss_weight": 0.05}
ALONE = {"hard_weight": 0.0, "soft_weight": 0.0, "z_loss_weight": 0.3}


@pytest.mark.parametrize("columns", [1, 127, 2057])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_with_both_terms(backend: str, device: str, reduction: str, columns: int) -> None:
    for name in STRUCTURES:
        check_call(*inputs((2,), columns, device=device), backend=backend, divergence=name, reduction=reduction, **BOTH)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 1.7])
def test_temperature_is_not_its_own(backend: str, device: str, temperature: float) -> None:
    """Its normaliser is at temperature 1, whether or not there are labels."""
    given = inputs((2,), 127, device=device)
    keywords = BOTH | {"temperature": temperature, "label_smoothing": 0.1}
    check_call(*given, backend=backend, **keywords)
    for reduction in ("sum", "none"):
        check_call(*given[:2], backend=backend, temperature=temperature, z_loss_weight=0.2, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    """Neither of the other terms; labels say which rows count."""
    skip_unsupported(backend, device, dtype)
    student, teacher, labels = inputs((3,), 300, dtype, device=device)
    labels[1] = -100
    student[1] = teacher[1] = torch.nan
    for reduction in ("mean", "none"):
        check_call(student, teacher, labels, backend=backend, reduction=reduction, **ALONE)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_its_rows(backend: str, device: str, reduction: str, labelled: bool) -> None:
    """Those of the cross-entropy, or without labels of the divergence; so are weights and num_items."""
    student, teacher, labels = inputs((6,), 127, device=device)
    labels[0] = -100
    mask, soft_mask = torch.tensor([1, 1, 0, 1, 1, 0]) == 1, torch.tensor([0, 1, 1, 1, 0, 0]) == 1
    keywords: dict[str, Any] = BOTH | {"reduction": reduction, "token_weights": torch.rand(6, device=device)}
    if not labelled:
        keywords["hard_weight"] = None
    given = (student, teacher, labels if labelled else None)
    check_call(*given, backend=backend, mask=mask.to(device), **keywords)
    keywords["num_items"] = None if reduction == "none" else (7, 5) if labelled else 3
    if labelled:
        check_call(*given, backend=backend, mask=mask.to(device), soft_mask=soft_mask.to(device), **keywords)
    else:
        check_call(*given, backend=backend, mask=soft_mask.to(device), **keywords)


def test_far_from_zero(backend: str, device: str) -> None:
    """Where the normaliser is large: what the term is there for."""
    student, teacher, labels = inputs((3,), 300, device=device)
    check_call(student + 200.0, teacher, labels, backend=backend, **BOTH)


def test_padding_columns_and_a_confident_row(backend: str, device: str) -> None:
    student, teacher, labels = inputs((2,), 140, device=device)
    student[:, 127:] = torch.nan
    labels %= 127
    student[0, labels[0]] = 40.0
    for reduction in ("mean", "none"):
        check_call(student, teacher, labels, vocab_size=127, backend=backend, reduction=reduction, **BOTH)


def test_parts(backend: str, device: str) -> None:
    """It is in the loss, and in neither part."""
    student, teacher, labels = inputs((4,), 127, device=device)
    student.requires_grad_()
    parts = fastkd.kd_loss(student, teacher, labels, return_parts=True, backend=backend, **BOTH)
    expected = reference.kd_loss(student, teacher, labels, **BOTH)
    for part, expected_part in zip(parts, expected, strict=True):
        check_loss(part.detach(), expected_part.detach())
    check_gradient(*(torch.autograd.grad(loss, student)[0] for loss in (parts.loss, expected.loss)))


def test_in_place(backend: str, device: str) -> None:
    leaf, teacher, labels = inputs((2,), 127, device=device)
    leaf.requires_grad_()
    for reduction in ("mean", "none"):
        grads = []
        for inplace in (False, True):
            loss = fastkd.kd_loss(
                leaf * 1, teacher, labels, inplace_backward=inplace, reduction=reduction, backend=backend, **BOTH
            )
            grads.append(torch.autograd.grad(loss.sum(), leaf)[0])
        assert torch.equal(*grads)
