"""The compiled modules' arguments: tensors as addresses, strides and dtype numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._request import Rows, RowSpec

# As in csrc/params.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ABSENT = (0, 0, 0, 0)


def matrix(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """(address, outer stride, inner stride, dtype) of a [B, S, V] view."""
    if tensor is None:
        return ABSENT
    outer, inner, _ = tensor.stride()
    return tensor.data_ptr(), outer, inner, DTYPES[tensor.dtype]


def kd_rows(
    rows: Rows,
    spec: RowSpec,
    hard: Tensor | None,
    soft: Tensor | None,
    stats: Tensor,
    grad: Tensor | None,
) -> tuple[Any, ...]:
    """Of ``kd_rows``, all but the threads or stream; without ``hard`` the gradient alone, from ``stats``."""
    student, teacher, *of_rows = rows
    temperature, formula, c_t, c_s, w, smoothing, n = spec
    outer, inner, columns = student.shape
    vectors = (0 if tensor is None else tensor.data_ptr() for tensor in (*of_rows, hard, soft))
    return (
        matrix(student), matrix(teacher), matrix(grad), *vectors, stats.data_ptr(), outer * inner, inner, n, columns,
        temperature, formula, c_t, c_s, w, smoothing, hard is None,
    )  # fmt: skip


def log_softmax(x: Tensor, out: Tensor, grad: Tensor | None, lse: Tensor, temperature: float) -> tuple[Any, ...]:
    """Of ``log_softmax``, all but the threads or stream; with ``grad`` it is the backward."""
    outer, inner, columns = x.shape
    return matrix(x), matrix(out), matrix(grad), lse.data_ptr(), outer * inner, inner, columns, temperature
