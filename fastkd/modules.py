"""The module form of the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastkd.divergences import Divergence, resolve
from fastkd.functional import KDLossParts, kd_loss


class KDLoss(nn.Module):
    """:func:`fastkd.kd_loss` with its keywords stored; ``mask``, ``token_weights`` and ``num_items`` come at each call.

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
        self.keywords: dict[str, Any] = {
            "temperature": temperature,
            "hard_weight": hard_weight,
            "soft_weight": soft_weight,
            "divergence": resolve(divergence),
            "scale_soft_by_t2": scale_soft_by_t2,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "vocab_size": vocab_size,
            "inplace_backward": inplace_backward,
            "return_parts": return_parts,
            "backend": backend,
        }

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
            **self.keywords,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
