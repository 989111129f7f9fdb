"""The divergences as data: names, numbers, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import fastkd
from fastkd import divergences
from fastkd._request import Formula
from tests.cases import DIVERGENCES


@pytest.mark.parametrize("name", divergences.NAMED)
def test_every_name_is_in_the_grid(name: str) -> None:
    """A new name is judged by the shared tests, or this fails."""
    assert name in DIVERGENCES
    assert divergences.resolve(name).name == name


@pytest.mark.parametrize("formula", Formula)
def test_every_formula_is_in_the_grid(formula: Formula) -> None:
    assert formula in {divergences.resolve(member.argument).formula for member in DIVERGENCES.values()}


def test_a_divergence_of_ones_own_is_one_line() -> None:
    mine = fastkd.Divergence("mine", c_t=0.3, c_s=0.7, w=0.25)
    assert divergences.resolve(mine) is mine
    student, teacher = torch.randn(2, 3, 9)
    assert fastkd.kd_loss(student, teacher, divergence=mine) > 0


@pytest.mark.parametrize(
    ("beta", "name"), [(0, "forward_kl"), (0.0, "forward_kl"), (1, "reverse_kl"), (1.0, "reverse_kl")]
)
def test_jsd_at_its_ends(beta: float, name: str) -> None:
    """Forward and reverse KL, not the formula's limits, which are 0."""
    assert fastkd.JSD(beta) is divergences.NAMED[name]


def test_jsd_weighs_the_teacher() -> None:
    """beta → 0: D/beta → KL(p_t‖p_s); beta → 1: D/(1−beta) → KL(p_s‖p_t)."""
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    for beta, scale, name in ((1e-7, 1e-7, "forward_kl"), (1 - 1e-7, 1e-7, "reverse_kl")):
        limit = fastkd.kd_loss(student, teacher, divergence=fastkd.JSD(beta)) / scale
        torch.testing.assert_close(limit, fastkd.kd_loss(student, teacher, divergence=name), rtol=1e-5, atol=0.0)


def test_symmetric_kl_at_its_ends() -> None:
    assert fastkd.SymmetricKL(1) is divergences.FORWARD_KL and fastkd.SymmetricKL(0.0) is divergences.REVERSE_KL


def test_symmetric_kl_is_both_directions() -> None:
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    student.requires_grad_()
    forward, reverse, both = (
        fastkd.kd_loss(student, teacher, temperature=2.0, divergence=member)
        for member in ("forward_kl", "reverse_kl", fastkd.SymmetricKL(0.3))
    )
    torch.testing.assert_close(both, 0.3 * forward + 0.7 * reverse)
    grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (both, 0.3 * forward + 0.7 * reverse)]
    torch.testing.assert_close(*grads)


def test_skew_at_zero() -> None:
    """Without skew, forward and reverse KL."""
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    for skewed, name in ((fastkd.SkewKL(0.0), "forward_kl"), (fastkd.SkewReverseKL(0.0), "reverse_kl")):
        both = (fastkd.kd_loss(student, teacher, divergence=member) for member in (skewed, name))
        torch.testing.assert_close(*both)


@pytest.mark.parametrize(
    ("make", "argument", "value"),
    [
        (make, name, value)
        for make, name in ((fastkd.JSD, "beta"), (fastkd.SymmetricKL, "forward"))
        for value in (-0.1, 1.1, math.nan, math.inf)
    ]
    + [
        (make, "lam", value)
        for make in (fastkd.SkewKL, fastkd.SkewReverseKL)
        for value in (-0.1, 1.0, 1, 2.0, math.nan)
    ],
)
def test_parameter_out_of_range(make: Any, argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: got {value}, must be in \[0, 1"):
        make(value)


@pytest.mark.parametrize(
    "numbers",
    [
        {"c_t": 0.0, "c_s": 0.0},
        {"c_t": 0.0, "c_s": 1.0, "w": 0.0},  # KL(p_s‖p_s)
        {"c_t": 1.0, "c_s": 0.0, "w": 1.0},  # KL(p_t‖p_t)
    ],
    ids=str,
)
def test_zero_everywhere(numbers: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^c_t, c_s, w: got .*: this divergence is 0 everywhere"):
        fastkd.Divergence("degenerate", **numbers)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("argument", ["c_t", "c_s"])
def test_bad_coefficient(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"^c_t, c_s: got .*, must be finite and >= 0"):
        fastkd.Divergence("bad", **{argument: value, "w": 0.5})


def test_not_a_number() -> None:
    for make, argument in ((fastkd.JSD, "beta"), (fastkd.SkewKL, "lam"), (fastkd.SkewReverseKL, "lam"),
                           (fastkd.SymmetricKL, "forward")):  # fmt: skip
        with pytest.raises(TypeError, match=f"^{argument}: got NoneType, must be a number"):
            make(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^c_t: got str, must be a number"):
        fastkd.Divergence("bad", c_t="1")  # type: ignore[arg-type]


def test_bad_formula() -> None:
    with pytest.raises(ValueError, match="7 is not a valid Formula"):
        fastkd.Divergence("bad", formula=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^formula: got .*TOTAL_VARIATION.* with c_t, which it does not have"):
        fastkd.Divergence("bad", c_t=3.0, formula=Formula.TOTAL_VARIATION)
    with pytest.raises(ValueError, match=r"^formula: got .*SYMMETRIC_KL.* with w"):
        fastkd.Divergence("bad", c_s=1.0, w=0.5, formula=Formula.SYMMETRIC_KL)
    with pytest.raises(ValueError, match=r"^c_t, c_s: got 1.0, 0.0, must be > 0"):
        fastkd.Divergence("bad", formula=Formula.SYMMETRIC_KL)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_bad_mixture_weight(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^w: got {value}, must be in \[0, 1\]"):
        fastkd.Divergence("bad", w=value)


def test_coefficients_that_do_not_count() -> None:
    """At w = 0 KL(p_s‖m) is 0 and at w = 1 KL(p_t‖m) is, whatever their coefficients."""
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    for numbers, name in (
        ({"c_t": 2.0, "c_s": 5.0, "w": 0.0}, "forward_kl"),
        ({"c_t": 5.0, "c_s": 2.0, "w": 1.0}, "reverse_kl"),
    ):
        student.requires_grad_()
        mine = fastkd.kd_loss(student, teacher, divergence=fastkd.Divergence("mine", **numbers))
        named = 2.0 * fastkd.kd_loss(student, teacher, divergence=name)
        torch.testing.assert_close(mine, named)
        grads = [torch.autograd.grad(loss, student)[0] for loss in (mine, named)]
        torch.testing.assert_close(*grads)


def test_frozen_and_hashable() -> None:
    assert fastkd.JSD(0.3) == fastkd.JSD(0.3)
    assert len({fastkd.JSD(0.3), fastkd.JSD(0.3), fastkd.JSD(0.4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        fastkd.JSD(0.3).w = 0.5  # type: ignore[misc]
