#include "slices.cuh"

#include "launch.h"

namespace fastkd {

namespace {

template <class T>
std::string launch_slice_sums(SliceParams p, const Queue& queue) {
    std::string status = "slice_sums: no functor has these numbers";
    const auto run = [&](auto functor) {
        RowGrid grid = prepare_rows(p, functor);
        void* arguments[] = {&p, &functor, &grid};
        const Kernels kernels = {nullptr, reinterpret_cast<const void*>(slice_sums_kernel<T, decltype(functor)>)};
        status = launch("slice_sums", kernels, {max_vectors<T>(p.n), 2, p.rows, p.columns}, arguments, grid, queue);
    };
    Divergences::dispatch({static_cast<Formula>(p.formula), p.c_t, p.c_s, p.w}, run);
    return status;
}

}  // namespace

std::string launch_slice_sums(const SliceParams& p, const Queue& queue) {
    switch (p.common_dtype()) {
        case DType::kBFloat16: return launch_slice_sums<bfloat16>(p, queue);
        case DType::kFloat16: return launch_slice_sums<float16>(p, queue);
        default: return launch_slice_sums<float>(p, queue);
    }
}

}  // namespace fastkd
