"""Build and call the CUDA kernels under the SIMT shim."""

from __future__ import annotations

import ctypes
import fcntl
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkd._request import Rows, RowSpec

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
Outputs = dict[str, torch.Tensor | None]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


class KDRowsParams(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("z", "u", "dz")),
        *((name, ctypes.c_void_p) for name in ("labels", "hard_scale", "soft_scale", "z_scale")),
        *((name, ctypes.c_void_p) for name in ("hard", "soft", "stats")),
        *((name, ctypes.c_int64) for name in ("rows", "inner_rows", "n", "columns")),
        *((name, ctypes.c_float) for name in ("temperature", "c_t", "c_s", "w", "smoothing")),
        ("formula", ctypes.c_int),
        ("from_stats", ctypes.c_bool),
    ]


class SliceParams(ctypes.Structure):
    _fields_ = [("rows", KDRowsParams), ("sums", ctypes.c_void_p)]


class RestParams(ctypes.Structure):
    _fields_ = [
        ("rows", KDRowsParams),
        ("listed", ctypes.c_void_p),
        ("k", ctypes.c_int64),
        ("outcome_grad", ctypes.c_void_p),
        ("outcomes", ctypes.c_void_p),
        ("outcome_scale", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


class LogSoftmaxParams(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("x", "out", "dy")),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "inner_rows", "columns")),
        ("temperature", ctypes.c_float),
    ]


class ScaleParams(ctypes.Structure):
    _fields_ = [
        ("x", Matrix),
        *((name, ctypes.c_int64) for name in ("rows", "inner_rows", "columns")),
        ("scalar", ctypes.c_float),
    ]


class Grid(NamedTuple):
    cluster: int  # blocks of a row, which are its parts if it is not kept
    resident: bool
    threads: int = 64
    clusters: int = 1  # each of which takes several rows


class Order(ctypes.Structure):
    """A grid, and the seed of the order in which its threads run; seed 0 gives the worst one."""

    _fields_ = [
        ("cluster", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("clusters", ctypes.c_int),
        ("resident", ctypes.c_bool),
        ("seed", ctypes.c_uint64),
    ]


def build(folder: Path, source: str, target: str, *flags: str, csrc: Path = CSRC) -> Path:
    """Compile ``source`` with the kernels in ``csrc`` and the scheduler, once in a folder that processes may share."""
    scheduler = compile_once(folder / "simt.o", "simt.cpp", "-fPIC", "-c")
    return compile_once(folder / target, source, *flags, f"-I{csrc}", str(scheduler))


def compile_once(target: Path, source: str, *flags: str) -> Path:
    command = ["g++", "-std=c++20", "-O1", "-g1", "-DFASTKD_SIMT", f"-I{HERE}", str(HERE / source), *flags]
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            subprocess.run([*command, "-o", str(target)], check=True)
    return target


class Simt:
    """The row contract's calls, run under the shim on a given grid."""

    def __init__(self, folder: Path) -> None:
        # An access of 16 bytes that is misaligned traps.
        alignment = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
        self.library = ctypes.CDLL(str(build(folder, "simt_library.cpp", "simt.so", "-fPIC", "-shared", *alignment)))

    def kd_rows(self, rows: Rows, spec: RowSpec, outputs: Outputs, grid: Grid, seed: int = 0) -> None:
        """``outputs`` are hard, soft, stats and dz; without hard it is the gradient from stats."""
        self.library.simt_kd_rows(ctypes.byref(kd_rows_params(rows, spec, outputs)), order(grid, seed))

    def slice_sums(
        self, rows: Rows, spec: RowSpec, stats: torch.Tensor, sums: torch.Tensor, grid: Grid, seed: int = 0
    ) -> None:
        of_rows = kd_rows_params(rows, spec, {"hard": None, "soft": None, "stats": stats, "dz": None})
        params = SliceParams(rows=of_rows, sums=pointer(sums))
        self.library.simt_slice_sums(ctypes.byref(params), order(grid, seed))

    def rest(
        self,
        rows: Rows,
        spec: RowSpec,
        listed: torch.Tensor,
        outcome_grad: torch.Tensor | None,
        outputs: Outputs,
        grid: Grid,
        seed: int = 0,
    ) -> None:
        """``outputs`` as there, ``soft`` being the rest; the gradient from ``outcome_grad`` and stats."""
        scratch = None if outcome_grad is None else torch.empty_like(outcome_grad)
        params = RestParams(
            rows=kd_rows_params(rows, spec, outputs), listed=pointer(listed), k=listed.shape[1],
            outcome_grad=pointer(outcome_grad),
        )  # fmt: skip
        self.library.simt_rest(ctypes.byref(params), ctypes.c_void_p(pointer(scratch)), order(grid, seed))

    def log_softmax(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        dy: torch.Tensor | None,
        lse: torch.Tensor,
        temperature: float,
        grid: Grid,
    ) -> None:
        outer, inner, columns = x.shape
        params = LogSoftmaxParams(
            x=matrix(x), out=matrix(out), dy=matrix(dy), lse=lse.data_ptr(), rows=outer * inner, inner_rows=inner,
            columns=columns, temperature=temperature,
        )  # fmt: skip
        self.library.simt_log_softmax(ctypes.byref(params), order(grid))

    def scale_(self, x: torch.Tensor, scalar: torch.Tensor) -> None:
        outer, inner, columns = x.shape
        params = ScaleParams(x=matrix(x), rows=outer * inner, inner_rows=inner, columns=columns)
        self.library.simt_scale(ctypes.byref(params), ctypes.c_void_p(scalar.data_ptr()), order(Grid(3, False)))


def kd_rows_params(rows: Rows, spec: RowSpec, outputs: Outputs) -> KDRowsParams:
    outer, inner, columns = rows.student.shape
    vectors = {name: pointer(getattr(rows, name)) for name in ("labels", "hard_scale", "soft_scale", "z_scale")}
    vectors |= {name: pointer(outputs[name]) for name in ("hard", "soft", "stats")}
    return KDRowsParams(
        z=matrix(rows.student), u=matrix(rows.teacher), dz=matrix(outputs["dz"]), **vectors,
        rows=outer * inner, inner_rows=inner, n=spec.vocab_size, columns=columns, temperature=spec.temperature,
        c_t=spec.c_t, c_s=spec.c_s, w=spec.w, smoothing=spec.label_smoothing, formula=spec.formula,
        from_stats=outputs["hard"] is None,
    )  # fmt: skip


def order(grid: Grid, seed: int = 0) -> Any:
    return ctypes.byref(Order(grid.cluster, grid.threads, grid.clusters, grid.resident, seed))


def matrix(tensor: torch.Tensor | None) -> Matrix:
    if tensor is None:
        return Matrix()
    return Matrix(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), DTYPES[tensor.dtype])


def pointer(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.data_ptr()
