"""The public functions: arguments are checked, weights, masks and reductions folded into scales of the rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, TypeAlias, TypedDict, overload

import torch
from torch import Tensor

from fastkd import _autograd, _dispatch, _keywords, _linear, _slices, _validate
from fastkd._request import WHOLE, Place, RowSpec
from fastkd.divergences import Divergence, resolve
from fastkd.sources import LinearLogits, TopK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

# What a distribution is given by.
Logits: TypeAlias = Tensor | LinearLogits
Teacher: TypeAlias = Logits | TopK
# A denominator of the mean, and what num_items may be: one, or with soft_mask one for each term.
Items: TypeAlias = "int | float | Tensor"
NumItems: TypeAlias = "Items | tuple[Items, Items] | None"


class KDLossParts(NamedTuple):
    """The loss, and the two terms it is made of: detached means, unweighted and without T².

    Each is over the rows that count for it, and of these the ones whose token weight is not 0. A z-loss is in the loss
    alone.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor


class Settings(TypedDict, total=False):
    """The keywords of :func:`kd_loss` that a :class:`fastkd.KDLoss` keeps, ``return_parts`` apart."""

    temperature: float
    hard_weight: float | None
    soft_weight: float
    divergence: str | Divergence
    scale_soft_by_t2: bool
    label_smoothing: float
    ignore_index: int
    reduction: str
    vocab_size: int | None
    z_loss_weight: float
    inplace_backward: bool
    chunk_rows: int | None
    backend: str | None
    vocab_group: ProcessGroup | None


class _Keywords(Settings, total=False):
    """All of them, ``return_parts`` apart, on which the result's type depends."""

    mask: Tensor | None
    soft_mask: Tensor | None
    token_weights: Tensor | None
    num_items: NumItems


