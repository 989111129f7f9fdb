"""The autograd functions: what is saved, when the gradient is computed, and what is refused. No mathematics.

A scalar loss computes its gradient in forward, while the row is at hand, and backward only scales it by
``grad_output``. A loss per row keeps statistics in forward and computes the gradient in backward, row scales times
``grad_output``; and so does a scalar loss of float16 logits, whose gradient could vanish before a loss scale reached it
(of a mean over 4096 rows nearly all of it lies below 6e-8).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastkd import _linear, _op
from fastkd._request import LOG_HARD, PEAK_STUDENT, Place, RowSpec
from fastkd.sources import LinearLogits, TopK

# Whether the running backward keeps its graph. Private to PyTorch; without it, assume that it does and copy.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

_OVERWRITTEN = "inplace_backward: student_logits were overwritten with their gradient, then used again"


class _SecondOrder(torch.autograd.Function):
    """The gradient, as if it depended on ``sources``; its derivative is the second one, which does not exist here."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Any:
        raise RuntimeError("fastkd has no second-order gradient: its backward cannot be differentiated")


def _final(grad: Tensor, *sources: Tensor) -> Tensor:
    """A gradient on its way out: under create_graph=True it carries a node that refuses to be differentiated.

    ``sources`` lead in the graph to all that it depends on, the logits and what its grad_output came from, so that the
    node stands in the way of every derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SecondOrder.apply(grad, *sources)  # type: ignore[no-any-return, no-untyped-call]
    return grad


def _scaled(grad: Tensor, grad_loss: Tensor, backend: str) -> Tensor:
    """The gradient that forward saved, times what comes from above; in its own memory if nobody wants it again."""
    if torch.compiler.is_compiling() or _is_batched(grad_loss):
        return (grad.to(grad_loss.dtype) * grad_loss).to(grad.dtype)
    if _keeps_graph():  # a second backward will want it unscaled
        grad = grad.clone()
    # The operator leaves a gradient times 1 alone; not calling it costs less, where looking does not wait.
    if type(grad_loss) is not Tensor or not grad_loss.is_cpu or grad_loss.item() != 1:
        _op.scale_(grad, grad_loss, backend)
    return grad


class _ScalarLoss(torch.autograd.Function):
    """Σ over the rows. The gradient is computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        hard_scale: Tensor | None,
        soft_scale: Tensor | None,
        z_scale: Tensor | None,
        spec: RowSpec,
        varying: Tensor | None,
        inplace: bool,
        place: Place,
        own_rows: bool,
    ) -> tuple[Tensor, ...]:
        rows = (student, teacher, labels, hard_scale, soft_scale, z_scale, *spec, varying)
        want_grad = ctx.needs_input_grad[0]
        inplace = inplace and want_grad
        if inplace:
            hard, soft, stats = _op.kd_rows_(*rows, *place)
            ctx.mark_dirty(student)
            grad = student
        else:
            hard, soft, stats, grad = _op.kd_rows(*rows, want_grad, *place)
        if own_rows:
            hard, soft = _counted(hard, hard_scale), _counted(soft, soft_scale)
        # soft is nobody's to change and, left differentiable, leads back to the logits without keeping them.
        ctx.save_for_backward(grad, soft)
        ctx.mark_non_differentiable(hard)
        ctx.set_materialize_grads(False)
        ctx.place = place
        loss = _weighted(hard, soft, stats, hard_scale, soft_scale, z_scale).sum()
        return (loss, hard, soft, student) if inplace else (loss, hard, soft)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _hard: None, _soft: None, grad_student: Tensor | None = None
    ) -> Any:
        if grad_student is not None:
            raise RuntimeError(_OVERWRITTEN)
        if grad_loss is None:
            return (None,) * 11
        grad, soft = ctx.saved_tensors
        return _final(_scaled(grad, grad_loss, ctx.place.backend), soft, grad_loss), *(None,) * 10


