#include "log_softmax.cuh"

#include "launch.h"
#include "scale.cuh"

namespace fastkd {

namespace {

// visit(T{}) with the element type of a dtype.
template <class Visit>
std::string with_type(DType dtype, Visit&& visit) {
    switch (dtype) {
        case DType::kFloat32: return visit(0.0f);
        case DType::kBFloat16: return visit(bfloat16{});
        case DType::kFloat16: return visit(float16{});
        case DType::kFloat64: break;
    }
    return "no kernel has this dtype";
}

}  // namespace

std::string launch_log_softmax(const LogSoftmaxParams& params, const Queue& queue) {
    LogSoftmaxParams p = params;
    const bool backward = p.dy.data != nullptr;
    Split split;
    void* arguments[] = {&p, &split};
    const auto run = [&](const char* name, auto resident, auto streaming, int64_t vectors) {
        const Kernels kernels = {reinterpret_cast<const void*>(resident), reinterpret_cast<const void*>(streaming)};
        return launch(name, kernels, {vectors, 1, p.rows, p.columns}, arguments, split, queue);
    };
    return with_type(p.x.dtype, [&](auto x) {
        return with_type(backward ? p.dy.dtype : p.out.dtype, [&](auto other) {
            using T = decltype(x);
            using Out = decltype(other);
            if (backward)
                return run("log_softmax_backward", log_softmax_backward_kernel<T, Out, true>,
                           log_softmax_backward_kernel<T, Out, false>, max_vectors<Out>(p.columns));
            return run("log_softmax", log_softmax_kernel<T, Out, true>, log_softmax_kernel<T, Out, false>,
                       max_vectors<T>(p.columns));
        });
    });
}

const void* scale_kernel_of(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return reinterpret_cast<const void*>(scale_kernel<float>);
        case DType::kBFloat16: return reinterpret_cast<const void*>(scale_kernel<bfloat16>);
        case DType::kFloat16: return reinterpret_cast<const void*>(scale_kernel<float16>);
        case DType::kFloat64: break;
    }
    return nullptr;
}

std::string launch_scale(const ScaleParams& params, const float* scalar, const Queue& queue) {
    ScaleParams p = params;
    Split split;  // not the kernel's to know
    void* arguments[] = {&p, &scalar};
    Kernels kernels = {nullptr, scale_kernel_of(p.x.dtype)};
    kernels.once = true;
    return launch("scale", kernels, {p.columns * size_of(p.x.dtype) / 16, 1, p.rows, p.columns}, arguments, split, queue);
}

std::string supports_device(int device) {
    cudaFuncAttributes attributes;
    cudaError_t status = cudaSetDevice(device);
    if (status == cudaSuccess)
        status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(scale_kernel<float>));
    if (status == cudaSuccess) return {};
    cudaGetLastError();
    return cudaGetErrorString(status);
}

}  // namespace fastkd