@overload
def kd_loss(
    student_logits: Logits,
    teacher_logits: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Logits,
    teacher_logits: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[_Keywords],
) -> KDLossParts: ...
@overload
def kd_loss(
    student_logits: Logits,
    teacher_logits: Teacher,
    labels: Tensor | None = None,
    *,
    return_parts: bool,
    **keywords: Unpack[_Keywords],
) -> Tensor | KDLossParts: ...
@_keywords.named_arguments
def kd_loss(
    student_logits: Logits,
    teacher_logits: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    hard_weight: float | None = None,
    soft_weight: float = 1.0,
    divergence: str | Divergence = "forward_kl",
    scale_soft_by_t2: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    soft_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: NumItems = None,
    vocab_size: int | None = None,
    z_loss_weight: float = 0.0,
    inplace_backward: bool = False,
    return_parts: bool = False,
    chunk_rows: int | None = None,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    **unknown: NoReturn,  # TorchScript stops here and shows this line: use torch.compile
) -> Tensor | KDLossParts:
    """Knowledge-distillation loss over logits, its gradient computed in the same pass wherever it can be.

    Per row ``hard_weight · CE(labels, student) + soft_weight · T² · D(softmax(teacher/T), softmax(student/T))``, the
    cross-entropy at temperature 1 (Hinton et al., 2015, Distilling the Knowledge in a Neural Network). Nothing is
    shifted: a causal language model's caller shifts. The teacher never receives a gradient, and there is no
    second-order gradient (asking for one raises).

    Args:
        student_logits: ``(..., V)`` float32, bfloat16, float16 or float64; arithmetic and loss are float32 (float64
            for float64), the gradient has the logits' dtype. ``-inf`` (a masked token) is legal, in the teacher too;
            where it makes a reverse KL infinite, the row's soft gradient is 0. Or a :class:`fastkd.LinearLogits`, whose
            logits are never all there: the loss, and the gradients of hidden states, matrix and bias, come from a
            chunk of rows at a time.
        teacher_logits: ``(..., V)``, same leading shape; its dtype may differ. Or a :class:`fastkd.LinearLogits`; or a
            :class:`fastkd.TopK`, a few tokens of each row. Of a row that counts, ids that are no tokens or twice there,
            and a mass above 1, raise on a CPU; on a GPU an id that is no token makes the row's loss NaN.
        labels: ``(...)`` int64 token ids, or None. A label outside ``[0, V)`` on a row that counts raises on a CPU and
            makes the row's loss NaN on a GPU, where a check would synchronise (see :func:`fastkd.check_labels`).
        temperature: T, of the soft term alone; above 0 and at most 1e19, beyond which T² overflows float32.
        hard_weight: weight of the cross-entropy. Must be given with labels (0.0: they only say which rows count).
        soft_weight: weight of the divergence.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"cross_entropy"`` (forward KL plus the teacher's entropy),
            ``"tvd"``, :func:`fastkd.JSD`, :func:`fastkd.SkewKL`, :func:`fastkd.SkewReverseKL`,
            :func:`fastkd.SymmetricKL`, or any :class:`fastkd.Divergence`.
        scale_soft_by_t2: multiply the soft term, value and gradient, by T².
        label_smoothing: in [0, 1), of the cross-entropy, as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: rows with this label do not count, for either term.
        mask: ``(...)`` bool; rows where it is False do not count. A row that does not count is never read.
        soft_mask: ``(...)`` bool; the rows that count for the soft term, where they are others than the hard term's:
            labels and ``mask`` then govern the hard term alone, and each mean is over its own term's rows. Without
            labels there is no hard term, and it does what ``mask`` does.
        token_weights: ``(...)`` float; multiplies each row's loss, not the denominator of the mean.
        reduction: ``"mean"`` over the rows that count (0 if there are none), ``"sum"``, or ``"none"``: ``(...)``.
        num_items: number or tensor of one element; the denominator of ``"mean"`` instead, for gradient accumulation;
            the mean of 0 items is 0. With ``soft_mask`` a pair, of the hard and of the soft term.
        vocab_size: only the first ``vocab_size`` columns are tokens; the others are not read and get gradient 0.
        z_loss_weight: adds this times ``(log Σ exp(student_logits))²`` to each row's loss, which keeps the normaliser
            near 1 (Chowdhery et al., 2022, PaLM, section 5). Its rows and its denominator are the cross-entropy's; it
            needs no labels.
        inplace_backward: write the gradient over ``student_logits``, which nothing else may then use.
        return_parts: return :class:`KDLossParts`; a term is then computed even if its weight is 0 (in a pass of its
            own), and the hard part is 0 without labels. A z-loss is in the loss and in neither part.
        chunk_rows: with a :class:`fastkd.LinearLogits`, how many rows' logits exist at once; None: as many as fit in
            512 MB, on a CPU in 64 MB.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"torch"``; None chooses by device (``python -m fastkd info``
            says why).
        vocab_group: of a vocabulary that lies in slices over the ranks of this process group, whose logits or matrices
            are this rank's columns: as many on each, in the order of the ranks, with ``vocab_size`` saying how many of
            the whole are tokens. Labels, masks and weights are the same on every rank, and ids those of the whole. So
            is the loss; a gradient is this rank's part of the whole one, and that of hidden states whole. Not given
            with a ``DTensor``, whose placements say it; then loss and gradients are of that type too, and the mean
            is over the global tensor.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what came and what is allowed.
        RuntimeError: the backend asked for by name cannot run here; a second derivative was asked for; a transform of
            ``torch.func`` is at work; or the ranks of a ``vocab_group`` differ in their arguments.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0]])
        >>> loss = fastkd.kd_loss(student, teacher, torch.tensor([0]), temperature=2.0, hard_weight=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (2.4844, torch.Size([1, 3]))
    """
    student, teacher, vectors = student_logits, teacher_logits, (labels, mask, soft_mask, token_weights)
    place, in_slices, spread = WHOLE, 0, None
    row_groups: tuple[str, ...] = ()
    if _validate.has_dtensor(student, teacher, *vectors):
        from fastkd import _dtensor

        spread = _dtensor.spread_of(student, vocab_group)
        student, teacher = spread.student(student), spread.teacher(teacher)
        labels, mask, soft_mask, token_weights = spread.vectors(vectors)
        place, in_slices, row_groups = spread.place, spread.in_slices, spread.row_groups
    elif vocab_group is not None:
        place, in_slices = _slices.place_in(vocab_group, student)

    def check() -> tuple[Divergence, Tensor, str]:
        if unknown:
            _keywords.check_keywords("kd_loss", kd_loss, unknown)
        member = resolve(divergence)
        like = _checked("student_logits", student, place)
        _validate.check_temperature(temperature)
        if isinstance(teacher, TopK):
            _validate.check_top_k("teacher_logits", teacher, like, temperature)
            _validate.check_tail("teacher_logits", teacher.tail, member.formula, member.w)
            teacher_like = like  # has no number of columns
        else:
            teacher_like = _checked("teacher_logits", teacher, place)
            _validate.check_device("teacher_logits", teacher_like, like)
        _validate.check_vocabularies(like, teacher_like, vocab_size, in_slices)
        _validate.check_bool("scale_soft_by_t2", scale_soft_by_t2)
        _validate.check_label_smoothing(label_smoothing)
        _validate.check_int("ignore_index", ignore_index)
        _validate.check_per_row("labels", labels, like, (torch.int64,))
        _validate.check_per_row("mask", mask, like, (torch.bool,))
        _validate.check_per_row("soft_mask", soft_mask, like, (torch.bool,))
        _validate.check_per_row("token_weights", token_weights, like, _validate.FLOAT_DTYPES)
        _validate.check_no_gradient("token_weights", token_weights)
        _validate.check_terms(hard_weight, soft_weight, labels, mask, soft_mask)
        _validate.check_reduction(reduction)
        if num_items is not None:
            pair = soft_mask is not None and labels is not None
            _validate.check_num_items(num_items, reduction, like, pair)
        _validate.check_bool("inplace_backward", inplace_backward)
        _validate.check_bool("return_parts", return_parts)
        _validate.check_number("z_loss_weight", z_loss_weight)
        _validate.check_chunk_rows(chunk_rows)
        if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
            if inplace_backward:
                raise ValueError(
                    "inplace_backward: got True with LinearLogits, whose logits are not there; must be False"
                )
        elif chunk_rows is not None:
            raise ValueError(f"chunk_rows: got {chunk_rows} with tensors of logits, which are all there; must be None")
        elif inplace_backward:
            _validate.check_inplace(student, teacher.log_probs if isinstance(teacher, TopK) else teacher)
        return member, like, _dispatch.requested(backend)

    member, like, name = _slices.raise_together(place, student, check)
    place = place._replace(backend=name)
    if labels is None and soft_mask is not None:  # the soft term is all there is
        mask, soft_mask = soft_mask, None
    rows: Callable[..., tuple[Tensor, Tensor, Tensor]]
    if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
        rows = partial(_autograd.linear_rows, chunk_rows=chunk_rows)
    elif isinstance(teacher, TopK):
        rows = partial(_autograd.linear_rows, chunk_rows=None, inplace=inplace_backward)
    else:
        teacher = teacher.detach() if teacher.requires_grad else teacher
        rows = partial(_autograd.kd_rows, inplace=inplace_backward)

    hard_items, soft_items = num_items if isinstance(num_items, tuple) else (num_items, None)
    hard_rows = soft_rows = _row_scale(
        like, labels, ignore_index, mask, token_weights, reduction, hard_items, row_groups
    )
    if soft_mask is not None and labels is not None:
        soft_rows = _row_scale(like, None, ignore_index, soft_mask, token_weights, reduction, soft_items, row_groups)
        labels = torch.where(hard_rows != 0, labels, 0)  # a row that the soft term alone counts needs one too
    spec = RowSpec(
        float(temperature), int(member.formula), member.c_t, member.c_s, member.w, float(label_smoothing),
        (in_slices or like.shape[-1]) if vocab_size is None else int(vocab_size),
    )  # fmt: skip
    has_hard = hard_weight is not None and hard_weight != 0
    has_z = z_loss_weight != 0
    has_soft = soft_weight != 0 or not (has_hard or has_z)
    hard_alone = soft_alone = None
    if return_parts:  # a part that is not in the loss by itself, lest a NaN of it reach the gradient
        with torch.no_grad():
            alone = partial(rows, student, z_scale=None, spec=spec, per_row=True, place=place)
            if not has_hard and labels is not None:
                hard_alone = alone(None, labels, hard_rows, None)[1]
            if soft_weight == 0:
                soft_alone = alone(teacher, None, None, soft_rows)[2]
    t2 = temperature * temperature if scale_soft_by_t2 else 1.0
    loss, hard, soft = rows(
        student,
        teacher if has_soft else None,
        labels if has_hard else None,
        hard_rows * float(hard_weight) if has_hard else None,  # type: ignore[arg-type]
        soft_rows * float(soft_weight * t2) if has_soft else None,
        hard_rows * float(z_loss_weight) if has_z else None,
        spec,
        per_row=reduction == "none",
        place=place,
        own_rows=soft_mask is not None,
    )
    if spread:
        loss = spread.loss(loss, per_row=reduction == "none")
    if not return_parts:
        return loss
    hard = _mean(hard if hard_alone is None else hard_alone, hard_rows, row_groups)
    soft = _mean(soft if soft_alone is None else soft_alone, soft_rows, row_groups)
    if spread:
        hard, soft = spread.replicated(hard), spread.replicated(soft)
    return KDLossParts(loss, hard, soft)


