"""Every backend on logits that are not there yet, against the reference, which has them all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LinearLogits, _dispatch
from fastkd._request import NUM_STATS, Rows, RowSpec
from tests import reference
from tests.assertions import GRAD_RELATIVE, LOSS_FLOOR, LOSS_RELATIVE
from tests.backends.test_rows import skip_unsupported
from tests.cases import DIVERGENCES, DTYPES, STRUCTURES, inputs, keywords

Source = Tensor | LinearLogits
COLUMNS, WIDTH, TEACHER_WIDTH = 131, 24, 16
# A gradient of a matrix or of hidden states sums products of the logits' gradient, and cancels more.
GRAD_FLOAT32 = 5e-5


def source(rows: tuple[int, ...], dtype: torch.dtype, width: int, device: str, **numbers: Any) -> LinearLogits:
    """Logits with a standard deviation of about 3."""
    hidden, weight = torch.randn(*rows, width, device=device), torch.randn(COLUMNS, width, device=device)
    bias = torch.randn(COLUMNS, device=device)
    return LinearLogits(hidden.to(dtype), (weight * 3 * width**-0.5).to(dtype), bias.to(dtype), **numbers)


def whole(source: Source, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """The logits by the definition, in this dtype or in their own."""
    if isinstance(source, Tensor):
        return source.to(dtype)
    hidden, weight, bias = (None if t is None else t.to(dtype) for t in source[:3])
    logits = hidden @ weight.T
    logits = source.scale * (logits if bias is None else logits + bias)
    return logits if source.softcap is None else source.softcap * torch.tanh(logits / source.softcap)


def tensors(source: Source) -> list[Tensor]:
    return [source] if isinstance(source, Tensor) else [t for t in source[:3] if t is not None]


def leaves(source: Source, dtype: torch.dtype | None = None) -> Source:
    """A copy whose tensors require a gradient."""
    copies = [t if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in
              ([source] if isinstance(source, Tensor) else source[:3])]  # fmt: skip
    return copies[0] if isinstance(source, Tensor) else LinearLogits(*copies, *source[3:])


def expect(
    student: Source, teacher: Source, labels: Tensor | None, grad_output: Tensor, dtype: torch.dtype | None, **keys: Any
) -> list[Tensor]:
    """[loss, gradients] by the reference, from logits that are made in this dtype; None is the sources' own."""
    leaf = leaves(student, dtype)
    keys["divergence"] = DIVERGENCES[keys.pop("divergence", "forward_kl")].definition
    loss = reference.kd_loss(whole(leaf, dtype), whole(teacher, dtype), labels, **keys).loss
    return [loss.detach(), *torch.autograd.grad(loss, tensors(leaf), grad_output.double())]


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).norm().item()


def check(
    student: Source, teacher: Source, labels: Tensor | None, *, backend: str, divergence: str = "forward_kl",
    chunk_rows: int | None = 4, **keys: Any,
) -> list[Tensor]:  # fmt: skip
    """Loss and every gradient; in half precision, as good as of whole logits in PyTorch. Gives the gradients."""
    leaf = leaves(student)
    argument = DIVERGENCES[divergence].argument
    loss = fastkd.kd_loss(leaf, teacher, labels, backend=backend, divergence=argument, chunk_rows=chunk_rows, **keys)
    grad_output = torch.rand_like(loss) + 0.5
    found = [loss.detach(), *torch.autograd.grad(loss, tensors(leaf), grad_output)]
    exact = expect(student, teacher, labels, grad_output, torch.float64, divergence=divergence, **keys)
    plain = expect(student, teacher, labels, grad_output, None, divergence=divergence, **keys)
    dtype = tensors(student)[0].dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for actual, expected, of_plain, like in zip(found, exact, plain, [None, *tensors(student)], strict=True):
        norm = expected.norm().item()
        if like is not None:
            assert actual.dtype == like.dtype and actual.shape == like.shape
        if dtype.itemsize == 2:  # that of the logits' rounding, and in the gradients of theirs
            limit = 2.0 * error(of_plain, expected) + GRAD_RELATIVE[dtype] * norm
        elif like is None:
            limit = LOSS_RELATIVE[dtype] * norm + LOSS_FLOOR[dtype]
        else:
            limit = (GRAD_FLOAT32 if dtype == torch.float32 else GRAD_RELATIVE[dtype]) * norm
        found_error = error(actual, expected)
        assert found_error <= limit, f"error {found_error:.2e} of {norm:.2e}, allowed {limit:.2e}"
    return found[1:]


