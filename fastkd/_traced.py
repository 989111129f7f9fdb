"""What runs only while ``torch.compile`` traces, and is imported only then: it imports the compiler."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def varying(*numbers: float) -> Tensor | None:
    """The numbers [n] in float64 on the CPU, if one of them is traced as unknown; None if all are known.

    To the tracer they look alike, so this is put into its graph as it is. It runs when the graph is traced, where an
    unknown number is a SymFloat; and, where nothing compiles the graph further, when that runs, on plain numbers.
    """
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    is_traced = type(zero) is not Tensor
    if is_traced and not any(isinstance(number, torch.SymFloat) for number in numbers):
        return None
    return torch.stack([zero + number for number in numbers])  # the compiler makes sums of numbers sums of tensors
