"""FLA: its cross-entropy, where there is no soft term; from hidden states its KL, where there is no hard one."""

from __future__ import annotations

from fastkd.bench.cases import HARD_WEIGHT, HIDDEN_STATES, SOFT_WEIGHT, TEMPERATURE, Case
from fastkd.bench.provider import Loss, Provider, needs_gpu_and


def fla(case: Case) -> Loss | None:
    if case.terms != "hard" or case.kind not in ("loss", "loss + backward") or case.inplace:
        return None
    from fla.modules import FusedCrossEntropyLoss

    cross_entropy = FusedCrossEntropyLoss()
    return lambda inputs: HARD_WEIGHT * cross_entropy(inputs.student, inputs.labels)


def from_hidden_states(case: Case) -> Loss | None:
    """Its temperature is 1: hidden states divided by T give logits divided by T."""
    if case.kind != HIDDEN_STATES or case.terms != "soft" or case.divergence != "forward_kl":
        return None
    from fla.modules import FusedKLDivLoss

    kl = FusedKLDivLoss()
    return lambda inputs: (
        (SOFT_WEIGHT * TEMPERATURE**2) * kl(inputs.student / TEMPERATURE, inputs.teacher / TEMPERATURE, *inputs.heads)
    )


PROVIDERS = (
    Provider("FLA", needs_gpu_and("fla-core"), fla),
    Provider("FLA fused", needs_gpu_and("fla-core"), from_hidden_states),
)