class _LossPerRow(torch.autograd.Function):
    """One loss a row. The gradient is computed in backward, from saved statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        hard_scale: Tensor | None,
        soft_scale: Tensor | None,
        z_scale: Tensor | None,
        spec: RowSpec,
        varying: Tensor | None,
        inplace: bool,
        place: Place,
        own_rows: bool,
    ) -> tuple[Tensor, ...]:
        rows = (student, teacher, labels, hard_scale, soft_scale, z_scale, *spec, varying)
        hard, soft, stats, _ = _op.kd_rows(*rows, False, *place)
        if own_rows:
            hard, soft = _counted(hard, hard_scale), _counted(soft, soft_scale)
        _save(ctx, student, teacher, labels, hard_scale, soft_scale, z_scale, stats, varying)
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.inplace, ctx.place = spec, inplace, place
        return _weighted(hard, soft, stats, hard_scale, soft_scale, z_scale), hard, soft

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> Any:
        if grad_loss is None:
            return (None,) * 11
        student, teacher, labels, *scales, stats, varying = _saved(ctx)
        rows = (student, teacher, labels, *_times(scales, grad_loss), stats, *ctx.spec, varying, *ctx.place)
        if ctx.inplace and not _is_batched(grad_loss):
            grad = student.detach()
            _op.kd_grad_(grad, *rows[1:])
        else:
            grad = _op.kd_grad(*rows)
        return _final(grad, student, grad_loss), *(None,) * 10


class _LinearLoss(torch.autograd.Function):
    """Where not all logits are there: Σ over the rows, or ``late`` one loss a row and the gradient in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        teacher: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        teacher_ids: Tensor | None,
        labels: Tensor | None,
        hard_scale: Tensor | None,
        soft_scale: Tensor | None,
        z_scale: Tensor | None,
        varying: Tensor | None,
        numbers: tuple[Any, ...],
        late: bool,
        inplace: bool,
        place: Place,
        own_rows: bool,
    ) -> tuple[Tensor, ...]:
        sources = (student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids)
        tensors = (*sources, labels, hard_scale, soft_scale, z_scale)
        wants = [want and not late for want in ctx.needs_input_grad[:3]]
        ctx.numbers, ctx.late, ctx.inplace, ctx.place = numbers, late, inplace, place
        dirty = inplace and wants[0]
        if dirty:
            hard, soft, stats = _LinearLoss._over_logits(ctx, tensors, varying)
            ctx.mark_dirty(student)
            grads: list[Any] = [student, None, None]
        else:
            hard, soft, stats, *grads = _op.linear_rows(*tensors, *numbers[:7], varying, *numbers[7:], wants, *place)
        if own_rows:
            hard, soft = _counted(hard, hard_scale), _counted(soft, soft_scale)
        losses = _weighted(hard, soft, stats, hard_scale, soft_scale, z_scale)
        # soft leads a second derivative back to the inputs without keeping them, as in _ScalarLoss.
        if late:
            _save(ctx, *tensors, varying, soft)
        else:
            ctx.save_for_backward(*grads, soft)
        ctx.mark_non_differentiable(hard)
        ctx.set_materialize_grads(False)
        loss = losses if late else losses.sum()
        return (loss, hard, soft, student) if dirty else (loss, hard, soft)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _hard: None, _soft: None, grad_student: Tensor | None = None
    ) -> Any:
        if grad_student is not None:
            raise RuntimeError(_OVERWRITTEN)
        if grad_loss is None:
            return (None,) * 17
        wants = ctx.needs_input_grad[:3]
        if ctx.late:
            *tensors, varying, soft = _saved(ctx)
            tensors = [*tensors[:8], *_times(tensors[8:], grad_loss)]
            if ctx.inplace and not _is_batched(grad_loss):
                grads = [tensors[0].detach(), None, None]
                _LinearLoss._over_logits(ctx, (grads[0], *tensors[1:]), varying)
            else:
                numbers = (*ctx.numbers[:7], varying, *ctx.numbers[7:])
                grads = _op.linear_rows(*tensors, *numbers, list(wants), *ctx.place)[3:]
        else:
            *grads, soft = ctx.saved_tensors
            wanted = zip(grads, wants, strict=True)
            grads = [_scaled(grad, grad_loss, ctx.place.backend) if want else grad for grad, want in wanted]
        final = (_final(grad, soft, grad_loss) if want else None for grad, want in zip(grads, wants, strict=True))
        return *final, *(None,) * 14

    @staticmethod
    def _over_logits(ctx: Any, tensors: Sequence[Tensor | None], varying: Tensor | None) -> tuple[Tensor, ...]:
        student, _, _, log_probs, _, _, ids, *vectors = tensors
        *spec, _, _, _, _, tail, _, _ = ctx.numbers
        losses: tuple[Tensor, ...] = _op.sparse_rows_(
            student, log_probs, ids, *vectors, *spec, varying, tail, *ctx.place
        )
        return losses


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, temperature: float, varying: Tensor | None, dtype: torch.dtype, backend: str
    ) -> Tensor:
        log_probs: Tensor
        log_probs, lse = _op.log_softmax(logits, temperature, varying, dtype, backend)
        ctx.save_for_backward(logits, lse, varying)
        ctx.temperature, ctx.backend = temperature, backend
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, lse, varying = ctx.saved_tensors
        grad = _op.log_softmax_backward(grads[0], logits, lse, ctx.temperature, varying, ctx.backend)
        return _final(grad, logits, grads[0]), None, None, None, None


