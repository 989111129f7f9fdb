"""The row contract by the compiled kernels of ``csrc/cpu``: SIMD within a row, threads over rows."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastkd import _built
from fastkd._request import Rows, RowSpec
from fastkd.backends import _arguments

_cpu: Any = None
try:
    _cpu = importlib.import_module("fastkd._cpu")
except ImportError as error:
    _missing = _built.missing("cpu", error)


def unavailable() -> str | None:
    if _cpu is None:
        way = "with g++ or clang installed, reinstall fastkd from source, by pip's --no-cache-dir"
        return f"its C++ part is not built ({_missing}); {way}"
    return None


def unsupported(logits: Tensor, teacher: Tensor | None) -> str | None:
    if logits.device.type != "cpu":
        return f"it runs on CPUs, not on {logits.device.type}"
    if logits.dtype == torch.float64:
        return "its kernels compute in float32, not in float64"
    return None


def kd_rows(rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None) -> None:
    _cpu.kd_rows(*_arguments.kd_rows(rows, spec, hard, soft, stats, grad), torch.get_num_threads())


def kd_grad(rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
    _cpu.kd_rows(*_arguments.kd_rows(rows, spec, None, None, stats, grad), torch.get_num_threads())


def slice_sums(rows: Rows, spec: RowSpec, stats: Tensor, sums: Tensor) -> None:
    arguments = _arguments.kd_rows(rows, spec, None, None, stats, None)
    _cpu.slice_sums(*arguments, sums.data_ptr(), torch.get_num_threads())


def rest_rows(rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
    arguments = _arguments.kd_rows(rows, spec, hard, rest, stats, None)
    _cpu.rest_rows(*arguments, listed.data_ptr(), listed.shape[1], 0, 0, 0, 0, torch.get_num_threads())


def rest_grad(rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor) -> None:
    arguments = _arguments.kd_rows(rows, spec, None, None, stats, grad)
    of_outcomes = listed.data_ptr(), listed.shape[1], outcome_grad.data_ptr(), 0, 0, 0
    _cpu.rest_rows(*arguments, *of_outcomes, torch.get_num_threads())


def sparse_rows(
    rows: Rows, spec: RowSpec, listed: Tensor, outcomes: Tensor, count: int, outcome_scale: Tensor, hard: Tensor,
    soft: Tensor, stats: Tensor, grad: Tensor | None,
) -> None:  # fmt: skip
    arguments = _arguments.kd_rows(rows, spec, hard, soft, stats, grad)
    of_outcomes = listed.data_ptr(), listed.shape[1], 0, outcomes.data_ptr(), outcome_scale.data_ptr(), count
    _cpu.rest_rows(*arguments, *of_outcomes, torch.get_num_threads())


def scale_(grad: Tensor, scalar: Tensor) -> None:
    number = scalar.item()
    if number != 1.0:
        outer, inner, columns = grad.shape
        _cpu.scale(_arguments.matrix(grad), outer * inner, inner, columns, number, torch.get_num_threads())


def hidden_rows(
    student: Tensor, teacher: Tensor, scale: Tensor, kind: int, losses: Tensor, grad: Tensor | None
) -> None:
    outer, inner, columns = student.shape
    _cpu.hidden_rows(
        *map(_arguments.matrix, (student, teacher, grad)), scale.data_ptr(), losses.data_ptr(), outer * inner, inner,
        columns, kind, torch.get_num_threads(),
    )  # fmt: skip


def log_softmax(logits: Tensor, out: Tensor, lse: Tensor, temperature: float) -> None:
    _cpu.log_softmax(*_arguments.log_softmax(logits, out, None, lse, temperature), torch.get_num_threads())


def log_softmax_backward(grad: Tensor, logits: Tensor, lse: Tensor, out: Tensor, temperature: float) -> None:
    _cpu.log_softmax(*_arguments.log_softmax(logits, out, grad, lse, temperature), torch.get_num_threads())
