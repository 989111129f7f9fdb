"""Every backend over the grid, against the reference: sizes, dtypes, temperatures, divergences, reductions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastkd
from fastkd import _dispatch
from tests import reference
from tests.assertions import check_call, check_loss
from tests.cases import DIVERGENCES, DTYPE_PAIRS, DTYPES, GPT2, ONE_TILE, QWEN, SIZES, STRUCTURES, TEMPERATURES, inputs

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
TERMS: dict[str, dict[str, Any]] = {
    "both": BOTH,
    "hard": {"hard_weight": 0.6, "soft_weight": 0.0},
    "soft": {"temperature": 2.0, "soft_weight": 0.4},
    "smooth": {"temperature": 1.7, "hard_weight": 0.3, "soft_weight": 0.7, "label_smoothing": 0.1},
    "hard_smooth": {"hard_weight": 1.0, "soft_weight": 0.0, "label_smoothing": 0.3},
    "without_t2": {"temperature": 3.0, "hard_weight": 1.0, "scale_soft_by_t2": False},
    "negative": {"temperature": 2.0, "hard_weight": 1.5, "soft_weight": -0.5},
}


def skip_unsupported(backend: str, device: str, *dtypes: torch.dtype) -> None:
    """That a backend refuses what it does not support is test_dispatch's."""
    student, *teacher = (torch.zeros(1, 1, dtype=dtype, device=device) for dtype in dtypes)
    if why := _dispatch.refusal(student, backend, *teacher):
        pytest.skip(why)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("columns", SIZES)
def test_size(backend: str, device: str, columns: int, reduction: str) -> None:
    check_call(*inputs((2,), columns, device=device), backend=backend, reduction=reduction, **BOTH)


@pytest.mark.parametrize("columns", [1, 127, 4099])
@pytest.mark.parametrize("name", ["tvd", "jsd(0.5)"])
def test_size_of_two_launches(backend: str, device: str, columns: int, name: str) -> None:
    """A divergence whose Σg needs a walk of its own."""
    check_call(*inputs((2,), columns, device=device), backend=backend, divergence=name, **BOTH)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd(0.5)"])
def test_size_of_gpt2(backend: str, device: str, name: str) -> None:
    check_call(*inputs((2,), GPT2, torch.bfloat16, device=device), backend=backend, divergence=name, **BOTH)


def test_size_of_qwen(backend: str, device: str) -> None:
    check_call(*inputs((2,), QWEN, torch.bfloat16, device=device), backend=backend, **BOTH)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(backend: str, device: str, dtype: torch.dtype, terms: str) -> None:
    skip_unsupported(backend, device, dtype)
    given = inputs((2,), 263, dtype, device=device)
    check_call(*given[: 2 if terms == "soft" else 3], backend=backend, reduction="sum", **TERMS[terms])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd(0.5)"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_two_dtypes(backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype], name: str) -> None:
    skip_unsupported(backend, device, *dtypes)
    check_call(*inputs((2,), 2057, *dtypes, device=device), backend=backend, divergence=name, **BOTH)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(backend: str, device: str, name: str, reduction: str) -> None:
    check_call(*inputs((2,), 2100, device=device), backend=backend, divergence=name, reduction=reduction, **BOTH)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_alone(backend: str, device: str, name: str) -> None:
    """Without labels; in bfloat16, at a temperature that is no integer."""
    student, teacher, _ = inputs((3,), 127, torch.bfloat16, device=device)
    check_call(student, teacher, backend=backend, divergence=name, temperature=1.7)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_in_float64(device: str, name: str) -> None:
    """To float64's digits: what float32 could hide."""
    check_call(*inputs((5,), 300, torch.float64, device=device), backend="torch", divergence=name, **BOTH)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperature(backend: str, device: str, temperature: float, name: str) -> None:
    keywords = BOTH | {"temperature": temperature}
    check_call(*inputs((2,), 127, device=device), backend=backend, divergence=name, **keywords)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reduction(backend: str, device: str, reduction: str, terms: str) -> None:
    given = inputs((3,), 127, device=device)
    check_call(*given[: 2 if terms == "soft" else 3], backend=backend, reduction=reduction, **TERMS[terms])


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 2), (2, 1, 2)], ids=str)
def test_shape(backend: str, device: str, rows: tuple[int, ...]) -> None:
    for reduction in ("mean", "none"):
        check_call(*inputs(rows, 13, device=device), backend=backend, reduction=reduction, **BOTH)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(backend: str, device: str, rows: tuple[int, ...]) -> None:
    """A loss of 0 that has a graph, and an empty gradient."""
    for reduction in ("mean", "sum", "none"):
        check_call(*inputs(rows, 7, device=device), backend=backend, reduction=reduction, **BOTH)


