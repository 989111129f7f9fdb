#include "launch.h"

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>
#include <tuple>

#include "grid.cuh"
#include "reader.cuh"

namespace fastkd {

namespace {

// Static shared memory of the largest kernel; a test compares.
constexpr int kStaticBytes = 3 << 10;

// Reads the limits, and the number of SMs.
cudaError_t read_limits(int device, Limits& limits, int& sms) {
    const std::pair<cudaDeviceAttr, int*> wanted[] = {
        {cudaDevAttrComputeCapabilityMajor, &limits.major},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits.block_shared},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits.sm_shared},
        {cudaDevAttrReservedSharedMemoryPerBlock, &limits.reserved_shared},
        {cudaDevAttrMultiProcessorCount, &sms},
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
    cudaLaunchAttribute attribute;

    Config(const Plan& plan, int64_t clusters, cudaStream_t stream, int parts = 1, bool meet = false) {
        if (meet) {  // all blocks run at once, or none
            attribute.id = cudaLaunchAttributeCooperative;
            attribute.val.cooperative = 1;
        } else {
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
        }
        config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster), parts);
        config.blockDim = dim3(plan.threads);
        config.dynamicSmemBytes = plan.shared;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = meet || plan.cluster > 1 ? 1 : 0;
    }
    Config(const Config&) = delete;
};

// How many clusters of a resident plan the device, or the part of it that this process was given, holds at once. Not
// every device has clusters of each size, and what it says to one that it has not is no error: 0, it does not fit.
int64_t clusters_held(const void* kernel, const Plan& plan, const Limits& limits, int sms) {
    int held = 0;
    // The most, not this plan's: a kernel has one such number, for rows of every length.
    bool fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     limits.block_shared - kStaticBytes) == cudaSuccess;
    if (fits && plan.cluster > 8)
        fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
    if (fits && plan.cluster > 1) {
        const Config one(plan, 1, nullptr);
        fits = cudaOccupancyMaxActiveClusters(&held, kernel, &one.config) == cudaSuccess;
    } else if (fits) {
        fits = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&held, kernel, plan.threads, plan.shared) == cudaSuccess;
        held *= sms;
    }
    if (!fits) cudaGetLastError();  // else the next call would report it
    return fits ? held : 0;
}

cudaError_t load(const void* kernel) {
    cudaFuncAttributes attributes;
    return kernel ? cudaFuncGetAttributes(&attributes, kernel) : cudaSuccess;
}

bool is_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const cudaError_t status = cudaStreamIsCapturing(stream, &capture);
    if (status != cudaSuccess) cudaGetLastError();  // the legacy stream, while another one is captured
    return status != cudaSuccess || capture != cudaStreamCaptureStatusNone;
}

// What is known of a call's kernels on a device after its first.
struct Ready {
    Plan plan;
    int64_t held;  // clusters
    int sms;
};

// Loads the kernels of a call and chooses the plan, once. Nothing is kept of a failure, nor chosen in a capture, where a
// kernel cannot be loaded.
std::string make_ready(const Kernels& kernels, const Sizes& sizes, const Queue& queue, Ready& ready) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int64_t>, Ready> known;
    const std::lock_guard<std::mutex> lock(mutex);
    // What is never kept is ready for rows of any length.
    const std::tuple key{queue.device, kernels.streaming, kernels.resident ? sizes.vectors : 0};
    if (const auto found = known.find(key); found != known.end()) {
        ready = found->second;
        return {};
    }
    if (is_capturing(queue.stream))
        return "a CUDA graph cannot capture the first call of its kind: make one like it before, on this device";
    Limits limits;
    cudaError_t status = read_limits(queue.device, limits, ready.sms);
    for (const void* kernel : {kernels.resident, kernels.streaming, kernels.companion}) {
        if (status == cudaSuccess) status = load(kernel);
    }
    if (status != cudaSuccess) return cudaGetErrorString(status);
    for (const Plan& plan : plans(limits, sizes.vectors, sizes.tensors)) {
        if (plan.resident && !kernels.resident) continue;
        ready.plan = plan;
        ready.held = plan.resident ? clusters_held(kernels.resident, plan, limits, ready.sms) : INT_MAX;
        if (ready.held > 0) break;
    }
    known.emplace(key, ready);
    if (kernels.companion) known.emplace(std::tuple{queue.device, kernels.companion, int64_t{0}}, ready);
    return {};
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Plan plan_of(int64_t vectors, int tensors, int cluster) {
    const int64_t share = divide_up(vectors, cluster);
    int threads = kWarp;
    while (threads < kMaxThreads && threads < share) threads *= 2;
    return {true, cluster, threads, share, kept_bytes(share, tensors)};
}

}  // namespace

