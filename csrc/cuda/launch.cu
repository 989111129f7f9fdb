#include "launch.h"

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>
#include <tuple>

#include "grid.cuh"

namespace fastkd {

namespace {

// Static shared memory of the largest kernel; a test compares.
constexpr int kStaticBytes = 6 << 10;

cudaError_t read_limits(int device, Limits& limits) {
    const std::pair<cudaDeviceAttr, int*> wanted[] = {
        {cudaDevAttrComputeCapabilityMajor, &limits.major},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits.block_shared},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits.sm_shared},
        {cudaDevAttrReservedSharedMemoryPerBlock, &limits.reserved_shared},
    };
    for (const auto& [attribute, value] : wanted) {
        const cudaError_t status = cudaDeviceGetAttribute(value, attribute, device);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

// Holds what a launch refers to.
struct Config {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster;

    Config(const Plan& plan, int64_t rows, cudaStream_t stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
        config.gridDim = dim3(static_cast<unsigned>(rows * plan.cluster));
        config.blockDim = dim3(plan.threads);
        config.dynamicSmemBytes = plan.shared;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = plan.cluster > 1 ? 1 : 0;
    }
    Config(const Config&) = delete;
};

constexpr Plan kStreaming = {false, 1, kMaxThreads, 0};

// Opts a kernel in to its shared memory and cluster, and says whether the device can hold one such cluster: its SMs, or
// the part of them that this process was given, may be too few.
cudaError_t prepare(const void* kernel, const Plan& plan, const Limits& limits, bool& fits) {
    fits = true;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              limits.block_shared - kStaticBytes);
    if (status == cudaSuccess && plan.cluster > 8)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess || plan.cluster == 1) return status;
    int clusters = 0;
    const Config one(plan, 1, nullptr);
    status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &one.config);
    fits = clusters > 0;
    return status;
}

// The plan of a kernel on a device, the current one, and the kernel prepared for it, once.
cudaError_t prepared_plan(int device, const void* resident, int64_t vectors, int tensors, Plan& chosen) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int64_t>, Plan> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const std::tuple key{device, resident, vectors};
    if (const auto found = known.find(key); found != known.end()) {
        chosen = found->second;
        return cudaSuccess;
    }
    Limits limits;
    cudaError_t status = read_limits(device, limits);
    if (status != cudaSuccess) return status;
    chosen = plan(limits, vectors, tensors);
    if (chosen.resident) {
        bool fits;
        status = prepare(resident, chosen, limits, fits);
        if (!fits) chosen = kStreaming;
    }
    if (status == cudaSuccess) known.emplace(key, chosen);
    return status;
}

}  // namespace

// Blocks of a size that leaves room for two on an SM, so that one's loads overlap the other's arithmetic; a cluster of
// 16, the largest there is, may take all of it.
Plan plan(const Limits& limits, int64_t vectors, int tensors) {
    const int64_t most = limits.block_shared - kStaticBytes;
    const int64_t half = std::min<int64_t>(most, limits.sm_shared / 2 - limits.reserved_shared - kStaticBytes);
    for (int cluster = 1; cluster <= (limits.major >= 9 ? kMaxCluster : 1); cluster *= 2) {
        const int64_t share = (vectors + cluster - 1) / cluster;
        const int64_t shared = share * 16 * tensors;
        if (shared <= (cluster == kMaxCluster ? most : half)) {
            const int64_t threads = (share + kWarp - 1) / kWarp * kWarp;
            return {true, cluster, static_cast<int>(std::min<int64_t>(threads, kMaxThreads)), shared};
        }
    }
    return kStreaming;
}

std::string launch(const char* name, Kernels kernels, int64_t vectors, int tensors, int64_t rows, int64_t columns,
                   void** arguments, const Queue& queue) {
    Plan grid = kStreaming;
    cudaError_t status = cudaSetDevice(queue.device);
    const bool fits = rows <= INT_MAX / kMaxCluster && columns <= INT_MAX / 2;
    if (status == cudaSuccess && !fits) status = cudaErrorInvalidConfiguration;
    if (status == cudaSuccess && kernels.resident)
        status = prepared_plan(queue.device, kernels.resident, vectors, tensors, grid);
    if (status == cudaSuccess) {
        const void* kernel = grid.resident ? kernels.resident : kernels.streaming;
        const Config all(grid, rows, queue.stream);
        status = cudaLaunchKernelExC(&all.config, kernel, arguments);
    }
    if (status == cudaSuccess) return {};
    return std::string(name) + " on " + std::to_string(rows) + " x " + std::to_string(columns) + " (cluster of " +
           std::to_string(grid.cluster) + ", " + std::to_string(grid.threads) + " threads, " +
           std::to_string(grid.shared) + " bytes of shared memory): " + cudaGetErrorString(status);
}

}  // namespace fastkd
