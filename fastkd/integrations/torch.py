"""PyTorch's own idiom, ``KLDivLoss()(log_softmax(s / T), softmax(t / T)) * T²``, as a module of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.modules.loss import _Loss

import fastkd


class KLDivLoss(_Loss):
    """``nn.KLDivLoss`` of logits: softmax, temperature and T² are within, and the gradient comes in the same pass.

    ``KLDivLoss(temperature=T)(student, teacher)`` is the value and the gradient of
    ``nn.KLDivLoss(reduction="batchmean")(log_softmax(student / T, -1), softmax(teacher / T, -1)) * T * T``, and right
    at logits of -inf too. Log-probabilities are logits; probabilities are not.

    Args:
        reduction: what PyTorch means by it. ``"batchmean"``: the sum over all rows by the size of the first dimension,
            which is the number of rows where logits are ``(N, V)``, and only there. ``"mean"``: by the number of
            elements, N·V, and so about V times too little. ``"sum"``. Not ``"none"``, whose elements are never there.
        temperature: T > 0.

    Shapes:
        input ``(..., V)``: the student's logits; target ``(..., V)``: the teacher's, which get no gradient.

    Raises:
        ValueError, TypeError: ``reduction``, or what :func:`fastkd.kd_loss` refuses.

    Example:
        >>> import torch
        >>> from fastkd.integrations.torch import KLDivLoss
        >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> round(KLDivLoss(temperature=2.0)(student, teacher).item(), 4)
        1.2806
    """

    def __init__(self, reduction: str = "batchmean", *, temperature: float = 1.0) -> None:
        super().__init__(reduction=reduction)
        if reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(
                f"reduction: got {reduction!r}, must be 'batchmean', 'mean' or 'sum'; "
                "fastkd.kd_loss(..., reduction='none') gives the loss of each row"
            )
        self.loss_fn = fastkd.KDLoss(temperature=temperature, reduction="sum" if reduction == "sum" else "mean")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        items = {"batchmean": input.shape[0], "mean": input.numel(), "sum": None}[self.reduction]
        return self.loss_fn(input, target, num_items=items)

    if TYPE_CHECKING:
        __call__ = forward
