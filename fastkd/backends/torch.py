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

from fastkd._request import (
    ELSEWHERE,
    GRAD_FORM,
    GRAD_SUM,
    LABEL_REST,
    LOG_HARD,
    LOG_RATIO,
    LOG_STUDENT,
    NEAR,
    PEAK_STUDENT,
    PEAK_TEACHER,
    Formula,
    HiddenKind,
    Mix,
    Rows,
    RowSpec,
)

# Elements of a chunk: temporaries of 1 MB on a CPU; elsewhere enough to fill the device.
CHUNK_CPU, CHUNK_OTHER = 2**18, 2**25
LOG2_E = math.log2(math.e)
# (which rows, their tensors, z [R, n], exp((z − peak)/T), their statistics) to (soft [R], its gradient [R, n] or None)
SoftTerm: TypeAlias = Callable[[slice, Rows, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]

# glibc gives freed blocks back to the system above twice the size of the largest mapped block freed so far, by default
# 256 KB: every chunk would fault its temporaries in again, which trebles the time. Freeing 16 MB once raises that.
torch.empty(2**24, dtype=torch.uint8, device="cpu")


def unavailable() -> str | None:
    return None


def unsupported(logits: Tensor, teacher: Tensor | None) -> str | None:
    return None


def kd_rows(rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    def soft_term(at: slice, chunk: Rows, z: Tensor, exps: Tensor, of_chunk: Tensor) -> tuple[Tensor, Tensor | None]:
        return _soft_term(spec, chunk, z, exps, of_chunk, grad is not None)

    stats.zero_()
    _walk(rows, spec, stats, grad, soft_term, (hard, soft))


def kd_grad(rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
    def soft_term(at: slice, chunk: Rows, z: Tensor, exps: Tensor, of_chunk: Tensor) -> tuple[Tensor, Tensor]:
        columns = _Columns(spec, chunk, z, exps, of_chunk)
        form = of_chunk[:, GRAD_FORM, None]
        is_near = form != 0
        g: Tensor | None
        if spec.summands[-1].mix == Mix.TEACHER:
            g = None
        elif spec.formula == Formula.TOTAL_VARIATION:
            g = _above(columns).addcmul_(columns.p_s, form, value=-1.0)
        elif is_near.is_cpu and not bool(is_near.any()):
            g = _far_g(spec, columns)
        elif is_near.is_cpu and bool(is_near.all()):
            g = _near(spec, columns)[1]
        else:
            g = torch.where(is_near, _near(spec, columns)[1], _far_g(spec, columns))
        return z[:, 0], _soft_gradient(spec, chunk, columns, g, of_chunk)

    _walk(rows, spec, stats, grad, soft_term)


def slice_sums(rows: Rows, spec: RowSpec, stats: Tensor, sums: Tensor) -> None:
    assert rows.soft_scale is not None
    for at, chunk, _ in _chunks(rows, spec.vocab_size, None, sums.dtype):
        z, of_chunk = chunk.student, stats[at]
        exps = _exps(z, of_chunk[:, PEAK_STUDENT, None], spec.temperature)
        columns = _Columns(spec, chunk, z, exps, of_chunk)
        if spec.formula == Formula.TOTAL_VARIATION:
            difference = columns.p_t - columns.p_s
            if not z.is_cpu or bool((0.5 * difference.abs().sum(-1) < NEAR).any()):
                difference = _difference(columns)
            above, below = _sides(columns)
            parts = 0.5 * difference.abs(), above, difference, below
        else:
            terms, g = _far(spec, columns)
            # With the masses m − p, whose sum over the row is 0, each is >= 0: where those of the slice are not small,
            # neither is the value.
            kappa = sum(one.imbalance for one in spec.summands)
            terms = torch.add(terms, columns.p_t - columns.p_s, alpha=kappa)  # apart from g, which it may be
            parts = (terms, g) * 2
            if not z.is_cpu or bool((terms.sum(-1) < NEAR * (spec.c_t + spec.c_s)).any()):
                parts = *parts[:2], *_near(spec, columns)
        torch.stack([part.sum(-1) for part in parts], -1, out=sums[at])
    sums.masked_fill_((rows.soft_scale == 0).unsqueeze(1), 0.0)


def _walk(
    rows: Rows,
    spec: RowSpec,
    stats: Tensor,
    grad: Tensor | None,
    soft_term: SoftTerm,
    losses: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Chunk by chunk: the soft term, and what every row operation adds to it. Without losses ``stats`` are known."""
    dead = _dead_rows(rows)
    for at, chunk, out in _chunks(rows, spec.vocab_size, grad, stats.dtype):
        z, of_chunk = chunk.student, stats[at]
        if losses:
            of_chunk[:, PEAK_STUDENT] = _finite(z.amax(-1))
        peak = of_chunk[:, PEAK_STUDENT, None]
        temperature = 1.0 if chunk.soft_scale is None else spec.temperature
        exps = _exps(z, peak, temperature)
        dz = None
        if chunk.soft_scale is not None:
            soft, dz = soft_term(at, chunk, z, exps, of_chunk)
            if losses:
                losses[1][at] = soft
        if chunk.hard_scale is not None or chunk.z_scale is not None:
            exps = _untempered(exps, z, peak, temperature)
            if losses:
                losses[0][at] = _hard_term(spec, chunk, z, exps, of_chunk)
            if out is not None:
                dz = _hard_gradient(spec, chunk, exps, of_chunk, dz)
        if out is not None and dz is not None:
            # A row that does not count may hold NaN, which a factor of 0 would not remove.
            out[:, : spec.vocab_size] = dz if dead is None else torch.where(dead[at].unsqueeze(1), 0.0, dz)
            out[:, spec.vocab_size :] = 0.0
    for loss, scale in zip(losses or (), (rows.hard_scale, rows.soft_scale), strict=False):
        if scale is None:
            loss.zero_()
        elif dead is not None:
            loss.masked_fill_(dead, 0.0)


def rest_rows(rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
    def soft_term(at: slice, chunk: Rows, z: Tensor, exps: Tensor, of_chunk: Tensor) -> tuple[Tensor, None]:
        u = z.masked_fill(_is_listed(z, listed[at]), -math.inf)
        of_chunk[:, PEAK_TEACHER] = _finite(u.amax(-1))
        of_chunk[:, LOG_RATIO] = _exps(u, of_chunk[:, PEAK_TEACHER, None], spec.temperature).sum(-1).log_()
        return of_chunk[:, LOG_RATIO], None

    _walk(rows, spec, stats, None, soft_term, (hard, rest))


def rest_grad(rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor) -> None:
    def soft_term(at: slice, chunk: Rows, z: Tensor, exps: Tensor, of_chunk: Tensor) -> tuple[Tensor, Tensor]:
        rest, some = of_chunk[:, LOG_RATIO, None], listed[at]
        of_outcome = outcome_grad[at] / spec.temperature
        u = z.masked_fill(_is_listed(z, some), -math.inf)
        dz = _exps(u, of_chunk[:, PEAK_TEACHER, None], spec.temperature)
        dz.mul_((of_outcome[:, -1:] * torch.exp(-rest)).masked_fill_(rest == -math.inf, 0.0))
        dz.scatter_add_(1, some.long().clamp(min=0), of_outcome[:, :-1].masked_fill(some < 0, 0.0))
        return z[:, 0], dz

    _walk(rows, spec, stats, grad, soft_term)


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


def _is_listed(z: Tensor, listed: Tensor) -> Tensor:
    """[R, n]."""
    columns = z.shape[1]
    marks = torch.zeros(len(z), columns + 1, dtype=torch.bool, device=z.device)
    index = listed.long()
    return marks.scatter_(1, torch.where(index < 0, columns, index), True)[:, :-1]


class _Columns:
    """What the terms of a divergence are made of, [R, n], each made when it is asked for.

    From the row's normalisers alone, whoever summed them; ``u_exps``, exp((u − peak)/T) if at hand, are consumed.
    """

    def __init__(
        self, spec: RowSpec, chunk: Rows, z: Tensor, z_exps: Tensor, stats: Tensor, u_exps: Tensor | None = None
    ) -> None:
        self._spec, self._chunk, self._z, self._z_exps, self._stats = spec, chunk, z, z_exps, stats
        self._u_exps = u_exps

    @functools.cached_property
    def d(self) -> Tensor:
        """log p_t − log p_s."""
        return _log_ratio(self._spec, self._chunk, self._z, self._stats)

    @functools.cached_property
    def p_t(self) -> Tensor:
        exps = _teacher_exps(self._spec, self._chunk, self._stats) if self._u_exps is None else self._u_exps
        return exps.mul_(torch.exp(-(self._stats[:, LOG_STUDENT, None] + self._stats[:, LOG_RATIO, None])))

    @functools.cached_property
    def p_s(self) -> Tensor:
        return self._z_exps * torch.exp(-self._stats[:, LOG_STUDENT, None])


def _log_ratio(spec: RowSpec, chunk: Rows, z: Tensor, stats: Tensor) -> Tensor:
    """d = (u − z)/T − shift: from the difference of the logits, which is exact where they are close.

    Where they are not it keeps its digits if their offset goes first, from the ones that are farther from 0.
    """
    assert chunk.teacher is not None
    u, z_peak, u_peak = chunk.teacher, stats[:, PEAK_STUDENT, None], stats[:, PEAK_TEACHER, None]
    offset = ((u_peak - z_peak) / 8.0).round_() * 8.0
    if not offset.is_cpu or bool(offset.any()):
        of_student = z_peak.abs() > u_peak.abs()
        z_offset, u_offset = torch.where(of_student, -offset, 0.0), torch.where(of_student, 0.0, offset)
        z, z_peak, u, u_peak = z - z_offset, z_peak - z_offset, u - u_offset, u_peak - u_offset
    inv_t = 1.0 / spec.temperature
    return _no_nan((u - z).mul_(inv_t).sub_((u_peak - z_peak) * inv_t + stats[:, LOG_RATIO, None]))


def _teacher_exps(spec: RowSpec, chunk: Rows, stats: Tensor) -> Tensor:
    assert chunk.teacher is not None
    return _exps(chunk.teacher, stats[:, PEAK_TEACHER, None], spec.temperature)


def _soft_term(
    spec: RowSpec, chunk: Rows, z: Tensor, z_exps: Tensor, stats: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(soft [R], its gradient times soft_scale [R, n]), and the statistics that are the soft term's."""
    assert chunk.teacher is not None
    stats[:, PEAK_TEACHER] = _finite(chunk.teacher.amax(-1))
    u_exps = _teacher_exps(spec, chunk, stats)
    z_sum, u_sum = z_exps.sum(-1), u_exps.sum(-1)
    stats[:, LOG_STUDENT] = z_sum.log()
    # Where the student has no mass, the teacher's alone.
    stats[:, LOG_RATIO] = (u_sum / torch.where(z_sum == 0, 1.0, z_sum)).log_()
    columns = _Columns(spec, chunk, z, z_exps, stats, u_exps)
    broken = 0.0 * (stats[:, LOG_STUDENT] + stats[:, LOG_RATIO])  # what _no_nan hides of a NaN in the logits
    if spec.formula == Formula.TOTAL_VARIATION:
        soft, g = _total_variation(columns, stats)
    else:
        terms, g = _far(spec, columns)
        soft = terms.sum(-1) + broken
        stats[:, GRAD_SUM] = -spec.c_t if spec.summands[-1].mix == Mix.STUDENT else g.sum(-1)
        near = soft < spec.near_below
        if not near.is_cpu or bool(near.any()):
            _centre(columns, stats, near)
            near_terms, near_g = _near(spec, columns)
            soft, g = torch.where(near, near_terms.sum(-1), soft), torch.where(near.unsqueeze(1), near_g, g)
            stats[:, GRAD_SUM] = torch.where(near, near_g.sum(-1), stats[:, GRAD_SUM])
            stats[:, GRAD_FORM] = near.to(stats.dtype)
    if spec.formula == Formula.CROSS_ENTROPY:
        relative = z - stats[:, PEAK_STUDENT, None]  # far from 0 the mean of z has no digits left
        soft = stats[:, LOG_STUDENT] - _no_nan(columns.p_t * relative).sum(-1) / spec.temperature
    soft = (soft + broken).clamp_(min=0.0)
    return soft, _soft_gradient(spec, chunk, columns, g, stats) if want_grad else None


def _soft_gradient(spec: RowSpec, chunk: Rows, columns: _Columns, g: Tensor | None, stats: Tensor) -> Tensor:
    """``soft_scale·∂D/∂z``, T·∂D/∂z being g − p_s·G, written over ``g``.

    Of a reverse KL, which has no use for ``g``, G goes from d, not from p_s·d: that, where p_s is near 1, has been
    rounded at the size of a d of tens. And where it is infinite there is no gradient.
    """
    assert chunk.soft_scale is not None
    grad_sum, last = stats[:, GRAD_SUM, None], spec.summands[-1]
    if last.mix == Mix.TEACHER:
        slope = (columns.d + grad_sum / last.c_s).nan_to_num_(0.0, 0.0, 0.0)
        dz = slope.mul_(columns.p_s).mul_(-last.c_s)
        if last is not spec:
            is_near = stats[:, GRAD_FORM, None] != 0
            masses = _difference(columns) if not is_near.is_cpu or bool(is_near.any()) else columns.p_t - columns.p_s
            dz = torch.where(grad_sum == math.inf, 0.0, dz.add_(masses, alpha=-spec.c_t))
    else:
        assert g is not None
        dz = g.addcmul_(columns.p_s, grad_sum, value=-1.0)
    broken = 0.0 * (stats[:, LOG_STUDENT] + stats[:, LOG_RATIO])
    return dz.mul_((chunk.soft_scale / spec.temperature + broken).unsqueeze(1))


# Any multiple of p_s may be added to g = ∂D/∂log p_s. That choice decides what cancels. With r = w/(1−w),
# κ = c_s·w − c_t·(1−w) and m = w·p_t + (1−w)·p_s,
#     g = p_s·(κ·p_t/m − c_s·log(1 + r·e^d))                    has its digits where the two are far apart, and
#     g = p_s·(κ·(p_t/m − 1) − c_s·log(1 + w·(e^d − 1)))        where they are close.


def _far(spec: RowSpec, columns: _Columns) -> tuple[Tensor, Tensor]:
    """(terms, g) of every mixture, and of a sum of two."""
    terms, g = _FAR[spec.summands[0].mix](spec, columns)
    for other in spec.summands[1:]:
        more, g = _FAR[other.mix](other, columns)
        terms = terms + more
    return terms, g


def _far_g(spec: RowSpec, columns: _Columns) -> Tensor:
    """g alone, where the teacher is no mixture."""
    if spec.mix == Mix.STUDENT:
        return columns.p_t * -spec.c_t
    y = _log_odds(spec, columns)
    return _both_g(spec, columns, y, _softplus(y))


def _student_mixture(spec: RowSpec, columns: _Columns) -> tuple[Tensor, Tensor]:
    """m = p_s: g = −c_t·p_t."""
    terms = _no_nan(columns.p_t * columns.d)
    return terms if spec.c_t == 1.0 else terms.mul_(spec.c_t), _far_g(spec, columns)


def _teacher_mixture(spec: RowSpec, columns: _Columns) -> tuple[Tensor, Tensor]:
    """m = p_t: g = −c_s·p_s·d. Where the student has mass and the teacher none, the value is inf and the gradient 0."""
    g = _no_nan(columns.p_s * columns.d).mul_(-spec.c_s)
    return g, g


def _both_mixture(spec: RowSpec, columns: _Columns) -> tuple[Tensor, Tensor]:
    """y = d + log r: p_t/m = sigmoid(y)/w, log(m/p_s) = softplus(y) + log(1−w), log(m/p_t) = softplus(−y) + log w."""
    y = _log_odds(spec, columns)
    of_small = _log1p_exp(y)
    softplus = of_small + y.clamp(min=0.0)
    terms = _no_nan((softplus + math.log1p(-spec.w)).mul_(columns.p_s)).mul_(-spec.c_s)
    minus = of_small.sub_(y.clamp(max=0.0)).add_(math.log(spec.w))
    terms.add_(_no_nan(minus.mul_(columns.p_t)), alpha=-spec.c_t)
    return terms, _both_g(spec, columns, y, softplus)


def _log_odds(spec: RowSpec, columns: _Columns) -> Tensor:
    return columns.d + (math.log(spec.w) - math.log1p(-spec.w))


def _both_g(spec: RowSpec, columns: _Columns, y: Tensor, softplus: Tensor) -> Tensor:
    """Written over softplus(y); y is consumed."""
    c_t, c_s, w = spec.c_t, spec.c_s, spec.w
    slope = softplus.mul_(-c_s).add_(y.sigmoid_(), alpha=c_s - c_t * (1.0 - w) / w)
    return _no_nan(slope.mul_(columns.p_s))


_FAR = {Mix.STUDENT: _student_mixture, Mix.TEACHER: _teacher_mixture, Mix.BOTH: _both_mixture}


def _near(spec: RowSpec, columns: _Columns) -> tuple[Tensor, Tensor]:
    """The same where the two are close; the terms have the masses m − p added, so that each is >= 0."""
    p_t, p_s, d = columns.p_t, columns.p_s, columns.d
    c_t, c_s, w = spec.c_t, spec.c_s, spec.w
    last = spec.summands[-1]
    if last.mix == Mix.TEACHER:
        terms, g = last.c_s * _bregman(p_s, -d, p_t), _no_nan(p_s * d).mul_(-last.c_s)
        if last is not spec:
            terms.add_(_bregman(p_t, d, p_s), alpha=c_t)
            g.sub_(_difference(columns), alpha=c_t)
        return terms, g
    if last.mix == Mix.STUDENT:
        return c_t * _bregman(p_t, d, p_s), _difference(columns).mul_(-c_t)
    # Beyond, the mixture is one side's share, which d does not enter; but all that it multiplies must stay finite.
    d = d.clamp(-80.0, 80.0)
    excess = torch.expm1(d)  # p_t/p_s − 1
    m = torch.lerp(p_s, p_t, w)
    log_s = (excess * w).log1p_().neg_()  # log(p_s/m)
    terms = c_t * _bregman(p_t, d + log_s, m) + c_s * _bregman(p_s, log_s, m)
    slope = (excess / (excess * w + 1.0)).mul_(spec.imbalance * (1.0 - w)).add_(log_s, alpha=c_s)
    return terms, slope.mul_(p_s)


def _centre(columns: _Columns, stats: Tensor, near: Tensor) -> None:
    """Take from rows that are near what the rounding of the normalisers adds to all d: it shows in Σ (p_t − p_s)."""
    excess = torch.where(near, _difference(columns).sum(-1), 0.0)
    stats[:, LOG_RATIO] += excess
    columns.p_t = columns.p_t * torch.exp(-excess).unsqueeze(1)
    del columns.d  # to be made again


def _difference(columns: _Columns) -> Tensor:
    """p_t − p_s, with all its digits as d → 0."""
    d, p_t, p_s = columns.d, columns.p_t, columns.p_s
    return torch.where(d.abs() < 0.5, torch.expm1(d.clamp(-1.0, 1.0)).mul_(p_s), p_t - p_s)


def _bregman(p: Tensor, x: Tensor, q: Tensor) -> Tensor:
    """p·x − p + q >= 0, given x = log(p/q), with all its digits as x → 0."""
    far = _no_nan(p * x).add_(q).sub_(p)
    if p.dtype == torch.float64:
        return torch.where(x.abs() < 0.5, (torch.expm1(-x) + x).mul_(p), far)
    series = x * (-1.0 / 5040.0)  # of exp(−x) − 1 + x, 3e-7 relative at 1/2
    for factor in (1.0 / 720.0, -1.0 / 120.0, 1.0 / 24.0, -1.0 / 6.0):
        series.add_(factor).mul_(x)
    return torch.where(x.abs() < 0.5, series.add_(0.5).mul_(x).mul_(x).mul_(p), far)


def _total_variation(columns: _Columns, stats: Tensor) -> tuple[Tensor, Tensor]:
    """(soft, g): g is of the side that has less of p_s."""
    soft = 0.5 * (columns.p_t - columns.p_s).abs_().sum(-1)
    near = soft < NEAR
    if not near.is_cpu or bool(near.any()):
        _centre(columns, stats, near)
        soft = 0.5 * _difference(columns).abs_().sum(-1)
    above, below = _sides(columns)
    of_above, of_below = above.sum(-1), below.sum(-1)
    other = of_above > -of_below
    stats[:, GRAD_SUM], stats[:, GRAD_FORM] = torch.where(other, of_below, of_above), other.to(stats.dtype)
    return soft, above.addcmul_(columns.p_s, other.to(above.dtype).unsqueeze(1), value=-1.0)


def _sides(columns: _Columns) -> tuple[Tensor, Tensor]:
    """g = p_s·[p_s > p_t] and −p_s·[p_s < p_t]; where they tie, half of each."""
    above = _above(columns)
    return above, above - columns.p_s


def _above(columns: _Columns) -> Tensor:
    return columns.d.sign().mul_(-0.5).add_(0.5).mul_(columns.p_s)


def _hard_term(spec: RowSpec, chunk: Rows, z: Tensor, exps: Tensor, stats: Tensor) -> Tensor:
    """hard [R] and the statistics that are its and the z-loss's; ``exps`` = exp(z − peak).

    The sum leaves the label's own entry out: with t = log of it over that entry, the cross-entropy is softplus(t) and
    1 − p_y = sigmoid(t), both with all their digits as p_y → 1.
    """
    if chunk.labels is None:
        stats[:, LOG_HARD] = exps.sum(-1).log_()
        return stats[:, LOG_HARD]
    label = chunk.labels.unsqueeze(1)
    column = label.clamp(0, spec.vocab_size - 1)
    z_y, exp_y = z.gather(1, column), exps.gather(1, column)
    others = exps.scatter_(1, column, 0.0).sum(-1, keepdim=True)
    exps.scatter_(1, column, exp_y)
    stats[:, LOG_HARD] = (others + exp_y).log_().squeeze(1)
    t = (stats[:, PEAK_STUDENT, None] - z_y) + others.log()
    hard, rest = _softplus(t), t.sigmoid()
    if spec.label_smoothing:
        anchor = z_y.masked_fill(z_y == -math.inf, 0.0)  # far from 0 a mean of z has no digits left
        hard -= spec.label_smoothing * (z - anchor).mean(-1, keepdim=True)
    is_elsewhere = label == ELSEWHERE
    hard, rest = hard.masked_fill_(is_elsewhere, 0.0), rest.masked_fill_(is_elsewhere, 0.0)
    if not z.is_cpu:  # on a CPU every label that counts has been checked
        bad = ((label < 0) & ~is_elsewhere) | (label >= spec.vocab_size)
        hard, rest = hard.masked_fill_(bad, math.nan), rest.masked_fill_(bad, math.nan)
    stats[:, LABEL_REST] = rest.squeeze(1)
    return hard.squeeze(1)


def _hard_gradient(spec: RowSpec, chunk: Rows, exps: Tensor, stats: Tensor, dz: Tensor | None) -> Tensor:
    """dz and the gradients of the hard term and of the z-loss, scales included, written over ``exps`` = exp(z − peak).

    p_y − 1 at the label's column has its digits in LABEL_REST.
    """
    log_hard, rest = stats[:, LOG_HARD, None], stats[:, LABEL_REST, None]
    factor = torch.zeros_like(rest)  # of softmax(z)
    if chunk.z_scale is not None:
        factor = 2.0 * chunk.z_scale.unsqueeze(1) * (stats[:, PEAK_STUDENT, None] + log_hard)
        factor = factor.masked_fill_(chunk.z_scale.unsqueeze(1) == 0, 0.0)
    if chunk.labels is None or chunk.hard_scale is None:
        exps.mul_(factor * torch.exp(-log_hard))
        return exps if dz is None else exps.add_(dz)
    scale, label = chunk.hard_scale.unsqueeze(1), chunk.labels.unsqueeze(1)
    smooth = spec.label_smoothing / spec.vocab_size
    of_label = scale * (spec.label_smoothing - smooth - rest) + factor * (1.0 - rest)
    if not exps.is_cpu:
        is_bad = ((label < 0) & (label != ELSEWHERE)) | (label >= spec.vocab_size)
        factor = factor.masked_fill(is_bad & (scale != 0), math.nan)
    exps.mul_((scale + factor) * torch.exp(-log_hard))
    if smooth:
        exps -= scale * smooth
    column = label.clamp(0, spec.vocab_size - 1)
    exps.scatter_(1, column, torch.where(label == ELSEWHERE, exps.gather(1, column), of_label))
    return exps if dz is None else exps.add_(dz)


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
    return _log1p_exp(x).add_(x.clamp(min=0.0))


def _log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^−|x|)."""
    return x.abs().neg_().exp_().log1p_()


def _no_nan(x: Tensor) -> Tensor:
    """In place: 0 for 0·inf and inf − inf. A NaN of the logits shows in the normalisers."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)


def _finite(peak: Tensor) -> Tensor:
    """What exponents may subtract: 0 where all is −inf."""
    return peak.masked_fill_(peak == -math.inf, 0.0)


def _dead_rows(rows: Rows) -> Tensor | None:
    """Which rows have scales of 0 alone; None if it is known that there are none."""
    scales = (rows.hard_scale, rows.soft_scale, rows.z_scale)
    alive = functools.reduce(torch.logical_or, (scale != 0 for scale in scales if scale is not None))
    return None if alive.is_cpu and bool(alive.all()) else ~alive


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(
    rows: Rows, vocab_size: int, grad: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Rows, Tensor | None]]:
    """(which rows, their tensors [R, n], of this dtype, and [R], where their gradient goes [R, V])."""
    matrices = [t for t in (rows.student, rows.teacher, grad) if t is not None]
    for at, parts in _split(*matrices):
        student, *others = parts
        out = others.pop() if grad is not None else None
        teacher = others.pop()[:, :vocab_size].to(dtype) if others else None
        vectors = (None if t is None else t[at] for t in rows[2:])
        yield at, Rows(student[:, :vocab_size].to(dtype), teacher, *vectors), out


def _split(*matrices: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Chunks [R, V_i] of [B, S, V_i] tensors, and which of the N = B·S rows they are."""
    outer, inner, columns = matrices[0].shape
    step = max(1, (CHUNK_CPU if matrices[0].is_cpu else CHUNK_OTHER) // columns)
    for b in range(outer):
        for start in range(0, inner, step):
            stop = min(start + step, inner)
            yield slice(b * inner + start, b * inner + stop), [matrix[b, start:stop] for matrix in matrices]
