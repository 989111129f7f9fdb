"""QuACK: its cross-entropy, where there is no soft term."""

from __future__ import annotations

from fastkd.bench.cases import HARD_WEIGHT, Case
from fastkd.bench.provider import Loss, Provider, needs_gpu_and


def quack(case: Case) -> Loss | None:
    if case.terms != "hard" or case.kind not in ("loss", "loss + backward") or case.inplace:
        return None
    from quack.cross_entropy import cross_entropy

    return lambda inputs: HARD_WEIGHT * cross_entropy(inputs.student, inputs.labels)


PROVIDERS = (Provider("QuACK", needs_gpu_and("quack-kernels"), quack),)