// Three blocks share an SM, or two, so that one's loads and barriers hide behind the others' arithmetic: the smallest
// portable cluster that allows it, else one of 16 blocks, which not every device has; then blocks that take all of an SM.
std::vector<Plan> plans(const Limits& limits, int64_t vectors, int tensors) {
    std::vector<Plan> all;
    const int largest = limits.major >= 9 ? kMaxCluster : 1, portable = std::min(largest, 8);
    const auto add = [&](int blocks, int first, int last) {
        const int64_t most = std::min<int64_t>(limits.block_shared, limits.sm_shared / blocks - limits.reserved_shared);
        for (int cluster = first; cluster <= last; cluster *= 2) {
            const Plan plan = plan_of(vectors, tensors, cluster);
            if (plan.shared + kStaticBytes <= most) return all.push_back(plan);
        }
    };
    add(3, 1, portable);
    add(2, 1, portable);
    add(3, 16, largest);
    add(2, 16, largest);
    for (int cluster = 1; cluster <= largest; cluster *= 2) add(1, cluster, cluster);
    all.push_back({false, 1, kMaxThreads, vectors, 0});
    return all;
}

int parts_of(int64_t rows, int64_t vectors, int sms) {
    const int64_t most = std::min<int64_t>(sms / std::max<int64_t>(rows, 1), vectors / (2 * kMaxThreads));
    return static_cast<int>(std::clamp<int64_t>(most, 1, kMaxParts));
}

namespace {

// Streams the rows, each by so many blocks.
cudaError_t stream(const Kernels& kernels, const Sizes& sizes, void** arguments, Split& split, const Queue& queue,
                   int parts) {
    const bool meet = parts > 1 && !kernels.once;
    split.share = static_cast<int>(divide_up(sizes.vectors, parts));
    split.meetings = nullptr;
    if (meet) {
        const size_t bytes = sizes.rows * sizeof(Meeting);
        split.meetings = static_cast<Meeting*>(queue.memory(bytes));
        const cudaError_t status = cudaMemsetAsync(split.meetings, 0, bytes, queue.stream);
        if (status != cudaSuccess) return status;
    }
    const Config all({false, 1, kMaxThreads, split.share, 0}, sizes.rows, queue.stream, parts, meet);
    const cudaError_t status = cudaLaunchKernelExC(&all.config, kernels.streaming, arguments);
    if (status == cudaSuccess || !meet) return status;
    cudaGetLastError();  // a process may have been given fewer SMs than the device says
    return stream(kernels, sizes, arguments, split, queue, 1);
}

}  // namespace

std::string launch(const char* name, const Kernels& kernels, const Sizes& sizes, void** arguments, Split& split,
                   const Queue& queue) {
    const Plan streaming = {false, 1, kMaxThreads, sizes.vectors, 0};
    Ready ready = {streaming, INT_MAX, 0};
    std::string error;
    cudaError_t status = cudaSetDevice(queue.device);
    if (sizes.rows > INT_MAX / kMaxCluster || sizes.columns > INT_MAX / 2) status = cudaErrorInvalidConfiguration;
    if (status == cudaSuccess) error = make_ready(kernels, sizes, queue, ready);
    const Plan& plan = kernels.once ? streaming : ready.plan;
    if (status == cudaSuccess && error.empty()) {
        if (plan.resident) {
            split = {static_cast<int>(plan.share), nullptr};
            const Config all(plan, kernels.walks ? std::min(sizes.rows, ready.held) : sizes.rows, queue.stream);
            status = cudaLaunchKernelExC(&all.config, kernels.resident, arguments);
        } else {
            status = stream(kernels, sizes, arguments, split, queue, parts_of(sizes.rows, sizes.vectors, ready.sms));
        }
    }
    if (status != cudaSuccess) error = cudaGetErrorString(status);
    if (error.empty()) return {};
    cudaGetLastError();
    return std::string(name) + " on " + std::to_string(sizes.rows) + " x " + std::to_string(sizes.columns) +
           " (cluster of " + std::to_string(plan.cluster) + ", " + std::to_string(plan.threads) + " threads, " +
           std::to_string(plan.shared) + " bytes of shared memory): " + error;
}

}  // namespace fastkd
