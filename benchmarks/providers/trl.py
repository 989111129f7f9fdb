"""TRL: the divergence of its distillation trainer, from hidden states, where there is no hard term. It has no T²."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.bench.cases import HIDDEN_STATES, SOFT_WEIGHT, TEMPERATURE, Case, Inputs
from fastkd.bench.provider import Loss, Provider, needs


def trl(case: Case) -> Loss | None:
    if case.kind != HIDDEN_STATES or case.terms != "soft":
        return None
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[case.divergence]

    def run(inputs: Inputs) -> Tensor:
        mask = torch.ones_like(inputs.labels).unsqueeze(0)
        hidden = (inputs.student.unsqueeze(0), inputs.teacher.unsqueeze(0))
        loss, *_ = _chunked_divergence_loss(*hidden, *inputs.heads, mask, beta, temperature=TEMPERATURE)
        return SOFT_WEIGHT * TEMPERATURE**2 * loss

    return run


PROVIDERS = (Provider("TRL", needs("trl"), trl),)