def kd_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    hard_scale: Tensor | None,
    soft_scale: Tensor | None,
    z_scale: Tensor | None,
    spec: RowSpec,
    *,
    per_row: bool,
    inplace: bool,
    place: Place,
    own_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, hard, soft) with a gradient to ``student``, or the sum of the losses: of a row

        loss = hard_scale·hard + soft_scale·soft + z_scale·lse(student)²

    ``own_rows``: a row may have one scale of 0 alone, where that term may be infinite and nevertheless is not there.
    """
    if not torch.is_grad_enabled():  # needs_input_grad tells of the tensor alone
        student = student.detach()
    spec, varying = _varying(spec)
    late = per_row or student.dtype == torch.float16
    function = _LossPerRow if late else _ScalarLoss
    loss, hard, soft = _apply(
        function, student, teacher, labels, hard_scale, soft_scale, z_scale, spec, varying, inplace, place, own_rows
    )[:3]
    return loss.sum() if late and not per_row else loss, hard, soft


def linear_rows(
    student: Tensor | LinearLogits,
    teacher: Tensor | LinearLogits | TopK | None,
    labels: Tensor | None,
    hard_scale: Tensor | None,
    soft_scale: Tensor | None,
    z_scale: Tensor | None,
    spec: RowSpec,
    *,
    per_row: bool,
    chunk_rows: int | None,
    place: Place,
    inplace: bool = False,
    own_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where one of the two is no tensor of logits, with gradients to the tensors of the student's."""
    ids, tail = None, ""
    if isinstance(teacher, TopK):
        ids, teacher, _, tail = teacher
    *of_student, scale, softcap = _as_linear(student)
    *of_teacher, teacher_scale, teacher_softcap = _as_linear(teacher)
    if not torch.is_grad_enabled():
        of_student = [t if t is None else t.detach() for t in of_student]
    of_teacher = [t if t is None else t.detach() for t in of_teacher]
    spec, varying = _varying(spec)
    autocast = _linear.autocast_dtype(of_student[0])
    late = per_row or _linear.logits_like(student, autocast).dtype == torch.float16
    numbers = (*spec, scale, softcap, teacher_scale, teacher_softcap, tail, autocast, chunk_rows)
    loss, hard, soft = _apply(
        _LinearLoss, *of_student, *of_teacher, ids, labels, hard_scale, soft_scale, z_scale, varying, numbers, late,
        inplace, place, own_rows,
    )[:3]  # fmt: skip
    return loss.sum() if late and not per_row else loss, hard, soft


def _as_linear(source: Tensor | LinearLogits | None) -> tuple[Any, ...]:
    """(hidden states, matrix, bias, scale, softcap); of logits, themselves and nothing."""
    return tuple(source) if isinstance(source, LinearLogits) else (source, None, None, 1.0, None)


def _varying(spec: RowSpec) -> tuple[RowSpec, Tensor | None]:
    """The numbers that the operators take, or in a compiled function a tensor of them, if they vary."""
    if not torch.compiler.is_compiling():
        return spec, None
    from fastkd import _traced

    varying = _traced.varying(spec.temperature, spec.c_t, spec.c_s, spec.w, spec.label_smoothing)
    if varying is not None:
        spec = RowSpec(1.0, spec.formula, 1.0, 0.0, 0.0, 0.0, spec.vocab_size)
    return spec, varying


