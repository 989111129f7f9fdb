"""Properties of the loss that hold for any logits, searched for counterexamples."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given, strategies
from torch import Tensor

import fastkd
from fastkd import _dispatch
from tests.cases import DIVERGENCES

# The search is the same in every run. Triton's interpreter takes some 50 ms a row.
search = hypothesis.settings(
    derandomize=True, deadline=None, max_examples=40, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip

names = strategies.sampled_from(sorted(DIVERGENCES))
temperatures = strategies.sampled_from([0.5, 1.0, 1.7, 2.0, 4.0])
backends = strategies.sampled_from(
    [name for name in _dispatch.NAMES if _dispatch.refusal(torch.zeros(1, 8), name) is None]  # on CPU tensors
)


@strategies.composite
def logits(draw: Any, tensors: int = 2) -> tuple[Tensor, ...]:
    """Logits of 1 or 2 rows: from a seed, with a drawn spread, ties, and values repeated between the tensors."""
    rows, columns = draw(strategies.integers(1, 2)), draw(strategies.integers(1, 12))
    spread = draw(strategies.sampled_from([0.01, 1.0, 10.0, 50.0]))
    number = strategies.floats(-1.0, 1.0, width=16)
    values = strategies.lists(number, min_size=rows * columns, max_size=rows * columns)
    return tuple(torch.tensor(draw(values)).view(rows, columns) * spread for _ in range(tensors))


def loss_of(name: str, student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
    return fastkd.kd_loss(student, teacher, divergence=DIVERGENCES[name].argument, reduction="none", **keywords)


def gradient_of(name: str, student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss_of(name, leaf, teacher, **keywords).sum(), leaf)[0]


@search
@given(logits(), names, temperatures, backends)
def test_not_negative(pair: tuple[Tensor, Tensor], name: str, temperature: float, backend: str) -> None:
    assert (loss_of(name, *pair, temperature=temperature, backend=backend) >= 0).all()


@search
@given(logits(tensors=1), names.filter(lambda name: name != "cross_entropy"), temperatures, backends)
def test_zero_at_equality(single: tuple[Tensor], name: str, temperature: float, backend: str) -> None:
    (student,) = single
    loss = loss_of(name, student, student.clone(), temperature=temperature, backend=backend)
    assert (loss >= 0).all()
    assert (loss < 1e-6).all()


@search
@given(logits(), names, temperatures, backends)
def test_gradient_sums_to_zero(pair: tuple[Tensor, Tensor], name: str, temperature: float, backend: str) -> None:
    """Softmax does not see a shift, so the loss does not change along it."""
    labels = torch.zeros(len(pair[0]), dtype=torch.int64)
    grad = gradient_of(name, *pair, labels=labels, hard_weight=0.5, temperature=temperature, backend=backend)
    size = grad.abs().sum(-1)
    assert (grad.double().sum(-1).abs() <= 1e-5 * size + 1e-6).all()


@search
@given(logits(), names, strategies.sampled_from([-64.0, 1.0, 256.0]), backends)
def test_shift(pair: tuple[Tensor, Tensor], name: str, shift: float, backend: str) -> None:
    """Of either distribution's logits; exact in float32 for these values."""
    student, teacher = (x.mul(256).round().div(256) for x in pair)
    plain = loss_of(name, student, teacher, backend=backend)
    for shifted in ((student + shift, teacher), (student, teacher - shift)):
        torch.testing.assert_close(loss_of(name, *shifted, backend=backend), plain, rtol=3e-5, atol=1e-4)


@search
@given(logits(), names, strategies.randoms(use_true_random=False), backends)
def test_permutation_of_the_vocabulary(pair: tuple[Tensor, Tensor], name: str, random: Any, backend: str) -> None:
    """The loss does not know the tokens' order, and the gradient follows it."""
    order = list(range(pair[0].shape[-1]))
    random.shuffle(order)
    permuted = tuple(x[:, order] for x in pair)
    torch.testing.assert_close(
        loss_of(name, *permuted, backend=backend), loss_of(name, *pair, backend=backend), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        gradient_of(name, *permuted, backend=backend), gradient_of(name, *pair, backend=backend)[:, order],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


@search
@given(logits(), names, strategies.lists(strategies.floats(0.0, 8.0, width=16), min_size=2, max_size=2), backends)
def test_linear_in_the_weights(pair: tuple[Tensor, Tensor], name: str, weights: list[float], backend: str) -> None:
    """Of rows and of terms, in value and gradient."""
    labels = torch.zeros(len(pair[0]), dtype=torch.int64)
    token_weights = torch.tensor(weights)[: len(labels)]
    both: dict[str, Any] = {"labels": labels, "hard_weight": 2.0, "soft_weight": 3.0, "backend": backend}
    hard, soft = ({"labels": labels, "hard_weight": h, "soft_weight": s} for h, s in ((1.0, 0.0), (0.0, 1.0)))
    for function in (loss_of, gradient_of):
        expected = 2.0 * function(name, *pair, **hard) + 3.0 * function(name, *pair, **soft)
        scale = token_weights if function is loss_of else token_weights.unsqueeze(1)
        actual = function(name, *pair, token_weights=token_weights, **both)
        torch.testing.assert_close(actual, scale * expected, rtol=1e-4, atol=2e-5)


@search
@given(logits(), strategies.sampled_from(["forward_kl", "tvd", "jsd(0.5)"]), backends)
def test_bounds(pair: tuple[Tensor, Tensor], name: str, backend: str) -> None:
    """TVD <= 1, JSD(0.5) <= log 2, and Pinsker's inequality: TVD² <= KL/2."""
    tvd = loss_of("tvd", *pair, backend=backend)
    bound = {"tvd": torch.tensor(1.0), "jsd(0.5)": torch.tensor(2.0).log()}.get(name, torch.tensor(torch.inf))
    loss = loss_of(name, *pair, backend=backend)
    assert (loss <= bound * (1 + 1e-6)).all()
    if name == "forward_kl":
        assert (tvd**2 <= loss / 2 + 1e-6).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_temperatures(backend: str, device: str, name: str, temperature: float) -> None:
    """Near one-hot and near uniform distributions: finite, and nowhere negative."""
    student, teacher = torch.randn(2, 2, 33, device=device)
    loss = loss_of(name, student, teacher, temperature=temperature, scale_soft_by_t2=False, backend=backend)
    grad = gradient_of(name, student, teacher, temperature=temperature, scale_soft_by_t2=False, backend=backend)
    assert (loss >= 0).all()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()
