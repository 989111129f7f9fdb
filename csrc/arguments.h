// What the Python modules are called with, as params. A matrix comes as (address, outer stride, inner stride, dtype),
// an absent one as (0, 0, 0, 0); what comes here was checked above.
#pragma once

#include <pybind11/pybind11.h>

#include "params.h"

namespace fastkd {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline Matrix matrix(const pybind11::tuple& t) {
    if (t.size() != 4) throw pybind11::value_error("a matrix is (address, outer stride, inner stride, dtype)");
    return {pointer<char>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            static_cast<DType>(t[3].cast<int>())};
}

inline KDRowsParams kd_rows_params(const pybind11::tuple& z, const pybind11::tuple& u, const pybind11::tuple& dz,
                                   uintptr_t labels, uintptr_t hard_scale, uintptr_t soft_scale, uintptr_t z_scale,
                                   uintptr_t hard, uintptr_t soft, uintptr_t stats, int64_t rows, int64_t inner_rows,
                                   int64_t n, int64_t columns, float temperature, int formula, float c_t, float c_s,
                                   float w, float smoothing, bool from_stats) {
    KDRowsParams p;
    p.z = matrix(z), p.u = matrix(u), p.dz = matrix(dz);
    p.labels = pointer<const int64_t>(labels);
    p.hard_scale = pointer<const float>(hard_scale), p.soft_scale = pointer<const float>(soft_scale);
    p.z_scale = pointer<const float>(z_scale);
    p.hard = pointer<float>(hard), p.soft = pointer<float>(soft), p.stats = pointer<float>(stats);
    p.rows = rows, p.inner_rows = inner_rows, p.n = n, p.columns = columns;
    p.temperature = temperature, p.formula = formula, p.c_t = c_t, p.c_s = c_s, p.w = w, p.smoothing = smoothing;
    p.from_stats = from_stats;
    return p;
}

inline LogSoftmaxParams log_softmax_params(const pybind11::tuple& x, const pybind11::tuple& out,
                                           const pybind11::tuple& dy, uintptr_t lse, int64_t rows, int64_t inner_rows,
                                           int64_t columns, float temperature) {
    LogSoftmaxParams p;
    p.x = matrix(x), p.out = matrix(out), p.dy = matrix(dy), p.lse = pointer<float>(lse);
    p.rows = rows, p.inner_rows = inner_rows, p.columns = columns, p.temperature = temperature;
    return p;
}

}  // namespace fastkd
