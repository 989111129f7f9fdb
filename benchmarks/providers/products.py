"""The floor from hidden states: products of matrices alone, both logits and the student's two gradients, each whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.bench.cases import HIDDEN_STATES, Case, Inputs
from fastkd.bench.provider import Loss, Provider


def products(case: Case) -> Loss | None:
    if case.kind != HIDDEN_STATES:
        return None

    def run(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            student_head, teacher_head = inputs.heads
            logits = inputs.student @ student_head.T
            if case.terms != "hard":
                inputs.teacher @ teacher_head.T
            logits @ student_head
            return logits.T @ inputs.student

    return run


PROVIDERS = (Provider("products", lambda device: None, products, is_floor=True),)
