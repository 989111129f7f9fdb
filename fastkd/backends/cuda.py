"""The row contract by the compiled kernels of ``csrc/cuda``: one read of the logits where a cluster holds the row."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastkd import _built
from fastkd._request import Rows, RowSpec
from fastkd.backends import _arguments

_supported: set[int] = set()  # indices of devices
_cuda: Any = None
try:
    _cuda = importlib.import_module("fastkd._cuda")
except ImportError as error:
    _missing = _built.missing("cuda", error)


def unavailable() -> str | None:
    if _cuda is None:
        return f"its CUDA part is not built ({_missing}); with nvcc, reinstall fastkd from source where there is a GPU"
    return None


def unsupported(logits: Tensor, teacher: Tensor | None) -> str | None:
    if logits.device.type != "cuda" or torch.version.hip is not None:
        return "it runs on NVIDIA GPUs"
    if why := _unsupported_device(logits.device):
        return why
    if logits.dtype == torch.float64:
        return "its kernels compute in float32, not in float64"
    if teacher is not None and teacher.dtype == torch.float64:
        return "its kernels compute in float32; the teacher's logits are float64"
    return None


def _unsupported_device(device: torch.device) -> str | None:
    """Asked again after a failure, which may pass: a GPU that another process had filled."""
    if device.index in _supported:
        return None
    with torch.cuda.device(device):
        why = _cuda.supports_device(device.index)
    if why:
        major, minor = torch.cuda.get_device_capability(device)
        return f"its build has nothing that this GPU (compute capability {major}.{minor}) runs: {why}"
    _supported.add(device.index)
    return None


def kd_rows(rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    _call(_cuda.kd_rows, rows.student, *_arguments.kd_rows(rows, spec, hard, soft, stats, grad))


def kd_grad(rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
    _call(_cuda.kd_rows, rows.student, *_arguments.kd_rows(rows, spec, None, None, stats, grad))


def slice_sums(rows: Rows, spec: RowSpec, stats: Tensor, sums: Tensor) -> None:
    arguments = _arguments.kd_rows(rows, spec, None, None, stats, None)
    _call(_cuda.slice_sums, rows.student, *arguments, sums.data_ptr())


def rest_rows(rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
    arguments = _arguments.kd_rows(rows, spec, hard, rest, stats, None)
    _call(_cuda.rest_rows, rows.student, *arguments, listed.data_ptr(), listed.shape[1], 0, 0)


def rest_grad(rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor) -> None:
    arguments = _arguments.kd_rows(rows, spec, None, None, stats, grad)
    scratch = torch.empty_like(outcome_grad)
    of_outcomes = listed.data_ptr(), listed.shape[1], outcome_grad.data_ptr(), scratch.data_ptr()
    _call(_cuda.rest_rows, rows.student, *arguments, *of_outcomes)


def scale_(grad: Tensor, scalar: Tensor) -> None:
    outer, inner, columns = grad.shape
    scalar = scalar.to(torch.float32)
    _call(_cuda.scale, grad, _arguments.matrix(grad), outer * inner, inner, columns, scalar.data_ptr())


def log_softmax(logits: Tensor, out: Tensor, lse: Tensor, temperature: float) -> None:
    _call(_cuda.log_softmax, logits, *_arguments.log_softmax(logits, out, None, lse, temperature))


def log_softmax_backward(grad: Tensor, logits: Tensor, lse: Tensor, out: Tensor, temperature: float) -> None:
    _call(_cuda.log_softmax, logits, *_arguments.log_softmax(logits, out, grad, lse, temperature))


def _call(function: Any, logits: Tensor, *arguments: Any) -> None:
    """Launch on the logits' device and its current stream."""
    if logits.numel() == 0:
        return
    used: list[Tensor] = []  # until the launch: what takes the memory afterwards comes later on the stream

    def memory(size: int) -> int:
        used.append(torch.empty(size, dtype=torch.uint8, device=logits.device))
        return int(used[-1].data_ptr())

    with torch.cuda.device(logits.device):
        status = function(*arguments, (logits.device.index, torch.cuda.current_stream().cuda_stream, memory))
    if status:
        raise RuntimeError(f"fastkd: {status}")
