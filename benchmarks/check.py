"""The error of a contender against float64, before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.bench.cases import Case, Inputs
from fastkd.bench.provider import Loss
from fastkd.bench.providers.eager import formula

# Elements of a chunk of rows in float64.
CHUNK = 2**25
# What is shown as wrong: ten times what the storage type's own rounding gives, and float32's for the loss.
LOSS_LIMIT = 1e-4
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}


def call(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """(the loss or the log-probabilities, the gradient if there is one): what is timed."""
    value = loss(inputs)
    if not inputs.student.requires_grad or not value.requires_grad:
        return value, None
    return value, torch.autograd.grad(value, inputs.student, inputs.grad_output)[0]


def errors(case: Case, loss: Loss, device: str) -> dict[str, float | None]:
    """Relative errors of the value and of the gradient, as vectors."""
    value, grad = call(loss, case.inputs(device))
    inputs = case.inputs(device)  # a contender may have overwritten its own
    value = value.detach().double()
    expected = torch.zeros_like(value)
    grad_error, grad_norm = 0.0, 0.0
    step = max(1, CHUNK // case.vocab)
    for start in range(0, case.rows, step):
        rows = slice(start, start + step)
        part = Inputs(
            inputs.student.detach()[rows].double().requires_grad_(case.kind != "loss"),
            inputs.teacher[rows].double(),
            inputs.labels[rows],
            inputs.grad_output[rows] if inputs.grad_output.dim() else inputs.grad_output,
        )
        share = 1.0 if case.kind == "log_softmax" else len(part.labels) / case.rows
        exact = formula(case, part._replace(grad_output=part.grad_output.double())) * share
        if case.kind == "log_softmax":
            expected[rows] = exact.detach()
        else:
            expected += exact.detach()
        if grad is not None:
            (exact_grad,) = torch.autograd.grad(exact, part.student, part.grad_output.double())
            grad_error += (grad[rows].double() - exact_grad).square().sum().item()
            grad_norm += exact_grad.square().sum().item()
    return {
        "value": ((value - expected).norm() / expected.norm()).item(),
        "gradient": None if grad is None else (grad_error / grad_norm) ** 0.5,
    }


def is_wrong(case: Case, found: dict[str, float | None]) -> bool:
    value_limit = GRADIENT_LIMIT[case.dtype] if case.kind == "log_softmax" else LOSS_LIMIT
    limits = {"value": value_limit, "gradient": GRADIENT_LIMIT[case.dtype]}
    return any(error is not None and not error <= limits[name] for name, error in found.items())
