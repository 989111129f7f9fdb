// csrc/cuda/launch.cu over a runtime that launches nothing, but refuses what an H200 would: more shared memory than the
// kernel was granted last, a cluster of 16 that was not allowed, blocks that must all run at once and do not, and in a
// capture whatever loads a kernel or asks about it.
#include <map>
#include <vector>

#include "cuda/launch.cu"

namespace {

struct Kernel {
    int shared = 48 << 10;
    bool loaded = false, clusters_of_16 = false;
};
std::map<const void*, Kernel> kernels;
bool is_captured = false;
int sms_given = 132;
struct Launched {
    int blocks, parts, cluster, shared;
} launched;

bool fits(const cudaLaunchConfig_t& config, const void* kernel) {
    const Kernel& known = kernels[kernel];
    const unsigned cluster = config.numAttrs && config.attrs->id == cudaLaunchAttributeClusterDimension
                                 ? config.attrs->val.clusterDim.x : 1;
    return known.loaded && static_cast<int>(config.dynamicSmemBytes) <= known.shared && config.gridDim.x > 0 &&
           config.gridDim.x % cluster == 0 && (cluster <= 8 || known.clusters_of_16);
}

}  // namespace

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = std::map<int, int>{{cudaDevAttrComputeCapabilityMajor, 9},
                                {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
                                {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
                                {cudaDevAttrReservedSharedMemoryPerBlock, 1 << 10},
                                {cudaDevAttrMultiProcessorCount, 132}}[attribute];
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
    if (is_captured) return cudaErrorNotPermitted;
    kernels[kernel].loaded = true;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (is_captured) return cudaErrorNotPermitted;
    if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) kernels[kernel].clusters_of_16 = value;
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value > (227 << 10) - fastkd::kStaticBytes) return cudaErrorInvalidValue;
        kernels[kernel].shared = value;
    }
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
    *clusters = 16;
    return !is_captured && fits(*config, kernel) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
    *blocks = 1;
    return is_captured ? cudaErrorNotPermitted : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = is_captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
    const bool meets = config->numAttrs && config->attrs->id == cudaLaunchAttributeCooperative;
    const int blocks = static_cast<int>(config->gridDim.x), parts = static_cast<int>(config->gridDim.y);
    if (!fits(*config, kernel) || (meets && blocks * parts > sms_given)) return cudaErrorInvalidValue;
    const int cluster = config->numAttrs && !meets ? static_cast<int>(config->attrs->val.clusterDim.x) : 1;
    launched = {blocks, parts, cluster, static_cast<int>(config->dynamicSmemBytes)};
    return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused"; }

// A call of one kind, of two tensors of so many vectors a row. Whether it was launched, and how.
extern "C" bool launch_rows(int kind, int64_t rows, int64_t vectors, bool captured, int sms, int (&how)[4]) {
    static const char resident[4] = {}, streaming[4] = {}, companion[4] = {};
    is_captured = captured, sms_given = sms;
    const fastkd::Kernels of_call = {&resident[kind], &streaming[kind], false, true, &companion[kind]};
    std::vector<char> memory;
    const fastkd::Queue queue = {0, nullptr, [&](int64_t bytes) { return memory.resize(bytes), memory.data(); }};
    fastkd::Split split;
    const bool done = fastkd::launch("rows", of_call, {vectors, 2, rows, 8 * vectors}, nullptr, split, queue).empty();
    how[0] = launched.blocks, how[1] = launched.parts, how[2] = launched.cluster, how[3] = launched.shared;
    return done;
}
