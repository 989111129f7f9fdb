#include "rest.cuh"

#include "launch.h"

namespace fastkd {

namespace {

template <class T>
std::string launch_rest(RestParams p, float* scratch, const Queue& queue) {
    RowGrid grid = prepare_rows(p, NoSoftTerm{});
    const auto run = [&](auto kernel, void** arguments) {
        Kernels kernels = {nullptr, reinterpret_cast<const void*>(kernel)};
        kernels.once = p.from_stats;
        return launch("rest", kernels, {max_vectors<T>(p.n), 1, p.rows, p.columns}, arguments, grid, queue);
    };
    void* of_rows[] = {&p, &grid};
    void* of_grad[] = {&p, &scratch, &grid};
    return p.from_stats ? run(rest_grad_kernel<T>, of_grad) : run(rest_rows_kernel<T>, of_rows);
}

}  // namespace

std::string launch_rest(const RestParams& p, float* scratch, const Queue& queue) {
    switch (p.common_dtype()) {
        case DType::kBFloat16: return launch_rest<bfloat16>(p, scratch, queue);
        case DType::kFloat16: return launch_rest<float16>(p, scratch, queue);
        default: return launch_rest<float>(p, scratch, queue);
    }
}

}  // namespace fastkd
