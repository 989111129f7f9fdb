"""The launch table: tiles, warps, and which rows are peeled."""

from __future__ import annotations

import pytest
import torch

from fastkd.kernels.config import CACHE_SHARE, GPUS, LEAST_SHARE, alignment, launch_options, programs_of, slices_of


def matrix(
    columns: int, offset: int = 0, dtype: torch.dtype = torch.bfloat16, width: int | None = None
) -> torch.Tensor:
    """[1, 3, columns], ``offset`` elements off the allocation, rows ``width`` apart."""
    width = width or columns
    return torch.empty(3 * width + offset, dtype=dtype).as_strided((1, 3, columns), (3 * width, width, 1), offset)


@pytest.mark.parametrize(
    ("matrices", "vec", "peel"),
    [
        ([matrix(128256)] * 3, 8, False),
        ([matrix(50257)] * 3, 8, True),
        # 50264 is a multiple of 8, so rows begin on 16 bytes, but not of 16, so Triton does not know.
        ([matrix(50264)] * 3, 8, True),
        ([matrix(50257, dtype=torch.float32)] * 2, 4, True),
        ([matrix(100, width=131)] * 2, 8, True),
        ([matrix(131), matrix(100, width=131), None], 8, True),
        # Heads that differ from matrix to matrix, or that the strides do not give away.
        ([matrix(50257), matrix(50258)], 8, False),
        ([matrix(50257, offset=1)] * 2, 8, False),
        ([matrix(128256), matrix(128256, dtype=torch.float32)], 8, False),
        ([matrix(50257), matrix(50257, dtype=torch.float32)], 8, True),
    ],
)
def test_alignment(matrices: list[torch.Tensor | None], vec: int, peel: bool) -> None:
    assert alignment(*matrices) == {"VEC": vec, "PEEL": peel}


@pytest.mark.parametrize(
    ("columns", "vec", "block", "threads"),
    [
        (1, 8, 512, 32),
        (512, 8, 512, 32),
        (513, 8, 1024, 64),
        (32000, 8, 4096, 256),
        (128256, 8, 8192, 512),
        (32000, 4, 2048, 256),
        (128256, 4, 4096, 512),
    ],
)
def test_tiles(columns: int, vec: int, block: int, threads: int) -> None:
    """Two vectors a thread, whatever a warp is, as far as a tile has them."""
    for gpu in (GPUS["H100"], GPUS["MI300X"]):
        options = launch_options(gpu, columns, vec)
        assert options["BLOCK"] == block
        assert options["num_warps"] == max(1, threads // gpu.lanes)


@pytest.mark.parametrize("name", GPUS)
def test_the_second_read_is_from_the_cache(name: str) -> None:
    """Of both logits in bfloat16, unless so few programs were left that reading from memory is faster."""
    gpu = GPUS[name]
    fits = {}
    for columns in (1000, 32000, 50257, 128256, 151936, 256000):
        row_bytes = 2 * 2 * columns
        warps = launch_options(gpu, columns, 8)["num_warps"]
        full = gpu.processors * (512 // (warps * gpu.lanes))
        programs = programs_of(gpu, 4096, row_bytes, warps)
        fits[columns] = programs * row_bytes <= CACHE_SHARE * gpu.cache
        assert fits[columns] or programs == full
        assert programs >= LEAST_SHARE * full
        assert programs_of(gpu, 3, row_bytes, warps) == 3
    assert fits[1000] and fits[32000]
    assert fits[128256]


@pytest.mark.parametrize("rows", [1, 2, 7, 65, 66, 67, 4096])
@pytest.mark.parametrize("columns", [1, 4095, 50257, 128256])
def test_slices(rows: int, columns: int) -> None:
    """A row is split where that gives idle processors work, into slices of whole tiles that hold a head too."""
    gpu, vec = GPUS["H100"], 8
    slices, width = slices_of(gpu, rows, columns, vec)
    assert (slices - 1) * width < columns + vec <= slices * width
    assert rows * slices <= gpu.processors or slices == 1
    assert width % launch_options(gpu, width, vec)["BLOCK"] == 0 or slices == 1
    if columns > 50000:
        assert (slices > 1) == (rows <= gpu.processors // 2)
