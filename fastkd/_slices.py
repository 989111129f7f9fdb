"""The vocabulary in slices over the ranks of a process group: of a backend and a group, a backend for whole rows.

Math    P_t(r), P_s(r) are the masses of slice r; what has an index r is of its own two softmaxes. The chain rule gives

            KL(p_t‖p_s) = Σ_r P_t(r)·(KL_r + log P_t(r)/P_s(r))          reverse KL likewise, by P_s
            H(p_t, p_s) = Σ_r P_t(r)·(H_r − log P_s(r))                  lse(z) − z_y = hard_r − log P(r) of y's slice
            1 − p_y = Σ of the other slices' P + P(r)·(1 − p_y in r)

        so what a backend says of a slice as if it were the whole is its state. Mixtures and the like take a forward KL
        first, for its normalisers, and then sums over the slices by the row's (``slice_sums``).
Digits  The states are float32, their merge is float64. Of a slice that took the near form, G shows what the rounding of
        its sums did to LOG_RATIO, which is taken out; the row's G is then what it is by definition: −c_t, or S, or 0.
Listed  A sparse teacher's outcomes are in slices as well: of each listed token its rank has the logit, and all ranks
        have that of the others together and the normaliser after the first exchange. The second is of sums.
Bytes   At most 40 a row and rank and exchange, whatever V and K. All ranks merge the same numbers in the same order:
        their losses and statistics are equal bit for bit.
Faults  A call's numbers go in front of its first exchange, in a message whose size does not depend on them (``_HEAD``).
        On a CPU every rank compares them at every call, so that all raise; a GPU waits for that once for each kind of
        call. How many exchanges there are follows from these numbers alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastkd import _dispatch
from fastkd._dispatch import Backend
from fastkd._request import (
    ELSEWHERE,
    GRAD_FORM,
    GRAD_SUM,
    LABEL_REST,
    LOG_HARD,
    LOG_RATIO,
    LOG_STUDENT,
    NUM_STATS,
    PEAK_STUDENT,
    PEAK_TEACHER,
    WHOLE,
    Formula,
    Mix,
    Place,
    Rows,
    RowSpec,
)
from fastkd.sources import LinearLogits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")

# Words of 4 bytes of the first message of an exchange: the call's numbers and as many of the states as there is room
# for, 300 rows and more; the rest, where latency no longer counts, goes in a second one.
_HEAD = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Call(NamedTuple):
    """What every rank must call with alike."""

    failed: float  # a rank that raises before its exchange says so in its stead
    operation: float
    rows: float
    rows_in_all: float
    columns_a_rank: float
    vocab_size: float
    student_dtype: float
    teacher_dtype: float
    terms: float  # which there are, and which gradients are wanted
    formula: float
    c_t: float
    c_s: float
    w: float
    temperature: float
    label_smoothing: float
    listed: float  # K


_WORDS = 2 * (len(Call._fields) + 1)
_OPERATIONS = ("failed", "kd_rows", "rest_rows")


def choose(
    logits: Tensor, place: Place, teacher: Tensor | None = None, operation: str = "kd_rows", agreed: Sequence[int] = ()
) -> Backend | Sliced:
    """``_dispatch.choose``, of a backend for whole rows, wherever they are.

    ``agreed``: the number of rows in all, of which these are a chunk, and what else decides about exchanges.
    """
    if not place.group:
        return _dispatch.choose(logits, place.backend, teacher, operation)
    if operation == "kd_rows":
        operation = "slice_sums"
    # In backward, whose ranks meet no more, it is the choice that forward made, and nothing raises.
    chosen = raise_together(place, logits, lambda: _dispatch.choose(logits, place.backend, teacher, operation))
    return Sliced(chosen, place, agreed)


def tokens_of(place: Place, vocab_size: int, columns: int) -> int:
    """How many of this rank's columns are tokens, given how many of the whole are."""
    return min(max(vocab_size - _start_of(place), 0), columns) if place.group else vocab_size


