"""TRL: drop-ins for the losses of its GKD and distillation trainers, and those trainers with them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer as _DistillationTrainer
from trl.experimental.gkd import GKDTrainer as _GKDTrainer

import fastkd
from fastkd import LinearLogits
from fastkd.integrations.transformers import IGNORED, linear_logits


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss`` of TRL, in float32 whatever the logits' dtype, without copies of the logits.

    As there: ``beta`` weighs the teacher, 0 and 1 being forward and reverse KL; there is no T²; nothing is shifted.

    Args:
        student_logits, teacher_logits: ``(..., V)``.
        labels: ``(...)``; those that are -100 do not count.
        reduction: ``"batchmean"``: the sum by the number of labels that count, and without labels by the size of the
            first dimension. ``"mean"``: by the number of *elements* that count, rows times V. ``"sum"``. Not
            ``"none"``, which in TRL is elementwise: those values are never there.
        num_items_in_batch: instead of all of these, the sum by this number.

    Raises:
        ValueError, TypeError: ``reduction``, or what :func:`fastkd.kd_loss` refuses.
    """
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(
            f"reduction: got {reduction!r}, must be 'batchmean', 'mean' or 'sum': elementwise values are never there; "
            "fastkd.kd_loss(..., reduction='none') gives the divergence of each row"
        )
    mask = None if labels is None else labels != IGNORED
    items = num_items_in_batch
    if items is None and reduction == "batchmean" and mask is None:
        items = student_logits.shape[0]
    elif items is None and reduction == "mean":
        items = student_logits[..., 0].numel() if mask is None else mask.sum()
        items = items * student_logits.shape[-1]
    return fastkd.kd_loss(
        student_logits,
        teacher_logits,
        mask=mask,
        temperature=temperature,
        divergence=fastkd.JSD(beta),
        scale_soft_by_t2=False,
        reduction="sum" if items is None and reduction == "sum" else "mean",
        num_items=items,
    )


class GKDTrainer(_GKDTrainer):
    """TRL's ``GKDTrainer`` with :func:`generalized_jsd_loss`."""

    generalized_jsd_loss = staticmethod(generalized_jsd_loss)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``_chunked_divergence_loss`` of TRL's ``DistillationTrainer``: generalised JSD of hidden states and heads.

    Args:
        student_hidden_states: ``(..., H)``; teacher_hidden_states: ``(..., H_t)``, of the same positions.
        student_lm_head_weight, teacher_lm_head_weight: ``(V, H)`` and ``(V, H_t)``, whole (an FSDP2 shard's
            ``full_tensor()``); biases ``(V,)``.
        completion_mask: ``(...)`` bool or 0 and 1: which positions count.
        beta: weighs the teacher, as in :func:`generalized_jsd_loss`; no T² here either.
        num_items_in_batch: the denominator; by default the positions that count, or 1 if there are none.

    Returns:
        The loss; the sum of the student's entropies in nats, without a graph; and how many positions count.

    Raises:
        ValueError, TypeError: what :func:`fastkd.kd_loss` refuses.
    """
    student = LinearLogits(
        student_hidden_states,
        student_lm_head_weight,
        student_lm_head_bias,
        student_logit_scale,
        student_final_logit_softcapping,
    )
    teacher = LinearLogits(
        teacher_hidden_states,
        teacher_lm_head_weight,
        teacher_lm_head_bias,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
    )
    return _divergence(student, teacher, completion_mask, beta, num_items_in_batch, temperature)


class DistillationTrainer(_DistillationTrainer):
    """TRL's ``DistillationTrainer`` with :func:`chunked_divergence_loss`."""

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Of prompts and completions together; what else there is goes where the method has a name for it.
        both = {
            name: torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask")
        }
        known = inspect.signature(self._get_last_hidden_state).parameters
        arguments = {
            "input_ids": both["ids"],
            "attention_mask": both["mask"],
            "logits_to_keep": inputs["completion_ids"].shape[1],
            **{name: value for name, value in inputs.items() if name in known},
        }
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        self.teacher_model.eval()
        unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
        student_hidden = self._get_last_hidden_state(unwrapped_student, **arguments)
        with torch.no_grad():  # through the wrapper, within which sharded parameters are whole
            teacher_hidden = self._forward_redirection(
                self.teacher_model,
                unwrapped_teacher,
                self._get_last_hidden_state,
                unwrapped_teacher,
                **arguments,
            )
            teacher = linear_logits(unwrapped_teacher, teacher_hidden)
        student = linear_logits(unwrapped_student, student_hidden)
        return _divergence(student, teacher, mask, self.beta, num_items_in_batch, self.temperature)


def _divergence(
    student: LinearLogits,
    teacher: LinearLogits,
    completion_mask: Tensor,
    beta: float,
    num_items: Tensor | int | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = completion_mask != 0
    loss = fastkd.kd_loss(
        student,
        teacher,
        mask=mask,
        temperature=temperature,
        divergence=fastkd.JSD(beta),
        scale_soft_by_t2=False,
        num_items=num_items,
    )
    # H(p) = log V − KL(p‖uniform), whose logits are all 0 and take no memory.
    with torch.no_grad():
        vocab = student.weight.shape[0]
        uniform = student.hidden.new_zeros(()).expand(*mask.shape, vocab)
        distance = fastkd.kd_loss(
            student,
            uniform,
            mask=mask,
            temperature=temperature,
            divergence="reverse_kl",
            scale_soft_by_t2=False,
            reduction="sum",
        )
        count = mask.sum()
        return loss, math.log(vocab) * count - distance, count
