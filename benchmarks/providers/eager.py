"""The loss as people write it in PyTorch, in float32 whatever the logits are; and the same compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.bench.cases import HARD_WEIGHT, HIDDEN_LAYERS, HIDDEN_STATES, SOFT_WEIGHT, TEMPERATURE, TOP_K, Case, Inputs
from fastkd.bench.provider import Loss, Provider


def divergence(name: str, log_s: Tensor, log_t: Tensor) -> Tensor:
    """Mean over the rows, of log-probabilities."""

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    if name == "forward_kl":
        return kl(log_t, log_s)
    if name == "reverse_kl":
        return kl(log_s, log_t)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=log_s.dtype))
    return 0.5 * (kl(log_t, log_m) + kl(log_s, log_m))


def formula(case: Case, inputs: Inputs) -> Tensor:
    """At least in float32; in float64 it is the reference that all contenders are checked against."""
    student, teacher = (x if x.dtype == torch.float64 else x.float() for x in inputs.logits())
    if case.kind == HIDDEN_LAYERS:
        return F.mse_loss(student, teacher)
    if case.kind == "log_softmax":
        return F.log_softmax(student / TEMPERATURE, -1).to(inputs.grad_output.dtype)
    loss = student.new_zeros(())
    if case.terms != "soft":
        loss = loss + HARD_WEIGHT * F.cross_entropy(student, inputs.labels)
    if case.terms != "hard":
        log_s = F.log_softmax(student / TEMPERATURE, -1)
        if case.kind == TOP_K:
            log_t = torch.cat((teacher, torch.log1p(-teacher.exp().sum(-1, keepdim=True))), -1)
            rest = log_s.scatter(-1, inputs.ids, -torch.inf).logsumexp(-1, keepdim=True)
            log_s = torch.cat((log_s.gather(-1, inputs.ids), rest), -1)
        else:
            log_t = F.log_softmax(teacher / TEMPERATURE, -1)
        loss = loss + SOFT_WEIGHT * TEMPERATURE**2 * divergence(case.divergence, log_s, log_t)
    return loss


def eager(case: Case) -> Loss | None:
    return None if case.inplace else lambda inputs: formula(case, inputs)


def compiled(case: Case) -> Loss | None:
    if case.inplace:
        return None
    torch.compiler.reset()  # each case its own graph, for its own shape
    function = torch.compile(lambda inputs: formula(case, inputs), dynamic=False)
    return lambda inputs: function(inputs)


def linear_cross_entropy(case: Case) -> Loss | None:
    """PyTorch's own, which chunks rows and vocabulary, where there is no soft term."""
    if case.kind != HIDDEN_STATES or case.terms != "hard":
        return None
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda inputs: (
        HARD_WEIGHT * F.linear_cross_entropy(inputs.student, inputs.heads[0], inputs.labels, options=options)
    )


def lacks_linear_cross_entropy(device: str) -> str | None:
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs a newer PyTorch"


PROVIDERS = (
    Provider("eager", lambda device: None, eager),
    Provider("torch.compile", lambda device: None, compiled),
    Provider("linear_cross_entropy", lacks_linear_cross_entropy, linear_cross_entropy),
)