SOURCES = [("linear", "linear"), ("linear", "tensor"), ("tensor", "linear")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sources", SOURCES, ids="-".join)
def test_grid(backend: str, device: str, sources: tuple[str, str], dtype: torch.dtype) -> None:
    skip_unsupported(backend, device, dtype)
    for name, reduction in product(STRUCTURES, ("mean", "none")):
        student, teacher = (source((2, 3), dtype, width, device) for width in (WIDTH, TEACHER_WIDTH))
        given = [
            s if kind == "linear" else whole(s, dtype) for s, kind in zip((student, teacher), sources, strict=True)
        ]
        labels = torch.randint(0, COLUMNS, (2, 3), device=device)
        check(*given, labels, backend=backend, reduction=reduction, **keywords(name) | {"divergence": name})


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_alone(backend: str, device: str, name: str) -> None:
    """Without labels, all rows in one chunk."""
    student, teacher = (source((5,), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    check(student, teacher, None, backend=backend, divergence=name, temperature=1.7, chunk_rows=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_scale_and_softcap(backend: str, device: str, reduction: str, dtype: torch.dtype) -> None:
    """Of either source; softcap's derivative needs the logits that the gradient would be written over."""
    for numbers in ({"scale": 0.3}, {"softcap": 5.0}, {"scale": -1.5, "softcap": 2.0}):
        student, teacher = source((5,), dtype, WIDTH, device, **numbers), source((5,), dtype, 8, device, **numbers)
        labels = torch.randint(0, COLUMNS, (5,), device=device)
        check(
            student,
            teacher,
            labels,
            backend=backend,
            reduction=reduction,
            **keywords("jsd(0.5)") | {"divergence": "jsd(0.5)"},
        )
        check(student._replace(bias=None), teacher, labels, backend=backend, hard_weight=1.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_do_not_count(backend: str, device: str, reduction: str) -> None:
    """Their hidden states may hold NaN, which would reach the gradient of the matrix in a product with 0."""
    student, teacher = (source((2, 4), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    labels = torch.randint(0, COLUMNS, (2, 4), device=device)
    labels[0, 1] = labels[1, 3] = -100
    mask = labels != labels[1, 1]
    for s in (student, teacher):
        s.hidden[(labels == -100) | ~mask] = torch.nan
    leaf = leaves(student)
    keys = keywords("jsd(0.5)") | {"mask": mask, "reduction": reduction, "backend": backend, "z_loss_weight": 0.01}
    loss = fastkd.kd_loss(leaf, teacher, labels, chunk_rows=2, **keys)
    found = [loss.detach(), *torch.autograd.grad(loss, tensors(leaf), torch.ones_like(loss))]
    clean = [s._replace(hidden=s.hidden.nan_to_num()) for s in (student, teacher)]
    leaf = leaves(clean[0])
    loss = fastkd.kd_loss(whole(leaf, torch.float32), whole(clean[1], torch.float32), labels, **keys)
    expected = [loss.detach(), *torch.autograd.grad(loss, tensors(leaf), torch.ones_like(loss))]
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_rows_that_do_not_count_where_nobody_looks(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking would wait."""
    monkeypatch.setattr("fastkd._linear._looking_is_free", lambda tensor: False)
    for reduction in ("mean", "none"):
        test_rows_that_do_not_count(backend, device, reduction)


def test_every_keyword(backend: str, device: str) -> None:
    student, teacher = (source((3, 4), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    labels = torch.randint(0, 120, (3, 4), device=device)
    labels[1, 2] = -100
    mask, soft_mask = torch.rand(3, 4, device=device) > 0.3, torch.rand(3, 4, device=device) > 0.3
    keys: dict[str, Any] = {
        "divergence": "reverse_kl", "temperature": 1.7, "hard_weight": 0.4, "soft_weight": 0.6, "mask": mask,
        "scale_soft_by_t2": False, "label_smoothing": 0.1, "z_loss_weight": 0.02, "vocab_size": 123,
        "token_weights": torch.rand(3, 4, device=device),
    }  # fmt: skip
    check(student, teacher, labels, backend=backend, num_items=7, **keys)
    check(student, teacher, labels, backend=backend, soft_mask=soft_mask, num_items=(7, 5), **keys)
    grads = check(student, whole(teacher, torch.float32)[..., :125], labels, backend=backend, reduction="none", **keys)
    assert not grads[1][123:].any() and not grads[2][123:].any()
    (grad,) = check(whole(student, torch.float32), teacher, labels, backend=backend, soft_mask=soft_mask, **keys)
    assert not grad[..., 123:].any()


def test_parts(backend: str, device: str) -> None:
    student, teacher = (source((6,), torch.float32, width, device) for width in (WIDTH, TEACHER_WIDTH))
    labels = torch.randint(0, COLUMNS, (6,), device=device)
    labels[0] = -100
    for weights in ({"hard_weight": 0.5}, {"hard_weight": 0.0}, {"hard_weight": 1.0, "soft_weight": 0.0}):
        found = fastkd.kd_loss(student, teacher, labels, return_parts=True, chunk_rows=4, backend=backend, **weights)
        expected = reference.kd_loss(whole(student), whole(teacher), labels, **weights)
        for part, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(part.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_gradient_of_a_dtype_of_its_own(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    """float32 logits, a half-precision gradient: that of float32, rounded once; in both of the backend's ways to it."""
    student, teacher, labels = inputs((3,), 2057, device=device)
    member = fastkd.divergences.resolve(DIVERGENCES[name].argument)
    spec = RowSpec(2.0, int(member.formula), member.c_t, member.c_s, member.w, 0.1, 2051)
    scale = torch.tensor([0.3, 0.0, 1.0], device=device)
    rows = Rows(student.unsqueeze(0), teacher.unsqueeze(0), labels % 2051, scale, 2.0 * scale)
    chosen = _dispatch.backend(backend)
    grads = []
    for kind in (torch.float32, dtype):
        losses = [torch.empty(3, device=device), torch.empty(3, device=device)]
        stats = torch.empty(3, NUM_STATS, device=device)
        first, second = (torch.empty(1, 3, 2057, dtype=kind, device=device) for _ in range(2))
        chosen.kd_rows(rows, spec, *losses, stats, first)
        chosen.kd_grad(rows, spec, stats, second)
        grads.append((first, second))
    for wide, narrow in zip(*grads, strict=True):
        torch.testing.assert_close(narrow, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
