"""The row contract in plain PyTorch, for any device and every dtype, float64 included.

It works on chunks of rows small enough that their temporaries stay in cache, so peak memory is the inputs, the
gradient and one chunk. The arithmetic suits CPU vector units, on which a comparison or a ``where`` costs as much as
eight multiplications and ``exp`` twice ``exp2``, while ``nan_to_num`` costs no more than a copy (torch 2.13, AVX2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd._request import Formula, Mix, Rows, RowSpec

# Elements of a chunk: temporaries of 1 MB on a CPU; elsewhere enough to fill the device.
CHUNK_CPU, CHUNK_OTHER = 2**18, 2**25
LOG2_E = math.log2(math.e)
# Below this a KL is summed again from terms that are small themselves: the plain sum of p·log(p/q) is off by some 1e-7.
NEAR = 0.05

# glibc gives freed blocks back to the system above twice the size of the largest mapped block freed so far, by default
# 256 KB: every chunk would fault its temporaries in again, which trebles the time. Freeing 16 MB once raises that.
torch.empty(2**24, dtype=torch.uint8, device="cpu")


def unavailable() -> str | None:
    return None


def unsupported(logits: Tensor, teacher: Tensor | None) -> str | None:
    return None


def kd_rows(rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    """``stats`` are all 0: the gradient of this backend starts again from the logits."""
    stats.zero_()
    dead = _dead_rows(rows)
    for at, chunk, out in _chunks(rows, spec.vocab_size, grad):
        z = chunk.student.to(hard.dtype)
        peak = z.amax(-1, keepdim=True)
        temperature = 1.0 if chunk.soft_scale is None else spec.temperature
        exps = _exps(z, peak, temperature)
        dz = None
        if chunk.soft_scale is not None:
            soft[at], dz = _soft_term(spec, chunk, z, peak, exps, out is not None)
        if chunk.hard_scale is not None:
            hard[at], dz = _hard_term(spec, chunk, z, peak, _untempered(exps, z, peak, temperature), dz)
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


def scale_(grad: Tensor, scalar: Tensor) -> None:
    if grad.is_cpu and scalar.item() == 1:  # elsewhere, looking would synchronise
        return
    scalar = scalar.to(_compute_dtype(grad))
    for _, (chunk,) in _split(grad):
        # A 0-d operand alone would be rounded to the gradient's dtype first.
        chunk.copy_(chunk.to(scalar.dtype) * scalar)


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
    # log p_t − log p_s = (u − z)/T − shift. From the difference of the logits, which is exact where they are close.
    shift = (u_peak - z_peak) * inv_t + (u_sum / z_sum).log()
    if spec.formula == Formula.CROSS_ENTROPY:
        mean = _no_nan(p_t * (z - z_peak)).sum(-1, keepdim=True) * inv_t  # far from 0 that of z has no digits left
        soft, residual = z_sum.log() - mean, p_s.sub_(p_t)
    elif spec.formula == Formula.TOTAL_VARIATION:
        soft, residual = _total_variation(p_t, p_s)
    else:
        d = (u - z).mul_(inv_t).sub_(shift)
        soft, residual = _MIXTURES[spec.mix](spec, d, p_t, p_s)
    # What _no_nan hides of a NaN in the logits, the normalisers still show.
    factor = chunk.soft_scale.unsqueeze(1) * inv_t + 0.0 * shift
    return (soft + 0.0 * shift).clamp_(min=0.0).squeeze(1), residual.mul_(factor) if want_grad else None


def _total_variation(p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    difference = p_s - p_t
    soft = 0.5 * difference.abs().sum(-1, keepdim=True)
    return soft, _residual(difference.sign_().mul_(0.5).mul_(p_s), p_s)


def _student_mixture(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """m = p_s: Σg = −c_t."""
    soft = _near(_no_nan(p_t * d).sum(-1, keepdim=True), p_t, p_s, d)
    return spec.c_t * soft, p_s.sub_(p_t).mul_(spec.c_t)


def _teacher_mixture(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    """m = p_t. Where the student has mass and the teacher none, the value is inf and the row's gradient is set to 0."""
    product = _no_nan(p_s * d.neg_())
    soft = product.sum(-1, keepdim=True)
    residual = product.addcmul_(p_s, soft, value=-1.0).nan_to_num_(0.0, 0.0, 0.0).mul_(spec.c_s)
    return spec.c_s * _near(soft, p_s, p_t, d), residual


def _both_mixture(spec: RowSpec, d: Tensor, p_t: Tensor, p_s: Tensor) -> tuple[Tensor, Tensor]:
    # Beyond |d| = 60 one probability is nothing beside the other, and all that multiplies it here stays finite.
    d = _no_nan(d).clamp_(-60.0, 60.0)
    log_m_s = torch.expm1(d).mul_(spec.w).log1p_()  # log(m/p_s), with all its digits as d → 0
    log_m_t = log_m_s - d
    term = _difference(p_s, p_t, d).mul_(spec.c_t * (1.0 - spec.w) - spec.c_s * spec.w)
    term.addcmul_(p_t, log_m_t, value=-spec.c_t).addcmul_(p_s, log_m_s, value=-spec.c_s)
    g = p_t.mul_(spec.c_t).add_(p_s, alpha=spec.c_s).mul_(spec.w - 1.0).mul_(torch.exp(-log_m_s))
    g.add_(p_s, alpha=spec.c_s).addcmul_(p_s, log_m_s, value=-spec.c_s)
    return term.sum(-1, keepdim=True), _residual(g, p_s)


_MIXTURES = {Mix.STUDENT: _student_mixture, Mix.TEACHER: _teacher_mixture, Mix.BOTH: _both_mixture}


def _near(kl: Tensor, p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """``kl`` = Σ p·x, x = log(p/q), with rows near 0 summed as Σ (p·x + q − p), whose terms are >= 0."""
    if kl.is_cpu and bool((kl >= NEAR).all()):
        return kl
    x = _no_nan(x)
    return torch.where(kl < NEAR, _difference(q, p, x).add_(_no_nan(p * x)).sum(-1, keepdim=True), kl)


def _difference(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p − q, given d = log(q/p), with all its digits as d → 0."""
    return torch.expm1(d.abs().neg_()).mul_(torch.maximum(p, q)).mul_(d.sign())


def _residual(g: Tensor, p_s: Tensor) -> Tensor:
    """T·∂D/∂z = g − p_s·Σg, in place."""
    return g.addcmul_(p_s, g.sum(-1, keepdim=True), value=-1.0)


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
    hard = F.softplus(t)
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


def _no_nan(x: Tensor) -> Tensor:
    """In place: 0 for 0·inf and inf − inf. A NaN of the logits shows in the normalisers."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)


def _dead_rows(rows: Rows) -> Tensor | None:
    """Which rows have scales of 0 alone; None if it is known that there are none."""
    scales = [scale for scale in (rows.hard_scale, rows.soft_scale) if scale is not None]
    alive = scales[0] != 0 if len(scales) == 1 else (scales[0] != 0) | (scales[1] != 0)
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
