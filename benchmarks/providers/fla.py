"""FLA: its cross-entropy, where there is no soft term (its KL works on hidden states)."""

from __future__ import annotations

from fastkd.bench.cases import HARD_WEIGHT, Case
from fastkd.bench.provider import Loss, Provider, needs_gpu_and


def fla(case: Case) -> Loss | None:
    if case.terms != "hard" or case.kind not in ("loss", "loss + backward") or case.inplace:
        return None
    from fla.modules import FusedCrossEntropyLoss

    cross_entropy = FusedCrossEntropyLoss()
    return lambda inputs: HARD_WEIGHT * cross_entropy(inputs.student, inputs.labels)


PROVIDERS = (Provider("FLA", needs_gpu_and("fla-core"), fla),)
