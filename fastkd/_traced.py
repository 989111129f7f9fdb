"""What runs only while ``torch.compile`` traces, and is imported only then: it imports the compiler."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def varying(*numbers: float) -> Tensor | None:
    """The numbers [n] in float64 on the CPU, if one of them is traced as unknown; None if all are known.

    To the tracer they look alike, so this is put into its graph as it is, and what it gives there, where an unknown
    number is a SymFloat, decides. It runs again when the graph is compiled further, where a number may have become
    known (PyTorch 2.11 gives up on some), and where it is not, when the graph runs.
    """
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    if isinstance(zero, FakeTensor) and not any(isinstance(number, torch.SymFloat) for number in numbers):
        return None
    return torch.stack([zero + number for number in numbers])  # the compiler makes sums of numbers sums of tensors
