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

void sums_row(const SliceParams& p, int64_t row, float* scratch) {
    float* sums = p.sums + row * 4;
    std::fill_n(sums, 4, 0.0f);
    if (p.soft_scale[row] == 0.0f) return;  // not read
    Divergences::dispatch({static_cast<Formula>(p.formula), p.c_t, p.c_s, p.w}, [&](const auto& functor) {
        Row<std::decay_t<decltype(functor)>>(p, functor, row, scratch).sums_from_stats(sums);
    });
}

// The row operation on a row's outcomes. z and dz: k + 1 numbers; stats: eight, and one more.
KDRowsParams of_outcomes(const RestParams& p, int64_t row, float* z, float* dz, float* stats) {
    KDRowsParams q;
    q.z.data = reinterpret_cast<char*>(z);
    q.u.data = const_cast<char*>(reinterpret_cast<const char*>(p.outcomes + row * (p.k + 1)));
    if (p.dz.data) q.dz.data = reinterpret_cast<char*>(dz);
    q.soft_scale = p.outcome_scale + row;
    q.stats = stats, q.hard = stats + kNumStats, q.soft = p.soft + row;
    q.rows = q.inner_rows = 1, q.n = p.count, q.columns = p.k + 1;
    q.formula = p.formula, q.c_t = p.c_t, q.c_s = p.c_s, q.w = p.w;
    return q;
}

int64_t rest_scratch(const RestParams& p) {
    const int64_t own = RestRow::scratch_floats(p);
    if (!p.outcomes) return own;
    return own + 2 * (p.k + 1) + kNumStats + 1 + kd_scratch(of_outcomes(p, 0, nullptr, nullptr, nullptr));
}

void rest_row(const RestParams& p, int64_t row, float* scratch) {
    if_counted(p, row, true, [&] {
        RestRow one(p, row, scratch);
        if (!p.outcomes) return p.from_stats ? one.gradient_from_stats() : one.rest();
        one.rest();
        float* z = scratch + RestRow::scratch_floats(p);
        float *dz = z + p.k + 1, *stats = dz + p.k + 1;
        one.outcomes(z);
        kd_row(of_outcomes(p, row, z, dz, stats), 0, stats + kNumStats + 1);
        if (p.dz.data) one.gradient_from(dz);
    });
}

extern const Kernels kernels;
const Kernels kernels = {
    FASTKD_ISA_NAME,     kd_scratch,      kd_row,        sums_row,  rest_scratch,   rest_row,
    log_softmax_scratch, log_softmax_row, scale_scratch, scale_row, hidden_scratch, hidden_row,
};

}  // namespace FASTKD_ISA
}  // namespace fastkd
