#include "log_softmax.cuh"

#include "launch.h"
#include "scale.cuh"

namespace fastkd {

namespace {

// visit(T{}) with the element type of a dtype.
template <class Visit>
std::string with_type(DType dtype, Visit&& visit) {
    return dtype == DType::kBFloat16 ? visit(bfloat16{}) : dtype == DType::kFloat16 ? visit(float16{}) : visit(0.0f);
}

}  // namespace

std::string launch_log_softmax(const LogSoftmaxParams& params, cudaStream_t stream) {
    LogSoftmaxParams p = params;
    void* arguments[] = {&p};
    const bool backward = p.dy.data != nullptr;
    return with_type(p.x.dtype, [&](auto x) {
        return with_type(backward ? p.dy.dtype : p.out.dtype, [&](auto other) {
            using T = decltype(x);
            using Out = decltype(other);
            if (backward) {
                const Plan grid = plan(p.columns / Vec<Out>::kColumns + 2, 1);
                const auto kernel = grid.resident ? &log_softmax_backward_kernel<T, Out, true>
                                                  : &log_softmax_backward_kernel<T, Out, false>;
                return launch("log_softmax_backward", reinterpret_cast<const void*>(kernel), grid, p.rows, p.columns,
                              arguments, stream);
            }
            const Plan grid = plan(p.columns / Vec<T>::kColumns + 2, 1);
            const auto kernel =
                grid.resident ? &log_softmax_kernel<T, Out, true> : &log_softmax_kernel<T, Out, false>;
            return launch("log_softmax", reinterpret_cast<const void*>(kernel), grid, p.rows, p.columns, arguments,
                          stream);
        });
    });
}

std::string launch_scale(const ScaleParams& params, const float* scalar, cudaStream_t stream) {
    ScaleParams p = params;
    void* arguments[] = {&p, &scalar};
    return with_type(p.x.dtype, [&](auto x) {
        const Plan grid = {false, 1, kMaxThreads, 0};
        return launch("scale", reinterpret_cast<const void*>(&scale_kernel<decltype(x)>), grid, p.rows, p.columns,
                      arguments, stream);
    });
}

}  // namespace fastkd
