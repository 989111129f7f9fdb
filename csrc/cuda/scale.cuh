// Scale a gradient by a scalar that lives on the device.
//
// Math    x *= s; nothing is read or written if s is 1, as in nearly every training loop's backward
// Shapes  x [B, S, columns] fp32|bf16|fp16, last stride 1; s 0-d, its address given
// Bytes   2e an element, e bytes wide, or none
// Grid    blocks of up to 256 threads, one or several a row
#pragma once

#include "../params.h"
#include "vec.cuh"

namespace fastkd {

template <class T>
FASTKD_KERNEL void FASTKD_BOUNDS(3) scale_kernel(const ScaleParams p, const float* scalar) {
    const float factor = *scalar;
    if (factor == 1.0f) return;
    constexpr int kColumns = Vec<T>::kColumns;
    T* data = reinterpret_cast<T*>(p.x.row(block_rank(), p.inner_rows));
    const int n = static_cast<int>(p.columns), head = head_of<kColumns>(data);
    const Row<const T, kColumns> from(data, n, head);
    const Row<T, kColumns> to(data, n, head);
    const int step = part_count() * block_threads() * kColumns;
    for (int first = (part_rank() * block_threads() + thread_rank()) * kColumns - head; first < n; first += step) {
        float values[kColumns];
        load_floats(from, first, values);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) values[j] *= factor;
        store(to, first, values);
    }
}

}  // namespace fastkd
