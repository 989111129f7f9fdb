"""Every backend on strided and misaligned logits, and what it writes of the memory around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd._request import Place
from tests.assertions import check_call, run, same_bits
from tests.cases import LAYOUTS, STRUCTURES, inputs, keywords, offset, padded_rows

STRIDED = tuple(name for name in LAYOUTS if name not in ("contiguous", "columns_first"))


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend: str, device: str, layout: str, which: str) -> None:
    student, teacher, labels = inputs((2, 2), 131, device=device)
    if which != "teacher":
        student = LAYOUTS[layout](student)
    if which != "student":
        teacher = LAYOUTS[layout](teacher)
    check_call(student, teacher, labels, backend=backend, **_forward(2.0))


@pytest.mark.parametrize("layout", ["without_last", "batch_second", "padded_rows"])
def test_layout_of_tiles(backend: str, device: str, layout: str) -> None:
    """Several tiles a row, loss and gradient in two launches, in bfloat16."""
    student, teacher, labels = inputs((2, 2), 4107, torch.bfloat16, device=device)
    student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
    check_call(student, teacher, labels, backend=backend, reduction="none", **_forward(1.7))


def test_two_layouts(backend: str, device: str) -> None:
    """Each tensor groups its rows in its own way, and so do the vectors."""
    student, teacher, labels = inputs((2, 3), 131, device=device)
    labels = labels.t().contiguous().t()
    mask = (torch.rand(2, 3, device=device) > 0.3)[:, :1].expand(2, 3)
    weights = torch.rand(3, 2, device=device).t()
    student, teacher = LAYOUTS["without_last"](student), LAYOUTS["batch_second"](teacher)
    check_call(student, teacher, labels, mask=mask, token_weights=weights, backend=backend, **_forward(2.0))


@pytest.mark.parametrize("shape", [(1, 1, 131), (1, 2, 131), (2, 1, 131)], ids=str)
def test_expanded_teacher(backend: str, device: str, shape: tuple[int, ...]) -> None:
    """One teacher for several rows: strides of 0."""
    student, _, labels = inputs((2, 2), 131, device=device)
    teacher = (torch.randn(shape) * 3).to(device).expand(2, 2, 131)
    check_call(student, teacher, labels, backend=backend, **_forward(2.0))


def test_expanded_student(backend: str, device: str) -> None:
    student, teacher, labels = inputs((3,), 131, device=device)
    check_call(student[:1].expand(3, 131), teacher, labels, backend=backend, **_forward(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shifts", [(1, 1), (0, 2), (5, 3)], ids=str)
def test_misaligned_bases(backend: str, device: str, shifts: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher, labels = inputs((2,), 2050, dtype, device=device)
    student, teacher = offset(student, shifts[0]), offset(teacher, shifts[1])
    check_call(student, teacher, labels, backend=backend, **_forward(2.0))


def test_unaligned_rows_with_padding_columns(backend: str, device: str) -> None:
    """Rows that start off a 16-byte boundary and end before their memory does."""
    student, teacher, labels = inputs((3,), 4101, device=device)
    student[:, 4003:] = teacher[:, 4003:] = torch.nan
    labels %= 4003
    check_call(student, teacher, labels, vocab_size=4003, backend=backend, **_forward(2.0))


@pytest.mark.parametrize("operator", ["kd_rows_", "kd_grad_"])
@pytest.mark.parametrize("layout", STRIDED)
def test_writes_its_own_columns_only(backend: str, device: str, layout: str, operator: str) -> None:
    """The gradient over strided logits is the gradient beside them, and the memory around them stays as it was.

    To the last bit where nothing is summed; a sum's order depends on where the rows begin.
    """
    columns = 2050
    student, teacher, labels = inputs((2, 2), columns, torch.bfloat16, device=device)
    given = (teacher, labels, torch.rand(2, 2, device=device), torch.rand(2, 2, device=device), None)
    spec = (2.0, 0, 1.0, 0.0, 0.0, 0.0, columns, None)
    operators, place = torch.ops.fastkd, Place(backend)
    _, _, stats, expected = operators.kd_rows(student, *given, *spec, True, *place)

    view, before = LAYOUTS[layout](student), student.clone()
    assert view._base is not None
    store = view._base
    if operator == "kd_rows_":
        operators.kd_rows_(view, *given, *spec, *place)
    else:
        operators.kd_grad_(view, *given, stats, *spec, *place)
        expected = operators.kd_grad(student, *given, stats, *spec, *place)
    if operator == "kd_grad_":
        assert same_bits(view, expected)
    else:
        torch.testing.assert_close(view, expected, rtol=torch.finfo(view.dtype).eps, atol=0)
    assert store[_outside(store, view)].isnan().all()
    assert same_bits(student, before)


def test_gradient_ends_at_its_row(backend: str, device: str) -> None:
    """Padding of a row is memory of others: scaling a gradient does not touch it either."""
    grad = padded_rows(torch.randn(3, 131, device=device))
    expected = (grad * 2.5).clone()
    torch.ops.fastkd.scale_(grad, torch.tensor(2.5, device=device), backend)
    assert same_bits(grad, expected)
    assert grad._base is not None
    assert grad._base[_outside(grad._base, grad)].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeats_bit_by_bit(backend: str, device: str, reduction: str) -> None:
    given = inputs((4,), 2061, torch.bfloat16, device=device)
    arguments = keywords("jsd(0.5)") | {"backend": backend, "reduction": reduction}
    first, second = run(*given, **arguments), run(*given, **arguments)
    assert same_bits(first[0], second[0])
    assert same_bits(first[1], second[1])


def test_a_row_does_not_depend_on_the_others(backend: str, device: str) -> None:
    """Neither on its place nor on how many rows there are."""
    student, teacher, labels = inputs((3,), 131, device=device)
    for name in STRUCTURES:
        arguments = keywords(name) | {"backend": backend, "reduction": "none"}
        loss, grad = run(student, teacher, labels, **arguments)
        alone = run(student[1:2].clone(), teacher[1:2].clone(), labels[1:2], **arguments)
        torch.testing.assert_close(alone[0], loss[1:2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone[1], grad[1:2], rtol=1e-5, atol=1e-7)


def _forward(temperature: float) -> dict[str, float]:
    return {"temperature": temperature, "hard_weight": 0.3, "soft_weight": 0.7}


def _outside(store: Tensor, view: Tensor) -> Tensor:
    """Where in ``store`` the view is not."""
    mask = torch.ones_like(store, dtype=torch.bool)
    mask.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return mask
