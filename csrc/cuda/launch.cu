#include "launch.h"

#include <algorithm>

#include "grid.cuh"

namespace fastkd {

namespace {

// Shared memory of a block: at least two blocks an SM (227 KB on sm_90), so that one's loads overlap the other's
// arithmetic; a cluster of 16, the largest there is, may take all of it. Static slots need 5 KB.
constexpr size_t kStaticBytes = 5 << 10;
constexpr size_t kSharedOfTwo = 104 << 10;

}  // namespace

Plan plan(int64_t vectors, int tensors) {
    int device = 0, major = 0, most = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return {false, 1, kMaxThreads, 0, status};
    for (int cluster = 1; cluster <= (major >= 9 ? 16 : 1); cluster *= 2) {
        const int64_t share = (vectors + cluster - 1) / cluster;
        const size_t shared = static_cast<size_t>(share) * 16 * tensors;
        const size_t limit = cluster == 16 ? most - kStaticBytes : std::min(kSharedOfTwo, most - kStaticBytes);
        if (shared <= limit) {
            const int64_t threads = (share + 31) / 32 * 32;
            return {true, cluster, static_cast<int>(std::min<int64_t>(threads, kMaxThreads)), shared};
        }
    }
    return {false, 1, kMaxThreads, 0};
}

std::string launch(const char* name, const void* kernel, const Plan& plan, int64_t rows, int64_t columns,
                   void** arguments, cudaStream_t stream) {
    cudaError_t status = plan.status;
    if (status == cudaSuccess && plan.shared > (48 << 10)) {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    }
    if (status == cudaSuccess && plan.cluster > 8) {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    if (status == cudaSuccess) {
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(rows * plan.cluster));
        config.blockDim = dim3(plan.threads);
        config.dynamicSmemBytes = plan.shared;
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = plan.cluster > 1 ? 1 : 0;
        status = cudaLaunchKernelExC(&config, kernel, arguments);
    }
    if (status == cudaSuccess) return {};
    return std::string(name) + " on " + std::to_string(rows) + " x " + std::to_string(columns) + " (cluster of " +
           std::to_string(plan.cluster) + ", " + std::to_string(plan.threads) + " threads, " +
           std::to_string(plan.shared) + " bytes of shared memory): " + cudaGetErrorString(status);
}

}  // namespace fastkd
