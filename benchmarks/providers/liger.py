"""Liger: its cross-entropy, and its KL or JSD on log-probabilities, composed to the same loss; from hidden states its
chunked distillation loss.

Its cross-entropy writes the gradient over its input, so the soft term comes first. The chunked loss has no T².
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastkd.bench.cases import HARD_WEIGHT, HIDDEN_LAYERS, HIDDEN_STATES, SOFT_WEIGHT, TEMPERATURE, TOP_K, Case, Inputs
from fastkd.bench.provider import Loss, Provider, needs, needs_gpu_and

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def liger(case: Case) -> Loss | None:
    if case.kind in ("log_softmax", HIDDEN_STATES, HIDDEN_LAYERS, TOP_K) or case.inplace:
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_jsd, liger_kl_div

    def run(inputs: Inputs) -> Tensor:
        loss = inputs.student.new_zeros((), dtype=inputs.grad_output.dtype)
        if case.terms != "hard":
            log_s, log_t = (F.log_softmax(x.float() / TEMPERATURE, -1) for x in (inputs.student, inputs.teacher))
            if case.divergence == "forward_kl":
                soft = liger_kl_div(log_s, log_t, reduction="batchmean", log_target=True)
            else:
                soft = liger_jsd(log_s, log_t, beta=BETAS[case.divergence])
            loss = loss + SOFT_WEIGHT * TEMPERATURE**2 * soft
        if case.terms != "soft":
            loss = loss + HARD_WEIGHT * liger_cross_entropy(inputs.student, inputs.labels)
        return loss

    return run


def chunked(case: Case) -> Loss | None:
    if case.kind != HIDDEN_STATES:
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=HARD_WEIGHT if case.terms != "soft" else 0.0,
        weight_soft_loss=SOFT_WEIGHT * TEMPERATURE**2 if case.terms != "hard" else 0.0,
        beta=BETAS[case.divergence],
        temperature=TEMPERATURE,
    )

    def run(inputs: Inputs) -> Tensor:
        (student_head, teacher_head), labels = inputs.heads, inputs.labels
        return loss(inputs.student, student_head, inputs.teacher, teacher_head, labels)

    return run


PROVIDERS = (
    Provider("Liger", needs_gpu_and("liger-kernel"), liger, overwrites=True),
    Provider("Liger chunked", needs("liger-kernel"), chunked),
)
