"""Scale a gradient by a scalar that lives on the device.

Math    x *= s
Shapes  x [B, S, V] bf16|fp16|fp32, last stride 1; s 0-d
Bytes   2e an element, e bytes wide; none if s is 1, which a training loop's backward nearly always gives: then every
        program returns after reading s, and the host never looks at it.
Grid    one program a row, BLOCK columns a step
"""

import triton
import triton.language as tl

from fastkd.kernels.config import alignment, device_of, gpu_of, launch_options, row_strides
from fastkd.kernels.lse import DROP, NO_TILE, align, load_tile, row_start, store_tile, tile_at, tile_range


@triton.jit(do_not_specialize=["inner_rows"], do_not_specialize_on_alignment=["scalar_ptr"])
def scale_kernel(
    x_ptr, scalar_ptr, inner_rows, x_outer, x_inner, columns,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    scalar = tl.load(scalar_ptr).to(tl.float32)
    if scalar == 1.0:
        return
    start, head = align(row_start(tl.program_id(0), inner_rows, x_outer, x_inner), VEC, PEEL)
    x_ptr += start
    length = columns + head
    for masked in tl.static_range(2):
        first, end = tile_range(length, NO_TILE, BLOCK, PEEL, masked)
        for i in tl.range(first, end):
            tile = tile_at(i, first, end, length, NO_TILE, BLOCK, PEEL, masked, False)
            x = load_tile(x_ptr, tile, head, length, BLOCK, VEC, masked, DROP)
            store_tile(x_ptr, tile, head, length, x * scalar, BLOCK, VEC, masked)


def scale_(x, scalar) -> None:
    """``x *= scalar`` for a [B, S, V] view ``x`` and a 0-d tensor."""
    outer, inner, columns = x.shape
    if outer * inner == 0:
        return
    tiles = alignment(x)
    with device_of(x):
        scale_kernel[(outer * inner,)](
            x, scalar, inner, *row_strides(x), columns,
            **tiles, **launch_options(gpu_of(x), columns, tiles["VEC"]),
        )  # fmt: skip
