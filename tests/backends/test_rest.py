"""Every backend that has it on the rest of a row, the columns that a sparse teacher does not list, and on its gradient.

The reference is by hand in float64: the row operation of fastkd._dispatch.Backend, from its definition.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import _dispatch
from fastkd._request import LOG_HARD, NUM_STATS, PEAK_STUDENT, PEAK_TEACHER, Rows, RowSpec
from tests.assertions import check_gradient, check_loss
from tests.cases import DTYPES, SIZES, offset, padded_rows, without_last

Case = tuple[Rows, RowSpec, Tensor, Tensor]


@pytest.fixture
def chosen(backend: str, device: str) -> Any:
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), backend, None, "rest_rows"):
        pytest.skip(why)
    return _dispatch.backend(backend)


def case(
    student: Tensor, k: int, *, temperature: float = 2.0, smoothing: float = 0.0, terms: str = "hard z", n: int = 0
) -> Case:
    """K listed columns a row, of which the first row lacks the last; labels in a row inside and in the next outside."""
    n = n or student.shape[-1]
    count, device = student.shape[0] * student.shape[1], student.device
    order = torch.stack([torch.randperm(n, device=device) for _ in range(count)])
    listed = order[:, :k].int().contiguous()
    labels = torch.where(torch.arange(count, device=device) % 2 == 0, order[:, 0], order[:, -1])
    if k > 1:
        listed[0, -1] = -1
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    hard_scale, soft_scale, z_scale = (torch.rand(count, device=device, dtype=dtype) + 0.5 for _ in range(3))
    has_hard = "hard" in terms
    rows = Rows(
        student, None, labels if has_hard else None, hard_scale if has_hard else None, soft_scale,
        z_scale * 0.05 if "z" in terms else None,
    )  # fmt: skip
    spec = RowSpec(temperature, 0, 1.0, 0.0, 0.0, smoothing, n)
    return rows, spec, listed, torch.randn(count, k + 1, device=device, dtype=dtype)


def by_hand(given: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(hard [N], the rest's log Σ exp(z/T) [N], gradient [N, V]) in float64, by autograd."""
    rows, spec, listed, outcome_grad = given
    columns = rows.student.shape[-1]
    z = rows.student.double().reshape(-1, columns).requires_grad_()
    dead = torch.stack([s == 0 for s in (rows.hard_scale, rows.soft_scale, rows.z_scale) if s is not None]).all(0)
    hards, rests, totals = [], [], []
    for i in range(len(z)):
        if dead[i]:
            hards.append(0.0), rests.append(0.0)
            continue
        row, some = z[i, : spec.vocab_size], [j for j in listed[i].tolist() if j >= 0]
        others = [j for j in range(spec.vocab_size) if j not in set(some)]
        total = z.new_zeros(())
        log_p = torch.log_softmax(row, -1)
        hard = z.new_zeros(())
        if rows.labels is not None and rows.hard_scale is not None:
            e = spec.label_smoothing
            hard = -(1 - e) * log_p[rows.labels[i]] - (e * log_p.mean() if e else 0.0)
            total = total + rows.hard_scale[i].double() * hard
        if rows.z_scale is not None:
            total = total + rows.z_scale[i].double() * torch.logsumexp(row, -1) ** 2
        rest = z.new_full((), -math.inf)
        if others and (row[others] > -math.inf).any():
            peak = row[others].max().detach()  # far from 0 a logarithm of the sum has no digits for the gradient
            rest = torch.logsumexp((row[others] - peak) / spec.temperature, -1) + peak / spec.temperature
            total = total + outcome_grad[i, -1].double() * rest
        for at, j in enumerate(listed[i].tolist()):
            if j >= 0:
                total = total + outcome_grad[i, at].double() * row[j] / spec.temperature
        hards.append(hard.item()), rests.append(rest.item()), totals.append(total)
    (grad,) = torch.autograd.grad(torch.stack(totals).sum(), z)
    return z.new_tensor(hards), z.new_tensor(rests), grad


