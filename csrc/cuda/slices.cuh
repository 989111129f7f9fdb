// What the columns of a slice of the vocabulary add to S and G, given the row's normalisers: stage 2 alone.
//
// Math    Σ term and Σ g in the far form, and in the near one (divergence.h), as SliceParams have it
// Shapes  z, u [B, S, columns], last stride 1; scales [N], stats [N, 8], sums [N, 4]
// Bytes   an element, e bytes wide: 2e, and 2e more, of L2 where they still are there, if the row may be near
// Grid    that of kd_rows.cuh where rows are streamed
#pragma once

#include "kd_rows.cuh"

namespace fastkd {

template <class T, class Functor>
FASTKD_KERNEL void FASTKD_BOUNDS(3) slice_sums_kernel(const SliceParams p, const Functor functor, const RowGrid grid) {
    FASTKD_SHARED(Exchange<false>, exchange);
    FASTKD_SHARED(RowNumbers, row);
    const KDRow<T, Functor, true, false> kernel(p, functor, grid);
    const int index = block_rank();
    float* const to = p.sums + static_cast<int64_t>(index) * 4;
    if (p.soft_scale[index] == 0.0f) {  // not read
        if (kernel.is_first()) to[0] = to[1] = to[2] = to[3] = 0.0f;
        return;
    }
    if (thread_rank() == 0) {
        exchange.blocks.init(grid, index);
        kernel.read(row, index);
    }
    block_barrier();
    const auto reader = kernel.open(kernel.place(index));
    constexpr bool kTwoSided = Functor::kTwoSided;
    const SumState far = kernel.template stage2_by_functor<kTwoSided>(reader, row, exchange, 0);
    if (kernel.is_first()) {
        to[0] = far.first, to[1] = far.second;
        to[2] = kTwoSided ? far.fourth : far.first, to[3] = far.second - far.third;
    }
    if (thread_rank() == 0)
        row.again = !kTwoSided && far.first < surely_far(functor.numbers) ? Again::kNear : Again::kNo;
    block_barrier();
    if (row.again == Again::kNo) return;
    const SumState near = kernel.template stage2_by_functor<true>(reader, row, exchange, 1);
    if (kernel.is_first()) to[2] = near.first, to[3] = near.second;
}

}  // namespace fastkd
