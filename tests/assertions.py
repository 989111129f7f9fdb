"""The tolerance rule, the only one, and the comparison of a call with the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastkd
from tests import reference
from tests.cases import DIVERGENCES

# The loss is computed in float32, whatever the storage; its inputs are the rounded values of the storage.
LOSS_RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}
# Below this a loss per row is compared absolutely.
LOSS_FLOOR = {torch.float32: 1e-8, torch.float64: 1e-14}
# Norm of the error over norm of the gradient: float32's arithmetic, or the rounding of the storage.
GRAD_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}
# A gradient is a difference of probabilities; where they cancel, this is left of their rounding.
GRAD_FLOOR = {torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7, torch.float64: 1e-15}


def check_loss(actual: Tensor, expected: Tensor) -> None:
    """Entry by entry; infinities and NaN stand where the reference has them."""
    assert actual.shape == expected.shape, f"loss: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    relative, floor = LOSS_RELATIVE[actual.dtype], LOSS_FLOOR[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=floor, equal_nan=True)


def check_gradient(actual: Tensor, expected: Tensor) -> None:
    """As one vector."""
    assert actual.shape == expected.shape, f"gradient: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "gradient: not finite"
    error, norm = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    limit = GRAD_RELATIVE[actual.dtype] * norm + GRAD_FLOOR[actual.dtype]
    assert error <= limit, f"gradient: error {error:.2e} of {norm:.2e}, allowed {limit:.2e}"


def run(
    student: Tensor, teacher: Tensor, labels: Tensor | None, *, grad_output: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the package; its inputs stay as they were, bit by bit."""
    given = [tensor for tensor in (student, teacher, labels) if tensor is not None]
    before = [tensor.clone() for tensor in given]
    leaf = student.detach().requires_grad_()
    loss = fastkd.kd_loss(leaf, teacher, labels, **keywords)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad_output is None else grad_output)
    for tensor, copy in zip(given, before, strict=True):
        assert same_bits(tensor, copy), "an input was written"
    return loss.detach(), grad


def expect(
    student: Tensor, teacher: Tensor, labels: Tensor | None, *, grad_output: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the reference for the same keywords; ``divergence`` is a name of ``cases.DIVERGENCES``."""
    keywords["divergence"] = DIVERGENCES[keywords.pop("divergence", "forward_kl")].definition
    leaf = student.detach().double().requires_grad_()
    loss = reference.kd_loss(leaf, teacher, labels, **keywords).loss
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad_output is None else grad_output.double())
    return loss.detach(), grad


def check_call(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    backend: str,
    divergence: str = "forward_kl",
    **keywords: Any,
) -> None:
    """``fastkd.kd_loss`` with these arguments agrees with the reference, in value and gradient, shape and dtype."""
    argument = DIVERGENCES[divergence].argument
    loss, grad = run(student, teacher, labels, backend=backend, divergence=argument, **keywords)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert grad.dtype == student.dtype
    expected_loss, expected_grad = expect(student, teacher, labels, divergence=divergence, **keywords)
    check_loss(loss, expected_loss)
    check_gradient(grad, expected_grad)


def check_hidden_loss(
    student: Tensor, teacher: Tensor, *, backend: str, grad_output: Tensor | None = None, **keywords: Any
) -> None:
    """``fastkd.hidden_loss`` with these arguments agrees with the reference; its inputs stay as they were."""
    before = student.clone(), teacher.clone()
    leaf, exact = student.detach().requires_grad_(), student.detach().double().requires_grad_()
    loss = fastkd.hidden_loss(leaf, teacher, backend=backend, **keywords)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    grad_output = torch.ones_like(loss) if grad_output is None else grad_output
    (grad,) = torch.autograd.grad(loss, leaf, grad_output)
    assert grad.dtype == student.dtype
    expected = reference.hidden_loss(exact, teacher, **keywords)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_output.double())
    check_loss(loss.detach(), expected.detach())
    check_gradient(grad, expected_grad)
    assert same_bits(student, before[0]) and same_bits(teacher, before[1]), "an input was written"


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal, and NaN where the other is NaN."""
    return left.dtype == right.dtype and bool(((left == right) | ((left != left) & (right != right))).all())
