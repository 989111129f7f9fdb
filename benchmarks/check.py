"""The error of a contender against float64, before it is timed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastkd.bench.cases import HIDDEN_STATES, Case, Inputs
from fastkd.bench.provider import Loss
from fastkd.bench.providers.eager import formula

# Elements that are computed in float64 at a time: few enough that malloc keeps their memory, which is slow to get anew.
CHUNK = 2**20
# What is shown as wrong: ten times what the storage type's own rounding gives, and float32's for the loss.
LOSS_LIMIT = 1e-4
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3}


def call(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """(the loss or the log-probabilities, the student's gradient if there is one): what is timed."""
    value = loss(inputs)
    if not inputs.student.requires_grad or not value.requires_grad:
        return value, None
    return value, torch.autograd.grad(value, (inputs.student, *inputs.heads[:1]), inputs.grad_output)[0]


@functools.lru_cache(maxsize=1)
def shared_inputs(case: Case, device: str) -> Inputs:
    """Of the contenders that leave them alone."""
    return case.inputs(device)


def errors(case: Case, loss: Loss, inputs: Inputs, device: str) -> dict[str, float | None]:
    """Relative errors of the value and of the gradient, as vectors."""
    value, grad = call(loss, inputs)
    expected, expected_grad = reference(case, device)
    return {
        "value": relative_error(value.detach(), expected),
        "gradient": None if grad is None or expected_grad is None else relative_error(grad, expected_grad),
    }


@functools.lru_cache(maxsize=1)  # every contender of a case is held against it
def reference(case: Case, device: str) -> tuple[Tensor, Tensor | None]:
    """(value, gradient) by float64, some rows at a time; what has a number a logit is kept in float32."""
    inputs = shared_inputs(case, device)
    heads = tuple(head.detach().double() for head in inputs.heads)
    values, grads = [], []
    step = max(1, CHUNK // case.vocab)
    for start in range(0, case.rows, step):
        rows = slice(start, start + step)
        student = inputs.student.detach()[rows].double().requires_grad_(inputs.student.requires_grad)
        grad_output = (inputs.grad_output[rows] if inputs.grad_output.dim() else inputs.grad_output).double()
        teacher, labels = inputs.teacher[rows].double(), inputs.labels[rows]
        ids = None if inputs.ids is None else inputs.ids[rows]
        exact = formula(case, Inputs(student, teacher, labels, grad_output, heads, ids))
        if exact.dim() == 0:
            exact = exact * (len(student) / case.rows)  # its share of the mean over all rows
        values.append(exact.detach() if exact.dim() == 0 else exact.detach().float())
        if exact.requires_grad:
            grads.append(torch.autograd.grad(exact, student, grad_output)[0].float())
    value = torch.cat(values) if values[0].dim() else torch.stack(values).sum()
    return value, torch.cat(grads) if grads else None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    error, norm = 0.0, 0.0
    for some, exact in zip(found.flatten().split(CHUNK), expected.flatten().split(CHUNK), strict=True):
        error += (some.double() - exact).square().sum().item()
        norm += exact.double().square().sum().item()
    return (error / norm) ** 0.5


def is_wrong(case: Case, found: dict[str, float | None]) -> bool:
    rounds = case.kind in ("log_softmax", HIDDEN_STATES)  # what is compared, or the logits behind it
    value_limit = GRADIENT_LIMIT[case.dtype] if rounds else LOSS_LIMIT
    limits = {"value": value_limit, "gradient": GRADIENT_LIMIT[case.dtype]}
    return any(error is not None and not error <= limits[name] for name, error in found.items())
