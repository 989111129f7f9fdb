"""The row contract in plain PyTorch, for any device and every dtype, float64 included.

It works on chunks of rows small enough that their temporaries stay in cache, so peak memory is the inputs, the
gradient and one chunk. The arithmetic suits CPU vector units, on which a comparison or a ``where`` costs as much as
eight multiplications and ``exp`` twice ``exp2``, while ``nan_to_num`` costs no more than a copy (torch 2.13, AVX2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from fastkd._request import LOG_HARD, PEAK_STUDENT, PEAK_TEACHER, Formula, HiddenKind, Mix, Rows, RowSpec

# Elements of a chunk: temporaries of 1 MB on a CPU; elsewhere enough to fill the device.
CHUNK_CPU, CHUNK_OTHER = 2**18, 2**25
LOG2_E = math.log2(math.e)
# Below this a divergence is summed again from terms that are small themselves: plain ones are off by some 1e-7.
NEAR = 0.05
# (which rows, their tensors, z [R, n], its peak [R, 1], exp((z − peak)/T)) to (soft [R], its gradient [R, n] if wanted)
SoftTerm: TypeAlias = Callable[[slice, Rows, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

# glibc gives freed blocks back to the system above twice the size of the largest mapped block freed so far, by default
# 256 KB: every chunk would fault its temporaries in again, which trebles the time. Freeing 16 MB once raises that.
torch.empty(2**24, dtype=torch.uint8, device="cpu")


def unavailable() -> str | None:
    return None


def unsupported(logits: Tensor, teacher: Tensor | None) -> str | None:
    return None


def kd_rows(rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    """``stats`` hold what a z-loss needs, and else 0: the gradient of this backend starts again from the logits."""

    def soft_term(at: slice, chunk: Rows, z: Tensor, peak: Tensor, exps: Tensor) -> tuple[Tensor, Tensor | None]:
        return _soft_term(spec, chunk, z, peak, exps, grad is not None)

    _walk(rows, spec, hard, soft, stats, grad, soft_term)


def _walk(
    rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None, soft_term: SoftTerm
) -> None:
    """Chunk by chunk: the soft term, and what every row operation adds to it."""
    stats.zero_()
    dead = _dead_rows(rows)
    for at, chunk, out in _chunks(rows, spec.vocab_size, grad):
        z = chunk.student.to(hard.dtype)
        peak = z.amax(-1, keepdim=True)
        temperature = 1.0 if chunk.soft_scale is None else spec.temperature
        exps = _exps(z, peak, temperature)
        dz = None
        if chunk.soft_scale is not None:
            soft[at], dz = soft_term(at, chunk, z, peak, exps)
        if chunk.hard_scale is not None or chunk.z_scale is not None:
            exps = _untempered(exps, z, peak, temperature)
        if chunk.z_scale is not None:
            log_sum, dz = _z_loss(chunk.z_scale, peak, exps, dz, out is not None)
            stats[at, PEAK_STUDENT], stats[at, LOG_HARD] = peak.squeeze(1), log_sum
        if chunk.hard_scale is not None:
            hard[at], dz = _hard_term(spec, chunk, z, peak, exps, dz)
        if out is not None and dz is not None:
            # A row that does not count may hold NaN, which a factor of 0 would not remove.
            out[:, : spec.vocab_size] = dz if dead is None else torch.where(dead[at].unsqueeze(1), 0.0, dz)
            out[:, spec.vocab_size :] = 0.0
    for losses, scale in ((hard, rows.hard_scale), (soft, rows.soft_scale)):
        if scale is None:
            losses.zero_()
        elif dead is not None:
            losses.masked_fill_(dead, 0.0)


def kd_grad(rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
    hard, soft = torch.empty_like(stats[:, 0]), torch.empty_like(stats[:, 0])
    kd_rows(rows, spec, hard, soft, torch.empty_like(stats), grad)


def rest_rows(rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
    def soft_term(at: slice, chunk: Rows, z: Tensor, *exps: Tensor) -> tuple[Tensor, None]:
        _, c, total = _unlisted(z, listed[at], spec.temperature)
        stats[at, PEAK_TEACHER] = c.squeeze(1)
        return total.log().squeeze(1), None

    _walk(rows, spec, hard, rest, stats, None, soft_term)


def rest_grad(rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor) -> None:
    def soft_term(at: slice, chunk: Rows, z: Tensor, *exps: Tensor) -> tuple[Tensor, Tensor]:
        dz, _, total = _unlisted(z, listed[at], spec.temperature)
        of_outcome = outcome_grad[at] / spec.temperature
        dz.mul_((of_outcome[:, -1:] / total).masked_fill_(total == 0, 0.0))
        some = listed[at]
        dz.scatter_add_(1, some.long().clamp(min=0), of_outcome[:, :-1].masked_fill(some < 0, 0.0))
        return total.squeeze(1), dz

    hard, rest = torch.empty_like(stats[:, 0]), torch.empty_like(stats[:, 0])
    _walk(rows, spec, hard, rest, torch.empty_like(stats), grad, soft_term)


def scale_(grad: Tensor, scalar: Tensor) -> None:
    if grad.is_cpu and scalar.item() == 1:  # elsewhere, looking would synchronise
        return
    scalar = scalar.to(_compute_dtype(grad))
    for _, (chunk,) in _split(grad):
        # A 0-d operand alone would be rounded to the gradient's dtype first.
        chunk.copy_(chunk.to(scalar.dtype) * scalar)


@torch.no_grad()  # of a backward that keeps a graph, which would not let out= be
def hidden_rows(
    student: Tensor, teacher: Tensor, scale: Tensor, kind: int, losses: Tensor, grad: Tensor | None
) -> None:
    alive = scale != 0
    dead = None if alive.is_cpu and bool(alive.all()) else ~alive
    for at, (some, others, *out) in _split(student, teacher, *([] if grad is None else [grad])):
        s, t = some.to(losses.dtype), others.to(losses.dtype)
        loss, ds, factor = _HIDDEN[HiddenKind(kind)](s, t)
        losses[at] = loss.squeeze(1)
        for result in out:
            torch.mul(ds, factor * scale[at].unsqueeze(1), out=result)
            if dead is not None:  # a row that does not count may hold NaN, which a factor of 0 does not remove
                result.masked_fill_(dead[at].unsqueeze(1), 0.0)
    if dead is not None:
        losses.masked_fill_(dead, 0.0)


def log_softmax(logits: Tensor, out: Tensor, lse: Tensor, temperature: float) -> None:
    for at, (x, result) in _split(logits, out):
        z = x.to(lse.dtype)
        peak = z.amax(-1, keepdim=True)
        log_sum = _exps(z, peak, temperature).sum(-1, keepdim=True).log_()
        torch.cat((peak, log_sum), -1, out=lse[at])
        result.copy_((z - peak).div_(temperature).sub_(log_sum))


def log_softmax_backward(grad: Tensor, logits: Tensor, lse: Tensor, out: Tensor, temperature: float) -> None:
    for at, (dy, x, result) in _split(grad, logits, out):
        g = dy.to(lse.dtype)
        peak, log_sum = lse[at].chunk(2, -1)
        p = (x.to(lse.dtype) - peak).div_(temperature).sub_(log_sum).exp_()
        result.copy_(torch.addcmul(g, p, g.sum(-1, keepdim=True), value=-1.0).div_(temperature))


def _mean_square(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, float]:
    """(Σ (s − t)²/H [R, 1], its gradient [R, H] but for a factor, that factor)."""
    e = s - t
    return e.square().mean(-1, keepdim=True), e, 2.0 / s.shape[-1]


def _cosine(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of 1 − cos, as half the squared distance of unit vectors: it has digits as the two come together.

    A vector of zeros has no direction: the loss is 1, the gradient 0.
    """
    a, b = _inverse_norm(s), _inverse_norm(t)
    unit = s * a
    e = torch.addcmul(unit, t, b, value=-1.0)
    none = (a == 0) | (b == 0)
    loss = e.square().sum(-1, keepdim=True).mul_(0.5).masked_fill_(none, 1.0)
    return loss, e.addcmul_(unit, loss, value=-1.0), a.masked_fill(none, 0.0)


