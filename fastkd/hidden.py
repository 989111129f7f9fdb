"""The loss of hidden states: of one pair of layers, and the module over several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastkd import _autograd, _dispatch, _validate, functional
from fastkd._request import HiddenKind
from fastkd.layers import Pairs, check_pairs

KINDS = {"mse": HiddenKind.MSE, "cosine": HiddenKind.COSINE}


def hidden_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    kind: str = "mse",
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """How far a student's hidden states are from a teacher's, its gradient computed in the same pass.

    Per row of width H ``Σ (s − t)² / H`` (TinyBERT, Jiao et al., 2020), or ``1 − cos(s, t)`` (DistilBERT, Sanh et al.,
    2019; the squared distance of normalised states in PKD, Sun et al., 2019, is twice that). Masks, weights, reductions
    and denominators are those of :func:`kd_loss`, and so is what is true of gradients: the teacher gets none.

    Args:
        student_hidden: ``(..., H)`` float32, bfloat16, float16 or float64; arithmetic and loss are float32 (float64
            for float64), the gradient has its dtype. :class:`fastkd.HiddenLoss` projects it where widths differ.
        teacher_hidden: ``(..., H)``, the same shape; its dtype may differ.
        kind: ``"mse"`` or ``"cosine"``. A vector of zeros has no direction: its cosine is 0, the loss 1, and the
            gradient 0.
        mask: ``(...)`` bool; rows where it is False (padding) do not count, and are never read.
        token_weights: ``(...)`` float; multiplies each row's loss, not the denominator of the mean.
        reduction: ``"mean"`` over the rows that count (0 if there are none), ``"sum"``, or ``"none"``: ``(...)``.
        num_items: number or tensor of one element; the denominator of ``"mean"`` instead, for gradient accumulation;
            the mean of 0 items is 0.
        backend: ``"triton"``, ``"cpu"`` or ``"torch"`` (``"cuda"`` has no such kernel); None chooses by device.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what came and what is allowed.
        RuntimeError: the backend asked for by name cannot run here; a second derivative was asked for; or a transform
            of ``torch.func`` is at work.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [9.0, 9.0]])
        >>> loss = fastkd.hidden_loss(student, teacher, mask=torch.tensor([True, False]))
        >>> loss.backward()
        >>> loss.item(), student.grad.tolist()
        (2.0, [[0.0, 2.0], [0.0, 0.0]])
    """
    of = "student_hidden"
    _validate.check_one_of("kind", kind, tuple(KINDS))
    _validate.check_logits("student_hidden", student_hidden, "H")
    _validate.check_logits("teacher_hidden", teacher_hidden, "H")
    _validate.check_hidden(student_hidden, teacher_hidden)
    _validate.check_device("teacher_hidden", teacher_hidden, student_hidden, of)
    _validate.check_per_row("mask", mask, student_hidden, (torch.bool,), of)
    _validate.check_per_row("token_weights", token_weights, student_hidden, _validate.FLOAT_DTYPES, of)
    _validate.check_no_gradient("token_weights", token_weights)
    _validate.check_reduction(reduction)
    if num_items is not None:
        _validate.check_num_items(num_items, reduction, student_hidden, pair=False, of=of)
    scale = functional._row_scale(student_hidden, None, 0, mask, token_weights, reduction, num_items)
    return _autograd.hidden_rows(
        student_hidden,
        teacher_hidden.detach(),
        scale,
        int(KINDS[kind]),
        per_row=reduction == "none",
        backend=_dispatch.requested(backend),
    )


class HiddenLossParts(NamedTuple):
    """The loss, and what it is the weighted mean of: the loss of each pair, detached and unweighted, ``(pairs,)``."""

    loss: Tensor
    pairs: Tensor


class HiddenLoss(nn.Module):
    """The weighted mean of :func:`fastkd.hidden_loss` over pairs of layers, with a projection where widths differ.

    Where ``student_size`` is not ``teacher_size`` each pair has a ``nn.Linear`` of its own, from the student's width to
    the teacher's (FitNets, Romero et al., 2015; TinyBERT, Jiao et al., 2020). Those are parameters to be trained with
    the student's, and to be thrown away with this module after: give them to the same optimizer,
    ``AdamW([*student.parameters(), *hidden_loss.parameters()])``. Under DDP or FSDP, have this module inside what is
    wrapped, or wrap it too; its gradients are not averaged otherwise. It needs the student's dtype and device, or
    autocast.

    A projected state lives until its loss is computed; then only its gradient is kept for backward.

    Args:
        pairs: (student's index, teacher's index) into the two tuples of hidden states, as :func:`fastkd.layer_map`
            gives them.
        student_size: width of the student's hidden states.
        teacher_size: width of the teacher's.
        kind: ``"mse"`` or ``"cosine"``.
        weights: one number > 0 a pair; all the same by default.
        projection: ``"linear"``, or None: none, and the widths must be equal.
        backend: as for :func:`fastkd.hidden_loss`.

    Called with the two tuples of hidden states ``(batch, length, H)`` that Hugging Face models return for
    ``output_hidden_states=True`` (or any two sequences of tensors, such as :meth:`fastkd.capture.take` gives), and
    ``mask``, ``token_weights`` and ``num_items`` of :func:`fastkd.hidden_loss`, the mask being
    ``attention_mask.bool()``. With ``return_parts=True`` it returns :class:`fastkd.HiddenLossParts`.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what came and what is allowed.

    Example:
        >>> import torch, fastkd
        >>> loss_fn = fastkd.HiddenLoss(fastkd.layer_map(2, 4), student_size=8, teacher_size=16)
        >>> student, teacher = [torch.randn(3, 5, 8)] * 3, [torch.randn(3, 5, 16)] * 5
        >>> loss_fn(student, teacher, mask=torch.ones(3, 5, dtype=torch.bool)).shape
        torch.Size([])
        >>> [name for name, _ in loss_fn.named_parameters()]
        ['projections.0.weight', 'projections.0.bias', 'projections.1.weight', 'projections.1.bias']
    """

    def __init__(
        self,
        pairs: Pairs,
        student_size: int,
        teacher_size: int,
        *,
        kind: str = "mse",
        weights: Sequence[float] | None = None,
        projection: str | None = "linear",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.pairs = check_pairs("pairs", pairs)
        for name, size in (("student_size", student_size), ("teacher_size", teacher_size)):
            _validate.check_int(name, size)
            if size < 1:
                raise ValueError(f"{name}: got {size}, must be >= 1")
        _validate.check_one_of("kind", kind, tuple(KINDS))
        if projection not in ("linear", None):
            raise ValueError(f"projection: got {projection!r}, must be 'linear' or None")
        if projection is None and student_size != teacher_size:
            raise ValueError(
                f"projection: got None, must be 'linear' where student_size, {student_size}, is not teacher_size, "
                f"{teacher_size}"
            )
        self.student_size, self.teacher_size, self.kind, self.backend = student_size, teacher_size, kind, backend
        self.weights = self._checked_weights(weights)
        self.projections = nn.ModuleList(
            nn.Linear(student_size, teacher_size) for _ in self.pairs if student_size != teacher_size
        )

    @overload
    def forward(
        self,
        student_hidden_states: Sequence[Tensor],
        teacher_hidden_states: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        return_parts: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        student_hidden_states: Sequence[Tensor],
        teacher_hidden_states: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        return_parts: Literal[True],
    ) -> HiddenLossParts: ...
    def forward(
        self,
        student_hidden_states: Sequence[Tensor],
        teacher_hidden_states: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        return_parts: bool = False,
    ) -> Tensor | HiddenLossParts:
        losses = []
        for index, (i, j) in enumerate(self.pairs):
            student = _layer("student_hidden_states", student_hidden_states, i, "student_size", self.student_size)
            teacher = _layer("teacher_hidden_states", teacher_hidden_states, j, "teacher_size", self.teacher_size)
            _validate.check_per_row(
                "token_weights", token_weights, student, _validate.FLOAT_DTYPES, "student_hidden_states"
            )
            # Into the rows' weights, so that the gradient is written as it is to be, once.
            dtype = torch.promote_types(student.dtype, torch.float32)
            weight = student.new_full(student.shape[:-1], self.weights[index], dtype=dtype)
            losses.append(
                hidden_loss(
                    self.projections[index](student) if self.projections else student,
                    teacher,
                    kind=self.kind,
                    mask=mask,
                    token_weights=weight if token_weights is None else weight * token_weights,
                    num_items=num_items,
                    backend=self.backend,
                )
            )
        stacked = torch.stack(losses)
        if not return_parts:
            return stacked.sum()
        return HiddenLossParts(stacked.sum(), stacked.detach() / stacked.new_tensor(self.weights))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}, kind={self.kind!r}, weights={self.weights}"

    def _checked_weights(self, weights: Sequence[float] | None) -> list[float]:
        """Of sum 1."""
        if weights is not None and not isinstance(weights, Iterable):
            raise TypeError(f"weights: got {type(weights).__name__}, must be a sequence of numbers, one a pair")
        weights = [1.0] * len(self.pairs) if weights is None else list(weights)
        if len(weights) != len(self.pairs):
            raise ValueError(f"weights: got {len(weights)}, must be one a pair, {len(self.pairs)}")
        for weight in weights:
            _validate.check_number("weights", weight)
            if not weight > 0:
                raise ValueError(f"weights: got {weight}, must be > 0; leave the pair out")
        return [weight / sum(weights) for weight in weights]


def _layer(name: str, states: Sequence[Tensor], index: int, size_name: str, size: int) -> Tensor:
    if not isinstance(states, (Sequence, Tensor)):
        raise TypeError(
            f"{name}: got {type(states).__name__}, must be a sequence of tensors, such as the hidden_states of a model "
            "that is called with output_hidden_states=True"
        )
    if index >= len(states):
        raise ValueError(f"{name}: got {len(states)} tensors, must be more than {index}, an index of pairs")
    _validate.check_logits(f"{name}[{index}]", states[index], "H")
    if states[index].shape[-1] != size:
        raise ValueError(f"{name}[{index}]: got a width of {states[index].shape[-1]}, must be {size_name}, {size}")
    return states[index]
