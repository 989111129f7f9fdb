"""What the columns of a slice of the vocabulary add to S and G, given the row's normalisers: stage 2 alone.

Math    Σ term and Σ g in the far form, and in the near one; of tvd Σ p_t − p_s is the third sum. The term is the exact
        one in both.
Shapes  z, u [B, S, V_i] bf16|fp16|fp32, each its own, last stride 1; soft_scale [N], stats [N, 8], sums [N, 4] fp32
Bytes   an element, e bytes wide: 2e
Grid    one program a row, or a part of it where rows are few, whose sums are then added in the same order always.
"""

import torch
import triton
import triton.language as tl

from fastkd._request import Rows, RowSpec
from fastkd.kernels.config import alignment, device_of, gpu_of, launch_options, row_strides, slices_of
from fastkd.kernels.divergence import MIX_STUDENT, MIX_TEACHER, TOTAL_VARIATION
from fastkd.kernels.kd_rows import FREE, LOG_RATIO, LOG_STUDENT, NUM_STATS, PEAK_STUDENT, PEAK_TEACHER, SUMS
from fastkd.kernels.lse import align, row_start, slice_at
from fastkd.kernels.row_stages import slice_exact_sums


@triton.jit(
    do_not_specialize=["inner_rows"],
    do_not_specialize_on_alignment=FREE["do_not_specialize_on_alignment"],
)
def row_sums_kernel(
    z_ptr, u_ptr, soft_scale_ptr, stats_ptr, sums_ptr,
    inner_rows, z_outer, z_inner, u_outer, u_inner, n, width, temperature, c_t, c_s, w,
    FORMULA: tl.constexpr, MIX: tl.constexpr, BALANCED: tl.constexpr, FAST_LOG: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.program_id(1)
    sums_ptr += (row * tl.num_programs(1) + part) * SUMS
    sum_term = 0.0
    sum_far = 0.0
    third = 0.0
    sum_near = 0.0
    if tl.load(soft_scale_ptr + row) != 0.0:
        stats_ptr += row.to(tl.int64) * NUM_STATS
        row_at, head = align(row_start(row, inner_rows, z_outer, z_inner), VEC, PEEL)
        start, head, length, _ = slice_at(part, width, head, n + head, -1)
        term, far, near, excess = slice_exact_sums(
            z_ptr + row_at + start, u_ptr + align(row_start(row, inner_rows, u_outer, u_inner), VEC, PEEL)[0] + start,
            head, length, tl.load(stats_ptr + PEAK_STUDENT), tl.load(stats_ptr + PEAK_TEACHER),
            tl.load(stats_ptr + LOG_STUDENT), tl.load(stats_ptr + LOG_RATIO), 1.0 / temperature, c_t, c_s, w,
            FORMULA, MIX, BALANCED, False, FAST_LOG, BLOCK, VEC, PEEL,
        )  # fmt: skip
        sum_term = tl.sum(term, 0)
        third = sum_term
        sum_far = tl.sum(far, 0)
        sum_near = tl.sum(near, 0)
        if FORMULA == TOTAL_VARIATION:
            third = tl.sum(excess, 0)
        elif MIX == MIX_STUDENT:  # of two parts, one of which has the one form in both
            sum_near += sum_far
            sum_far = sum_near - c_t * tl.sum(excess, 0)
        elif MIX == MIX_TEACHER:
            sum_near = sum_far
    tl.store(sums_ptr, sum_term)
    tl.store(sums_ptr + 1, sum_far)
    tl.store(sums_ptr + 2, third)
    tl.store(sums_ptr + 3, sum_near)


def slice_sums(rows: Rows, spec: RowSpec, stats, sums) -> None:
    """Fill ``sums`` [N, 4] from the logits and the row's normalisers in ``stats``."""
    z, u, _, _, soft_scale, _ = rows
    outer, inner, columns = z.shape
    count = outer * inner
    if count == 0:
        return
    gpu, tiles = gpu_of(z), alignment(z, u)
    slices, width = slices_of(gpu, count, columns, tiles["VEC"])
    options = launch_options(gpu, width, tiles["VEC"], heavy=True)  # both forms of a mixture at once
    with device_of(z):
        parts = sums if slices == 1 else torch.empty(count, slices, SUMS.value, device=z.device)
        row_sums_kernel[(count, slices)](
            z, u, soft_scale, stats, parts, inner, *row_strides(z), *row_strides(u), spec.vocab_size, width,
            spec.temperature, spec.c_t, spec.c_s, spec.w, FORMULA=int(spec.formula), MIX=int(spec.mix),
            BALANCED=spec.c_s * spec.w == spec.c_t * (1.0 - spec.w), FAST_LOG=gpu.is_nvidia, **tiles, **options,
        )  # fmt: skip
        if slices > 1:
            torch.sum(parts, 1, out=sums)
