"""What runs only while ``torch.compile`` traces, and is imported only then: it imports the compiler."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.allow_in_graph
def varying(*numbers: float) -> Tensor | None:
    """The numbers [n] in float64 on the CPU, if one of them is traced as unknown; None if all are known.

    To the tracer they look alike, so this is put into its graph as it is, and told apart below it.
    """
    if not any(isinstance(number, torch.SymFloat) for number in numbers):
        return None
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + number for number in numbers])  # the compiler makes sums of numbers sums of tensors
