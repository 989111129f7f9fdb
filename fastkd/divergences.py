"""The divergences between the two distributions, as data.

With ``p_t = softmax(u/T)``, ``p_s = softmax(z/T)`` and ``m = w·p_t + (1−w)·p_s``, almost every divergence in use is

    D = c_t·KL(p_t‖m) + c_s·KL(p_s‖m)

so a member of the family is three numbers, and a new one is one line: ``Divergence("mine", c_t=0.3, c_s=0.7, w=0.2)``.
This module is the only one that knows a divergence's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastkd._request import Formula
from fastkd._validate import check_real

# Of a formula, those of its numbers that may be given.
_NUMBERS = {
    Formula.MIXTURE_KL: ("c_t", "c_s", "w"),
    Formula.CROSS_ENTROPY: (),
    Formula.TOTAL_VARIATION: (),
    Formula.SYMMETRIC_KL: ("c_t", "c_s"),
}


@dataclass(frozen=True)
class Divergence:
    """``c_t·KL(p_t‖m) + c_s·KL(p_s‖m)``, ``m = w·p_t + (1−w)·p_s``; or another ``formula``, with those of these
    numbers that it has.

    Raises:
        ValueError: a weight is negative, ``w`` is outside [0, 1], the divergence would be 0 everywhere, or the formula
            has no such number.
        TypeError: one of them is no number.
    """

    name: str
    c_t: float = 1.0
    c_s: float = 0.0
    w: float = 0.0
    formula: Formula = Formula.MIXTURE_KL

    def __post_init__(self) -> None:
        if not isinstance(self.formula, Formula):
            object.__setattr__(self, "formula", Formula(self.formula))
        for name in ("c_t", "c_s", "w"):
            check_real(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, default in (("c_t", 1.0), ("c_s", 0.0), ("w", 0.0)):
            if name not in _NUMBERS[self.formula] and getattr(self, name) != default:
                raise ValueError(f"formula: got {self.formula!r} with {name}, which it does not have")
        if not (0.0 <= self.c_t < float("inf") and 0.0 <= self.c_s < float("inf")):
            raise ValueError(f"c_t, c_s: got {self.c_t}, {self.c_s}, must be finite and >= 0")
        if not 0.0 <= self.w <= 1.0:
            raise ValueError(f"w: got {self.w}, must be in [0, 1]")
        if self.formula == Formula.SYMMETRIC_KL and not (self.c_t > 0.0 and self.c_s > 0.0):
            raise ValueError(f"c_t, c_s: got {self.c_t}, {self.c_s}, must be > 0: without one, it is of the family")
        # KL(p‖p) = 0, so at w = 0 only c_t counts and at w = 1 only c_s.
        if self.c_t * (self.w < 1.0) + self.c_s * (self.w > 0.0) == 0.0:
            raise ValueError(f"c_t, c_s, w: got {self.c_t}, {self.c_s}, {self.w}: this divergence is 0 everywhere")


FORWARD_KL = Divergence("forward_kl", c_t=1.0, c_s=0.0, w=0.0)
REVERSE_KL = Divergence("reverse_kl", c_t=0.0, c_s=1.0, w=1.0)
CROSS_ENTROPY = Divergence("cross_entropy", formula=Formula.CROSS_ENTROPY)
TVD = Divergence("tvd", formula=Formula.TOTAL_VARIATION)

NAMED = {member.name: member for member in (FORWARD_KL, REVERSE_KL, CROSS_ENTROPY, TVD)}

_JSD = "fastkd.JSD(beta), whose beta weighs the teacher"
_SYMMETRIC_KL = "fastkd.SymmetricKL(forward), whose forward weighs KL(teacher‖student)"
# What other libraries call a divergence, and what it is here.
_ELSEWHERE = {
    "kl": "'forward_kl' is KL(teacher‖student), 'reverse_kl' KL(student‖teacher)",
    "kl_div": "'forward_kl' is KL(teacher‖student), as F.kl_div(student, teacher) is",
    "fkl": "it is 'forward_kl' here",
    "rkl": "it is 'reverse_kl' here",
    "ce": "it is 'cross_entropy' here",
    "tv": "it is 'tvd' here",
    "js": f"it is {_JSD}",
    "jsd": f"it is {_JSD}",
    "skew_kl": "it is fastkd.SkewKL(lam)",
    "skew_reverse_kl": "it is fastkd.SkewReverseKL(lam)",
    "symmetric_kl": f"it is {_SYMMETRIC_KL}",
    "jeffreys": "half of it is fastkd.SymmetricKL(0.5)",
    "mixed": f"it is {_SYMMETRIC_KL}",
}


def JSD(beta: float) -> Divergence:
    """Generalised Jensen-Shannon divergence ``β·KL(p_t‖m) + (1−β)·KL(p_s‖m)``, ``m = β·p_t + (1−β)·p_s``.

    ``beta`` weighs the teacher. As in TRL and Liger, ``beta=0`` is forward KL and ``beta=1`` reverse KL; these are not
    the formula's limits, which are 0. Source: Agarwal et al. (2024), On-Policy Distillation of Language Models, eq. 1.

    Raises:
        ValueError: ``beta`` is outside [0, 1].
    """
    _check_share("beta", beta)
    if beta in (0.0, 1.0):
        return FORWARD_KL if beta == 0.0 else REVERSE_KL
    return Divergence("jsd", c_t=beta, c_s=1.0 - beta, w=beta)


def SkewKL(lam: float) -> Divergence:
    """Skewed forward KL ``KL(p_t ‖ λ·p_t + (1−λ)·p_s)``. Source: Ko et al. (2024), DistiLLM, eq. 4.

    Raises:
        ValueError: ``lam`` is outside [0, 1); at 1 the divergence would be 0 everywhere.
    """
    _check_skew(lam)
    return Divergence("skew_kl", c_t=1.0, c_s=0.0, w=lam)


def SkewReverseKL(lam: float) -> Divergence:
    """Skewed reverse KL ``KL(p_s ‖ (1−λ)·p_t + λ·p_s)``. Source: Ko et al. (2024), DistiLLM, eq. 5.

    Raises:
        ValueError: ``lam`` is outside [0, 1); at 1 the divergence would be 0 everywhere.
    """
    _check_skew(lam)
    return Divergence("skew_reverse_kl", c_t=0.0, c_s=1.0, w=1.0 - lam)


def SymmetricKL(forward: float = 0.5) -> Divergence:
    """Both directions, ``forward·KL(p_t‖p_s) + (1−forward)·KL(p_s‖p_t)``; at 0.5 half of Jeffreys' divergence.

    ``forward=1`` is forward KL and ``forward=0`` reverse KL. Where the student has mass and the teacher none it is
    infinite and the row's soft gradient 0, as of reverse KL. Source: Kullback and Leibler (1951), On Information and
    Sufficiency, whose divergence J is the sum of the two.

    Raises:
        ValueError: ``forward`` is outside [0, 1].
    """
    _check_share("forward", forward)
    if forward in (0.0, 1.0):
        return FORWARD_KL if forward == 1.0 else REVERSE_KL
    return Divergence("symmetric_kl", c_t=forward, c_s=1.0 - forward, formula=Formula.SYMMETRIC_KL)


def resolve(divergence: str | Divergence) -> Divergence:
    """The divergence that a caller named, or gave.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a divergence.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(f"divergence: got {divergence!r}, must be a name or a fastkd.Divergence")
    if divergence not in NAMED:
        raise ValueError(
            f"divergence: got {divergence!r}, must be one of {', '.join(map(repr, NAMED))}, "
            "or fastkd.JSD(beta), fastkd.SkewKL(lam), fastkd.SkewReverseKL(lam), "
            "fastkd.SymmetricKL(forward), fastkd.Divergence(...)"
            + (f"; {_ELSEWHERE[divergence]}" if divergence in _ELSEWHERE else "")
        )
    return NAMED[divergence]


def _check_share(name: str, share: float) -> None:
    check_real(name, share)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name}: got {share}, must be in [0, 1]")


def _check_skew(lam: float) -> None:
    check_real("lam", lam)
    if not 0.0 <= lam < 1.0:
        raise ValueError(f"lam: got {lam}, must be in [0, 1)")