def _inverse_norm(x: Tensor) -> Tensor:
    """1/‖x‖ [R, 1]; 0 for zeros, NaN where the square is infinite."""
    square = x.square().sum(-1, keepdim=True)
    return (square.rsqrt() + 0.0 * square).masked_fill_(square == 0, 0.0)


_HIDDEN: dict[HiddenKind, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | float]]] = {
    HiddenKind.MSE: _mean_square,
    HiddenKind.COSINE: _cosine,
}


def _unlisted(z: Tensor, listed: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp((z − peak)/T) [R, n] of the columns that are not listed, 0 at those that are; their peak and sum [R, 1]."""
    columns = z.shape[1]
    is_listed = torch.zeros(len(z), columns + 1, dtype=torch.bool, device=z.device)
    index = listed.long()
    is_listed.scatter_(1, torch.where(index < 0, columns, index), True)
    u = z.masked_fill(is_listed[:, :-1], -math.inf)
    peak = u.amax(-1, keepdim=True)
    peak = peak.masked_fill_(peak == -math.inf, 0.0)
    exps = _exps(u, peak, temperature)
    return exps, peak, exps.sum(-1, keepdim=True)


def _soft_term(
    spec: RowSpec, chunk: Rows, z: Tensor, z_peak: Tensor, z_exps: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(soft [R], its gradient times soft_scale [R, n])."""
    assert chunk.teacher is not None and chunk.soft_scale is not None
    u = chunk.teacher.to(z.dtype)
    u_peak = u.amax(-1, keepdim=True)
    p_t = _exps(u, u_peak, spec.temperature)
    z_sum, u_sum = z_exps.sum(-1, keepdim=True), p_t.sum(-1, keepdim=True)
    p_t /= u_sum
    p_s = z_exps / z_sum
    inv_t = 1.0 / spec.temperature
    # d = log p_t − log p_s = (u − z)/T − shift: from the difference of the logits, which is exact where they are close,
    # and keeps its digits where they are not if their offset goes first.
    offset = ((u_peak - z_peak) / 8.0).round_() * 8.0
    if not offset.is_cpu or bool(offset.any()):
        u, u_peak = u - offset, u_peak - offset
    shift = (u_peak - z_peak) * inv_t + (u_sum / z_sum).log()
    d = _no_nan((u - z).mul_(inv_t).sub_(shift))
    if spec.formula == Formula.TOTAL_VARIATION:
        soft, residual = _total_variation(d, p_t, p_s)
    else:
        soft, residual = _far(spec, d, p_t, p_s)
        near = soft < _near_below(spec)
        if not near.is_cpu or bool(near.any()):
            near_soft, near_residual = _near(spec, d, p_t, p_s)
            soft, residual = torch.where(near, near_soft, soft), torch.where(near, near_residual, residual)
    if spec.formula == Formula.CROSS_ENTROPY:
        mean = _no_nan(p_t * (z - z_peak)).sum(-1, keepdim=True) * inv_t  # far from 0 that of z has no digits left
        soft = z_sum.log() - mean
    # What _no_nan hides of a NaN in the logits, the normalisers still show.
    factor = chunk.soft_scale.unsqueeze(1) * inv_t + 0.0 * shift
    return (soft + 0.0 * shift).clamp_(min=0.0).squeeze(1), residual.mul_(factor) if want_grad else None


# The residuals are T·∂D/∂z = g − p_s·G, G = Σ g, where any multiple of p_s may be added to g = ∂D/∂log p_s. That choice
# decides what cancels. With r = w/(1−w), κ = c_s·w − c_t·(1−w) and m = w·p_t + (1−w)·p_s,
#     g = p_s·(κ·p_t/m − c_s·log(1 + r·e^d))                    has its digits where the two are far apart, and
#     g = p_s·(κ·(p_t/m − 1) − c_s·log(1 + w·(e^d − 1)))        where they are close.


def _student_mixture(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """m = p_s: g = −c_t·p_t."""
    return spec.c_t * _no_nan(p_t * d).sum(-1, keepdim=True), (p_s - p_t).mul_(spec.c_t)


def _teacher_mixture(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """m = p_t: g = −c_s·p_s·(d − E_s[d]). Where the student has mass and the teacher none: inf, and a gradient of 0.

    The mean goes from d, not from p_s·d: that, where p_s is near 1, has been rounded at the size of a d of tens.
    """
    value = _no_nan(p_s * d).sum(-1, keepdim=True).neg_()
    slope = (d + value).nan_to_num_(0.0, 0.0, 0.0).mul_(-spec.c_s)
    return spec.c_s * value, _residual(slope.mul_(p_s), p_s)


def _both_mixture(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """y = d + log r: p_t/m = sigmoid(y)/w, log(m/p_s) = softplus(y) + log(1−w), log(m/p_t) = softplus(−y) + log w."""
    c_t, c_s, w = spec.c_t, spec.c_s, spec.w
    y = d + (math.log(w) - math.log1p(-w))
    softplus = _softplus(y)
    value = _no_nan(p_s * (softplus + math.log1p(-w))).mul_(-c_s)
    value.add_(_no_nan(p_t * (_softplus(-y) + math.log(w))), alpha=-c_t)
    slope = softplus.mul_(-c_s).add_(y.sigmoid_(), alpha=c_s - c_t * (1.0 - w) / w)
    return value.sum(-1, keepdim=True), _residual(_no_nan(p_s * slope), p_s)


def _far(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    soft, residual = _FAR[spec.summands[0].mix](spec, d, p_t, p_s)
    for other in spec.summands[1:]:
        value, more = _FAR[other.mix](other, d, p_t, p_s)
        residual = torch.where(value == math.inf, 0.0, residual.add_(more))  # an infinite reverse KL has no gradient
        soft = soft + value
    return soft, residual


_FAR = {Mix.STUDENT: _student_mixture, Mix.TEACHER: _teacher_mixture, Mix.BOTH: _both_mixture}


def _near_below(spec: RowSpec) -> float:
    """Below this the terms and the gradient of a divergence lose digits unless they are written for small d."""
    largest = -spec.c_t * math.log(spec.w) - spec.c_s * math.log1p(-spec.w) if spec.mix == Mix.BOTH else math.inf
    return min(NEAR * (spec.c_t + spec.c_s), largest / 4)


def _near(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """Every mixture where the two are close; the terms have the masses m − p added, so that each is >= 0."""
    d = _centred(d, p_t, p_s)
    excess = torch.expm1(d)  # p_t/p_s − 1
    value, g = torch.zeros_like(d), torch.zeros_like(d)
    for summand in spec.summands:
        c_t, c_s, w = summand.c_t, summand.c_s, summand.w
        m = torch.lerp(p_s, p_t, w)
        log_s = (excess * w).log1p_().neg_()  # log(p_s/m)
        value += c_t * _bregman(p_t, d + log_s, m) + c_s * _bregman(p_s, log_s, m)
        slope = (excess / (excess * w + 1.0)).mul_((c_s * w - c_t * (1.0 - w)) * (1.0 - w)).add_(log_s, alpha=c_s)
        g += slope.mul_(p_s)
    return value.sum(-1, keepdim=True), _residual(g, p_s)


def _centred(d: Tensor, p_t: Tensor, p_s: Tensor) -> Tensor:
    """d without what the rounding of the normalisers added to all columns, which shows in Σ (p_t − p_s) = 0.

    And within bounds beyond which a column has no mass on one side, so that all that multiplies it stays finite.
    """
    d = d.clamp(-80.0, 80.0)
    return d.sub_(_difference(d, p_t, p_s).sum(-1, keepdim=True))


def _difference(d: Tensor, p_t: Tensor, p_s: Tensor) -> Tensor:
    """p_t − p_s, with all its digits as d → 0."""
    return torch.where(d.abs() < 0.5, torch.expm1(d.clamp(-1.0, 1.0)).mul_(p_s), p_t - p_s)


def _bregman(p: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """p·x − p + q >= 0, given x = log(p/q), with all its digits as x → 0."""
    far = (p * x).add_(q).sub_(p)
    if p.dtype == torch.float64:
        return torch.where(x.abs() < 0.5, (torch.expm1(-x) + x).mul_(p), far)
    series = x * (-1.0 / 5040.0)  # of exp(−x) − 1 + x, 3e-7 relative at 1/2
    for factor in (1.0 / 720.0, -1.0 / 120.0, 1.0 / 24.0, -1.0 / 6.0):
        series.add_(factor).mul_(x)
    return torch.where(x.abs() < 0.5, series.add_(0.5).mul_(x).mul_(x).mul_(p), far)


def _total_variation(d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """g = p_s·[p_s > p_t] or −p_s·[p_s < p_t], whichever side has less of p_s; where they tie, half of it."""
    soft = 0.5 * (p_s - p_t).abs_().sum(-1, keepdim=True)
    near = soft < NEAR
    if not near.is_cpu or bool(near.any()):
        d = torch.where(near, _centred(d, p_t, p_s), d)
        soft = 0.5 * _difference(d, p_t, p_s).abs_().sum(-1, keepdim=True)
    above = d.sign().mul_(-0.5).add_(0.5)
    g = p_s * above
    grad_sum = g.sum(-1, keepdim=True)
    g_below = g - p_s
    return soft, torch.where(grad_sum <= 0.5, g.addcmul_(p_s, grad_sum, value=-1.0), _residual(g_below, p_s))


def _residual(g: Tensor, p_s: Tensor) -> Tensor:
    """T·∂D/∂z = g − p_s·Σg, in place."""
    return g.addcmul_(p_s, g.sum(-1, keepdim=True), value=-1.0)


def _z_loss(
    scale: Tensor, peak: Tensor, exps: Tensor, dz: Tensor | None, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(log Σ exps [R], dz + 2·scale·lse(z)·softmax(z) [R, n]), with ``exps`` = exp(z − peak)."""
    total = exps.sum(-1, keepdim=True)
    log_sum = total.log()
    if want_grad:
        factor = 2.0 * scale.unsqueeze(1) * (peak + log_sum) / total
        dz = exps * factor if dz is None else dz.addcmul_(exps, factor)
    return log_sum.squeeze(1), dz


def _hard_term(
    spec: RowSpec, chunk: Rows, z: Tensor, peak: Tensor, exps: Tensor, dz: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(hard [R], dz + its gradient times hard_scale [R, n]); ``exps`` = exp(z − peak) is consumed.

    The sum leaves the label's own entry out: with t = log of it over that entry, the cross-entropy is softplus(t) and
    1 − p_y = sigmoid(t), both with all their digits as p_y → 1.
    """
    assert chunk.labels is not None and chunk.hard_scale is not None
    label = chunk.labels.unsqueeze(1)
    scale = chunk.hard_scale.unsqueeze(1)
    if not z.is_cpu:  # on a CPU every label that counts has been checked
        scale = torch.where((label >= 0) & (label < spec.vocab_size), scale, math.nan)
    label = label.clamp(0, spec.vocab_size - 1)
    z_y = z.gather(1, label)
    exp_y = exps.gather(1, label)
    others = exps.scatter_(1, label, 0.0).sum(-1, keepdim=True)
    t = (peak - z_y) + others.log()
    hard = _softplus(t)
    grad_y = -t.sigmoid()
    exps.mul_(scale / (others + exp_y))
    if spec.label_smoothing:
        anchor = z_y.masked_fill(z_y == -math.inf, 0.0)  # far from 0 a mean of z has no digits left
        hard -= spec.label_smoothing * (z - anchor).mean(-1, keepdim=True)
        grad_y += spec.label_smoothing * (1.0 - 1.0 / spec.vocab_size)
        exps -= scale * (spec.label_smoothing / spec.vocab_size)
    exps.scatter_(1, label, grad_y * scale)
    return (hard + 0.0 * scale).squeeze(1), exps if dz is None else exps.add_(dz)


def _exps(x: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """exp((x − peak)/T)."""
    return (x - peak).mul_(LOG2_E / temperature).exp2_()


def _untempered(exps: Tensor, z: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """exp(z − peak) from exp((z − peak)/T), which may be consumed: a power where T is a small integer."""
    if temperature in (1.0, 2.0, 3.0):
        return exps.pow_(int(temperature))
    return _exps(z, peak, 1.0)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). PyTorch's own gives x above 20, which float64 tells from it."""
    return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0.0))


def _no_nan(x: Tensor) -> Tensor:
    """In place: 0 for 0·inf and inf − inf. A NaN of the logits shows in the normalisers."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)


def _dead_rows(rows: Rows) -> Tensor | None:
    """Which rows have scales of 0 alone; None if it is known that there are none."""
    scales = (rows.hard_scale, rows.soft_scale, rows.z_scale)
    alive = functools.reduce(torch.logical_or, (scale != 0 for scale in scales if scale is not None))
    return None if alive.is_cpu and bool(alive.all()) else ~alive


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(rows: Rows, vocab_size: int, grad: Tensor | None) -> Iterator[tuple[slice, Rows, Tensor | None]]:
    """(which rows, their tensors [R, n] and [R], where their gradient goes [R, V])."""
    matrices = [t for t in (rows.student, rows.teacher, grad) if t is not None]
    for at, parts in _split(*matrices):
        student, *others = parts
        out = others.pop() if grad is not None else None
        teacher = others.pop()[:, :vocab_size] if others else None
        vectors = (None if t is None else t[at] for t in rows[2:])
        yield at, Rows(student[:, :vocab_size], teacher, *vectors), out


def _split(*matrices: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Chunks [R, V_i] of [B, S, V_i] tensors, and which of the N = B·S rows they are."""
    outer, inner, columns = matrices[0].shape
    step = max(1, (CHUNK_CPU if matrices[0].is_cpu else CHUNK_OTHER) // columns)
    for b in range(outer):
        for start in range(0, inner, step):
            stop = min(start + step, inner)
            yield slice(b * inner + start, b * inner + stop), [matrix[b, start:stop] for matrix in matrices]
