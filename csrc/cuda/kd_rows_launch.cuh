// The row kernels of one dtype: instantiated by including this in a translation unit of its own.
#pragma once

#include "kd_rows.cuh"
#include "launch.h"

namespace fastkd {

template <class T>
std::string launch_kd_rows(const KDRowsParams& params, const Queue& queue) {
    KDRowsParams p = params;
    const auto run = [&](const auto& functor, auto soft) {
        using Functor = std::decay_t<decltype(functor)>;
        constexpr bool kSoft = decltype(soft)::value;
        Kernels kernels = {reinterpret_cast<const void*>(kd_rows_kernel<T, Functor, kSoft, true>),
                           reinterpret_cast<const void*>(kd_rows_kernel<T, Functor, kSoft, false>)};
        kernels.once = p.from_stats;
        kernels.walks = true;
        kernels.companion = scale_kernel_of(p.dz.data ? p.dz.dtype : p.z.dtype);
        Functor f = functor;
        RowGrid grid = prepare_rows(p, functor);
        void* arguments[] = {&p, &f, &grid};
        const Sizes sizes = {max_vectors<T>(p.n), kSoft ? 2 : 1, p.rows, p.columns};
        return launch("kd_rows", kernels, sizes, arguments, grid, queue);
    };
    const Numbers numbers{static_cast<Formula>(p.formula), p.c_t, p.c_s, p.w};
    if (!p.u.data) return run(NoSoftTerm{}, std::false_type{});
    std::string status = "kd_rows: no functor has these numbers";
    Divergences::dispatch(numbers, [&](const auto& functor) { status = run(functor, std::true_type{}); });
    return status;
}

}  // namespace fastkd