@pytest.mark.parametrize("kind", [int, float, torch.tensor], ids=["int", "float", "tensor"])
def test_num_items(backend: str, device: str, kind: Any) -> None:
    given = inputs((3,), 127, device=device)
    number = kind(7)
    check_call(*given, backend=backend, num_items=number.to(device) if torch.is_tensor(number) else number, **BOTH)


def test_num_items_of_a_step(backend: str, device: str) -> None:
    """Micro-batches of unequal length with the step's number of tokens add up to the whole batch."""
    student, teacher, labels = inputs((5,), 127, device=device)
    labels[1] = -100
    items = (labels != -100).sum()
    whole = fastkd.kd_loss(student, teacher, labels, backend=backend, **BOTH)
    parts = [
        fastkd.kd_loss(student[at], teacher[at], labels[at], num_items=items, backend=backend, **BOTH)
        for at in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("columns", [(130, 130), (130, 133), (141, 130), (ONE_TILE + 5, ONE_TILE)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocab_size(backend: str, device: str, columns: tuple[int, int], reduction: str) -> None:
    """Columns beyond the vocabulary hold NaN: they are not read, and their gradient is exactly 0."""
    tokens = 127 if max(columns) < ONE_TILE else 2001
    shape = {"device": device, "spread": 3.0}
    (student, _, _), (_, teacher, _) = inputs((2,), columns[0], **shape), inputs((2,), columns[1], **shape)
    student[:, tokens:] = teacher[:, tokens:] = torch.nan
    labels = torch.tensor([0, tokens - 1], device=device)
    keywords = BOTH | {"backend": backend, "reduction": reduction, "label_smoothing": 0.1}
    check_call(student, teacher, labels, vocab_size=tokens, divergence="jsd(0.5)", **keywords)
    leaf = student.requires_grad_()
    fastkd.kd_loss(leaf, teacher, labels, vocab_size=tokens, **keywords).sum().backward()
    assert (leaf.grad[:, tokens:] == 0).all()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_parts(backend: str, device: str, name: str, labelled: bool) -> None:
    """Unweighted means over the rows that count, detached; a term of weight 0 too."""
    student, teacher, labels = inputs((4,), 127, device=device)
    keywords = BOTH | ({"soft_weight": 0.0} if labelled else {"hard_weight": None, "soft_weight": 0.5})
    labels[2] = -100
    given = (student.requires_grad_(), teacher, labels if labelled else None)
    argument, definition = DIVERGENCES[name]
    parts = fastkd.kd_loss(*given, divergence=argument, return_parts=True, backend=backend, **keywords)
    expected = reference.kd_loss(*given, divergence=definition, **keywords)
    assert parts._fields == ("loss", "hard", "soft")
    assert not parts.hard.requires_grad and not parts.soft.requires_grad
    for part, expected_part in zip(parts, expected, strict=True):
        check_loss(part.detach(), expected_part.detach())
    plain = fastkd.kd_loss(*given, divergence=argument, backend=backend, **keywords)
    torch.testing.assert_close(parts.loss, plain, rtol=1e-6, atol=1e-7)
    parts.loss.backward()
