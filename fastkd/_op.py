"""The registered operators ``torch.ops.fastkd.*``: the only schemas, their allocations and their fake implementations.

They are defined through ``torch.library.Library``: a call costs about a quarter of one through
``torch.library.custom_op`` (benchmarks/overhead.py). None is differentiable by itself; ``_autograd`` makes them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _dispatch, _labels, _linear, _slices, _sparse
from fastkd._request import NUM_STATS, Place, Rows, RowSpec
from fastkd._views import flat, row_views
from fastkd.sources import LinearLogits, TopK

_lib = torch.library.Library("fastkd", "DEF")  # type: ignore[no-untyped-call]

_VECTORS = "Tensor? labels, Tensor? hard_scale, Tensor? soft_scale, Tensor? z_scale"
_ROWS = f"Tensor? teacher, {_VECTORS}"
# A graph of torch.compile holds its floats: another value would be another graph. Where one varies, all of them come in
# a tensor of the CPU's, `varying` (_traced.py); the schema's floats are then not read.
_SPEC = (
    "float temperature, int formula, float c_t, float c_s, float w, float label_smoothing, SymInt vocab_size, "
    "Tensor? varying"
)

_PLACE = "str backend, str group, SymInt width"


def _define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated implementation and its fake under ``schema``; the result calls the operator."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _lib.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))  # type: ignore[no-untyped-call]
        _lib.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fastkd::{name}", fake, lib=_lib)
        return getattr(torch.ops.fastkd, name).default  # type: ignore[no-any-return]

    return register


def _row_spec(numbers: Sequence[Any], varying: Tensor | None) -> RowSpec:
    spec = RowSpec(*numbers)
    if varying is None:
        return spec
    temperature, c_t, c_s, w, label_smoothing = varying.tolist()
    return RowSpec(temperature, spec.formula, c_t, c_s, w, label_smoothing, spec.vocab_size)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_losses(student: Tensor) -> Tensor:
    return student.new_empty(student.shape[:-1], dtype=_compute_dtype(student))


def _losses(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hard, soft, stats) for these logits, uninitialised."""
    hard = _row_losses(student)
    return hard, torch.empty_like(hard), hard.new_empty((*hard.shape, NUM_STATS))


def _gradient(student: Tensor, want_grad: bool = True) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format) if want_grad else student.new_empty(0)


