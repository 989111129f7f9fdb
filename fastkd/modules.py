"""The module form of the loss."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fastkd.divergences import Divergence, resolve
from fastkd.functional import KDLossParts, kd_loss


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
