"""The CUDA kernels' source, run on a CPU under the SIMT shim, against float64."""

from __future__ import annotations

import itertools
import math
import subprocess
from pathlib import Path

import pytest
import torch

from fastkd._request import LOG_HARD, NUM_STATS, PEAK_STUDENT, Formula, Rows, RowSpec
from fastkd.backends import torch as reference
from fastkd.divergences import JSD, NAMED, Divergence, SkewKL, SkewReverseKL, SymmetricKL
from tests.csrc.simt import Grid, Outputs, Simt, build

MEMBERS = (*NAMED.values(), JSD(0.3), SkewKL(0.1), SkewReverseKL(0.2), SymmetricKL())
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRIDS = [Grid(cluster, True) for cluster in (1, 2, 4)] + [Grid(parts, False) for parts in (1, 2, 3, 7)]
# One where a cluster keeps the row, one where its parts stream it.
BOTH_WAYS = [Grid(2, True), Grid(3, False)]


def spec_of(member: Divergence, temperature: float, vocab_size: int, smoothing: float = 0.0) -> RowSpec:
    return RowSpec(temperature, int(member.formula), member.c_t, member.c_s, member.w, smoothing, vocab_size)


def outputs_for(rows: Rows, grad: bool) -> Outputs:
    count = rows.student.shape[0] * rows.student.shape[1]
    vectors = {name: torch.full((count,), math.nan) for name in ("hard", "soft")}
    stats = torch.full((count, NUM_STATS), math.nan)
    return {**vectors, "stats": stats, "dz": torch.full_like(rows.student, math.nan) if grad else None}


def check(
    simt: Simt,
    rows: Rows,
    spec: RowSpec,
    grid: Grid,
    gradient: torch.dtype | None = None,
    offset: int = 0,
    tolerance: float | None = None,
) -> None:
    """Loss and gradient, in two orders, loss alone, and the gradient from its statistics.

    The gradient has a dtype of its own, and begins off a boundary.
    """
    exact = Rows(*(t.double() if t is not None and t.is_floating_point() else t for t in rows))
    count = rows.student.shape[0] * rows.student.shape[1]
    hard, soft = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    dz = torch.zeros_like(exact.student)
    exact_stats = torch.zeros(count, NUM_STATS, dtype=torch.float64)
    reference.kd_rows(exact, spec, hard, soft, exact_stats, dz)

    gradient = gradient or rows.student.dtype

    def nans() -> torch.Tensor:
        memory = torch.full((rows.student.numel() + offset,), math.nan, dtype=gradient)
        return memory[offset:].view(rows.student.shape)

    fused, again = ({**outputs_for(rows, grad=False), "dz": nans()} for _ in range(2))
    loss = outputs_for(rows, grad=False)
    simt.kd_rows(rows, spec, fused, grid)
    simt.kd_rows(rows, spec, again, grid, seed=1)
    simt.kd_rows(rows, spec, loss, grid, seed=2)
    for name in ("hard", "soft", "dz"):
        assert torch.equal(fused[name], again[name])
    later = {"hard": None, "soft": None, "stats": loss["stats"], "dz": nans()}
    simt.kd_rows(rows, spec, later, Grid(grid.cluster, False))
    for result in (fused, loss):
        torch.testing.assert_close(result["hard"].double(), hard, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(result["soft"].double(), soft, rtol=1e-5, atol=1e-7)
        if rows.z_scale is not None:
            lse, exact_lse = (s[:, PEAK_STUDENT] + s[:, LOG_HARD] for s in (result["stats"].double(), exact_stats))
            torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-6)
    for result in (fused, later):
        error = (result["dz"].double() - dz).norm() / dz.norm().clamp_min(1e-12)
        assert error <= (tolerance or GRADIENT[gradient])


