"""The row contract by the Triton kernels of ``fastkd.kernels``, which are imported when first used."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastkd._request import Rows, RowSpec


def unavailable() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def unsupported(logits: Tensor, teacher: Tensor | None) -> str | None:
    if logits.dtype == torch.float64:
        return "its kernels compute in float32, not in float64"
    if logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "on a CPU Triton runs only in its interpreter (TRITON_INTERPRET=1)"
    if logits.device.type not in ("cpu", "cuda"):
        return f"it runs on NVIDIA and AMD GPUs, not on {logits.device.type}"
    return None


def kd_rows(rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    from fastkd.kernels import kd_rows as kernel

    kernel.kd_rows(rows, spec, hard, soft, stats, grad)


def kd_grad(rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
    from fastkd.kernels import kd_rows as kernel

    kernel.kd_rows(rows, spec, None, None, stats, grad)


def slice_sums(rows: Rows, spec: RowSpec, stats: Tensor, sums: Tensor) -> None:
    from fastkd.kernels import slices as kernel

    kernel.slice_sums(rows, spec, stats, sums)


def rest_rows(rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
    from fastkd.kernels import rest as kernel

    kernel.rest_rows(rows, spec, listed, hard, rest, stats)


def rest_grad(rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor) -> None:
    from fastkd.kernels import rest as kernel

    kernel.rest_grad(rows, spec, listed, outcome_grad, stats, grad)


def scale_(grad: Tensor, scalar: Tensor) -> None:
    from fastkd.kernels import scale as kernel

    kernel.scale_(grad, scalar)


def hidden_rows(
    student: Tensor, teacher: Tensor, scale: Tensor, kind: int, losses: Tensor, grad: Tensor | None
) -> None:
    from fastkd.kernels import hidden as kernel

    kernel.hidden_rows(student, teacher, scale, kind, losses, grad)


def log_softmax(logits: Tensor, out: Tensor, lse: Tensor, temperature: float) -> None:
    from fastkd.kernels import log_softmax as kernel

    kernel.log_softmax(logits, out, lse, temperature)


def log_softmax_backward(grad: Tensor, logits: Tensor, lse: Tensor, out: Tensor, temperature: float) -> None:
    from fastkd.kernels import log_softmax as kernel

    kernel.log_softmax_backward(grad, logits, lse, out, temperature)
