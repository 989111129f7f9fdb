"""Every backend on slices of the vocabulary: the state of a slice, its sums, and its gradient from merged statistics.

The reference is by hand in float64: what the whole row gives, from the definitions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import _dispatch, divergences
from fastkd._request import (
    ELSEWHERE,
    GRAD_FORM,
    GRAD_SUM,
    LABEL_REST,
    LOG_HARD,
    LOG_RATIO,
    LOG_STUDENT,
    NUM_STATS,
    PEAK_STUDENT,
    PEAK_TEACHER,
    Formula,
    Mix,
    Rows,
    RowSpec,
)
from tests import reference
from tests.assertions import check_gradient, check_loss
from tests.cases import DIVERGENCES, DTYPES, STRUCTURES, inputs

# Where the columns are cut: rows of a slice begin anywhere.
COLUMNS = 300
CUTS = {1: (0, 300), 2: (0, 101, 300), 3: (0, 1, 180, 300), 4: (0, 75, 150, 225, 300)}
# Each divergence in one number of slices, and one in each: what slices do has nothing to do with which it is.
NUMBERS = [*((name, 3) for name in DIVERGENCES), *(("jsd(0.5)", slices) for slices in (1, 2, 4))]
LABELS = (0, 180, 299, 100, 101)


def spec_of(name: str, columns: int = COLUMNS, temperature: float = 2.0, smoothing: float = 0.0) -> RowSpec:
    member = divergences.resolve(DIVERGENCES[name].argument)
    return RowSpec(temperature, int(member.formula), member.c_t, member.c_s, member.w, smoothing, columns)


SUMMED = tuple(name for name in DIVERGENCES if spec_of(name).formula != Formula.CROSS_ENTROPY)


@pytest.fixture
def chosen(backend: str) -> Any:
    return _dispatch.backend(backend)


def make(device: str, dtype: torch.dtype = torch.float32, near: bool = False, terms: str = "hard soft z") -> Rows:
    student, teacher, _ = inputs((1, len(LABELS)), COLUMNS, dtype, device=device)
    if near:
        teacher = (student + 1e-3 * torch.randn_like(student)).to(dtype)
    scale = torch.float64 if dtype == torch.float64 else torch.float32
    hard, soft, z = (torch.rand(len(LABELS), device=device, dtype=scale) + 0.5 for _ in range(3))
    has_hard, has_soft = "hard" in terms, "soft" in terms
    return Rows(
        student, teacher if has_soft else None, torch.tensor(LABELS, device=device) if has_hard else None,
        hard if has_hard else None, soft if has_soft else None, 0.05 * z if "z" in terms else None,
    )  # fmt: skip


def cut(rows: Rows, spec: RowSpec, first: int, end: int) -> tuple[Rows, RowSpec]:
    """A slice, as it is all that a rank has. Label smoothing asks for the mass that its columns are of all."""
    teacher = None if rows.teacher is None else rows.teacher[..., first:end]
    labels = rows.labels
    if labels is not None:
        labels = torch.where((labels >= first) & (labels < end), labels - first, ELSEWHERE)
    share = (end - first) / spec.vocab_size
    of_slice = spec._replace(vocab_size=end - first, label_smoothing=spec.label_smoothing * share)
    return rows._replace(student=rows.student[..., first:end], teacher=teacher, labels=labels), of_slice


def outputs(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(hard, soft, stats), to be filled."""
    dtype = torch.float64 if rows.student.dtype == torch.float64 else torch.float32
    hard, soft = (torch.empty(len(LABELS), dtype=dtype, device=rows.student.device) for _ in range(2))
    return hard, soft, hard.new_empty(len(LABELS), NUM_STATS)


def whole(chosen: Any, rows: Rows, spec: RowSpec) -> Tensor:
    """The statistics of the row, by the backend."""
    hard, soft, stats = outputs(rows)
    chosen.kd_rows(rows, spec, hard, soft, stats, None)
    return stats


