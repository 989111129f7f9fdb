"""The judge: the loss in float64, from the textbook definitions, differentiated by autograd.

It imports only torch and shares nothing with the package. Nothing here is fast, in place or clever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


class Parts(NamedTuple):
    """The loss, and the means of its two terms over the rows that count for them, unweighted."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


def kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p·log(p/q), with 0·log(0/q) = 0."""
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def log(p: Tensor) -> Tensor:
    """log p, without a gradient where p = 0."""
    return torch.where(p > 0, torch.where(p > 0, p, 1.0).log(), -math.inf)


def forward_kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    return kl(log_t.exp(), log_t, log_s)


def reverse_kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(p_s‖p_t): infinite where the student has mass and the teacher none. Such a row has no gradient: 0."""
    infinite = ((log_s > -math.inf) & (log_t == -math.inf)).any(-1)
    finite_log_t = torch.where(infinite.unsqueeze(-1), 0.0, log_t)
    return torch.where(infinite, math.inf, kl(log_s.exp(), log_s, finite_log_t))


def symmetric_kl(forward: float) -> Divergence:
    """Both directions. An infinite reverse one leaves the row no gradient at all."""

    def divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
        reverse = reverse_kl(log_t, log_s)
        both = forward * forward_kl(log_t, log_s) + (1.0 - forward) * reverse
        return torch.where(reverse == math.inf, math.inf, both)

    return divergence


def cross_entropy(log_t: Tensor, log_s: Tensor) -> Tensor:
    p_t = log_t.exp()
    return -(p_t * torch.where(p_t > 0, log_s, 0.0)).sum(-1)


def tvd(log_t: Tensor, log_s: Tensor) -> Tensor:
    return 0.5 * (log_t.exp() - log_s.exp()).abs().sum(-1)


def jsd(beta: float) -> Divergence:
    def divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
        p_t, p_s = log_t.exp(), log_s.exp()
        log_m = log(beta * p_t + (1.0 - beta) * p_s)
        return beta * kl(p_t, log_t, log_m) + (1.0 - beta) * kl(p_s, log_s, log_m)

    return divergence


def skew_kl(lam: float) -> Divergence:
    def divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
        return kl(log_t.exp(), log_t, log(lam * log_t.exp() + (1.0 - lam) * log_s.exp()))

    return divergence


def skew_reverse_kl(lam: float) -> Divergence:
    def divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
        return kl(log_s.exp(), log_s, log((1.0 - lam) * log_t.exp() + lam * log_s.exp()))

    return divergence


def family(c_t: float, c_s: float, w: float) -> Divergence:
    """c_t·KL(p_t‖m) + c_s·KL(p_s‖m), m = w·p_t + (1−w)·p_s, for 0 < w < 1."""

    def divergence(log_t: Tensor, log_s: Tensor) -> Tensor:
        p_t, p_s = log_t.exp(), log_s.exp()
        log_m = log(w * p_t + (1.0 - w) * p_s)
        return c_t * kl(p_t, log_t, log_m) + c_s * kl(p_s, log_s, log_m)

    return divergence


def is_infinite_without_mass(divergence: Divergence) -> bool:
    """Of the teacher's where the student has some, as reverse KL is."""
    return bool(divergence(torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5]).log()) == math.inf)


class Listed(NamedTuple):
    """A teacher who lists K tokens of a row."""

    ids: Tensor  # (..., K), −1 for none
    log_probs: Tensor
    tail: str


def listed_divergence(divergence: Divergence, teacher: Listed, z: Tensor) -> Tensor:
    """Of one row: z [V] is the student's, over T; ids and log-probabilities are [K]."""
    keep = teacher.ids >= 0
    ids, log_t, log_q = teacher.ids[keep].long(), teacher.log_probs.double()[keep], torch.log_softmax(z, -1)
    log_s = log_q[ids]
    if teacher.tail == "bucket":
        outside = torch.ones_like(z, dtype=torch.bool)
        outside[ids] = False
        if outside.any():
            least = 2.0**-24 if is_infinite_without_mass(divergence) else 0.0
            rest = (1.0 - log_t.exp().sum()).clamp(min=least)
            log_t = torch.cat((log_t, rest.log().reshape(1)))
            log_s = torch.cat((log_s, torch.logsumexp(log_q[outside], -1, keepdim=True)))
        log_t = torch.log_softmax(log_t, -1)  # for what rounding brought over 1
    elif not len(ids):
        return 0.0 * z.sum()
    elif teacher.tail == "renormalize":
        everywhere = torch.full_like(z.detach(), -math.inf)
        everywhere[ids] = torch.log_softmax(log_t, -1)
        log_t, log_s = everywhere, log_q
    elif teacher.tail == "support":
        log_t, log_s = torch.log_softmax(log_t, -1), torch.log_softmax(log_s, -1)
    else:
        assert teacher.tail == "truncate"
    return divergence(log_t, log_s)


