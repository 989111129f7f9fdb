"""Which backend runs a call, and why. The only module that knows the backends' names."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import TracebackType
from typing import Any, Protocol, cast

from torch import Tensor

from fastkd._request import Rows, RowSpec


class Backend(Protocol):
    """The row contract. Tensors are [B, S, V] views or [N] vectors (see ``Rows``); outputs are given, and filled."""

    def unavailable(self) -> str | None:
        """What is missing for this backend on this machine, or None."""

    def unsupported(self, logits: Tensor, teacher: Tensor | None) -> str | None:
        """Why it cannot run on these logits, or None."""

    def kd_rows(
        self, rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None
    ) -> None:
        """All stages; ``grad`` may be the student's logits, and its dtype another than theirs (half of float32)."""

    def kd_grad(self, rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
        """The last stage alone, from nothing but the statistics and the logits; ``grad`` as there.

        The columns may be a slice of the vocabulary, and the statistics those of the whole row.
        """

    def slice_sums(self, rows: Rows, spec: RowSpec, stats: Tensor, sums: Tensor) -> None:
        """The second stage alone: what the columns of a slice add to the value and to G, given the row's normalisers.

        Of ``stats`` the two peaks, LOG_STUDENT and LOG_RATIO are read. ``sums`` [N, 4], in the losses' dtype, gets

            Σ term and Σ g in the far form, Σ term and Σ g in the near form

        weights included. Added over the slices, one pair or the other is the row's value and the GRAD_SUM that goes
        with that GRAD_FORM; which, the far value tells. Where a slice's own is 0.05·(c_t + c_s) or more, and so the
        row's, since terms are >= 0, the near pair may repeat the far one.

        A total variation has one term, with all its digits, and its two forms are its two sides. The third sum is then
        E = Σ p_t − p_s, which is not 0 by the rounding of LOG_RATIO, and the value is S + E·(G + G')/2.

        ``rows.soft_scale`` says which rows count; of the others sums are 0, and nothing is read. It is not asked of a
        cross-entropy, whose value follows from the slices' own.

        A backend may lack this one: the automatic choice then goes on.
        """

    def rest_rows(self, rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
        """What a sparse teacher, who lists a few columns of a row, needs of all the others; no teacher is read.

        ``listed`` [N, K] int32, contiguous: columns in [0, vocab_size), distinct in a row, and −1 for none. With c the
        largest of the columns that are not listed, given as stats[PEAK_TEACHER],

            rest [N] = log Σ exp((z_j − c)/T) over the columns j that are not listed

        which is −inf, and c 0, if all are listed or −inf. ``hard`` is what ``kd_rows`` gives, and so are PEAK_STUDENT
        and LOG_HARD; what else of ``stats``, which comes as 0, is filled is between this and ``rest_grad``.
        ``rows.soft_scale`` says which rows count, and nothing else. Of ``spec`` the formula and its numbers are not
        read.

        A backend may lack these two: the automatic choice then goes on.
        """

    def rest_grad(
        self, rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor
    ) -> None:
        """The gradient, from statistics that ``rest_rows`` gave for these rows; ``grad`` as for ``kd_rows``.

        ``outcome_grad`` [N, K + 1], contiguous, in the losses' dtype, weights included: by z/T at the listed columns,
        and by ``c/T + rest``. So, rounded once,

            dz_i = hard part + outcome_grad_i/T                                     at the listed columns
            dz_j = hard part + outcome_grad_K/T·exp((z_j − c)/T − rest)             at the others; 0 if rest is −inf

        where the hard part is that of ``kd_rows`` and of a z-loss. A row of which no scale counts is not read and gets
        0, whatever its outcome_grad; so do columns past vocab_size.
        """

    def sparse_rows(
        self, rows: Rows, spec: RowSpec, listed: Tensor, outcomes: Tensor, count: int, outcome_scale: Tensor,
        hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None,
    ) -> None:  # fmt: skip
        """``rest_rows``, the row operation on the outcomes, and ``rest_grad``, in one: the row is then at hand.

        ``outcomes`` [N, K + 1], contiguous, in the losses' dtype, are the teacher's, of which the first ``count`` are
        there, K + 1 or K. The student's are z/T at the listed columns and ``c/T + rest``. Of the divergence between the
        two, which ``spec`` names, at temperature 1, ``soft`` [N] is the value and ``outcome_scale`` [N] the soft scale.

        A backend that has the other two may lack this one.
        """

    def scale_(self, grad: Tensor, scalar: Tensor) -> None:
        """``grad *= scalar``, which is 0-d and is read on the device; nothing is written if it is 1."""

    def log_softmax(self, logits: Tensor, out: Tensor, lse: Tensor, temperature: float) -> None:
        """``out`` and, for the backward, ``lse`` [N, 2]: the peak and log Σ exp((logits − peak)/T)."""

    def log_softmax_backward(self, grad: Tensor, logits: Tensor, lse: Tensor, out: Tensor, temperature: float) -> None:
        """``out = (grad − softmax(logits/T)·Σ grad)/T``."""

    def hidden_rows(
        self, student: Tensor, teacher: Tensor, scale: Tensor, kind: int, losses: Tensor, grad: Tensor | None
    ) -> None:
        """The loss of hidden states [B, S, H] (see ``HiddenKind``); a row whose scale is 0 is not read.

        A backend may lack this one: the automatic choice then goes on.
        """


# Modules of fastkd.backends. Of those that can run, the automatic choice is the first in the device's list.
NAMES = ("cuda", "triton", "cpu", "torch")
# Triton before the compiled CUDA kernels until these have been measured.
PREFERENCE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}

_override = ""


class use_backend:
    """Choose the backend of the calls that name none: from here on, or as a context manager for a block.

    In either use it is the choice of the whole process, whatever the thread.

    ``None`` returns to the automatic choice. The keyword ``backend=`` goes first, then this, then the environment
    variable ``FASTKD_BACKEND``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        global _override
        self._previous = [_override]
        self._name = _override = _check_name("use_backend", name)
        self._is_new = True

    def __enter__(self) -> None:
        global _override
        if not self._is_new:  # entered again
            self._previous.append(_override)
            _override = self._name
        self._is_new = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _override
        _override = self._previous.pop()


def requested(name: str | None) -> str:
    """The backend that the caller asked for, by argument, :class:`use_backend` or environment; '' for none."""
    if name is not None:
        return _check_name("backend", name)
    return _override or _from_environment


def choose(logits: Tensor, name: str, teacher: Tensor | None = None, operation: str = "kd_rows") -> Backend:
    """The backend called ``name``, or the device's first that can run ``operation`` on ``logits``.

    Warns, once, where a CPU's calls are slower than they need be since the ``cpu`` backend was not built.

    Raises:
        RuntimeError: the one asked for by name cannot; it says why.
    """
    for candidate in candidates(logits, name):
        why = refusal(logits, candidate, teacher, operation)
        if why is None:
            return backend(candidate)
        if candidate == "cpu" and not name and backend("cpu").unsupported(logits, teacher) is None:
            _warn_once(why)
    raise RuntimeError(f"backend {name!r} cannot run here: {why}")


def candidates(logits: Tensor, name: str) -> tuple[str, ...]:
    """The backends to try, in order."""
    return (name,) if name else PREFERENCE.get(logits.device.type, ("torch",))


def refusal(logits: Tensor, name: str, teacher: Tensor | None = None, operation: str = "kd_rows") -> str | None:
    """Why backend ``name`` cannot run ``operation`` on ``logits``, or None."""
    lacks = None if hasattr(backend(name), operation) else f"it has no {operation}"
    return _unavailable(name) or lacks or backend(name).unsupported(logits, teacher)


@functools.cache
def _warn_once(why: str) -> None:
    """The install says it too, but pip does not show that. Who asks for a backend by name, 'torch' too, knows."""
    warnings.warn(
        f"fastkd: backend 'cpu' cannot run here, and 'torch', which is slower, does its work: {why}. To have no "
        "warning, ask for 'torch' by fastkd.use_backend or FASTKD_BACKEND.",
        RuntimeWarning,
        stacklevel=1,
    )


@functools.cache
def backend(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"fastkd.backends.{name}"))


@functools.cache
def _unavailable(name: str) -> str | None:
    return backend(name).unavailable()


def _check_name(argument: str, name: Any) -> str:
    if name is None:
        return ""
    if name not in NAMES:
        raise ValueError(f"{argument}: got {name!r}, must be one of {', '.join(map(repr, sorted(NAMES)))}")
    return cast(str, name)


_from_environment = _check_name("FASTKD_BACKEND", os.environ.get("FASTKD_BACKEND") or None)
