#include "rest.cuh"

#include "launch.h"

namespace fastkd {

namespace {

template <class T>
std::string launch_rest(KDRowsParams p, Listed listed, const Queue& queue) {
    RowGrid grid = prepare_rows(p, NoSoftTerm{});
    const auto kernel = p.from_stats ? rest_grad_kernel<T> : rest_rows_kernel<T>;
    const Kernels kernels = {nullptr, reinterpret_cast<const void*>(kernel)};
    void* arguments[] = {&p, &listed, &grid};
    return launch("rest", kernels, {max_vectors<T>(p.n), 1, p.rows, p.columns}, arguments, grid.share, queue);
}

}  // namespace

std::string launch_rest(const KDRowsParams& p, const Listed& listed, const Queue& queue) {
    switch (p.common_dtype()) {
        case DType::kBFloat16: return launch_rest<bfloat16>(p, listed, queue);
        case DType::kFloat16: return launch_rest<float16>(p, listed, queue);
        default: return launch_rest<float>(p, listed, queue);
    }
}

}  // namespace fastkd
