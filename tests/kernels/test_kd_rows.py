"""What only the Triton kernels have: rows in slices, programs that walk several rows, a gradient dtype of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd._request import NUM_STATS, Rows, RowSpec
from fastkd.kernels import config, kd_rows, log_softmax
from tests import interpreter
from tests.assertions import check_call, check_gradient, same_bits
from tests.cases import STRUCTURES, inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sets the interpreter's number of processors")

SPEC = RowSpec(2.0, 0, 1.0, 0.0, 0.0, 0.1, 4990)


@pytest.fixture(autouse=True)
def rounding() -> None:
    interpreter.mend()


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(config, "INTERPRETER", config.INTERPRETER._replace(processors=request.param))


def rows_of(count: int, columns: int, dtype: torch.dtype = torch.float32) -> Rows:
    student, teacher, labels = inputs((1, count), columns, dtype)
    hard_scale, soft_scale = torch.rand(count), torch.rand(count)
    return Rows(student, teacher, (labels % SPEC.vocab_size).view(-1), hard_scale, soft_scale)


def run(rows: Rows, spec: RowSpec = SPEC, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hard, soft, stats, gradient)"""
    count = rows.student.shape[1]
    hard, soft, stats = torch.empty(count), torch.empty(count), torch.empty(count, NUM_STATS)
    grad = torch.empty_like(rows.student, dtype=dtype)
    kd_rows.kd_rows(rows, spec, hard, soft, stats, grad)
    return hard, soft, stats, grad


@pytest.mark.parametrize("processors", [8], indirect=True)
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_row_in_slices(processors: None, name: str) -> None:
    """One row, whose slices meet a label, a head, columns of −inf and padding; far from the teacher, and near."""
    student, teacher, labels = inputs((1,), 6151)
    labels[0] = 3000
    student[0, 2000:4500] = teacher[0, 3500:3600] = -torch.inf
    student[0, 3000] = 1.0
    student[0, 3500:3600] = -3.0 if name == "forward_kl" else -torch.inf
    arguments = {"backend": "triton", "divergence": name, "temperature": 2.0, "hard_weight": 0.5}
    check_call(student, teacher, labels, reduction="mean", label_smoothing=0.0, vocab_size=6000, **arguments)
    student, _, labels = inputs((1,), 6151)
    teacher = student + 1e-2 * torch.randn_like(student)
    check_call(student, teacher, labels, reduction="none", label_smoothing=0.1, **arguments)


@pytest.mark.parametrize("processors", [8], indirect=True)
def test_slices_say_the_same_every_time(processors: None) -> None:
    rows = rows_of(1, 5000)
    for first, second in zip(run(rows), run(rows), strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize("processors", [8], indirect=True)
def test_a_row_that_does_not_count_is_not_read_in_slices(processors: None) -> None:
    rows = rows_of(2, 5000)
    rows.hard_scale[0] = rows.soft_scale[0] = 0.0
    rows.student[0, 0] = torch.nan
    hard, soft, _, grad = run(rows)
    assert hard[0] == soft[0] == 0.0 and (grad[0, 0] == 0.0).all()
    assert torch.isfinite(grad).all() and (grad[0, 1, : SPEC.vocab_size] != 0.0).all()
    assert (grad[0, 1, SPEC.vocab_size :] == 0.0).all()


@pytest.mark.parametrize("processors", [1], indirect=True)
def test_a_program_walks_several_rows(processors: None) -> None:
    """Each as if it were alone."""
    rows = rows_of(5, 5000)
    rows.hard_scale[1] = rows.soft_scale[1] = 0.0
    for one, alone in zip(run(rows), zip(*(run(row_of(rows, i)) for i in range(5)), strict=True), strict=True):
        for i in (0, 2, 3, 4):
            assert same_bits(one.view(5, -1)[i], alone[i].view(-1))


def row_of(rows: Rows, i: int) -> Rows:
    return Rows(*(x[:, i : i + 1] for x in rows[:2]), *(x if x is None else x[i : i + 1] for x in rows[2:]))


@pytest.mark.parametrize("processors", [1, 8], indirect=True)
@pytest.mark.parametrize("columns", [5000, 4099])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_has_a_dtype_of_its_own(processors: None, columns: int, dtype: torch.dtype) -> None:
    """From float32 logits, rounded once; with its losses and from statistics."""
    rows = rows_of(2, columns)
    spec = SPEC._replace(vocab_size=columns, label_smoothing=0.0)
    *_, stats, wide = run(rows, spec)
    *_, narrow = run(rows, spec, dtype)
    assert narrow.dtype == dtype
    check_gradient(narrow, wide)
    again = torch.empty_like(narrow)
    kd_rows.kd_rows(rows, spec, None, None, stats, again)
    check_gradient(again, wide)


@pytest.mark.parametrize("processors", [8], indirect=True)
def test_log_softmax_in_slices(processors: None) -> None:
    x, dy = torch.randn(1, 1, 6151) * 3.0, torch.randn(1, 1, 6151)
    x[..., 2000:4500] = -torch.inf
    out, lse, dx = torch.empty_like(x), torch.empty(1, 2), torch.empty_like(x)
    log_softmax.log_softmax(x, out, lse, 2.0)
    log_softmax.log_softmax_backward(dy, x, lse, dx, 2.0)
    leaf = x.double().requires_grad_()
    expected = torch.log_softmax(leaf / 2.0, -1)
    (expected_dx,) = torch.autograd.grad(expected, leaf, dy.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    check_gradient(dx, expected_dx)