def log_softmax(
    logits: Tensor, *, temperature: float = 1.0, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """``log softmax(logits / temperature)`` over the last dimension, forward and backward each in one kernel.

    The backward recomputes the probabilities from the logits in float32, so it stays exact where the rounded output
    (bfloat16 log-probabilities are 3 % apart near -10) would not.

    Args:
        logits: ``(..., V)`` float32, bfloat16, float16 or float64.
        temperature: T > 0.
        dtype: of the result; the logits' by default.
        backend: as for :func:`kd_loss`.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what came and what is allowed.
        RuntimeError: the backend asked for by name cannot run here, or a second derivative was asked for.

    Example:
        >>> import torch, fastkd
        >>> fastkd.log_softmax(torch.zeros(1, 4), temperature=2.0).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    _validate.check_logits("logits", logits)
    _validate.check_temperature(temperature)
    if dtype is not None and dtype not in _validate.FLOAT_DTYPES:
        raise TypeError(f"dtype: got {dtype}, must be float32, bfloat16, float16 or float64")
    dtype = dtype or logits.dtype
    # Kernels that compute in float32 have no float64 to write.
    written = torch.float32 if dtype == torch.float64 and logits.dtype != torch.float64 else dtype
    return _autograd.log_softmax(logits, float(temperature), written, _dispatch.requested(backend)).to(dtype)


def _checked(name: str, source: Logits, place: Place = WHOLE) -> Tensor:
    """The logits, or what has their shape and dtype, and no memory. A slice of a vocabulary may have no columns."""
    least = 0 if place.group else 1
    if not isinstance(source, LinearLogits):
        _validate.check_logits(name, source, least=least)
        return source
    _validate.check_logits(f"{name}.hidden", source.hidden, "H")
    autocast = _linear.autocast_dtype(source.hidden)
    _validate.check_linear(name, source, autocast is not None, least)
    return _linear.logits_like(source, autocast)


def _row_scale(
    student_logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    token_weights: Tensor | None,
    reduction: str,
    num_items: Items | None,
    row_groups: tuple[str, ...] = (),
) -> Tensor:
    """What a row's loss is multiplied by, weights of the terms apart; 0 for a row that does not count. ``(...)``."""
    counts = None if labels is None else labels != ignore_index
    if mask is not None:
        counts = mask if counts is None else counts & mask
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    if counts is not None:
        scale = counts.to(dtype) if token_weights is None else torch.where(counts, token_weights.to(dtype), 0.0)
    elif token_weights is not None:
        scale = token_weights.to(dtype)
    else:
        scale = torch.ones(student_logits.shape[:-1], dtype=dtype, device=student_logits.device)
    if reduction != "mean":
        return scale
    if num_items is None:
        if row_groups:
            count = torch.ones_like(scale).count_nonzero() if counts is None else counts.count_nonzero()
            return scale / _slices.summed_over(count, row_groups).clamp_min(1)
        return scale / (max(scale.numel(), 1) if counts is None else counts.count_nonzero().clamp_min_(1))
    # Of 0 items the mean is 0.
    if not isinstance(num_items, Tensor):
        return scale / float(num_items) if num_items != 0 else scale * 0.0
    # All on its own device: a number of the CPU's then costs a GPU no wait.
    num_items = num_items.reshape(())
    return scale * torch.where(num_items != 0, 1.0 / num_items.to(dtype), 0.0)


def _mean(losses: Tensor, scale: Tensor, row_groups: tuple[str, ...]) -> Tensor:
    """Of the rows that count, of these the ones whose token weight is not 0."""
    total, count = losses.detach().sum(), scale.count_nonzero()
    total, count = (_slices.summed_over(number, row_groups) for number in (total, count))
    return total / count.clamp_min(1)