def make_rows(vocab: int, dtype: torch.dtype, hard: bool = True, soft: bool = True, offset: int = 0) -> Rows:
    """Two rows; ``offset`` elements off the allocation, so that they start off a 16-byte boundary."""
    torch.manual_seed(vocab)

    def logits() -> torch.Tensor:
        memory = (torch.randn(2 * vocab + offset) * 3).to(dtype)
        return memory[offset:].view(1, 2, vocab)

    labels = torch.tensor([0, vocab // 2])
    scales = torch.tensor([0.5, 0.25])
    return Rows(
        logits(),
        logits() if soft else None,
        labels if hard else None,
        scales if hard else None,
        scales if soft else None,
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_divergences_on_every_grid(simt: Simt, member: Divergence, grid: Grid) -> None:
    check(simt, make_rows(1003, torch.bfloat16), spec_of(member, 2.0, 1003), grid)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 1.7])
@pytest.mark.parametrize(("hard", "soft"), [(True, True), (False, True), (True, False), (False, False)])
def test_z_loss(simt: Simt, hard: bool, soft: bool, temperature: float, grid: Grid) -> None:
    """Beside either term or alone; whatever the temperature of the soft term."""
    rows = make_rows(1003, torch.float32, hard=hard, soft=soft)._replace(z_scale=torch.tensor([0.05, -0.5]))
    check(simt, rows, spec_of(NAMED["forward_kl"], temperature, 1003), grid)
    check(simt, rows, spec_of(JSD(0.5), temperature, 1001)._replace(label_smoothing=0.1), grid)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize(("vocab", "offset"), [(1, 0), (7, 3), (64, 0), (1000, 0), (1000, 1), (1001, 5)])
def test_sizes_and_alignments(simt: Simt, vocab: int, offset: int, dtype: torch.dtype, grid: Grid) -> None:
    check(simt, make_rows(vocab, dtype, offset=offset), spec_of(JSD(0.5), 1.0, vocab), grid)


def off(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy whose rows begin ``offset`` elements off a 16-byte boundary."""
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    memory[offset:] = tensor.flatten()
    return memory[offset:].view(tensor.shape)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("offsets", [(0, 1, 2), (3, 3, 0), (1, 0, 1), (5, 6, 7)])
def test_rows_off_by_different_amounts(
    simt: Simt, offsets: tuple[int, int, int], dtype: torch.dtype, grid: Grid
) -> None:
    rows = make_rows(1001, dtype)
    student, teacher, gradient = offsets
    rows = rows._replace(student=off(rows.student, student), teacher=off(rows.teacher, teacher))
    check(simt, rows, spec_of(NAMED["forward_kl"], 2.0, 1001), grid, offset=gradient)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize(
    ("student", "teacher", "gradient"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_dtypes_of_their_own(
    simt: Simt, student: torch.dtype, teacher: torch.dtype, gradient: torch.dtype, grid: Grid
) -> None:
    rows = make_rows(777, torch.float32)
    rows = rows._replace(student=rows.student.to(student), teacher=off(rows.teacher.to(teacher), 3))
    check(simt, rows, spec_of(JSD(0.3), 2.0, 777), grid, gradient)


def test_any_number_of_clusters_gives_the_same_to_the_bit(simt: Simt) -> None:
    """Rows of different alignment, some of which do not count, walked over by one cluster or by many."""
    torch.manual_seed(0)
    student, teacher = ((torch.randn(1, 7, 501) * 3).to(torch.bfloat16) for _ in range(2))
    scales = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5])
    rows = Rows(student, teacher, torch.tensor([0, 498, 7, 0, -100, 250, 0]), scales, scales)
    results = []
    for clusters in (1, 2, 3, 7):
        outputs = outputs_for(rows, grad=True)
        simt.kd_rows(rows, spec_of(JSD(0.5), 2.0, 499), outputs, Grid(2, True, clusters=clusters))
        assert not any(outputs[name].isnan().any() for name in ("hard", "soft", "dz"))
        results.append([outputs[name] for name in ("hard", "soft", "dz")])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("hard", "soft"), [(True, False), (False, True), (True, True)])
def test_terms_temperatures_smoothing_and_padding(
    simt: Simt, temperature: float, hard: bool, soft: bool, grid: Grid
) -> None:
    rows = make_rows(300, torch.float32, hard, soft)
    check(simt, rows, spec_of(NAMED["forward_kl"], temperature, 297, smoothing=0.1), grid)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_far_from_0(simt: Simt, member: Divergence, temperature: float, grid: Grid) -> None:
    rows = make_rows(500, torch.float32)
    rows.student.add_(1e4)
    rows.teacher.add_(1e4)
    check(simt, rows, spec_of(member, temperature, 500, smoothing=0.1), grid)


# Size of the logits, noise of the teacher about the student (None: logits of its own), its offset (< 0: the student's).
REGIMES = [(1, None, 0), (8, None, 0), (3, 0.1, 0), (3, 1e-2, 0)]
REGIMES += [(2, 0.5, offset) for offset in (100, 1e3, 1e4, -100, -1e3, -1e4)]


@pytest.mark.parametrize(("size", "noise", "offset"), REGIMES)
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_digits(simt: Simt, member: Divergence, size: float, noise: float | None, offset: float) -> None:
    rows = make_rows(1500, torch.float32, hard=False)
    rows.student.mul_(size / 3)
    if noise is None:
        rows.teacher.mul_(size / 3)
    else:
        rows.teacher.copy_(rows.student + noise * torch.randn_like(rows.student) + max(offset, 0))
        rows.student.add_(min(offset, 0))
    spec = spec_of(member, 1.0, 1500)
    check(simt, rows, spec, Grid(2, True), tolerance=max(1e-5, error_of_plain_pytorch(rows, spec)))


def error_of_plain_pytorch(rows: Rows, spec: RowSpec) -> float:
    """Of the soft gradient by autograd, in float32: the definition, as one would write it."""

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        z = rows.student.to(dtype).requires_grad_()
        a, b = (rows.teacher.to(dtype) / spec.temperature).log_softmax(-1), (z / spec.temperature).log_softmax(-1)
        if spec.formula == Formula.TOTAL_VARIATION:
            value = (a.exp() - b.exp()).abs().sum(-1) / 2
        elif spec.formula == Formula.CROSS_ENTROPY:
            value = -(a.exp() * b).sum(-1)
        else:
            value = sum(mixture(part, a, b) for part in spec.summands)
        (value.flatten() * rows.soft_scale.to(dtype)).sum().backward()
        return z.grad

    exact = gradient(torch.float64)
    return float((gradient(torch.float32) - exact).norm() / exact.norm())


def mixture(spec: RowSpec, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # w is 0 or 1 where the mixture is one of the two.
    log_w, log_v = (math.log(w) if w else -math.inf for w in (spec.w, 1 - spec.w))
    log_m = torch.logaddexp(a + log_w, b + log_v)
    return (spec.c_t * a.exp() * (a - log_m) + spec.c_s * b.exp() * (b - log_m)).sum(-1)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
def test_a_sum_that_overflows_is_taken_again(simt: Simt, grid: Grid) -> None:
    """finfo.min in the student alone: the value is representable, a sum of terms that are not normalised is not."""
    rows = make_rows(300, torch.float32, hard=False)
    rows.student[..., :4] = torch.finfo(torch.float32).min
    rows.teacher[..., :4] = 8.0
    check(simt, rows, spec_of(NAMED["forward_kl"], 1.0, 300), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stretches_of_the_smallest_float(simt: Simt, dtype: torch.dtype, temperature: float, grid: Grid) -> None:
    """Padding, as whole warps and as the first vectors of a thread: its own exponents, over T, overflow."""
    rows = make_rows(9000, dtype)
    for logits in (rows.student, rows.teacher):
        logits[0, 0, 2500:], logits[0, 1, :4000] = torch.finfo(dtype).min, torch.finfo(dtype).min
    check(simt, rows, spec_of(JSD(0.3), temperature, 9000), grid)
    check(simt, rows, spec_of(NAMED["forward_kl"], temperature, 9000), grid)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("member", [m for m in MEMBERS if m.name != "cross_entropy"], ids=lambda member: member.name)
def test_near_convergence(simt: Simt, member: Divergence, grid: Grid) -> None:
    rows = make_rows(1500, torch.float32, hard=False)
    rows.teacher.copy_(rows.student + 1e-3 * torch.randn_like(rows.student))
    exact = Rows(*(None if t is None else t.double() for t in rows))
    spec, expected, outputs = spec_of(member, 1.0, 1500), torch.empty(2).double(), outputs_for(rows, grad=True)
    reference.kd_rows(exact, spec, torch.empty(2).double(), expected, torch.empty(2, NUM_STATS).double(), None)
    simt.kd_rows(rows, spec, outputs, grid)
    assert (outputs["soft"] >= 0).all()
    torch.testing.assert_close(outputs["soft"].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
def test_a_row_that_does_not_count_is_not_read(simt: Simt, grid: Grid) -> None:
    rows = make_rows(500, torch.float32)
    rows.student[0, 0], rows.teacher[0, 0] = math.nan, math.nan
    rows.hard_scale[0] = rows.soft_scale[0] = 0.0
    outputs = outputs_for(rows, grad=True)
    simt.kd_rows(rows, spec_of(NAMED["reverse_kl"], 2.0, 500), outputs, grid)
    assert outputs["hard"][0] == 0 and outputs["soft"][0] == 0 and not outputs["dz"][0, 0].any()
    assert outputs["dz"][0, 1].isfinite().all()


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_minus_infinity(simt: Simt, member: Divergence, grid: Grid) -> None:
    rows = make_rows(200, torch.float32)
    rows.student[..., 10:20] = -math.inf
    rows.teacher[..., 15:25] = -math.inf
    outputs = outputs_for(rows, grad=True)
    simt.kd_rows(rows, spec_of(member, 2.0, 200), outputs, grid)
    assert outputs["dz"].isfinite().all()
    infinite = member.name in ("forward_kl", "reverse_kl", "cross_entropy", "symmetric_kl")
    assert outputs["soft"].isposinf().all() if infinite else outputs["soft"].isfinite().all()


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("filling", [math.nan, math.inf], ids=str)
def test_a_nan_is_of_its_row_alone(simt: Simt, filling: float, whose: str, member: Divergence, grid: Grid) -> None:
    rows = make_rows(500, torch.float32)
    (rows.student if whose == "student" else rows.teacher)[0, 0, 490] = filling
    outputs = outputs_for(rows, grad=True)
    simt.kd_rows(rows, spec_of(member, 2.0, 500), outputs, grid)
    assert outputs["soft"].isnan().tolist() == [True, False]
    assert outputs["dz"][0, 0].isnan().all()
    assert outputs["dz"][0, 1].isfinite().all()


@pytest.mark.parametrize("member", [NAMED["forward_kl"], NAMED["tvd"], JSD(0.5)], ids=lambda member: member.name)
def test_any_order_of_the_parts_gives_the_same_to_the_bit(simt: Simt, member: Divergence) -> None:
    """Rows near convergence too, which are walked over again and again."""
    rows = make_rows(501, torch.bfloat16)
    rows.teacher[0, 0] = rows.student[0, 0]
    results = []
    for seed in range(8):
        outputs = outputs_for(rows, grad=True)
        simt.kd_rows(rows, spec_of(member, 2.0, 501), outputs, Grid(7, False), seed)
        results.append([outputs[name] for name in ("hard", "soft", "dz")])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("grid", BOTH_WAYS, ids=str)
def test_in_place_is_the_same_to_the_bit(simt: Simt, grid: Grid) -> None:
    rows = make_rows(777, torch.bfloat16)
    spec = spec_of(SkewKL(0.1), 2.0, 777)
    outputs = outputs_for(rows, grad=True)
    simt.kd_rows(rows, spec, outputs, grid)
    simt.kd_rows(rows, spec, {**outputs_for(rows, grad=False), "dz": rows.student}, grid)
    assert torch.equal(rows.student, outputs["dz"])


@pytest.mark.parametrize("grid", [Grid(1, False), Grid(3, False), Grid(1, True), Grid(4, True)], ids=str)
@pytest.mark.parametrize(("dtype", "other"), list(itertools.product(GRADIENT, repeat=2)), ids=str)
def test_log_softmax(simt: Simt, dtype: torch.dtype, other: torch.dtype, grid: Grid) -> None:
    x = make_rows(501, dtype, offset=1).student
    dy = torch.randn(1, 2, 501).to(other)
    out, dx, lse = torch.empty_like(x, dtype=other), torch.empty_like(x), torch.empty(2, 2)
    simt.log_softmax(x, out, None, lse, 2.0, grid)
    simt.log_softmax(x, dx, dy, lse, 2.0, grid)
    exact = x.double().requires_grad_()
    expected = torch.log_softmax(exact / 2.0, -1)
    expected.backward(dy.double())
    assert (out.double() - expected).norm() <= GRADIENT[other] * expected.norm()
    assert (dx.double() - exact.grad).norm() <= GRADIENT[dtype] * exact.grad.norm()


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
def test_scale(simt: Simt, dtype: torch.dtype) -> None:
    x = make_rows(333, dtype, offset=3).student
    before = x.clone()
    simt.scale_(x, torch.tensor(1.0))
    assert torch.equal(x, before)
    simt.scale_(x, torch.tensor(0.3))
    torch.testing.assert_close(x, (before.float() * torch.tensor(0.3)).to(dtype), rtol=0, atol=0)


def test_more_than_a_warp_of_warps(simt: Simt) -> None:
    check(simt, make_rows(20011, torch.bfloat16), spec_of(JSD(0.5), 2.0, 20011), Grid(8, True, threads=256))


# Orders to run in: in one alone the thread sanitizer sees what nothing orders.
@pytest.mark.parametrize(("sanitizer", "orders"), [("thread", 1), ("address,alignment", 3)])
def test_sanitizers(sanitizer: str, orders: int, folder: Path) -> None:
    flags = ("-DSIMT_FEW", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    program = build(folder, "simt_main.cpp", f"simt_main_{sanitizer}", *flags)
    run = subprocess.run([str(program), str(orders)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
