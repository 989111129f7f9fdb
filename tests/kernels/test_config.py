"""The launch table: tiles, warps, and which rows are peeled."""

from __future__ import annotations

import pytest
import torch

from fastkd.kernels.config import MAX_BLOCK, alignment, launch_options


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


@pytest.mark.parametrize(("columns", "block"), [(1, 128), (128, 128), (129, 256), (2048, 2048), (151936, MAX_BLOCK)])
def test_tiles(columns: int, block: int) -> None:
    """Eight columns a thread, whatever a warp is, as far as a tile has them."""
    for lanes in (32, 64):
        options = launch_options(columns, lanes)
        assert options["BLOCK"] == block
        assert options["num_warps"] == max(1, block // (8 * lanes))
        assert ("maxnreg" in options) == (lanes == 32)
    assert launch_options(columns, 32, heavy=True)["maxnreg"] > launch_options(columns, 32)["maxnreg"]
