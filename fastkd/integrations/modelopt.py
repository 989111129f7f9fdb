"""NVIDIA ModelOpt: the criterion of its logits, for ``mtd.convert`` and for its Hugging Face trainer."""

from __future__ import annotations

from typing import Any

import torch
from modelopt.torch.distill.plugins import huggingface
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

import fastkd
from fastkd.integrations.torch import KLDivLoss


class LogitsDistillationLoss(_Loss):
    """``modelopt.torch.distill.LogitsDistillationLoss``, with its arguments, values and T².

    Args:
        temperature: T > 0.
        reduction: ModelOpt's. ``"mean"``, its default, divides by the number of *elements*, N·V: a loss about V times
            less than the mean over tokens, which is ``"batchmean"`` for logits ``(N, V)`` (for ``(B, S, V)`` it divides
            by B). ``"none"`` gives the loss of each row, ``(...)``, for a mask of one's own; or ``"sum"``.

    Raises:
        ValueError, TypeError: a bad argument, and what :func:`fastkd.kd_loss` refuses.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.loss_fn = (
            fastkd.KDLoss(temperature=temperature, reduction="none")
            if reduction == "none"
            else KLDivLoss(reduction, temperature=temperature)
        )

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        return self.loss_fn(logits_s, logits_t)


class KDTrainer(huggingface.KDTrainer):
    """ModelOpt's trainer with this criterion on the logits as they are, neither cast nor copied.

    Labels of -100 do not count. Where the Trainer counts the items of all micro-batches of a step, the loss is divided
    by that, as the Trainer expects: ModelOpt's is the mean of each, so that its gradient is
    ``gradient_accumulation_steps`` times too large. With ``use_liger_kernel`` the loss is Liger's, and ModelOpt's own.
    """

    _last_teacher_outputs: Any

    def _standard_kd_loss(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
    ) -> Tensor:
        teacher_logits, self._last_teacher_outputs = self._last_teacher_outputs.logits, None
        if labels is None:  # all that have a next token
            labels = torch.zeros(teacher_logits.shape[:-1], dtype=torch.int64, device=teacher_logits.device)
        labels = F.pad(labels[..., 1:], (0, 1), value=huggingface.IGNORE_INDEX)
        loss = fastkd.kd_loss(
            outputs.logits,
            teacher_logits,
            mask=labels != huggingface.IGNORE_INDEX,
            temperature=self._kd_criterion._temperature,
            num_items=num_items_in_batch,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss
