"""What the row operation works on: the numbers (RowSpec) and the tensors (Rows) that every backend receives."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Formula(IntEnum):
    """The functors that a backend implements. Their numbers are the same in every language."""

    MIXTURE_KL = 0
    CROSS_ENTROPY = 1
    TOTAL_VARIATION = 2
    SYMMETRIC_KL = 3


class Mix(IntEnum):
    """What the mixture ``m = w·p_t + (1−w)·p_s`` is. Compile-time structure, derived from the number ``w``."""

    STUDENT = 0
    TEACHER = 1
    BOTH = 2


class HiddenKind(IntEnum):
    """What :class:`fastkd.HiddenLoss` calls its kinds. Their numbers are the same in every language."""

    MSE = 0
    COSINE = 1


# Below this a divergence of weight 1 is summed from terms that are small themselves: plain ones are off by some 1e-7.
NEAR = 0.05


class RowSpec(NamedTuple):
    """The numbers of the row operation; as plain arguments, part of the registered operators' schema."""

    temperature: float
    formula: int
    c_t: float
    c_s: float
    w: float
    label_smoothing: float
    vocab_size: int

    @property
    def mix(self) -> Mix:
        return Mix.STUDENT if self.w == 0.0 else Mix.TEACHER if self.w == 1.0 else Mix.BOTH

    @property
    def summands(self) -> tuple[RowSpec, ...]:
        """The divergences whose sum it is: of ``SYMMETRIC_KL``, two of the family; else itself."""
        if self.formula != Formula.SYMMETRIC_KL:
            return (self,)
        forward = self._replace(formula=Formula.MIXTURE_KL, c_s=0.0)
        return forward, self._replace(formula=Formula.MIXTURE_KL, c_t=0.0, w=1.0)

    @property
    def imbalance(self) -> float:
        """κ = c_s·w − c_t·(1−w), 0 for every JSD: c_t·(m − p_t) + c_s·(m − p_s) = κ·(p_t − p_s)."""
        return self.c_s * self.w - self.c_t * (1.0 - self.w)

    @property
    def near_below(self) -> float:
        """Of the family, below this a row takes the near form. A mixture's largest value may itself be small."""
        weight = self.c_t + self.c_s
        if self.mix != Mix.BOTH:
            return NEAR * weight
        return min(NEAR * weight, (-self.c_t * math.log(self.w) - self.c_s * math.log1p(-self.w)) / 4)


class Place(NamedTuple):
    """Who runs a call, and where its vocabulary lies; as plain arguments, part of the operators' schema."""

    backend: str  # '' for the automatic choice
    group: str = ""  # the name of the process group over whose ranks it lies in slices; '': whole
    width: int = 0  # columns of a slice: rank r has those from r·width on, the last ones fewer if they end there


WHOLE = Place("")


class Rows(NamedTuple):
    """The tensors of the row operation. N = B·S rows; within [B, S, V] the last stride is 1 and the others are free.

    A scale of None means that its term is absent: without ``hard_scale`` labels are not read, without ``soft_scale``
    the teacher is not. A row whose scales are all 0 is not read: losses 0, gradient 0.

    ``z_scale`` is that of the z-loss lse(z)², z at temperature 1, and adds ``2·z_scale·lse(z)·softmax(z)`` to the
    gradient. The value follows from PEAK_STUDENT and LOG_HARD, which are then given without labels too.

    The columns may be a slice of the vocabulary, and a label in another one is ``ELSEWHERE``: the row has all its
    statistics, but the value of its hard term is not specified (it is finite), and its gradient no entry of a label.
    """

    student: Tensor  # [B, S, V]
    teacher: Tensor | None  # [B, S, V_t]
    labels: Tensor | None  # [N] int64
    hard_scale: Tensor | None  # [N] fp32 (fp64 with fp64 logits)
    soft_scale: Tensor | None  # [N] likewise
    z_scale: Tensor | None = None  # [N] likewise


# Columns of the statistics [N, 8] that the loss hands to the gradient: the peaks max z and max u (0 where all is −inf);
# log Σ exp of z − peak and (z − peak)/T, kept apart from the peaks because far from 0 their sum has no digits left for
# an exponent; that of (u − peak)/T less the latter, which has digits of its own near convergence; G = Σ g; 1 − p_y at
# temperature 1, since p_y − 1 has none as p_y → 1; and which of two forms g has in this row (0 or 1): they differ by a
# multiple of p_s, which dz = g − p_s·G does not see.
PEAK_STUDENT, PEAK_TEACHER, LOG_HARD, LOG_STUDENT, LOG_RATIO, GRAD_SUM, LABEL_REST, GRAD_FORM = range(8)
NUM_STATS = 8

# The label of a row that counts, where its column is in another slice of the vocabulary.
ELSEWHERE = -(2**63)