def expected_grad(rows: Rows, spec: RowSpec, name: str) -> Tensor:
    z = rows.student.double().reshape(-1, spec.vocab_size).requires_grad_()
    total = z.new_zeros(())
    if rows.hard_scale is not None:
        total = total + (rows.hard_scale * reference.hard_loss(z, rows.labels, spec.label_smoothing)).sum()
    if rows.soft_scale is not None:
        u = rows.teacher.double().reshape_as(z)
        log_t, log_s = ((x / spec.temperature).log_softmax(-1) for x in (u, z))
        total = total + (rows.soft_scale * DIVERGENCES[name].definition(log_t, log_s)).sum()
    if rows.z_scale is not None:
        total = total + (rows.z_scale * torch.logsumexp(z, -1) ** 2).sum()
    (grad,) = torch.autograd.grad(total, z)
    return grad


def check_slices(chosen: Any, rows: Rows, spec: RowSpec, name: str, stats: Tensor, slices: int) -> None:
    """The gradients of slices, each from the row's statistics and its own columns, are the row's gradient."""
    grad = torch.full_like(rows.student, math.nan)
    for first, end in zip(CUTS[slices], CUTS[slices][1:], strict=False):
        some, of_slice = cut(rows, spec, first, end)
        given = stats.clone()
        if spec.label_smoothing:  # the label's own share is of the whole: rest − ε is that of the row
            factor = rows.hard_scale
            if rows.z_scale is not None:
                factor = factor + 2.0 * rows.z_scale * (stats[:, PEAK_STUDENT] + stats[:, LOG_HARD])
            missing = spec.label_smoothing - of_slice.label_smoothing
            given[:, LABEL_REST] -= missing * rows.hard_scale / factor
        chosen.kd_grad(some, of_slice, given, grad[..., first:end])
    check_gradient(grad.reshape(-1, spec.vocab_size), expected_grad(rows, spec, name))


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize(("name", "slices"), NUMBERS)
def test_gradient(chosen: Any, device: str, name: str, near: bool, slices: int) -> None:
    rows, spec = make(device, near=near), spec_of(name)
    check_slices(chosen, rows, spec, name, whole(chosen, rows, spec), slices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", ["hard", "z", "hard z", "soft", "hard soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_terms(chosen: Any, device: str, smoothing: float, terms: str, dtype: torch.dtype) -> None:
    rows, spec = make(device, dtype, terms=terms), spec_of("jsd(0.5)", smoothing=smoothing if "hard" in terms else 0.0)
    if why := chosen.unsupported(rows.student, rows.teacher):
        pytest.skip(why)
    check_slices(chosen, rows, spec, "jsd(0.5)", whole(chosen, rows, spec), 2)


@pytest.mark.parametrize("temperature", [1.0, 1.7, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_at_temperature(chosen: Any, device: str, smoothing: float, temperature: float) -> None:
    rows, spec = make(device), spec_of("forward_kl", temperature=temperature, smoothing=smoothing)
    check_slices(chosen, rows, spec, "forward_kl", whole(chosen, rows, spec), 3)


def normalised(rows: Rows, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """(log p_t, log p_s) of the row."""
    of = (x.double().reshape(-1, spec.vocab_size) / spec.temperature for x in (rows.teacher, rows.student))
    log_t, log_s = (x.log_softmax(-1) for x in of)
    return log_t, log_s


def normalisers(rows: Rows, spec: RowSpec) -> Tensor:
    """The row's statistics that stage 2 reads, and no others."""
    logs = []
    stats = torch.full_like(outputs(rows)[2], math.nan)
    for logits, peak in ((rows.student, PEAK_STUDENT), (rows.teacher, PEAK_TEACHER)):
        x = logits.double().reshape(-1, spec.vocab_size)
        stats[:, peak] = x.amax(-1)
        logs.append(((x - x.amax(-1, keepdim=True)) / spec.temperature).logsumexp(-1))
    stats[:, LOG_STUDENT], stats[:, LOG_RATIO] = logs[0], logs[1] - logs[0]
    return stats


def sums_of_slices(chosen: Any, rows: Rows, spec: RowSpec, stats: Tensor, slices: int) -> Tensor:
    total = torch.zeros(len(stats), 4, dtype=torch.float64, device=stats.device)
    for first, end in zip(CUTS[slices], CUTS[slices][1:], strict=False):
        sums = torch.full((len(stats), 4), math.nan, dtype=stats.dtype, device=stats.device)
        chosen.slice_sums(*cut(rows, spec, first, end), stats, sums)
        total += sums
    return total


def taken(sums: Tensor, spec: RowSpec, near: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(S, G, the form of g) from a row's sums."""
    if spec.formula == Formula.TOTAL_VARIATION:
        value, g, excess, other = sums.unbind(-1)
        is_other = g > -other
        return value + 0.5 * excess * (g + other), torch.where(is_other, other, g), is_other.double()
    value, g = sums[:, 2 * near : 2 * near + 2].unbind(-1)
    return value, g, torch.full_like(g, float(near))


def grad_sums(spec: RowSpec, log_t: Tensor, log_s: Tensor, near: bool) -> tuple[Tensor, Tensor]:
    """(G, Σ abs(g)) from the definition of g in either form (csrc/divergence.h)."""
    p_t, p_s = log_t.exp(), log_s.exp()
    c_t, c_s, w = spec.c_t, spec.c_s, spec.w
    if spec.formula == Formula.TOTAL_VARIATION:
        above, below = p_s * (p_s > p_t), -p_s * (p_s < p_t)
        less = above.sum(-1, keepdim=True) <= -below.sum(-1, keepdim=True)
        g = torch.where(less, above, below)
    elif spec.mix == Mix.TEACHER:
        g = -c_s * p_s * (log_t - log_s)
    else:
        m, kappa = w * p_t + (1.0 - w) * p_s, c_s * w - c_t * (1.0 - w)
        if near:
            g = p_s * (kappa * (p_t / m - 1.0) - c_s * torch.log1p(w * torch.expm1(log_t - log_s)))
        else:
            g = p_s * (kappa * p_t / m - c_s * torch.log1p(w / (1.0 - w) * (log_t - log_s).exp()))
    return g.sum(-1), g.abs().sum(-1)


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize(("name", "slices"), [number for number in NUMBERS if number[0] in SUMMED])
def test_sums(chosen: Any, device: str, name: str, near: bool, slices: int) -> None:
    """S and G, and the gradient that comes of them, which no form of g is right for unless its G is."""
    rows, spec = make(device, near=near), spec_of(name)
    stats = normalisers(rows, spec)
    value, g, form = taken(sums_of_slices(chosen, rows, spec, stats, slices), spec, near)
    log_t, log_s = normalised(rows, spec)
    torch.testing.assert_close(value, DIVERGENCES[name].definition(log_t, log_s), rtol=1e-5, atol=0.0)
    if spec.formula in (Formula.MIXTURE_KL, Formula.TOTAL_VARIATION):  # of others each backend has forms of its own
        expected_g, size = grad_sums(spec, log_t, log_s, near)
        assert ((g - expected_g).abs() <= 1e-5 * size).all()
    of_row = whole(chosen, rows, spec)
    stats = torch.where(stats.isnan(), of_row, stats)
    stats[:, GRAD_SUM], stats[:, GRAD_FORM] = g, form
    check_slices(chosen, rows, spec, name, stats, slices)


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("name", [name for name in SUMMED if spec_of(name).mix == Mix.BOTH or "symmetric" in name])
def test_sums_where_mass_moves_from_slice_to_slice(chosen: Any, device: str, name: str, direction: float) -> None:
    """Terms are >= 0: what a slice has and another has not would pass for the mark of a row that is far."""
    rows, spec = make(device), spec_of(name)
    rows.student.mul_(0.1)
    rows.teacher.copy_(rows.student)[..., :101].add_(direction * 0.8)
    sums = sums_of_slices(chosen, rows, spec, normalisers(rows, spec), 2)
    expected = DIVERGENCES[name].definition(*normalised(rows, spec))
    assert (sums[:, 0] < spec.near_below).all()
    torch.testing.assert_close(taken(sums, spec, True)[0], expected, rtol=1e-5, atol=0.0)


def test_total_variation_without_the_error_of_its_ratio(chosen: Any, device: str) -> None:
    """It feels an error of LOG_RATIO itself, which its third sum shows."""
    rows, spec = make(device, near=True), spec_of("tvd")
    stats = normalisers(rows, spec)
    stats[:, LOG_RATIO] += 3e-7
    sums = sums_of_slices(chosen, rows, spec, stats, 3)
    torch.testing.assert_close(sums[:, 2], torch.full_like(sums[:, 2], -3e-7), rtol=0.2, atol=0.0)
    expected = DIVERGENCES["tvd"].definition(*normalised(rows, spec))
    torch.testing.assert_close(taken(sums, spec, True)[0], expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sums_of_dtypes(chosen: Any, device: str, temperature: float, dtype: torch.dtype) -> None:
    rows, spec = make(device, dtype), spec_of("mine", temperature=temperature)
    if why := chosen.unsupported(rows.student, rows.teacher):
        pytest.skip(why)
    value, g, _ = taken(sums_of_slices(chosen, rows, spec, normalisers(rows, spec), 2), spec, False)
    log_t, log_s = normalised(rows, spec)
    torch.testing.assert_close(value, DIVERGENCES["mine"].definition(log_t, log_s), rtol=1e-5, atol=0.0)
    expected_g, size = grad_sums(spec, log_t, log_s, False)
    assert ((g - expected_g).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("name", SUMMED)
def test_sums_over_minus_inf(chosen: Any, device: str, name: str) -> None:
    """On one side, the other and both; of all of a slice on either."""
    rows, spec = make(device), spec_of(name)
    student, teacher = rows.student[0], rows.teacher[0]
    student[0, :75] = teacher[0, 75:150] = -math.inf
    student[1, ::2] = teacher[1, ::2] = -math.inf
    student[2, :75] = teacher[2, :75] = -math.inf
    teacher[3, 60:90] = -math.inf
    value, _, _ = taken(sums_of_slices(chosen, rows, spec, normalisers(rows, spec), 4), spec, False)
    torch.testing.assert_close(value, DIVERGENCES[name].definition(*normalised(rows, spec)), rtol=1e-5, atol=0.0)


def test_sums_of_rows_that_do_not_count(chosen: Any, device: str) -> None:
    """Nothing of them is read, not their statistics; the hard term does not make a row count."""
    rows, spec = make(device), spec_of("jsd(0.5)")
    stats = normalisers(rows, spec)
    rows.student[0, 1] = rows.teacher[0, 1] = stats[1] = math.nan
    rows.soft_scale[1] = 0.0
    sums = sums_of_slices(chosen, rows, spec, stats, 2)
    assert (sums[1] == 0.0).all() and sums.isfinite().all() and (sums[0] != 0.0).all()


def test_sums_of_one_row(chosen: Any, device: str) -> None:
    """Which may be split; columns past the vocabulary are not read. Twice the same, to the bit."""
    student, teacher, _ = inputs((1, 1), 10007, device=device)
    rows = Rows(student, teacher, None, None, torch.ones(1, device=device))
    spec = spec_of("jsd(0.1)", 9001)
    of_tokens = rows._replace(student=student[..., :9001], teacher=teacher[..., :9001])
    stats = normalisers(of_tokens, spec)
    student[..., 9001:] = teacher[..., 9001:] = math.nan
    sums, again = (torch.empty(1, 4, device=device) for _ in range(2))
    chosen.slice_sums(rows, spec, stats, sums)
    chosen.slice_sums(rows, spec, stats, again)
    assert torch.equal(sums, again)
    expected = DIVERGENCES["jsd(0.1)"].definition(*normalised(of_tokens, spec))
    torch.testing.assert_close(sums[:, 0].double(), expected, rtol=1e-5, atol=0.0)


def logs(stats: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(lse of z, of z/T and of u/T) from a slice's statistics."""
    stats = stats.double()
    log_s = stats[:, LOG_STUDENT]
    log_t = stats[:, LOG_RATIO] + torch.where(log_s == -math.inf, 0.0, log_s)
    of_z, of_u = stats[:, PEAK_STUDENT], stats[:, PEAK_TEACHER]
    return of_z + stats[:, LOG_HARD], of_z / temperature + log_s, of_u / temperature + log_t


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "slices"), [number for number in NUMBERS if number[0] in STRUCTURES])
def test_state(chosen: Any, device: str, name: str, slices: int, masked: bool) -> None:
    """The statistics of slices merge to those of the row, one of −inf alone among them; hard is the owner's."""
    rows, spec = make(device), spec_of(name)
    if masked:
        rows.student[0, 1:3, :101] = rows.teacher[0, 2:4, :101] = rows.teacher[0, 4, 225:] = -math.inf
    z, u = (x.double().reshape(-1, COLUMNS) for x in (rows.student, rows.teacher))
    merged, hard, rest = [], torch.zeros(len(LABELS), dtype=torch.float64, device=device), []
    for first, end in zip(CUTS[slices], CUTS[slices][1:], strict=False):
        some, of_slice = cut(rows, spec, first, end)
        hards, soft, stats = outputs(some)
        chosen.kd_rows(some, of_slice, hards, soft, stats, None)
        is_here = some.labels != ELSEWHERE
        assert hards.isfinite().all() and (soft[: masked or None].isfinite()).all()
        lses = logs(stats, spec.temperature)
        for lse, x, by in zip(lses, (z, z, u), (1.0, spec.temperature, spec.temperature), strict=True):
            check_loss(lse.float(), torch.logsumexp(x[:, first:end] / by, -1))
        merged.append(lses[0])
        hard += torch.where(is_here, hards.double() - lses[0], 0.0)
        rest.append(torch.where(is_here, stats[:, LABEL_REST].double(), 0.0))
    lse = torch.stack(merged).logsumexp(0)
    check_loss((hard + lse).float(), reference.hard_loss(z, rows.labels, 0.0))
    own = sum(of_slice * mass.exp() for of_slice, mass in zip(rest, (m - lse for m in merged), strict=True))
    others = sum(
        torch.where((rows.labels >= first) & (rows.labels < end), 0.0, (mass - lse).exp())
        for mass, first, end in zip(merged, CUTS[slices], CUTS[slices][1:], strict=False)
    )
    check_loss((own + others).float(), 1.0 - z.softmax(-1).gather(1, rows.labels.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_over_minus_inf(chosen: Any, device: str, name: str) -> None:
    """A slice of −inf alone, on either side, and some columns."""
    rows, spec = make(device), spec_of(name)
    student, teacher = rows.student[0], rows.teacher[0]
    student[1, :101] = teacher[2, :101] = -math.inf
    student[3, ::3] = teacher[3, ::3] = student[3, 101] = -math.inf
    student[3, 100] = student[4, 101] = 1.0
    check_slices(chosen, rows, spec, name, whole(chosen, rows, spec), 2)


def test_label_of_a_masked_slice(chosen: Any, device: str) -> None:
    """All of the owner's slice is −inf: so is its normaliser, which no NaN of the label's gets into."""
    rows, spec = make(device), spec_of("forward_kl")
    rows.student[0, 0, :101] = -math.inf
    some, of_slice = cut(rows, spec, 0, 101)
    hard, soft, stats = outputs(some)
    chosen.kd_rows(some, of_slice, hard, soft, stats, None)
    assert stats[0, LOG_HARD] == -math.inf and stats[0, PEAK_STUDENT] == 0.0


def test_rest(chosen: Any, device: str) -> None:
    """Of a sparse teacher's rest: the label elsewhere adds nothing, to the gradient neither."""
    rows = make(device, terms="hard z")._replace(soft_scale=torch.ones(len(LABELS), device=device))
    spec = spec_of("forward_kl", smoothing=0.1)
    rows.labels.fill_(ELSEWHERE)
    listed = torch.tensor([[3, 200, -1]], device=device, dtype=torch.int32).repeat(len(LABELS), 1)
    hard, rest, stats = outputs(rows)
    stats.zero_()
    chosen.rest_rows(rows, spec, listed, hard, rest, stats)
    z = rows.student.double().reshape(-1, COLUMNS).requires_grad_()
    assert hard.isfinite().all()
    lse = torch.logsumexp(z, -1)
    check_loss(stats[:, PEAK_STUDENT] + stats[:, LOG_HARD], lse.detach())
    grad, outcome_grad = torch.empty_like(rows.student), torch.zeros(len(LABELS), 4, device=device)
    chosen.rest_grad(rows, spec, listed, outcome_grad, stats, grad)
    total = (rows.hard_scale * (lse - spec.label_smoothing * z.mean(-1)) + rows.z_scale * lse**2).sum()
    check_gradient(grad.reshape(-1, COLUMNS), torch.autograd.grad(total, z)[0])
