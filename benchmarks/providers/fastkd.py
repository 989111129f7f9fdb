"""fastkd, on each of its backends."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastkd
from fastkd import _dispatch
from fastkd.bench.cases import HARD_WEIGHT, HIDDEN_LAYERS, SOFT_WEIGHT, TEMPERATURE, TOP_K, Case, Inputs
from fastkd.bench.provider import Loss, Provider


def unavailable(backend: str, device: str) -> str | None:
    return _dispatch.refusal(torch.empty(1, 1, device=device), backend)


def loss(backend: str, case: Case) -> Loss | None:
    if case.kind == HIDDEN_LAYERS:
        if not hasattr(_dispatch.backend(backend), "hidden_rows"):
            return None
        return lambda inputs: fastkd.hidden_loss(inputs.student, inputs.teacher, backend=backend)
    if case.kind == TOP_K and not hasattr(_dispatch.backend(backend), "rest_rows"):
        return None
    if case.kind == "log_softmax":
        return lambda inputs: fastkd.log_softmax(inputs.student, temperature=TEMPERATURE, backend=backend)

    def run(inputs: Inputs) -> Tensor:
        student, teacher = Output.apply(inputs.student) if case.inplace else inputs.student, inputs.teacher
        if inputs.heads:
            student, teacher = map(fastkd.LinearLogits, (student, teacher), inputs.heads)
        if inputs.ids is not None:
            teacher = fastkd.TopK(inputs.ids, teacher, TEMPERATURE)
        return fastkd.kd_loss(
            student,
            teacher,
            inputs.labels,
            temperature=TEMPERATURE,
            hard_weight=HARD_WEIGHT if case.terms != "soft" else 0.0,
            soft_weight=SOFT_WEIGHT if case.terms != "hard" else 0.0,
            divergence=fastkd.JSD(0.5) if case.divergence == "jsd" else case.divergence,
            inplace_backward=case.inplace,
            backend=backend,
        )

    return run


class Output(torch.autograd.Function):
    """A leaf may not be overwritten: its values as the output of a model, without a copy."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


PROVIDERS = tuple(
    Provider(f"fastkd {name}", partial(unavailable, name), partial(loss, name)) for name in _dispatch.NAMES
)
