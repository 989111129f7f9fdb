"""The module forms of the losses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd import _validate
from fastkd.divergences import Divergence, resolve
from fastkd.functional import HIDDEN_KINDS, KDLossParts, hidden_loss, kd_loss
from fastkd.layers import Pairs, check_pairs


class KDLoss(nn.Module):
    """:func:`fastkd.kd_loss` with its keywords as attributes, which a schedule may change from call to call.

    ``mask``, ``token_weights`` and ``num_items`` come at each call.

    Example:
        >>> import torch, fastkd
        >>> loss_fn = fastkd.KDLoss(temperature=2.0, hard_weight=0.5, soft_weight=0.5)
        >>> logits = torch.zeros(2, 4)
        >>> loss_fn(logits, logits, torch.tensor([1, 3]))
        tensor(0.6931)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        hard_weight: float | None = None,
        soft_weight: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        scale_soft_by_t2: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_size: int | None = None,
        inplace_backward: bool = False,
        return_parts: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.soft_weight = soft_weight
        self.divergence = resolve(divergence)
        self.scale_soft_by_t2 = scale_soft_by_t2
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.inplace_backward = inplace_backward
        self.return_parts = return_parts
        self.backend = backend

    def keywords(self) -> dict[str, Any]:
        """What :func:`fastkd.kd_loss` is called with at every call."""
        return {name: getattr(self, name) for name in _KEYWORDS}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Tensor | KDLossParts:
        return kd_loss(
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            token_weights=token_weights,
            num_items=num_items,
            **self.keywords(),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords().items())


_KEYWORDS = tuple(inspect.signature(KDLoss).parameters)


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
        _validate.check_one_of("kind", kind, tuple(HIDDEN_KINDS))
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
            # Into the rows' weights, so that the gradient is written as it is to be, once.
            weight = student.new_full(student.shape[:-1], self.weights[index], dtype=torch.float32)
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

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}, kind={self.kind!r}, weights={self.weights}"

    def _checked_weights(self, weights: Sequence[float] | None) -> list[float]:
        """Of sum 1."""
        weights = [1.0] * len(self.pairs) if weights is None else list(weights)
        if len(weights) != len(self.pairs):
            raise ValueError(f"weights: got {len(weights)}, must be one a pair, {len(self.pairs)}")
        for weight in weights:
            _validate.check_number("weights", weight)
            if not weight > 0:
                raise ValueError(f"weights: got {weight}, must be > 0; leave the pair out")
        return [weight / sum(weights) for weight in weights]


def _layer(name: str, states: Sequence[Tensor], index: int, size_name: str, size: int) -> Tensor:
    if index >= len(states):
        raise ValueError(f"{name}: got {len(states)} tensors, must be more than {index}, an index of pairs")
    if states[index].shape[-1] != size:
        raise ValueError(f"{name}[{index}]: got a width of {states[index].shape[-1]}, must be {size_name}, {size}")
    return states[index]
