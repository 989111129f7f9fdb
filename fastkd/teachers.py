"""Sparse teachers made of dense ones, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd import _linear, _validate, functional
from fastkd.functional import Logits
from fastkd.sources import TopK


@torch.no_grad()
def top_k(teacher: Logits, k: int, *, temperature: float = 1.0, tail: str = "bucket") -> TopK:
    """The k most probable tokens of each row, with their log-probabilities of ``softmax(logits/T)`` over them all.

    Logits of a :class:`fastkd.LinearLogits` are never all there. Nothing here is differentiable.

    Args:
        teacher: logits ``(..., V)`` float32, bfloat16, float16 or float64, or a :class:`fastkd.LinearLogits`.
        k: at least 1 and at most V.
        temperature: T > 0.
        tail: what :class:`fastkd.TopK` says of the other tokens.

    Returns:
        ids ``(..., k)`` int64, the most probable first, and log-probabilities in float32 (float64 of float64).

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what came and what is allowed.

    Example:
        >>> import torch, fastkd
        >>> teacher = fastkd.top_k(torch.tensor([[0.1, 0.6, 0.3]]).log(), 2)
        >>> teacher.ids.tolist(), [round(p, 4) for p in teacher.log_probs[0].exp().tolist()]
        ([[1, 2]], [0.6, 0.3])
    """
    _validate.check_one_of("tail", tail, _validate.TAILS)
    shape = _check("k", k, teacher, temperature)
    if k > shape[-1]:
        raise ValueError(f"k: got {k}, must be at most {shape[-1]}, the vocabulary")
    parts = []
    for z in _chunks(teacher):
        largest, ids = z.topk(k)
        peak = largest[:, :1]
        log_sum = ((z - peak) / temperature).exp().sum(-1, keepdim=True).log()
        parts.append((ids, (largest - peak) / temperature - log_sum))
    ids, log_probs = (torch.cat(part).view(*shape[:-1], k) for part in zip(*parts, strict=True))
    return TopK(ids, log_probs, float(temperature), tail)


@torch.no_grad()
def sample_tokens(
    teacher: Logits, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> TopK:
    """n tokens a row drawn from ``softmax(logits/T)``, each with the share of the draws that it got.

    The gradient of forward KL with it is, in the mean over draws, that of the whole distribution, which that of the n
    most probable is not (Anshumann et al., 2025, Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs).

    Args:
        teacher: as for :func:`fastkd.top_k`.
        n: number of draws, with replacement; at least 1.
        temperature: T > 0.
        generator: of the random numbers, on the teacher's device; the default one if None.

    Returns:
        ids ``(..., n)`` int64, distinct in a row, padded with -1; the logarithm of their shares in float32 (float64 of
        float64); and ``tail="renormalize"``.

    Raises:
        ValueError, TypeError: a bad argument; the message names it, what came and what is allowed.

    Example:
        >>> import torch, fastkd
        >>> teacher = fastkd.sample_tokens(torch.tensor([[0.0, 50.0, 0.0]]), 3)
        >>> teacher.ids.tolist(), teacher.log_probs.exp().tolist()
        ([[1, -1, -1]], [[1.0, 0.0, 0.0]])
    """
    shape = _check("n", n, teacher, temperature)
    parts = []
    for z in _chunks(teacher):
        p = torch.softmax((z - z.amax(-1, keepdim=True)) / temperature, -1)
        drawn = torch.multinomial(p, n, replacement=True, generator=generator).sort(-1).values
        is_first = torch.ones_like(drawn, dtype=torch.bool)
        is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        place = is_first.cumsum(-1) - 1  # of each draw among the distinct ones
        counts = torch.zeros_like(p[:, :1]).repeat(1, n).scatter_add_(1, place, torch.ones_like(place, dtype=p.dtype))
        parts.append((torch.full_like(drawn, -1).scatter_(1, place, drawn), (counts / n).log_()))
    ids, log_probs = (torch.cat(part).view(*shape[:-1], n) for part in zip(*parts, strict=True))
    return TopK(ids, log_probs, float(temperature), "renormalize")


def _check(name: str, number: int, teacher: Logits, temperature: float) -> torch.Size:
    """Of the logits."""
    shape = functional._checked("teacher", teacher).shape
    _validate.check_int(name, number)
    if number < 1:
        raise ValueError(f"{name}: got {number}, must be >= 1")
    _validate.check_temperature(temperature)
    return shape


def _chunks(teacher: Logits) -> Iterator[Tensor]:
    """The logits [R, V] in float32, or float64."""
    for z in _linear.chunks(teacher):
        yield z.to(torch.promote_types(z.dtype, torch.float32))