def check(chosen: Any, given: Case, grad: Tensor | None = None) -> Tensor:
    """Values and gradient; the latter into ``grad``, or memory of its own. The inputs stay as they were."""
    rows, spec, listed, outcome_grad = given
    expected_hard, expected_rest, expected_grad = by_hand(given)
    before = rows.student.clone()
    dtype = outcome_grad.dtype
    hard, rest = (torch.empty(len(listed), dtype=dtype, device=listed.device) for _ in range(2))
    stats = hard.new_empty(len(listed), NUM_STATS)
    chosen.rest_rows(rows, spec, listed, hard, rest, stats)
    check_loss(hard, expected_hard)
    counts = rows.soft_scale != 0
    for scale in (rows.hard_scale, rows.z_scale):
        counts = counts if scale is None else counts | (scale != 0)
    assert (rest[~counts] == 0).all()
    peak = stats[:, PEAK_TEACHER].double()
    check_loss((rest + peak / spec.temperature)[counts].to(dtype), expected_rest[counts])
    assert (peak[counts & (expected_rest == -math.inf)] == 0).all()
    z = rows.student.reshape(-1, rows.student.shape[-1])[:, : spec.vocab_size].double()
    if rows.z_scale is not None:
        lse = (stats[:, PEAK_STUDENT] + stats[:, LOG_HARD])[counts]
        check_loss(lse, torch.logsumexp(z, -1)[counts])
    assert torch.equal(before.nan_to_num(), rows.student.nan_to_num()), "the logits were written"
    if grad is None:
        grad = torch.empty_like(rows.student)
    chosen.rest_grad(rows, spec, listed, outcome_grad, stats, grad)
    check_gradient(grad.reshape(expected_grad.shape), expected_grad)
    assert not grad[..., spec.vocab_size :].any()
    return grad


def logits(rows: tuple[int, int], columns: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3.0 * torch.randn(*rows, columns, device=device)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", ["", "hard", "z", "hard z"])
def test_terms(chosen: Any, device: str, terms: str, dtype: torch.dtype) -> None:
    student = logits((1, 2), 300, device, dtype)
    if why := chosen.unsupported(student, None):
        pytest.skip(why)
    check(chosen, case(student, 5, terms=terms))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 1.7, 0.5])
def test_temperature(chosen: Any, device: str, temperature: float) -> None:
    check(chosen, case(logits((1, 2), 300, device), 5, temperature=temperature, smoothing=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.0])
def test_a_rest_of_the_smallest_float(chosen: Any, device: str, temperature: float, dtype: torch.dtype) -> None:
    """As padding is masked; the rest is of nothing else then, and its exponents overflow by themselves."""
    given = case(logits((1, 2), 300, device, dtype), 5, temperature=temperature, terms="z")
    student, listed = given[0].student, given[2].long()
    kept = student[0].gather(-1, listed.clamp(min=0))
    student.fill_(torch.finfo(dtype).min)[0].scatter_(-1, listed.clamp(min=0), kept)
    check(chosen, given)


@pytest.mark.parametrize("columns", SIZES)
def test_size(chosen: Any, device: str, columns: int) -> None:
    """One listed column, all of them (nothing is left: a rest of −inf), and some."""
    for k in {1, min(columns, 64), min(columns, 1024)}:
        check(chosen, case(logits((1, 2), columns, device), k))


def test_all_columns(chosen: Any, device: str) -> None:
    """Of a row none is left, of another one: a rest of −inf, and of one column."""
    given = case(logits((1, 2), 300, device), 300, n=300)
    check(chosen, given)
    given = case(logits((1, 1), 2057, device), 2050, n=2050)  # its last is padding
    check(chosen, given)


def test_one_row(chosen: Any, device: str) -> None:
    """Which may be split; its parts hold labels, columns of −inf, and padding. Twice the same, to the bit."""
    student = logits((1, 1), 10007, device)
    student[..., 2000:6500] = -math.inf
    given = rows, _, listed, outcome_grad = case(student, 200, smoothing=0.0, n=9001)
    of_minus_inf = student.flatten()[listed.clamp(min=0).long()].isinf()
    outcome_grad[:, :-1].masked_fill_(of_minus_inf, 0.0)
    for label in (0, 9000, int(listed[0, 0])):
        rows.student[0, 0, label] = 1.0
        rows.labels[0] = label
        assert torch.equal(check(chosen, given), check(chosen, given))