def hard_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """−Σ q·log softmax(z), q = (1−ε)·1_y + ε/V."""
    log_p = torch.log_softmax(logits, -1)
    of_label = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing == 0.0:
        return of_label
    return (1.0 - label_smoothing) * of_label - label_smoothing * log_p.mean(-1)


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "mse",
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Σ (s − t)²/H, or 1 − cos(s, t), over the rows that count, in float64. A vector of zeros has no direction."""
    counts = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask
    s, t = student.double()[counts], teacher.double()[counts]
    if kind == "mse":
        rows = ((s - t) ** 2).sum(-1) / s.shape[-1]
    else:
        zero = (s == 0).all(-1) | (t == 0).all(-1)
        one = torch.ones_like(s)
        unit_s, unit_t = (
            x / x.norm(dim=-1, keepdim=True) for x in (torch.where(zero[:, None], one, v) for v in (s, t))
        )
        rows = torch.where(zero, 1.0, ((unit_s - unit_t) ** 2).sum(-1) / 2)
    if token_weights is not None:
        rows = rows * token_weights.double()[counts]
    if reduction == "none":
        return torch.zeros(counts.shape, dtype=torch.float64, device=s.device).masked_scatter(counts, rows)
    return rows.sum() if reduction == "sum" else rows.sum() / (max(len(s), 1) if num_items is None else num_items)


def kd_loss(
    student: Tensor,
    teacher: Tensor | Listed,
    labels: Tensor | None = None,
    *,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    hard_weight: float | None = None,
    soft_weight: float = 1.0,
    scale_soft_by_t2: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    soft_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | tuple[float | Tensor, float | Tensor] | None = None,
    vocab_size: int | None = None,
    z_loss_weight: float = 0.0,
) -> Parts:
    """α·CE(y, σ(z)) + β·T²·D(σ(u/T), σ(z/T)) + ζ·(log Σ exp z)², each over the rows that count for it, in float64.

    The last one's are those of the first, or without labels, of the second.
    """
    counts = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if labels is not None:
        counts = counts & (labels != ignore_index)
    if mask is not None:
        counts = counts & mask
    soft_counts = counts if soft_mask is None else soft_mask

    z = student.double()[..., :vocab_size]
    hard = z.new_zeros(int(counts.sum()))
    if labels is not None:
        hard = hard_loss(z[counts], labels[counts], label_smoothing)
    if isinstance(teacher, Listed):
        listed = zip(
            teacher.ids[soft_counts], teacher.log_probs[soft_counts], z[soft_counts] / temperature, strict=True
        )
        rows = [listed_divergence(divergence, Listed(*ids, teacher.tail), of) for *ids, of in listed]
        soft = torch.stack(rows) if rows else z.new_zeros(0)
    else:
        u = teacher.double()[..., :vocab_size]
        log_t, log_s = (torch.log_softmax(logits[soft_counts] / temperature, -1) for logits in (u, z))
        soft = divergence(log_t, log_s)
    z_counts = soft_counts if labels is None else counts
    z_losses = torch.logsumexp(z[z_counts], -1) ** 2

    t2 = temperature**2 if scale_soft_by_t2 else 1.0
    hard_items, soft_items = num_items if isinstance(num_items, tuple) else (num_items, num_items)
    loss = z.new_zeros(counts.shape)
    for weight, losses, rows, items in (
        (hard_weight, hard, counts, hard_items), ((soft_weight or 0.0) * t2, soft, soft_counts, soft_items),
        (z_loss_weight, z_losses, z_counts, hard_items),
    ):  # fmt: skip
        if not weight:  # a term of weight 0 is absent, even where it is infinite
            continue
        weights = weight if token_weights is None else weight * token_weights.double()[rows]
        number = 1.0
        if reduction == "mean":
            number = max(len(losses), 1) if items is None else items
        loss = loss + torch.zeros_like(loss).masked_scatter(rows, weights * losses / number)
    if reduction != "none":
        loss = loss.sum()
    return Parts(loss, hard.detach().sum() / max(len(hard), 1), soft.detach().sum() / max(len(soft), 1))
