// Rows over threads.
#pragma once

#include <cstdint>

namespace fastkd {

// Calls row(context, i, scratch) for every i in [0, rows), by at most ``threads`` threads, the caller's among them.
// Each thread has a scratch of its own, kept between calls. Which thread takes a row does not change its result.
// Small work runs on the caller alone, and where the pool is ours so does a call that comes while another has it.
void parallel_rows(int64_t rows, int64_t row_bytes, int threads, int64_t scratch_floats, const void* context,
                   void (*row)(const void* context, int64_t i, float* scratch));

}  // namespace fastkd
