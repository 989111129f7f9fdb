"""Launch configurations: the only table of tiles, warps, programs and GPUs."""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton

from fastkd._request import Mix

VECTOR_BYTES = 16
# Of a tile. With one vector of each matrix the loop costs as much as three columns; with four it spills.
VECTORS_PER_THREAD = 2
# Threads of a processor, four warps a scheduler: three compute while one waits for memory. A long row takes all of
# them, one up to LONG columns half, since what a thread does once a row costs as much as some 20 columns.
THREADS = 512
LONG = 1 << 15
MAX_REGISTERS = 128  # of a thread, with THREADS of them
# What the rows in flight may take of the cache, if their second read is to find them there.
CACHE_SHARE = 0.75
# Fewer programs than that, of those that fill the GPU, cost more than the reads they save. A row in three walks issues
# twice as much as one in two.
LEAST_SHARE, LEAST_SHARE_OF_THREE = 0.4, 0.8
# Slices of a row, at most.
MAX_SLICES = 64


class Gpu(NamedTuple):
    """What a launch depends on."""

    arch: int | str  # as Triton names it: 90, "gfx942"
    lanes: int  # of a warp
    processors: int  # SMs, or compute units
    cache: int  # bytes between the processors and DRAM

    @property
    def is_nvidia(self) -> bool:
        return isinstance(self.arch, int)


MIB = 1 << 20
# What cannot be asked of a device: of AMD's GPUs the last cache, which PyTorch does not know; and all of one that is
# compiled for, but not there.
GPUS = {
    "H100": Gpu(90, 32, 132, 50 * MIB),
    "H200": Gpu(90, 32, 132, 60 * MIB),
    "A100": Gpu(80, 32, 108, 40 * MIB),
    "B200": Gpu(100, 32, 148, 126 * MIB),
    "RTX 5090": Gpu(120, 32, 170, 96 * MIB),
    "MI300X": Gpu("gfx942", 64, 304, 256 * MIB),
    "RX 7900 XTX": Gpu("gfx1100", 32, 96, 96 * MIB),
}
# One program walks several rows, and a single row is split.
INTERPRETER = Gpu("", 32, 2, 1 << 40)


def interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def gpu_of(tensor: torch.Tensor) -> Gpu:
    return INTERPRETER if interprets() else _gpu(tensor.get_device())


@functools.cache
def _gpu(device: int) -> Gpu:
    target = triton.runtime.driver.active.get_current_target()
    known = [gpu for gpu in GPUS.values() if gpu.arch == target.arch]
    if not torch.cuda.is_available():
        return known[0]
    properties = torch.cuda.get_device_properties(device)
    cache = known[0].cache if known and target.backend == "hip" else properties.L2_cache_size
    return Gpu(target.arch, target.warp_size, properties.multi_processor_count, cache)


def is_heavy(gpu: Gpu, mix: Mix, peel: bool, two_moments: bool) -> bool:
    """Whether the row kernel spills at MAX_REGISTERS.

    So does a divergence of two moments, and a true mixture whose rows are unaligned, or on Blackwell. Any other mixture
    may spill 8 bytes on sm_80 before Triton 3.9: not worth half the warps, all that so many registers leave an SM.
    """
    return two_moments or (mix == Mix.BOTH and (peel or (gpu.is_nvidia and gpu.arch >= 100)))


def launch_options(gpu: Gpu, columns: int, vec: int, heavy: bool = False) -> dict[str, Any]:
    """BLOCK and warps for rows, or slices of rows, of so many ``columns``; a vector has ``vec``."""
    most = THREADS if columns > LONG and not heavy else THREADS // 2
    threads = min(most, max(32, triton.next_power_of_2(columns) // (vec * VECTORS_PER_THREAD)))
    # FP fusion is asked for because its default changes between versions of Triton, and registers because ptxas may be
    # content with half of those that there are, and spill.
    options = {
        "BLOCK": threads * vec * VECTORS_PER_THREAD,
        "num_warps": max(1, threads // gpu.lanes),
        "enable_fp_fusion": True,
    }
    registers = 2 * MAX_REGISTERS - 1 if heavy else MAX_REGISTERS
    return options | ({"maxnreg": registers} if gpu.is_nvidia and (heavy or threads == THREADS) else {})


def hidden_options(gpu: Gpu, columns: int) -> dict[str, Any]:
    """BLOCK and warps for rows of hidden states, which are held whole: at most 16 warps, whose registers fit 16384."""
    block = max(128, triton.next_power_of_2(columns))
    warps = min(16, max(1, block // (8 * gpu.lanes)))  # eight columns a thread
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def list_options(listed: int) -> dict[str, Any]:
    """LISTED and warps for lists of so many columns, a column a thread."""
    size = triton.next_power_of_2(listed)
    return {"LISTED": size, "num_warps": min(8, max(1, size // 32)), "enable_fp_fusion": True}


def programs_of(gpu: Gpu, rows: int, row_bytes: int, warps: int, least: float = LEAST_SHARE) -> int:
    """Programs that share the rows out, one row at a time each, so that what is in flight stays in the cache.

    A row so long that few programs would be left is read again from memory instead.
    """
    full = gpu.processors * max(1, THREADS // (warps * gpu.lanes))
    fitting = int(gpu.cache * CACHE_SHARE) // row_bytes
    return min(rows, full if fitting < least * full else min(full, fitting))


def slices_of(gpu: Gpu, rows: int, columns: int, vec: int) -> tuple[int, int]:
    """(slices, columns of one): more than one where there are fewer than half as many rows as processors."""
    block = THREADS // 2 * vec * VECTORS_PER_THREAD
    blocks = triton.cdiv(columns + vec, block)  # vec: a row is walked from before its start
    slices = max(1, min(gpu.processors // rows, blocks, MAX_SLICES))
    width = triton.cdiv(blocks, slices) * block
    return triton.cdiv(columns + vec, width), width


def row_strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    """(outer, inner) strides of a [B, S, V] matrix."""
    if matrix is None:
        return 0, 0
    return (matrix.stride(0) if matrix.shape[0] > 1 else 0), matrix.stride(1)


def alignment(*optional: torch.Tensor | None) -> dict[str, int | bool]:
    """VEC and PEEL for [B, S, V_i] matrices that are walked together.

    PEEL: some row starts off a 16-byte boundary, but in every matrix by the same number of columns.
    """
    matrices = [matrix for matrix in optional if matrix is not None]
    vec = VECTOR_BYTES // min(matrix.element_size() for matrix in matrices)
    strides = [row_strides(matrix) for matrix in matrices]
    heads = [[stride % vec for stride in pair] for pair in strides]
    # Triton knows a stride to be aligned by itself only if 16 divides it.
    unaligned = any(stride % 16 for pair in strides for stride in pair)
    bases = all(matrix.data_ptr() % VECTOR_BYTES == 0 for matrix in matrices)
    return {"VEC": vec, "PEEL": unaligned and bases and all(pair == heads[0] for pair in heads)}


def device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device; make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
