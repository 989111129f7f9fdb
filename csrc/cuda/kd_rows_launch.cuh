// The row kernels of one dtype: instantiated by including this in a translation unit of its own.
#pragma once

#include "kd_rows.cuh"
#include "launch.h"

namespace fastkd {

template <class T>
std::string launch_kd_rows(const KDRowsParams& params, const Queue& queue) {
    const auto run = [&](const auto& functor, auto soft) {
        using Functor = std::decay_t<decltype(functor)>;
        constexpr bool kSoft = decltype(soft)::value;
        const void* resident = reinterpret_cast<const void*>(kd_rows_kernel<T, Functor, kSoft, true>);
        const void* streaming = reinterpret_cast<const void*>(kd_rows_kernel<T, Functor, kSoft, false>);
        // One vector more than the columns need, for a row that starts off a boundary.
        const int64_t vectors = params.n / Vec<T>::kColumns + 2;
        KDRowsParams p = params;
        Functor f = functor;
        void* arguments[] = {&p, &f};
        return launch("kd_rows", {params.from_stats ? nullptr : resident, streaming}, vectors, kSoft ? 2 : 1, p.rows,
                      p.columns, arguments, queue);
    };
    const Numbers numbers{static_cast<Formula>(params.formula), params.c_t, params.c_s, params.w};
    if (!params.u.data) return run(NoSoftTerm{}, std::false_type{});
    std::string status = "kd_rows: no functor has these numbers";
    Divergences::dispatch(numbers, [&](const auto& functor) { status = run(functor, std::true_type{}); });
    return status;
}

}  // namespace fastkd
