"""A teacher who lists K tokens of a row: its divergence, as one over K + 1 outcomes, the last being all other tokens.

The student's log-probabilities of the outcomes follow from

    z'_i = z_i/T  of the K listed columns        z'_r = lse of z/T over the others

so the divergence is the row operation that there is, at temperature 1, on the tiny matrices z' and u' [N, K + 1], with
all its digits; its gradient by z' is, by the chain rule, what ``rest_grad`` makes that of z from. What a tail says of
the rest is the teacher's u' alone:

    bucket       u'_r = log(1 − Σp)
    renormalize  u'_r = −inf, where every token outside has p_t = 0 and all are as one, in m too: g is then p_s times a
                 constant. The row operation normalises u' over the K.
    support      no r: the last column is padding, beyond the vocabulary of K
    truncate     Σ of the terms of the K as they come, which is no divergence, and so written out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd import _dispatch, _slices
from fastkd._request import PEAK_TEACHER, Formula, Mix, Place, Rows, RowSpec
from fastkd._validate import TAILS
from fastkd.sources import TopK

# The teacher's mass beyond the listed tokens where 1 − Σp in float32 has none left: a reverse KL needs some.
SMALLEST_TAIL = 2.0**-24
# Elements of what duplicates are looked for in: 8 MB.
MARKS = 2**21
# Σp may be so much larger than 1 as the rounding of log-probabilities, of bfloat16 at the worst, can make it.
LARGEST_MASS = 1.0625


def kd_rows(
    rows: Rows, teacher: TopK, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None,
    place: Place, agreed: Sequence[int],
) -> None:  # fmt: skip
    """The row operation (see ``_dispatch.Backend.kd_rows``) with a teacher of [N, K], instead of ``rows.teacher``."""
    soft_scale = rows.soft_scale
    assert soft_scale is not None
    agreed = (*agreed, *(teacher.tail == tail for tail in TAILS))
    chosen = _slices.choose(rows.student, place, None, "rest_rows", agreed)
    listed, u = _teacher_outcomes(teacher, spec, soft.dtype)
    if teacher.tail in ("renormalize", "support"):  # who lists nothing says nothing
        soft_scale = torch.where((listed < 0).all(-1), 0.0, soft_scale)
    outcomes = u.shape[1] - (teacher.tail == "support")
    if teacher.tail != "truncate" and hasattr(chosen, "sparse_rows"):
        chosen.sparse_rows(rows, spec, listed, u, outcomes, soft_scale, hard, soft, stats, grad)
        return
    rest = torch.empty_like(soft)
    stats.zero_()  # a backend fills what it needs, and an operator may not give what memory held
    if isinstance(chosen, _slices.Sliced):
        share = chosen.rest_rows(rows, spec, listed, hard, rest, stats)
        logits, peak = share.logits, share.peak
    else:
        chosen.rest_rows(rows, spec, listed, hard, rest, stats)
        logits = _slices.listed_logits(rows.student, listed, rest.dtype)
        peak = logits.amax(-1)
    has_rest = outcomes == u.shape[1]
    z, largest = _student_outcomes(logits, peak, rest, stats[:, PEAK_TEACHER], spec.temperature, has_rest)
    outcome_grad = None if grad is None else torch.empty_like(z)
    out = None if outcome_grad is None else outcome_grad.unsqueeze(0)
    of_outcomes = spec._replace(temperature=1.0, label_smoothing=0.0, vocab_size=outcomes)
    matrices = Rows(z.unsqueeze(0), u.unsqueeze(0), None, None, soft_scale)
    if isinstance(chosen, _slices.Sliced):
        log_sum = share.log_sum + (peak - largest) / spec.temperature
        if has_rest:
            log_sum = torch.logaddexp(log_sum, z[:, -1].double())
        if teacher.tail == "truncate":
            b = (z - log_sum.unsqueeze(1)).to(z.dtype)
            _truncated(share.own(u), b, soft_scale, spec, soft, outcome_grad, chosen.total)
        else:
            chosen.outcome_rows(matrices, of_outcomes, share, log_sum, soft, out)
    elif teacher.tail == "truncate":
        _truncated(u, z.log_softmax(-1), soft_scale, spec, soft, outcome_grad)
    else:
        of_matrices = _dispatch.choose(z, place.backend)
        of_matrices.kd_rows(matrices, of_outcomes, torch.empty_like(hard), soft, torch.empty_like(stats), out)
    if grad is not None:
        assert outcome_grad is not None
        chosen.rest_grad(rows, spec, listed, outcome_grad, stats, grad)


def check(teacher: TopK, vocab_size: int, soft_scale: Tensor) -> None:
    """Raise if a row that counts lists a token that is none, or one twice, or more mass than there is.

    Raises:
        ValueError: naming the first such row.
    """
    ids, log_probs = teacher[:2]
    if not ids.numel():
        return
    counts = soft_scale != 0
    is_bad = (ids < -1) | (ids >= vocab_size)
    bad, is_twice = is_bad.any(-1), _listed_again(torch.where(is_bad, -1, ids).long(), vocab_size)
    wrong = (bad | is_twice.any(-1)) & counts
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        if bad[row]:
            found = ids[row][is_bad[row]]
            raise ValueError(f"ids: got {int(found[0])} in row {row}, must be in [0, {vocab_size}), or -1 for padding")
        found = ids[row][is_twice[row]]
        raise ValueError(f"ids: got {int(found[0])} more than once in row {row}, must be distinct; -1 is padding")
    check_mass(ids, log_probs, counts)


def check_mass(ids: Tensor, log_probs: Tensor, counts: Tensor | bool = True) -> None:
    """Raise if a row of [N, K] that counts has more mass than there is, or a NaN.

    Raises:
        ValueError: naming the first such row.
    """
    mass = torch.where(ids < 0, 0.0, log_probs.float().exp()).sum(-1)
    wrong = ~(mass <= LARGEST_MASS) & counts
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"log_probs: got probabilities of sum {mass[row].item():.4g} in row {row}, must be at most 1; these are "
            "log-probabilities over the whole vocabulary, no logits: fastkd.top_k makes them of logits"
        )


def _listed_again(ids: Tensor, vocab_size: int) -> Tensor:
    """Which of ids [N, K] another place of their row lists too, one of these excepted.

    Each writes its place at its column, which memory need not be cleared for, and finds there its own or another.
    """
    places = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
    step = max(1, MARKS // vocab_size)
    marks = torch.empty(min(step, len(ids)), vocab_size + 1, dtype=torch.int32, device=ids.device)
    found = torch.empty_like(ids, dtype=torch.int32)
    for start in range(0, len(ids), step):
        some = torch.where(ids[start : start + step] < 0, vocab_size, ids[start : start + step])
        of_rows = marks[: len(some)].scatter_(1, some, places.expand_as(some))
        torch.gather(of_rows, 1, some, out=found[start : start + step])
    return (found != places) & (ids >= 0)


def _teacher_outcomes(teacher: TopK, spec: RowSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(listed [N, K] int32, u' [N, K + 1]). What is out of range, which a CPU has found, makes its row NaN."""
    ids, log_probs = teacher[:2]
    bad = (ids < -1) | (ids >= spec.vocab_size)
    listed = torch.where(bad, -1, ids).int().contiguous()
    absent = ids < 0
    a = torch.where(bad, math.nan, torch.where(absent, -math.inf, log_probs.to(dtype)))
    if teacher.tail == "bucket":
        # 1 − Σp, the largest apart: 1 − p has its digits as p → 1.
        largest, at = a.max(-1, keepdim=True)
        tail = -torch.expm1(largest) - a.exp().scatter_(-1, at, 0.0).sum(-1, keepdim=True)
        infinite = any(summand.mix == Mix.TEACHER for summand in spec.summands)
        tail = tail.clamp_(min=SMALLEST_TAIL if infinite else 0.0)
        none_left = (~absent).sum(-1, keepdim=True) == spec.vocab_size
        u_rest = tail.log_().masked_fill_(none_left, -math.inf)
    else:
        u_rest = a.new_full((len(a), 1), -math.inf)
    return listed, torch.cat((a, u_rest), -1)