class _HiddenLoss(_ScalarLoss):
    """Of hidden states: another forward, with no hard term. Its backward has Nones to spare, which PyTorch allows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, scale: Tensor, kind: int, backend: str
    ) -> tuple[Tensor | None, ...]:
        losses, grad = _op.hidden_rows(student, teacher, scale, kind, ctx.needs_input_grad[0], backend)
        ctx.save_for_backward(grad, losses)
        ctx.set_materialize_grads(False)
        ctx.place = Place(backend)
        return (losses * scale).sum(), None, losses


class _HiddenLossPerRow(torch.autograd.Function):
    """Of hidden states, one loss a row. Its sums are cheap to take again: backward starts from the inputs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, scale: Tensor, kind: int, backend: str) -> Tensor:
        losses: Tensor
        losses, _ = _op.hidden_rows(student, teacher, scale, kind, False, backend)
        _save(ctx, student, teacher, scale)
        ctx.kind, ctx.backend = kind, backend
        return losses * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, teacher, scale = _saved(ctx)
        (scale,) = _times([scale], grads[0])
        _, grad = _op.hidden_rows(student, teacher, scale, ctx.kind, True, ctx.backend)
        return _final(grad, student, grads[0]), *(None,) * 4


def hidden_rows(student: Tensor, teacher: Tensor, scale: Tensor, kind: int, *, per_row: bool, backend: str) -> Tensor:
    """``scale·loss`` of each row, or the sum, with a gradient to ``student``."""
    if not torch.is_grad_enabled():  # needs_input_grad tells of the tensor alone
        student = student.detach()
    loss: Tensor
    if per_row or student.dtype == torch.float16:
        loss = _apply(_HiddenLossPerRow, student, teacher, scale, kind, backend)
        return loss if per_row else loss.sum()
    loss = _apply(_HiddenLoss, student, teacher, scale, kind, backend)[0]
    return loss


def log_softmax(logits: Tensor, temperature: float, dtype: torch.dtype, backend: str) -> Tensor:
    varying = None
    if torch.compiler.is_compiling():
        from fastkd import _traced

        varying = _traced.varying(temperature)
        if varying is not None:
            temperature = 1.0
    log_probs: Tensor = _apply(_LogSoftmax, logits, temperature, varying, dtype, backend)
    return log_probs


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    try:
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "fastkd does not work within transforms of torch.func (grad, vmap, jvp, ...); take gradients by "
                "backward() or torch.autograd.grad, and many losses at once by reduction='none'"
            ) from error
        raise


def _is_batched(grad_loss: Tensor) -> bool:
    """Whether this stands for several grad_outputs (``is_grads_batched``), each of which gets a gradient of its own."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad_loss) or functorch.is_batchedtensor(grad_loss)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward. What torch.inference_mode() made cannot be saved, but can be kept."""
    ctx.kept = [t if _is_inference(t) else None for t in tensors]
    ctx.save_for_backward(*(t if kept is None else None for t, kept in zip(tensors, ctx.kept, strict=True)))


def _saved(ctx: Any) -> list[Any]:
    return [t if kept is None else kept for t, kept in zip(ctx.saved_tensors, ctx.kept, strict=True)]


def _times(scales: list[Tensor | None], grad_loss: Tensor) -> list[Tensor | None]:
    """A row that does not count has a scale of 0, whatever its grad_output: 0·inf is NaN."""
    return [s if s is None else torch.where(s == 0, 0.0, s * grad_loss) for s in scales]


def _is_inference(tensor: Tensor | None) -> bool:
    return tensor is not None and not torch.compiler.is_compiling() and tensor.is_inference()


def _counted(losses: Tensor, scale: Tensor | None) -> Tensor:
    """Without those of rows that do not count for this term."""
    return losses if scale is None else torch.where(scale != 0, losses, 0.0)


def _weighted(
    hard: Tensor,
    soft: Tensor,
    stats: Tensor,
    hard_scale: Tensor | None,
    soft_scale: Tensor | None,
    z_scale: Tensor | None,
) -> Tensor:
    terms = [(hard, hard_scale), (soft, soft_scale)]
    if z_scale is not None:  # lse(z)²; a row that was not read has no statistics
        lse = stats[..., PEAK_STUDENT] + stats[..., LOG_HARD]
        terms.append((torch.where(z_scale != 0, lse.square(), 0.0), z_scale))
    weighted: Tensor | None = None
    for losses, scale in terms:
        if scale is not None:
            weighted = losses * scale if weighted is None else torch.addcmul(weighted, losses, scale)
    assert weighted is not None
    return weighted
