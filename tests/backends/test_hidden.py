"""Every backend's loss of hidden states over the grid, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import _dispatch
from fastkd._request import HiddenKind
from tests.assertions import check_gradient, check_hidden_loss, check_loss, same_bits
from tests.backends.test_backward import GRAD_OUTPUTS
from tests.cases import DTYPE_PAIRS, DTYPES, LAYOUTS, offset, padded_rows

KINDS = ("mse", "cosine")
# One, less than a vector load, a tile and one column more, BERT's, an odd one of several tiles, and the widest.
WIDTHS = (1, 7, 128, 129, 768, 4099, 16384)

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def has_it(request: pytest.FixtureRequest, device: str) -> None:
    """A backend may lack the operation (tests/test_hidden.py says which)."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "torch"
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), name, None, "hidden_rows"):
        pytest.skip(why)


def states(
    rows: tuple[int, ...],
    width: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A student's some way from its teacher's."""
    teacher = torch.randn(*rows, width) * 3
    student = teacher + torch.randn(*rows, width)
    return student.to(device, dtype), teacher.to(device, dtype if teacher_dtype is None else teacher_dtype)


def skip_unsupported(backend: str, device: str, *dtypes: torch.dtype) -> None:
    student, *teacher = (torch.zeros(1, 1, dtype=dtype, device=device) for dtype in dtypes)
    if why := _dispatch.refusal(student, backend, *teacher):
        pytest.skip(why)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("width", WIDTHS)
def test_width(backend: str, device: str, kind: str, width: int, reduction: str) -> None:
    check_hidden_loss(*states((3,), width, device=device), kind=kind, reduction=reduction, backend=backend)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(backend: str, device: str, kind: str, dtype: torch.dtype, reduction: str) -> None:
    skip_unsupported(backend, device, dtype)
    check_hidden_loss(*states((3,), 771, dtype, device=device), kind=kind, reduction=reduction, backend=backend)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_two_dtypes(backend: str, device: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    skip_unsupported(backend, device, *dtypes)
    scaled = torch.tensor(1024.0, device=device)  # float16 has few digits below 6e-5
    check_hidden_loss(*states((3,), 2057, *dtypes, device=device), kind=kind, grad_output=scaled, backend=backend)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend: str, device: str, kind: str, layout: str, which: str) -> None:
    student, teacher = states((2, 2), 131, device=device)
    if which == "student":
        check_hidden_loss(LAYOUTS[layout](student), teacher, kind=kind, backend=backend)
    else:
        check_hidden_loss(student, LAYOUTS[layout](teacher), kind=kind, backend=backend)


@pytest.mark.parametrize("layout", ["without_last", "batch_second", "padded_rows", "offset_3"])
def test_layout_of_tiles(backend: str, device: str, kind: str, layout: str) -> None:
    """Several tiles a row, in bfloat16; the gradient of each row from above."""
    student, teacher = (LAYOUTS[layout](x) for x in states((2, 2), 4107, torch.bfloat16, device=device))
    grad_output = torch.randn(2, 2, device=device)
    check_hidden_loss(student, teacher, kind=kind, reduction="none", grad_output=grad_output, backend=backend)


def test_two_layouts(backend: str, device: str, kind: str) -> None:
    """Each tensor groups its rows in its own way, and so do the vectors; one teacher's row for several."""
    student, teacher = states((2, 3), 131, device=device)
    mask = (torch.rand(2, 3, device=device) > 0.3)[:, :1].expand(2, 3)
    weights = torch.rand(3, 2, device=device).t()
    for other in (LAYOUTS["batch_second"](teacher), teacher[:, :1].expand(2, 3, 131)):
        check_hidden_loss(
            LAYOUTS["without_last"](student), other, kind=kind, mask=mask, token_weights=weights, backend=backend
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_its_own_columns_only(backend: str, device: str, kind: str, dtype: torch.dtype) -> None:
    """The gradient's rows and nothing beside them."""
    student, teacher = (x.unsqueeze(0) for x in states((3,), 1031, dtype, device=device))
    scale, losses = torch.rand(3, device=device), torch.empty(3, device=device)
    number = int(HiddenKind[kind.upper()])
    expected = torch.empty_like(student)
    for grad in (expected, padded_rows(student), offset(student, 3)):
        _dispatch.backend(backend).hidden_rows(student, teacher, scale, number, losses, grad)
        torch.testing.assert_close(grad, expected, rtol=torch.finfo(dtype).eps, atol=0)
        if grad is not expected:
            assert grad._base is not None
            outside = torch.ones_like(grad._base, dtype=torch.bool)
            outside.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(False)
            assert grad._base[outside].isnan().all()


@pytest.mark.parametrize("rows", [(), (1,), (2, 1, 2), (0,), (2, 0)], ids=str)
def test_shape(backend: str, device: str, kind: str, rows: tuple[int, ...]) -> None:
    for reduction in ("mean", "none"):
        check_hidden_loss(*states(rows, 13, device=device), kind=kind, reduction=reduction, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf], ids=str)
def test_row_that_does_not_count_is_not_read(
    backend: str, device: str, kind: str, filling: float, reduction: str
) -> None:
    student, teacher = states((2, 2), 127, device=device)
    mask = torch.tensor([[True, False], [False, True]], device=device)
    weights = torch.tensor([[0.5, torch.nan], [1.0, -2.0]], device=device)
    keywords: dict[str, Any] = {"mask": mask, "token_weights": weights, "reduction": reduction, "kind": kind}
    check_hidden_loss(student, teacher, backend=backend, **keywords)
    student[~mask], teacher[~mask] = filling, filling
    leaf = student.requires_grad_()
    loss = fastkd.hidden_loss(leaf, teacher, backend=backend, **keywords)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert (leaf.grad[~mask] == 0).all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(backend: str, device: str, kind: str, reduction: str) -> None:
    """Loss 0 with a graph, gradient 0, though every row holds NaN."""
    student = torch.full((3, 17), torch.nan, device=device, requires_grad=True)
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    loss = fastkd.hidden_loss(student, student, kind=kind, mask=mask, reduction=reduction, backend=backend)
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("number", [7, 7.0, torch.tensor(7)], ids=["int", "float", "tensor"])
def test_num_items(backend: str, device: str, kind: str, number: Any) -> None:
    number = number.to(device) if torch.is_tensor(number) else number
    check_hidden_loss(*states((3,), 127, device=device), kind=kind, num_items=number, backend=backend)


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf], ids=str)
def test_nan_shows_in_its_row(backend: str, device: str, kind: str, spoilt: float, whose: str) -> None:
    """And the others do not notice. An infinity is infinitely far, and has no direction."""
    given = states((2,), 127, device=device)
    given[whose == "teacher"][1, 126] = spoilt
    loss = fastkd.hidden_loss(*given, kind=kind, reduction="none", backend=backend)
    assert loss[0].isfinite()
    assert loss[1].isinf() if kind == "mse" and spoilt == torch.inf else loss[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [3.7, -0.5, 0.0, 1024.0])