def listed_logits(student: Tensor, listed: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] of [B, S, V], and −inf where ``listed`` is −1."""
    if not student.shape[-1]:
        return student.new_full(listed.shape, -math.inf, dtype=dtype)
    columns = listed.long().clamp_(min=0).view(*student.shape[:2], listed.shape[1])
    return student.gather(-1, columns).view(listed.shape).to(dtype).masked_fill_(listed < 0, -math.inf)


def summed(tensor: Tensor, group: str) -> Tensor:
    """Over the ranks of a group, on each of them."""
    total = torch.ops._c10d_functional.all_reduce(tensor.contiguous(), "sum", group)
    result: Tensor = torch.ops._c10d_functional.wait_tensor(total)
    return result


def summed_over(tensor: Tensor, groups: Sequence[str]) -> Tensor:
    return functools.reduce(summed, groups, tensor)


def check_group(group: ProcessGroup | None) -> None:
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"vocab_group: got {type(group).__name__}, must be a process group: mesh.get_group() of a mesh")


def place_of(group: ProcessGroup, width: int) -> Place:
    """Of slices of so many columns. A group of one has no slices, and a call in it is as any other."""
    return WHOLE if group.size() == 1 else Place("", group.group_name, width)


def place_in(group: ProcessGroup, student: object) -> tuple[Place, int]:
    """(of slices as wide as the student's, in this group; columns of them all)."""
    check_group(group)
    columns, dim = (student.weight, 0) if isinstance(student, LinearLogits) else (student, -1)
    width = columns.shape[dim] if isinstance(columns, Tensor) and columns.dim() > 0 else 0
    place = place_of(group, width)
    return place, group.size() * width if place.group else 0


def raise_together(place: Place, student: object, check: Callable[[], Result]) -> Result:
    """The result of a check that may raise on one rank alone: the others, who go on to an exchange, raise there."""
    if not place.group or torch.compiler.is_compiling():  # which traces no error
        return check()
    try:
        return check()
    except Exception:
        tensor = student.hidden if isinstance(student, LinearLogits) else student
        device = tensor.device if isinstance(tensor, Tensor) else "cpu"
        head = torch.zeros(_HEAD, dtype=torch.int32, device=device)
        head[:2] = torch.ones(1, dtype=torch.float64, device=device).view(torch.int32)
        _all_gather(head, place.group)
        raise


class Share(NamedTuple):
    """What a rank knows of the columns that a sparse teacher lists."""

    logits: Tensor  # [N, K], −inf where none is listed, or one of another slice
    is_elsewhere: Tensor  # [N, K] the latter
    peak: Tensor  # [N] the largest of all slices
    log_sum: Tensor  # [N] likewise, log Σ exp((z − peak)/T)

    def own(self, outcomes: Tensor) -> Tensor:
        """[N, K + 1] without those of other slices."""
        return outcomes.masked_fill(torch.nn.functional.pad(self.is_elsewhere, (0, 1)), -math.inf)


class Sliced:
    """The part of ``_dispatch.Backend`` that works on rows, over slices. Specs, labels, listed columns are global."""

    def __init__(self, backend: Backend, place: Place, agreed: Sequence[int] = ()) -> None:
        self._backend, self._agreed = backend, agreed
        self._place, self._group, self._width = place, place.group, place.width
        group = _resolved(place.group)
        self._rank, self._size = group.rank(), group.size()
        self._start = self._rank * self._width

    def kd_rows(
        self, rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None
    ) -> None:
        """See ``_dispatch.Backend``, as of all here. Nothing is known of G before the exchange: kd_grad follows it."""
        first = spec if _tells_value(spec) else spec._replace(formula=int(Formula.MIXTURE_KL), c_t=1.0, c_s=0.0, w=0.0)
        own, of_slice = self._own(rows, first)
        if of_slice.vocab_size:
            self._backend.kd_rows(own, of_slice, hard, soft, stats, None)
        else:
            _of_no_token(hard, soft, stats)
        state = _hard_state(own, of_slice, hard, stats)
        if rows.soft_scale is not None:
            state |= {
                "u_peak": stats[:, PEAK_TEACHER],
                "log_s": stats[:, LOG_STUDENT],
                "log_ratio": _exact_ratio(first, soft, stats),
                "soft": soft,
                "form": stats[:, GRAD_FORM],
            }
        states = self._exchange(self._call("kd_rows", rows, spec, grad), state, rows[2:])
        stats.zero_()
        self._merge_hard(rows, spec, states, hard, stats)
        if rows.soft_scale is not None:
            _merge_soft(first, states, soft, stats)
            if first is not spec:
                of_own = spec._replace(vocab_size=of_slice.vocab_size)
                self._sum_over_slices(self._backend, own, of_own, soft, stats)
        self._leave_out(rows, hard, soft)
        if grad is not None:
            self.kd_grad(rows, spec, stats, grad)

    def kd_grad(self, rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
        own, of_slice, of_own = self._for_gradient(rows, spec, stats)
        if of_slice.vocab_size:
            self._backend.kd_grad(own, of_slice, of_own, grad)
        else:
            grad.zero_()

    def rest_rows(self, rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> Share:
        own, of_slice = self._own(rows, spec)
        of_own = _own_columns(listed, self._start, of_slice.vocab_size)
        if of_slice.vocab_size:
            self._backend.rest_rows(own, of_slice, of_own, hard, rest, stats)
        else:
            _of_no_token(hard, rest, stats)
        inv_t, logits = 1.0 / spec.temperature, listed_logits(rows.student, of_own, rest.dtype)
        peak = logits.amax(-1)
        state = _hard_state(own, of_slice, hard, stats) | {
            "rest_peak": stats[:, PEAK_TEACHER],
            "rest": rest,
            "listed_peak": peak,
            "listed": ((logits - finite(peak).unsqueeze(1)) * inv_t).logsumexp(-1),
        }
        call = self._call("rest_rows", rows, spec, None, listed.shape[1])
        states = self._exchange(call, state, (*rows[2:], listed.view(-1)))
        stats.zero_()
        self._merge_hard(rows, spec, states, hard, stats)
        peak, log_sum, _ = _masses(states["rest_peak"], states["rest"], inv_t)
        stats[:, PEAK_TEACHER], stats[:, LOG_RATIO] = peak, log_sum
        rest.copy_(stats[:, LOG_RATIO])
        self._leave_out(rows, hard, rest)
        peak, log_sum, _ = _masses(states["listed_peak"], states["listed"], inv_t)
        peak = peak.masked_fill(log_sum == -math.inf, -math.inf).to(logits.dtype)
        return Share(logits, (listed >= 0) & (of_own < 0), peak, log_sum)

    def outcome_rows(
        self, rows: Rows, spec: RowSpec, share: Share, log_student: Tensor, soft: Tensor, grad: Tensor | None
    ) -> None:
        """``kd_rows`` of [1, N, K + 1] outcomes, of the student those that a rank has and that of all other tokens.

        ``log_student`` [N] is log Σ exp over all that count. The last outcome is in the first rank's sums alone.
        """
        assert rows.teacher is not None and rows.soft_scale is not None
        u = rows.teacher[0]
        counted = u[:, : spec.vocab_size].double()
        peak = finite(counted.amax(-1))
        log_teacher = (counted - peak.unsqueeze(1)).logsumexp(-1)
        stats = soft.new_zeros(len(soft), NUM_STATS)
        stats[:, PEAK_TEACHER], stats[:, LOG_STUDENT] = peak, log_student
        stats[:, LOG_RATIO] = log_teacher - log_student
        own = rows._replace(teacher=share.own(u).unsqueeze(0))
        of_sums = spec._replace(vocab_size=spec.vocab_size if self._rank == 0 else u.shape[1] - 1)
        is_entropy = spec.formula == Formula.CROSS_ENTROPY
        if is_entropy:
            of_sums = of_sums._replace(formula=Formula.MIXTURE_KL)
        backend = _dispatch.choose(own.student, self._place.backend, None, "slice_sums")
        self._sum_over_slices(backend, own, of_sums, soft, stats)
        if is_entropy:
            a = counted - (peak + log_teacher).unsqueeze(1)
            soft -= torch.where(a == -math.inf, 0.0, a.exp() * a).sum(-1)
        soft += 0.0 * (stats[:, LOG_STUDENT] + stats[:, LOG_RATIO])  # no mass at all is a NaN, as of a whole row
        soft.masked_fill_(rows.soft_scale == 0, 0.0)
        if grad is not None:
            backend.kd_grad(own, spec, stats, grad)

    def total(self, sums: Tensor) -> Tensor:
        """Over the ranks, in float64."""
        return _all_gather(sums, self._group).double().sum(0)

    def rest_grad(
        self, rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor
    ) -> None:
        own, of_slice, of_own = self._for_gradient(rows, spec, stats)
        if of_slice.vocab_size:
            of_listed = _own_columns(listed, self._start, of_slice.vocab_size)
            self._backend.rest_grad(own, of_slice, of_listed, outcome_grad, of_own, grad)
        else:
            grad.zero_()

    def _own(self, rows: Rows, spec: RowSpec) -> tuple[Rows, RowSpec]:
        """What the backend is asked of this slice before it knows of the others.

        With label smoothing 1 its hard term is lse − mean z, whatever the label is.
        """
        tokens = tokens_of(self._place, spec.vocab_size, rows.student.shape[-1])
        smoothing = 1.0 if spec.label_smoothing else 0.0
        labels = self._labels(rows, spec, tokens, 0 if spec.label_smoothing else ELSEWHERE)
        return rows._replace(labels=labels), spec._replace(vocab_size=tokens, label_smoothing=smoothing)

    def _for_gradient(self, rows: Rows, spec: RowSpec, stats: Tensor) -> tuple[Rows, RowSpec, Tensor]:
        """The slice's part of label smoothing is ε·n_r/V; the label's column gets the rest of ε through LABEL_REST.

        Backends give it hard_scale·(ε_r·(1 − 1/n_r) − rest) + f·(1 − rest), f being the z-loss's factor of softmax(z).
        """
        tokens = tokens_of(self._place, spec.vocab_size, rows.student.shape[-1])
        smoothing = spec.label_smoothing * tokens / spec.vocab_size
        if rows.labels is not None and spec.label_smoothing:
            assert rows.hard_scale is not None
            weight = rows.hard_scale
            if rows.z_scale is not None:
                weight = weight + 2.0 * rows.z_scale * (stats[:, PEAK_STUDENT] + stats[:, LOG_HARD])
            missing = rows.hard_scale * (spec.label_smoothing - smoothing) / torch.where(weight == 0, 1.0, weight)
            stats = stats.clone()
            stats[:, LABEL_REST] -= missing
        own = rows._replace(labels=self._labels(rows, spec, tokens, ELSEWHERE))
        return own, spec._replace(vocab_size=tokens, label_smoothing=smoothing), stats

    def _labels(self, rows: Rows, spec: RowSpec, tokens: int, elsewhere: int) -> Tensor | None:
        """Those of this slice; −1, as outside the whole, stays outside the slice."""
        if rows.labels is None:
            return None
        own = rows.labels - self._start
        is_token = (rows.labels >= 0) & (rows.labels < spec.vocab_size)
        return torch.where((own >= 0) & (own < tokens), own, torch.where(is_token, elsewhere, -1))

    def _merge_hard(self, rows: Rows, spec: RowSpec, states: dict[str, Tensor], hard: Tensor, stats: Tensor) -> None:
        if "log_h" not in states:
            return
        peak, log_sum, log_p = _masses(states["z_peak"], states["log_h"], 1.0)
        stats[:, PEAK_STUDENT], stats[:, LOG_HARD] = peak, log_sum
        if rows.labels is None:
            return
        owner = (rows.labels // self._width).clamp(0, self._size - 1).unsqueeze(0)
        log_owner, loss, rest = (x.gather(0, owner).squeeze(0) for x in (log_p, states["hard"], states["label_rest"]))
        others = log_p.exp().scatter(0, owner, 0.0).sum(0)
        nothing = log_owner == -math.inf  # a label with no probability, whose slice has none
        loss = loss - torch.where(others < 0.5, torch.log1p(-others), log_owner)
        rest = torch.where(nothing, 1.0, others + log_owner.exp() * rest)
        loss = torch.where(nothing, math.inf, loss)
        if spec.label_smoothing:
            starts = self._width * torch.arange(self._size, device=loss.device).unsqueeze(1)
            share = (spec.vocab_size - starts).clamp(0, self._width).to(loss.dtype) / spec.vocab_size
            over_mean = torch.where(log_p == -math.inf, math.inf, states["mean"] - log_p)
            smooth = torch.where(share == 0, 0.0, share * over_mean).sum(0)
            loss = (1.0 - spec.label_smoothing) * loss + spec.label_smoothing * smooth
        bad = (rows.labels < 0) | (rows.labels >= spec.vocab_size)
        hard.copy_(torch.where(bad, math.nan, loss))
        stats[:, LABEL_REST] = torch.where(bad, math.nan, rest)

    def _sum_over_slices(self, backend: Backend, own: Rows, of_slice: RowSpec, soft: Tensor, stats: Tensor) -> None:
        """The second exchange: the row's value and G, by the row's normalisers."""
        sums = stats.new_zeros(len(stats), 4)
        if of_slice.vocab_size:
            backend.slice_sums(own, of_slice, stats, sums)
        far, g_far, near, g_near = self.total(sums).unbind(-1)
        if of_slice.formula == Formula.TOTAL_VARIATION:  # one value, Σ (p_t − p_s), and the G of either side
            is_near = g_far > -g_near
            value = far + near * (g_far + g_near) / 2
        else:
            is_near = far < of_slice.near_below
            value = torch.where(is_near, near, far)
        soft.copy_(value.clamp(min=0.0))
        stats[:, GRAD_SUM], stats[:, GRAD_FORM] = torch.where(is_near, g_near, g_far), is_near.to(stats.dtype)

    def _leave_out(self, rows: Rows, hard: Tensor, soft: Tensor) -> None:
        """Of rows that do not count, which no backend has read, the losses are 0."""
        scales = [scale for scale in rows[3:] if scale is not None]
        dead = functools.reduce(torch.logical_and, (scale == 0 for scale in scales))
        for loss, scale in ((hard, rows.hard_scale), (soft, rows.soft_scale)):
            if scale is None:
                loss.zero_()
            else:
                loss.masked_fill_(dead, 0.0)

    def _call(self, operation: str, rows: Rows, spec: RowSpec, grad: Tensor | None, listed: int = 0) -> Call:
        there = [tensor is not None for tensor in (*rows[2:], grad)] + [bool(flag) for flag in self._agreed[1:]]
        terms = sum(2**i for i, flag in enumerate(there) if flag)
        teacher = -1 if rows.teacher is None else _DTYPES.index(rows.teacher.dtype)
        count = rows.student.shape[:-1].numel()
        return Call(
            0, _OPERATIONS.index(operation), count, self._agreed[0] if self._agreed else count, self._width,
            spec.vocab_size, _DTYPES.index(rows.student.dtype), teacher, terms,
            spec.formula, spec.c_t, spec.c_s, spec.w, spec.temperature, spec.label_smoothing, listed,
        )  # fmt: skip

    def _exchange(self, call: Call, state: dict[str, Tensor], vectors: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """The states of all slices, each [ranks, N] in float64, once it is known that these are of the same call."""
        mine = torch.stack(list(state.values()), -1)
        words = mine.view(torch.int32).view(-1)
        room = min(_HEAD - _WORDS, len(words))
        numbers, is_new = _numbers_of(call, self._group, words.device)
        head = words.new_zeros(_HEAD)
        torch.cat(
            (numbers, _checksum(vectors, words.device).view(torch.int32), words[:room]), out=head[: _WORDS + room]
        )
        heads = _all_gather(head, self._group)
        if words.is_cpu or is_new:
            _compare(heads[:, :_WORDS])
        whole = heads[:, _WORDS : _WORDS + room]
        if room < len(words):
            whole = torch.cat((whole, _all_gather(words[room:], self._group)), 1)
        each = whole.contiguous().view(mine.dtype).view(self._size, *mine.shape).double().unbind(-1)
        return dict(zip(state, each, strict=True))


def _tells_value(spec: RowSpec) -> bool:
    """Whether the slices' own divergences, with their masses, are all there is to know."""
    return spec.formula == Formula.CROSS_ENTROPY or (spec.formula == Formula.MIXTURE_KL and spec.mix != Mix.BOTH)


def _of_no_token(hard: Tensor, soft: Tensor, stats: Tensor) -> None:
    """What a backend would say of a slice without columns, of which none is asked."""
    stats.zero_()
    for column in (LOG_HARD, LOG_STUDENT, LOG_RATIO):
        stats[:, column] = -math.inf
    hard.zero_()
    soft.fill_(-math.inf)


def _hard_state(own: Rows, of_slice: RowSpec, hard: Tensor, stats: Tensor) -> dict[str, Tensor]:
    state = {"z_peak": stats[:, PEAK_STUDENT]}
    if own.labels is None and own.z_scale is None:
        return state
    state["log_h"] = stats[:, LOG_HARD]
    if own.labels is None:
        return state
    rest = stats[:, LABEL_REST]
    if of_slice.label_smoothing:
        state["mean"] = hard
        if of_slice.vocab_size:  # the cross-entropy, which the smoothing took the place of
            column = own.labels.clamp(min=0).view(*own.student.shape[:2], 1)
            z_y = own.student.gather(-1, column).view(-1).to(hard.dtype)
            of_label = (stats[:, PEAK_STUDENT] - z_y) + stats[:, LOG_HARD]
            hard = torch.where(rest < 0.5, -torch.log1p(-rest), of_label)
    return state | {"hard": hard, "label_rest": rest}


def _exact_ratio(spec: RowSpec, soft: Tensor, stats: Tensor) -> Tensor:
    """LOG_RATIO without its rounding δ, where the near form's G shows it: G = −c_t·expm1(δ), or c_s·(KL − δ)."""
    g = stats[:, GRAD_SUM]
    delta = (soft - g) / spec.c_s if spec.mix == Mix.TEACHER else torch.log1p(-g / spec.c_t)
    return stats[:, LOG_RATIO] + torch.where(stats[:, GRAD_FORM] != 0, delta, 0.0)


def _masses(peak: Tensor, log_sum: Tensor, inv_t: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of [ranks, N]: the row's peak, 0 where all is −inf, log Σ exp relative to it, and log P of the slices."""
    nothing = log_sum == -math.inf
    of_row = finite(peak.masked_fill(nothing, -math.inf).amax(0))
    relative = (peak - of_row) * inv_t + log_sum
    total = relative.exp().sum(0).log()
    return of_row, total, relative - total


def _merge_soft(spec: RowSpec, states: dict[str, Tensor], soft: Tensor, stats: Tensor) -> None:
    log_s, inv_t = states["log_s"], 1.0 / spec.temperature
    log_t = states["log_ratio"] + log_s.masked_fill(log_s == -math.inf, 0.0)
    z_peak, log_student, log_p_s = _masses(states["z_peak"], log_s, inv_t)
    u_peak, log_teacher, log_p_t = _masses(states["u_peak"], log_t, inv_t)
    stats[:, PEAK_STUDENT], stats[:, PEAK_TEACHER] = z_peak, u_peak
    stats[:, LOG_STUDENT], stats[:, LOG_RATIO] = log_student, log_teacher - log_student
    by_student = spec.mix == Mix.TEACHER
    log_p, log_q = (log_p_s, log_p_t) if by_student else (log_p_t, log_p_s)
    weight = spec.c_s if by_student else spec.c_t
    p = log_p.exp()
    of_masses = weight * _mean(p, log_p - log_q)
    of_slices = _mean(p.masked_fill(log_q == -math.inf, 0.0), states["soft"])
    is_entropy = spec.formula == Formula.CROSS_ENTROPY
    value = of_slices - _mean(p, log_p_s) if is_entropy else of_slices + of_masses
    # Near where most of the row is, and its slices lie as in the teacher.
    near = (_mean(p, states["form"]) > 0.5) & (of_masses < spec.near_below)
    soft.copy_(value.clamp(min=0.0))
    stats[:, GRAD_SUM] = value if by_student else torch.where(near, 0.0, -weight)
    stats[:, GRAD_FORM] = near


def finite(peak: Tensor) -> Tensor:
    return peak.masked_fill(peak == -math.inf, 0.0)


def _mean(p: Tensor, x: Tensor) -> Tensor:
    """Σ p·x over the slices, with 0·x = 0 whatever x is."""
    return torch.where(p == 0, 0.0, p * x).sum(0)


def _own_columns(listed: Tensor, start: int, tokens: int) -> Tensor:
    own = listed - start
    return own.masked_fill_((listed < 0) | (own < 0) | (own >= tokens), -1)


def _checksum(vectors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """[1] int64, of labels, scales and listed columns by their bits: every rank must have the same rows."""
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for i, vector in enumerate(vectors):
        if vector is not None:
            bits = vector.view(torch.int64 if vector.element_size() == 8 else torch.int32).long()
            total += (bits * torch.arange(1 + i, len(bits) + 1 + i, device=device)).sum()
    return total


def _resolved(group: str) -> ProcessGroup:
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type,attr-defined]


def _start_of(place: Place) -> int:
    """This rank's first column."""
    return _resolved(place.group).rank() * place.width


_seen: dict[tuple[Any, ...], Tensor] = {}


def _numbers_of(call: Call, group: str, device: torch.device) -> tuple[Tensor, bool]:
    """(the call's numbers as words, whether they are new): a GPU keeps them, since copying would wait."""
    key = (call, group, device)
    if key in _seen:
        return _seen[key], False
    words = torch.tensor(call, dtype=torch.float64, device="cpu").view(torch.int32).to(device)
    if device.type != "cpu":
        _seen[key] = words
    return words, True


def _all_gather(tensor: Tensor, group: str) -> Tensor:
    """[ranks, ...]."""
    size = _resolved(group).size()
    flat = tensor.contiguous().view(-1)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(flat, size, group)
    result: Tensor = torch.ops._c10d_functional.wait_tensor(gathered)
    return result.view(size, *tensor.shape)


def _compare(heads: Tensor) -> None:
    """Raise, on every rank alike, if one of them makes another call.

    Raises:
        RuntimeError: which rank of the group, and what differs.
    """
    if bool((heads == heads[0]).all()):
        return
    calls = [Call(*numbers) for numbers in heads[:, : _WORDS - 2].contiguous().view(torch.float64).tolist()]
    for rank, call in enumerate(calls):
        if call.failed:
            raise RuntimeError(f"vocab_group: rank {rank} of the group has raised an error, which it shows")
    for rank, call in enumerate(calls):
        for name, mine, first in zip(Call._fields, call, calls[0], strict=True):
            if mine != first:
                raise RuntimeError(
                    f"vocab_group: rank {rank} of the group differs from rank 0 in {name}: {_shown(name, mine)} and "
                    f"{_shown(name, first)}; every rank must make the same call, on columns of its own"
                )
    others = [rank for rank in range(len(heads)) if bool((heads[rank] != heads[0]).any())]
    raise RuntimeError(
        f"vocab_group: rank {others[0]} of the group has other rows than rank 0: labels, masks, weights or listed "
        "tokens; ranks that share a vocabulary must have the same"
    )


def _shown(name: str, number: float) -> str:
    if name.endswith("dtype"):
        return "none" if number < 0 else str(_DTYPES[int(number)])
    if name == "operation":
        return _OPERATIONS[int(number)]
    return f"{number:g}"
