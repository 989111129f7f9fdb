// What the columns of a slice of the vocabulary add to S and G, given the row's normalisers: stage 2 alone.
//
// Math    Σ term and Σ g in the far form, and in the near one (divergence.h), as SliceParams have it
// Shapes  z, u [B, S, columns], last stride 1; scales [N], stats [N, 8], sums [N, 4]
// Bytes   an element, e bytes wide: 2e
// Grid    a block of up to 256 threads a row, which its threads walk over side by side
#pragma once

#include "kd_rows.cuh"

namespace fastkd {

template <class T, class Functor>
FASTKD_KERNEL void FASTKD_BOUNDS(2) slice_sums_kernel(const SliceParams p, const Functor functor, const RowGrid grid) {
    FASTKD_SHARED(Exchange, exchange);
    FASTKD_SHARED(RowNumbers, row);
    const KDRow<T, Functor, true, false> kernel(p, functor, grid);
    const int index = block_rank();
    float* const to = p.sums + static_cast<int64_t>(index) * 4;
    if (p.soft_scale[index] == 0.0f) {  // not read
        if (thread_rank() < 4) to[thread_rank()] = 0.0f;
        return;
    }
    if (thread_rank() == 0) kernel.read(row, index);
    block_barrier();
    const auto reader = kernel.open(kernel.place(index));
    SumState sums;
    reader.template for_each<false>([&](int slot) {
        for_columns(reader.x_at(slot), reader.y_at(slot), [&](int, float z, float u) {
            float p_s, excess;
            const TermGrad far = kernel.template evaluate<false>(row, z, u, p_s, excess);
            const TermGrad near = kernel.template evaluate<true>(row, z, u, p_s, excess);
            sums.first += Functor::kTwoSided ? near.term : far.term;
            sums.second += far.g;
            sums.third += Functor::kTwoSided ? excess : near.term;
            sums.fourth += Functor::kTwoSided ? far.g - p_s : near.g;
        });
    });
    const auto merge = [](const SumState& lane) { return KDRow<T, Functor, true, false>::merge(lane); };
    sums = exchange.reduce(merge(sums), 0, merge);
    if (thread_rank() == 0) memcpy(to, &sums, sizeof(sums));
}

}  // namespace fastkd
