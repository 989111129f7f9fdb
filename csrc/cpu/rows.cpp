// The kernels of one instruction set. setup.py compiles this file once for each, with FASTKD_ISA naming it.
#include <cstring>
#include <type_traits>

#include "hidden.h"
#include "kd_rows.h"
#include "kernels.h"
#include "log_softmax.h"
#include "rest.h"

namespace fastkd {
inline namespace FASTKD_ISA {

int64_t kd_scratch(const KDRowsParams& p) { return Row<NoSoftTerm>::scratch_floats(p); }

// Calls run() for a row that counts; and does what is the same of all operations.
template <class Run>
void if_counted(const KDRowsParams& p, int64_t row, bool has_soft, Run&& run) {
    const bool hard = p.labels && p.hard_scale[row] != 0.0f;
    const bool soft = has_soft && p.soft_scale[row] != 0.0f;
    const bool z_loss = p.z_scale && p.z_scale[row] != 0.0f;
    const int64_t size = size_of(p.dz.dtype);
    char* dz = p.dz.data ? p.dz.row(row, p.inner_rows) : nullptr;
    if (!hard && !soft && !z_loss) {  // not read: a masked row may hold anything
        if (!p.from_stats) p.hard[row] = p.soft[row] = 0.0f;
        if (dz) std::memset(dz, 0, p.columns * size);
        return;
    }
    run();
    if (dz) std::memset(dz + p.n * size, 0, (p.columns - p.n) * size);
}

void kd_row(const KDRowsParams& p, int64_t row, float* scratch) {
    const auto run = [&](const auto& functor) {
        Row<std::decay_t<decltype(functor)>> one(p, functor, row, scratch);
        p.from_stats ? one.gradient_from_stats() : one.losses_and_gradient();
    };
    const Numbers numbers{static_cast<Formula>(p.formula), p.c_t, p.c_s, p.w};
    if_counted(p, row, p.u.data != nullptr, [&] {
        if (!p.u.data)
            run(NoSoftTerm());
        else
            Divergences::dispatch(numbers, run);
    });
}

int64_t rest_scratch(const RestParams& p) { return RestRow::scratch_floats(p); }

void rest_row(const RestParams& p, int64_t row, float* scratch) {
    if_counted(p, row, true, [&] {
        RestRow one(p, row, scratch);
        p.from_stats ? one.gradient_from_stats() : one.rest();
    });
}

extern const Kernels kernels;
const Kernels kernels = {
    FASTKD_ISA_NAME, kd_scratch, kd_row, rest_scratch, rest_row, log_softmax_scratch, log_softmax_row, scale_scratch, scale_row,
    hidden_scratch, hidden_row,
};

}  // namespace FASTKD_ISA
}  // namespace fastkd