def test_grad_output_of_a_scalar_loss(backend: str, device: str, kind: str, value: float, dtype: torch.dtype) -> None:
    grad_output = torch.tensor(value, device=device)
    check_hidden_loss(*states((2,), 127, dtype, device=device), kind=kind, grad_output=grad_output, backend=backend)


@pytest.mark.parametrize("name", GRAD_OUTPUTS)
def test_grad_output_per_row(backend: str, device: str, kind: str, name: str) -> None:
    grad_output = GRAD_OUTPUTS[name]().to(device)
    given = states((3,), 127, device=device)
    check_hidden_loss(*given, kind=kind, reduction="none", grad_output=grad_output, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(backend: str, device: str, kind: str, reduction: str) -> None:
    student, teacher = states((2,), 127, torch.bfloat16, device=device)
    student.requires_grad_()
    loss = fastkd.hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend)
    ones = torch.ones_like(loss)
    first, tripled, again = (
        torch.autograd.grad(loss, student, factor * ones, retain_graph=True)[0] for factor in (1.0, 3.0, 1.0)
    )
    assert same_bits(first, again)
    check_gradient(tripled, 3.0 * first.double())


def test_float16_survives_a_loss_scale(backend: str, device: str, kind: str) -> None:
    """A mean's gradient is 0 in float16; that times 2^16 is not."""
    student, teacher = states((512,), 768, torch.float16, device=device)
    grad_output = torch.tensor(2.0**16, device=device)
    check_hidden_loss(student, teacher, kind=kind, grad_output=grad_output, backend=backend)


def test_repeats_bit_by_bit(backend: str, device: str, kind: str) -> None:
    given = states((4,), 2061, torch.bfloat16, device=device)
    grads = []
    for _ in range(2):
        leaf = given[0].clone().requires_grad_()
        fastkd.hidden_loss(leaf, given[1], kind=kind, backend=backend).backward()
        grads.append(leaf.grad)
    assert same_bits(*grads)


def test_the_same_states(backend: str, device: str, kind: str) -> None:
    """Nothing to learn."""
    student = states((3,), 771, device=device)[0].requires_grad_()
    loss = fastkd.hidden_loss(student, student, kind=kind, reduction="sum", backend=backend)
    loss.backward()
    assert 0 <= loss < 1e-12
    assert student.grad.norm() < 1e-7


def test_near_its_end(backend: str, device: str, kind: str) -> None:
    """1 − cos of 5e-7 keeps its digits, which 1 less a cosine in float32 has not."""
    _, teacher = states((3,), 771, device=device)
    student = teacher + 3e-3 * torch.randn(3, 771, device=device)
    loss = fastkd.hidden_loss(student, teacher, kind=kind, reduction="none", backend=backend)
    exact = fastkd.hidden_loss(student.double(), teacher.double(), kind=kind, reduction="none", backend="torch")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_vector_of_zeros(backend: str, device: str, kind: str, whose: str, dtype: torch.dtype) -> None:
    """As the reference has it: no NaN anywhere, and with a cosine a loss of 1 and a gradient of 0."""
    skip_unsupported(backend, device, dtype)
    student, teacher = states((3,), 127, dtype, device=device)
    for tensor, mine in ((student, "student"), (teacher, "teacher")):
        if whose in (mine, "both"):
            tensor[1] = 0.0
    for reduction in ("mean", "none"):
        check_hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend)
    if kind == "cosine":
        leaf = student.requires_grad_()
        loss = fastkd.hidden_loss(leaf, teacher, kind=kind, reduction="none", backend=backend)
        loss.sum().backward()
        assert loss[1] == 1 and (leaf.grad[1] == 0).all() and leaf.grad[0].any()


def test_size_of_the_vectors(backend: str, device: str, kind: str) -> None:
    """A cosine does not see it, from 1e-15 to 1e15."""
    student, teacher = states((3,), 127, device=device)
    if kind == "mse":
        check_loss(
            fastkd.hidden_loss(1e15 * student, 1e15 * teacher, backend=backend),
            1e30 * fastkd.hidden_loss(student, teacher, backend=backend).double(),
        )
        return
    expected = fastkd.hidden_loss(student, teacher, kind=kind, backend=backend)
    for a, b in ((1e-15, 1.0), (1e15, 1e-15), (1.0, 1e15)):
        loss = fastkd.hidden_loss(a * student, b * teacher, kind=kind, backend=backend)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