def _fake_kd_rows(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return (*_losses(student), _gradient(student, want_grad=args[-4]))


@_define(
    f"kd_rows(Tensor student, {_ROWS}, {_SPEC}, bool want_grad, {_PLACE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_kd_rows,
)
def kd_rows(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hard, soft, stats, gradient): the losses of each row, and the gradient if asked for."""
    *rest, want_grad, backend, group, width = args
    grad = _gradient(student, want_grad)
    return *_run_rows(student, grad if want_grad else None, *rest, backend, group, width), grad


@_define(
    f"kd_rows_(Tensor(a!) student, {_ROWS}, {_SPEC}, {_PLACE}) -> (Tensor, Tensor, Tensor)",
    lambda student, *args: _losses(student),
)
def kd_rows_(student: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(hard, soft, stats); the gradient is written over ``student``."""
    return _run_rows(student, student, *args)


@_define(f"kd_grad(Tensor student, {_ROWS}, Tensor stats, {_SPEC}, {_PLACE}) -> Tensor", lambda s, *_: _gradient(s))
def kd_grad(student: Tensor, *args: Any) -> Tensor:
    """The gradient alone, from the statistics that :func:`kd_rows` gave."""
    grad = _gradient(student)
    _run_grad(student, grad, *args)
    return grad


@_define(f"kd_grad_(Tensor(a!) student, {_ROWS}, Tensor stats, {_SPEC}, {_PLACE}) -> ()", lambda *_: None)
def kd_grad_(student: Tensor, *args: Any) -> None:
    """The same, written over ``student``."""
    _run_grad(student, student, *args)
    torch.autograd.graph.increment_version(student)  # a kernel's writes are not seen by autograd


def _fake_linear_rows(student: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, autocast, _, wants, _, _, _ = args
    logits = student if weight is None else _linear.logits_like(LinearLogits(student, weight), autocast)
    grads = zip((student, weight, bias), wants, strict=True)
    return *_losses(logits), *(student.new_empty(0) if t is None else _gradient(t, want) for t, want in grads)


@_define(
    "linear_rows(Tensor student, Tensor? student_weight, Tensor? student_bias, Tensor? teacher, "
    f"Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_ids, {_VECTORS}, {_SPEC}, float student_scale, "
    "float? student_softcap, float teacher_scale, float? teacher_softcap, str tail, ScalarType? autocast, "
    f"SymInt? chunk_rows, bool[3] wants, {_PLACE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_linear_rows,
)
def linear_rows(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(hard, soft, stats, and those gradients of the student's three tensors that ``wants`` asks for).

    Each source is three tensors and two numbers, those of a ``LinearLogits``; or logits, and no matrix; or the
    teacher's is log-probabilities, with their ids and a tail, those of a ``TopK``.
    """
    weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids, *vectors = args[:10]
    *numbers, varying, scale, softcap, teacher_scale, teacher_softcap, tail, autocast = args[10:-5]
    source: Tensor | LinearLogits = student
    if weight is not None:
        source = LinearLogits(student, weight, bias, scale, softcap)
    if teacher_weight is not None:
        teacher = LinearLogits(teacher, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    elif teacher_ids is not None:
        teacher = TopK(teacher_ids, teacher, tail=tail)
    (chunk_rows, wants), place = args[-5:-3], Place(*args[-3:])
    spec = _row_spec(numbers, varying)
    losses, grads = _run_linear(source, teacher, vectors, spec, autocast, chunk_rows, wants, place)
    given = zip(grads, (student, weight, bias), strict=True)
    return *losses, *(student.new_empty(0) if grad is None else grad.view(t.shape) for grad, t in given)


@_define(
    f"sparse_rows_(Tensor(a!) student, Tensor? teacher, Tensor? teacher_ids, {_VECTORS}, {_SPEC}, str tail, "
    f"{_PLACE}) -> (Tensor, Tensor, Tensor)",
    lambda student, *args: _losses(student),
)
def sparse_rows_(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """(hard, soft, stats) of logits and a ``TopK``, or no teacher; the gradient is written over ``student``."""
    log_probs, ids, *vectors = args[:6]
    *numbers, varying, tail = args[6:-3]
    teacher = None if ids is None else TopK(ids, log_probs, tail=tail)
    wants = (True, False, False)
    spec, place = _row_spec(numbers, varying), Place(*args[-3:])
    losses, _ = _run_linear(student, teacher, vectors, spec, None, None, wants, place, True)
    torch.autograd.graph.increment_version(student)  # a kernel's writes are not seen by autograd
    return losses


def _run_linear(
    source: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | TopK | None,
    vectors: Sequence[Tensor | None],
    spec: RowSpec,
    autocast: torch.dtype | None,
    chunk_rows: int | None,
    wants: Sequence[bool],
    place: Place,
    inplace: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor | None]]:
    """(losses, gradients): see ``_linear.linear_rows``."""
    logits = _linear.logits_like(source, autocast)
    of_rows = _linear.Vectors(*(None if t is None else flat(t) for t in vectors))
    if isinstance(teacher, TopK):
        k = teacher.ids.shape[-1]
        teacher = teacher._replace(ids=teacher.ids.reshape(-1, k), log_probs=teacher.log_probs.reshape(-1, k))

    def check() -> None:
        _check_labels(logits, spec, *of_rows[:3])
        if isinstance(teacher, TopK) and (logits.device.type == "cpu" or _labels.ALWAYS):
            assert of_rows.soft_scale is not None
            _sparse.check(teacher, spec.vocab_size, of_rows.soft_scale)

    _slices.raise_together(place, logits, check)
    losses = _losses(logits)
    flat_losses = [t.view(losses[0].numel(), *t.shape[logits.dim() - 1 :]) for t in losses]
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        grads = _linear.linear_rows(
            source, teacher, of_rows, spec, flat_losses, autocast, chunk_rows, wants, place, inplace
        )
    return losses, grads


@_define("scale_(Tensor(a!) grad, Tensor scalar, str backend) -> ()", lambda *_: None)
def scale_(grad: Tensor, scalar: Tensor, backend: str) -> None:
    """``grad *= scalar``, a 0-d tensor that is read on the device; nothing is written if it is 1."""
    _dispatch.choose(grad, backend).scale_(row_views(grad)[0], scalar)


@_define(
    "log_softmax(Tensor logits, float temperature, Tensor? varying, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    lambda logits, temperature, varying, dtype, backend: _log_softmax_outputs(logits, dtype),
)
def log_softmax(
    logits: Tensor, temperature: float, varying: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, normalisers)."""
    out, lse = _log_softmax_outputs(logits, dtype)
    if varying is not None:
        temperature = varying.item()
    logits_view, out_view = row_views(logits, out)
    _dispatch.choose(logits, backend).log_softmax(logits_view, out_view, lse.view(-1, 2), temperature)
    return out, lse


@_define(
    "log_softmax_backward(Tensor grad, Tensor logits, Tensor lse, float temperature, Tensor? varying, str backend)"
    " -> Tensor",
    lambda grad, logits, *_: _gradient(logits),
)
def log_softmax_backward(
    grad: Tensor, logits: Tensor, lse: Tensor, temperature: float, varying: Tensor | None, backend: str
) -> Tensor:
    out = _gradient(logits)
    if varying is not None:
        temperature = varying.item()
    grad_view, logits_view, out_view = row_views(grad, logits, out)
    _dispatch.choose(logits, backend).log_softmax_backward(
        grad_view, logits_view, lse.view(-1, 2), out_view, temperature
    )
    return out


@_define(
    "hidden_rows(Tensor student, Tensor teacher, Tensor scale, int kind, bool want_grad, str backend)"
    " -> (Tensor, Tensor)",
    lambda student, *args: (_row_losses(student), _gradient(student, want_grad=args[-2])),
)
def hidden_rows(
    student: Tensor, teacher: Tensor, scale: Tensor, kind: int, want_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(losses, gradient): the loss of each row, unscaled, and the gradient times its scale if asked for."""
    losses, grad = _row_losses(student), _gradient(student, want_grad)
    views = row_views(student, teacher, *([grad] if want_grad else []))
    chosen = _dispatch.choose(student, backend, teacher, "hidden_rows")
    chosen.hidden_rows(views[0], views[1], flat(scale), kind, flat(losses), views[2] if want_grad else None)
    return losses, grad


def _log_softmax_outputs(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    return out, torch.empty((*logits.shape[:-1], 2), dtype=_compute_dtype(logits), device=logits.device)


def _run_rows(student: Tensor, grad: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    teacher, labels, hard_scale, soft_scale, z_scale, *numbers, varying = args[:-3]
    spec, place = _row_spec(numbers, varying), Place(*args[-3:])

    def check() -> None:
        _check_labels(student, spec, labels, hard_scale, soft_scale)

    _slices.raise_together(place, student, check)
    losses = _losses(student)
    hard, soft, stats = losses
    rows, grad = _views(student, teacher, labels, hard_scale, soft_scale, z_scale, grad)
    chosen = _slices.choose(student, place, teacher)
    chosen.kd_rows(rows, spec, flat(hard), flat(soft), stats.view(-1, NUM_STATS), grad)
    return losses


def _check_labels(
    logits: Tensor, spec: RowSpec, labels: Tensor | None, hard_scale: Tensor | None, soft_scale: Tensor | None
) -> None:
    if hard_scale is not None and (logits.device.type == "cpu" or _labels.ALWAYS):
        assert labels is not None
        _labels.check_rows(labels, spec.vocab_size, hard_scale, soft_scale)


def _run_grad(student: Tensor, grad: Tensor, *args: Any) -> None:
    teacher, labels, hard_scale, soft_scale, z_scale, stats, *numbers, varying = args[:-3]
    spec, place = _row_spec(numbers, varying), Place(*args[-3:])
    rows, grad_view = _views(student, teacher, labels, hard_scale, soft_scale, z_scale, grad)
    assert grad_view is not None
    chosen = _slices.choose(student, place, teacher)
    chosen.kd_grad(rows, spec, stats.view(-1, NUM_STATS), grad_view)


def _views(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    hard_scale: Tensor | None,
    soft_scale: Tensor | None,
    z_scale: Tensor | None,
    grad: Tensor | None,
) -> tuple[Rows, Tensor | None]:
    views = iter(row_views(*(t for t in (student, teacher, grad) if t is not None)))
    vectors = (None if t is None else flat(t) for t in (labels, hard_scale, soft_scale, z_scale))
    rows = Rows(next(views), None if teacher is None else next(views), *vectors)
    return rows, next(views, None)
