"""Every backend on logits of −inf, masked tokens, with 0·log 0 = 0 and the gradients that are still there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastkd
from tests.assertions import check_call, check_gradient, check_loss, expect, run
from tests.cases import DIVERGENCES, ONE_TILE, inputs, keywords

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
PATTERNS = ("student", "teacher", "both", "each", "nested")


def masked(pattern: str, columns: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """One row masked by the pattern and one that is whole."""
    student, teacher, labels = inputs((2,), columns, device=device)
    third = columns // 3
    if pattern in ("student", "each"):
        student[0, :third] = -torch.inf
    if pattern in ("teacher", "each"):
        teacher[0, 2 * third :] = -torch.inf
    if pattern == "both":
        student[0, ::2] = teacher[0, ::2] = -torch.inf
    if pattern == "nested":  # the teacher's tokens are some of the student's
        student[0, : third // 2] = teacher[0, :third] = -torch.inf
    labels[0] = third + 1
    return student, teacher, labels


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_value_and_gradient(backend: str, device: str, pattern: str, name: str) -> None:
    """As in the definitions, infinite where they are, with a finite gradient throughout."""
    given = masked(pattern, 127, device)
    check_call(*given, backend=backend, divergence=name, reduction="none", **BOTH)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("pattern", ["each", "both"])
def test_value_and_gradient_together(backend: str, device: str, pattern: str, name: str) -> None:
    """The same where loss and gradient come from one pass, in bfloat16, at another temperature."""
    student, teacher, labels = masked(pattern, 127, device)
    check_call(
        student.bfloat16(), teacher.bfloat16(), labels, backend=backend, divergence=name, reduction="mean",
        temperature=0.5, hard_weight=0.3, soft_weight=0.7,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_whole_tile(backend: str, device: str, end: str, name: str) -> None:
    """A running maximum that begins at −inf, and one that meets nothing but −inf."""
    student, teacher, labels = inputs((1,), 2 * ONE_TILE + 100, device=device)
    where = slice(0, ONE_TILE + 7) if end == "first" else slice(ONE_TILE - 7, None)
    student[:, where] = teacher[:, where] = -torch.inf
    labels[:] = ONE_TILE + 20 if end == "first" else 20
    for reduction in ("mean", "none"):
        check_call(student, teacher, labels, backend=backend, divergence=name, reduction=reduction, **BOTH)


@pytest.mark.parametrize("name", ["reverse_kl", "symmetric_kl(0.3)"])
def test_infinite_reverse_kl(backend: str, device: str, name: str) -> None:
    """The student has mass where the teacher has none: the value is +inf and the row's soft gradient exactly 0."""
    student, teacher, labels = masked("teacher", 127, device)
    for reduction in ("none", "sum"):
        arguments = {"reduction": reduction, "backend": backend, "temperature": 2.0}
        arguments["divergence"] = DIVERGENCES[name].argument
        loss, grad = run(student, teacher, None, **arguments)
        assert loss.isposinf().tolist() == ([True, False] if reduction == "none" else True)
        assert (grad[0] == 0).all()
        assert (grad[1] != 0).any()
        both = run(student, teacher, labels, hard_weight=0.3, **arguments)[1]
        check_gradient(both[:1], expect(student[:1], teacher[:1], labels[:1], hard_weight=0.3, soft_weight=0.0)[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_infinite_loss_leaves_the_other_rows(backend: str, device: str, reduction: str) -> None:
    student, teacher, labels = masked("student", 127, device)
    arguments = keywords("forward_kl") | {"reduction": reduction, "backend": backend}
    loss, grad = run(student, teacher, labels, **arguments)
    assert loss.isposinf().any()
    expected = expect(student[1:], teacher[1:], labels[1:], reduction="sum", **BOTH)[1]
    check_gradient(grad[1:], expected / (2 if reduction == "mean" else 1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_token_left(backend: str, device: str, name: str) -> None:
    """Distributions of one token each: equal in the first row, different in the second."""
    student, teacher, labels = inputs((2,), 127, device=device)
    student[:, :] = teacher[:, :] = -torch.inf
    student[:, 5] = 1.0
    teacher[0, 5] = teacher[1, 7] = -2.0
    labels[:] = 5
    check_call(student, teacher, labels, backend=backend, divergence=name, reduction="none", **BOTH)


def test_label_of_a_masked_token(backend: str, device: str) -> None:
    """An impossible label costs +inf and still has a gradient."""
    student, teacher, labels = masked("both", 127, device)
    labels[0] = 10
    check_call(student, teacher, labels, backend=backend, reduction="none", **BOTH)


def test_label_smoothing_over_masked_tokens(backend: str, device: str) -> None:
    """It asks for mass on every token, so it costs +inf."""
    given = masked("both", 127, device)
    check_call(*given, backend=backend, reduction="none", label_smoothing=0.1, **BOTH)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_term_of_weight_0(backend: str, device: str, reduction: str) -> None:
    """Likewise a teacher that is not asked for anything but its part."""
    student, teacher, labels = inputs((2,), 127, device=device)
    teacher[0, 3] = torch.nan
    arguments = {"hard_weight": 1.0, "soft_weight": 0.0, "reduction": reduction}
    leaf = student.requires_grad_()
    parts = fastkd.kd_loss(leaf, teacher, labels, return_parts=True, backend=backend, **arguments)
    assert parts.soft.isnan() and parts.hard.isfinite()
    parts.loss.sum().backward()
    check_gradient(leaf.grad, expect(student.detach(), teacher, labels, **arguments)[1])


@pytest.mark.parametrize("term", ["hard", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_infinite_term_of_weight_0(backend: str, device: str, reduction: str, term: str) -> None:
    """Computed for its part alone, it leaves the loss and its gradient as they are without it."""
    student, teacher, labels = masked("student" if term == "soft" else "both", 127, device)
    if term == "hard":
        labels[0] = 10
    weights = {"hard_weight": 0.0, "soft_weight": 1.0} if term == "hard" else {"hard_weight": 1.0, "soft_weight": 0.0}
    leaf = student.requires_grad_()
    parts = fastkd.kd_loss(leaf, teacher, labels, return_parts=True, reduction=reduction, backend=backend, **weights)
    assert getattr(parts, term).isposinf()
    loss, grad = expect(student.detach(), teacher, labels, reduction=reduction, **weights)
    check_loss(parts.loss.detach(), loss)
    parts.loss.sum().backward()
    check_gradient(leaf.grad, grad)
