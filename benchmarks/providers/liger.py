"""Liger: its cross-entropy, and its KL or JSD on log-probabilities, composed to the same loss.

Its cross-entropy writes the gradient over its input, so the soft term comes first. Its JSD counts beta from the
student's side.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastkd.bench.cases import HARD_WEIGHT, SOFT_WEIGHT, TEMPERATURE, Case, Inputs
from fastkd.bench.provider import Loss, Provider, needs_gpu_and


def liger(case: Case) -> Loss | None:
    if case.kind == "log_softmax" or case.inplace:
        return None
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_jsd, liger_kl_div

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[case.divergence]

    def run(inputs: Inputs) -> Tensor:
        loss = inputs.student.new_zeros((), dtype=inputs.grad_output.dtype)
        if case.terms != "hard":
            log_s, log_t = (F.log_softmax(x.float() / TEMPERATURE, -1) for x in (inputs.student, inputs.teacher))
            if case.divergence == "forward_kl":
                soft = liger_kl_div(log_s, log_t, reduction="batchmean", log_target=True)
            else:
                soft = liger_jsd(log_s, log_t, beta=beta)
            loss = loss + SOFT_WEIGHT * TEMPERATURE**2 * soft
        if case.terms != "soft":
            loss = loss + HARD_WEIGHT * liger_cross_entropy(inputs.student, inputs.labels)
        return loss

    return run


PROVIDERS = (Provider("Liger", needs_gpu_and("liger_kernel"), liger, overwrites=True),)
