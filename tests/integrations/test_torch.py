"""KLDivLoss of logits is PyTorch's of log-probabilities."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from fastkd.integrations import torch as ours


@pytest.mark.parametrize("shape", [(6, 50), (2, 3, 50)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_idiom(shape: tuple[int, ...], temperature: float, reduction: str) -> None:
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    p, q = F.softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    expected: Any = nn.KLDivLoss(reduction=reduction)(q, p) * temperature**2
    loss = ours.KLDivLoss(reduction, temperature=temperature)(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    (grad,), (other,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_it_is_a_loss_of_pytorch() -> None:
    """And takes log-probabilities for logits, and masked tokens."""
    loss = ours.KLDivLoss()
    assert isinstance(loss, _Loss) and loss.reduction == "batchmean"
    student, teacher = torch.randn(4, 9).log_softmax(-1), torch.randn(4, 9).log_softmax(-1)
    expected = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss(student, teacher), expected)
    student[:, 3] = teacher[:, 3] = -torch.inf
    assert loss(student, teacher).isfinite()


@pytest.mark.parametrize("reduction", ["none", "average"])
def test_reductions_that_it_does_not_have(reduction: str) -> None:
    with pytest.raises(ValueError, match=f"reduction: got '{reduction}', must be"):
        ours.KLDivLoss(reduction)


def test_docstring() -> None:
    assert doctest.testmod(ours).attempted and not doctest.testmod(ours).failed
