"""Launch configurations: the only table of tiles and warps."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton

# Columns a tile, at most. Larger tiles spill: 32 K columns with 32 warps moved 5 times the ideal traffic elsewhere.
MAX_BLOCK = 2048
# Columns a thread handles of a tile: one 16-byte load of bfloat16.
COLUMNS_PER_THREAD = 8
VECTOR_BYTES = 16
# Registers a thread, at most (ptxas): three blocks of 256 threads on an SM, whose loads hide behind each other's
# arithmetic; two where a true mixture takes more.
MAX_REGISTERS, MAX_REGISTERS_HEAVY = 80, 128


@functools.cache
def launch_options(columns: int, warp_size: int | None = None, heavy: bool = False) -> dict[str, int | bool]:
    """BLOCK and warps for rows of ``columns``; a warp has 32 lanes on NVIDIA GPUs and 64 on AMD's CDNA."""
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(columns)))
    lanes = warp_size or (32 if torch.version.hip is None else 64)
    warps = max(1, block // (COLUMNS_PER_THREAD * lanes))
    # FP fusion is asked for because its default changes between versions of Triton.
    options: dict[str, int | bool] = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
    return options | ({"maxnreg": MAX_REGISTERS_HEAVY if heavy else MAX_REGISTERS} if lanes == 32 else {})


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


@functools.cache
def hidden_options(columns: int, warp_size: int | None = None) -> dict[str, int | bool]:
    """BLOCK and warps for rows of hidden states, which are held whole: at most 16 warps, whose registers fit 16384."""
    block = max(128, triton.next_power_of_2(columns))
    lanes = warp_size or (32 if torch.version.hip is None else 64)
    warps = min(16, max(1, block // (COLUMNS_PER_THREAD * lanes)))
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
