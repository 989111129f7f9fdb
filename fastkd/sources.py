"""Where logits come from, other than a tensor of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearLogits(NamedTuple):
    """Logits that are not there yet: ``softcap·tanh(x/softcap)`` of ``x = scale·(hidden @ weight.T + bias)``.

    :func:`fastkd.kd_loss` takes it for a tensor of logits, the student's, the teacher's or both, and computes them a
    chunk of rows at a time. The student's ``hidden``, ``weight`` and ``bias`` get gradients, in their dtypes.

    Example:
        >>> import torch, fastkd
        >>> head = torch.nn.Linear(8, 100)
        >>> student_hidden, teacher_hidden = torch.randn(4, 8), torch.randn(4, 16)
        >>> student = fastkd.LinearLogits(student_hidden, head.weight, head.bias)
        >>> teacher = fastkd.LinearLogits(teacher_hidden, torch.randn(100, 16), softcap=30.0)
        >>> fastkd.kd_loss(student, teacher, temperature=2.0).backward()
        >>> head.weight.grad.shape
        torch.Size([100, 8])
    """

    hidden: Tensor  # (..., H) float32, bfloat16, float16 or float64
    weight: Tensor  # (V, H), as nn.Linear's; of hidden's dtype unless under autocast
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None  # > 0