def _student_outcomes(
    z: Tensor, peak: Tensor, rest: Tensor, rest_peak: Tensor, temperature: float, has_rest: bool
) -> tuple[Tensor, Tensor]:
    """(z' [N, K + 1] of the listed logits, less the largest logit of an outcome over T; that [N]).

    Far from 0 it would have no digits left.
    """
    of_others = rest_peak.masked_fill(rest == -math.inf, -math.inf)
    largest = _slices.finite(torch.maximum(peak, of_others) if has_rest else peak)
    of_rest = (rest_peak - largest) / temperature + rest
    return torch.cat(((z - largest.unsqueeze(1)).div_(temperature), of_rest.unsqueeze(1)), -1), largest


def _truncated(
    u: Tensor, log_student: Tensor, soft_scale: Tensor, spec: RowSpec, soft: Tensor, outcome_grad: Tensor | None,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> None:  # fmt: skip
    """Σ over the K of the terms, with the student's probabilities over the whole vocabulary, and nothing of the rest.

    ``total`` makes sums over the row of those over the columns here.

    Then no mass sums to 1, and nothing may be added to a term or to g: they are those of the definition,

        g = ∂term/∂log p_s = c_s·p_s·(b − log m + 1) − (1−w)·(p_s/m)·(c_t·p_t + c_s·p_s),   dz' = g − p_s·Σg,  g_r = 0
    """
    a, b, p_s = u[:, :-1], log_student[:, :-1], log_student.exp()
    p_t, of_student = a.exp(), p_s[:, :-1]
    if spec.formula == Formula.TOTAL_VARIATION:
        term = 0.5 * (of_student - p_t).abs()
        g = 0.5 * (of_student - p_t).sign() * of_student
    elif spec.formula == Formula.CROSS_ENTROPY:
        term, g = -_no_nan(p_t * b), -p_t
    else:
        term, g = torch.zeros_like(a), torch.zeros_like(a)
        for summand in spec.summands:
            c_t, c_s, w = summand.c_t, summand.c_s, summand.w
            log_m = {Mix.STUDENT: b, Mix.TEACHER: a}.get(summand.mix)
            if log_m is None:
                log_m = torch.logaddexp(a + math.log(w), b + math.log1p(-w))
            term += c_t * _no_nan(p_t * (a - log_m)) + c_s * _no_nan(of_student * (b - log_m))
            g += c_s * _no_nan(of_student * (b - log_m + 1.0))
            if summand.mix == Mix.STUDENT:  # m is p_s, where this is 0 too
                g -= c_t * p_t + c_s * of_student
            elif summand.mix == Mix.BOTH:
                g -= (1.0 - w) * _no_nan((b - log_m).exp() * (c_t * p_t + c_s * of_student))
    counts = soft_scale != 0
    broken = 0.0 * (p_s.sum(-1) + p_t.sum(-1))  # what _no_nan hides
    value, grad_sum = total(torch.stack((term.sum(-1) + broken, g.sum(-1)), -1)).to(soft.dtype).unbind(-1)
    soft.copy_(torch.where(counts, value, 0.0))
    if outcome_grad is not None:
        dz = torch.nn.functional.pad(g, (0, 1)).addcmul_(p_s, grad_sum.unsqueeze(1), value=-1.0)
        finite = counts & (grad_sum.abs() != math.inf)  # as everywhere, no gradient of an infinite reverse KL
        outcome_grad.copy_(torch.where(finite.unsqueeze(1), dz * soft_scale.unsqueeze(1), 0.0))


def _no_nan(x: Tensor) -> Tensor:
    """In place: 0 for 0·inf and inf − inf."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)
