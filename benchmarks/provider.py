"""What a contender is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastkd import _extras
from fastkd.bench.cases import Case, Inputs

# From the inputs, the loss (or the log-probabilities), to which the runner applies backward.
Loss = Callable[[Inputs], Tensor]


class Provider(NamedTuple):
    name: str
    unavailable: Callable[[str], str | None]  # why it cannot run on a device, or None
    loss: Callable[[Case], Loss | None]  # None: it does not compute such a case
    overwrites: bool = False  # the student's logits, even where the case is not in place
    is_floor: bool = False  # what no contender can do without, and computes no loss


def needs(package: str) -> Callable[[str], str | None]:
    return lambda device: _extras.missing(package)


def needs_gpu_and(package: str) -> Callable[[str], str | None]:
    def unavailable(device: str) -> str | None:
        return _extras.missing(package) if device == "cuda" else "needs a GPU"

    return unavailable