def test_no_columns(chosen: Any, device: str) -> None:
    """Padding alone: the rest is all there is."""
    rows, spec, listed, outcome_grad = case(logits((1, 2), 300, device), 3)
    check(chosen, (rows, spec, listed.fill_(-1), outcome_grad))


def test_minus_inf(chosen: Any, device: str) -> None:
    """Listed, unlisted, and all that is left: the gradient there is 0."""
    for masked in ("listed", "some", "rest"):
        rows, spec, listed, outcome_grad = case(logits((1, 2), 300, device), 5)
        row, some = rows.student[0, 1], listed[1].long()
        if masked == "listed":
            row[some[1]] = -math.inf
            outcome_grad[1, 1] = 0.0
        elif masked == "some":
            row[:100] = -math.inf
            outcome_grad[1, :-1][some < 100] = 0.0
        else:
            kept = row[some].clone()
            row.fill_(-math.inf)
            row[some] = kept
        rows.labels[1] = some[0]
        row[some[0]] = 1.0
        check(chosen, (rows, spec, listed, outcome_grad))


def test_digits_of_a_small_rest(chosen: Any, device: str) -> None:
    """Far below the listed columns, where what is relative to these would be 0; and far from 0."""
    for below, shift in ((20.0, 0.0), (300.0, 0.0), (5.0, 1e4)):
        rows, spec, listed, outcome_grad = case(logits((1, 2), 300, device), 5, terms="hard", temperature=1.0)
        rows.student.sub_(below).scatter_add_(-1, listed.clamp(min=0).long()[None], torch.full_like(
            listed[None], 1, dtype=torch.float32) * below).add_(shift)  # fmt: skip
        check(chosen, (rows, spec, listed, outcome_grad))


def test_rows_that_do_not_count(chosen: Any, device: str) -> None:
    """They may hold NaN; a row may count for either term alone."""
    rows, spec, listed, outcome_grad = case(logits((1, 4), 300, device), 5)
    for scale in (rows.hard_scale, rows.soft_scale, rows.z_scale):
        scale[1] = 0.0
    rows.hard_scale[2] = rows.z_scale[2] = 0.0
    rows.soft_scale[3] = 0.0
    outcome_grad[1] = math.nan
    rows.student[0, 1] = math.nan
    grad = check(chosen, (rows, spec, listed, outcome_grad))
    assert not grad[0, 1].any()


def test_padding_columns(chosen: Any, device: str) -> None:
    student = logits((1, 2), 2100, device)
    student[..., 2049:] = math.nan
    check(chosen, case(student, 64, n=2049))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_dtype_of_its_own(chosen: Any, device: str, dtype: torch.dtype) -> None:
    """float32 logits, a half-precision gradient."""
    student = logits((1, 2), 2057, device)
    check(chosen, case(student, 64), torch.empty_like(student, dtype=dtype))


@pytest.mark.parametrize("layout", [without_last, padded_rows, lambda z: offset(z, 3)], ids=["rows", "padded", "base"])
def test_layouts(chosen: Any, device: str, layout: Any) -> None:
    student = layout(logits((2, 2), 1027, device))
    check(chosen, case(student, 17), torch.empty(2, 2, 1027, device=device))


def test_over_the_logits(chosen: Any, device: str) -> None:
    """The gradient may be written over them."""
    for dtype in (torch.float32, torch.bfloat16):
        rows, spec, listed, outcome_grad = case(logits((1, 2), 2057, device, dtype), 64)
        expected = check(chosen, (rows, spec, listed, outcome_grad))
        hard, rest = torch.empty(2, device=device), torch.empty(2, device=device)
        stats = torch.empty(2, NUM_STATS, device=device)
        chosen.rest_rows(rows, spec, listed, hard, rest, stats)
        chosen.rest_grad(rows, spec, listed, outcome_grad, stats, rows.student)
        assert torch.equal(rows.student, expected)
