// Launches: which grid a call gets, and the entry points of the module. Statuses are '' or what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <string>
#include <vector>

#include "../params.h"

namespace fastkd {

struct Split;

// Where a launch goes. The device is set, since this runtime, linked statically, need not know of another's choice.
struct Queue {
    int device;
    cudaStream_t stream;
    std::function<void*(int64_t)> memory;  // so many bytes of the device's, for what is launched next
};

// What of a device decides a grid; sizes in bytes.
struct Limits {
    int major;                                     // of its compute capability
    int block_shared, sm_shared, reserved_shared;  // shared memory: the most of a block, of an SM; CUDA's of a block
};

struct Plan {
    bool resident;
    int cluster, threads;
    int64_t share;   // vectors of a block
    int64_t shared;  // bytes, dynamic
};

// The grids for rows of ``vectors`` 16-byte vectors in ``tensors`` tensors, the best first: the only such table. The
// last one streams, which every device can.
std::vector<Plan> plans(const Limits& limits, int64_t vectors, int tensors);

// Blocks of a row that is streamed: several where there are at most half as many rows as SMs. A thread gets two vectors at
// least: what it does once a row costs more than they do.
int parts_of(int64_t rows, int64_t vectors, int sms);

// The kernels of a call and of those that belong to it. All are loaded at the first, so that a later one can be captured.
struct Kernels {
    const void *resident, *streaming;     // the two instantiations; resident: null if there is none
    bool once = false;                    // a row is walked over once: not kept, and its blocks need not meet
    bool walks = false;                   // a cluster walks over rows until there are none; else it takes one
    const void* companion = nullptr;      // what a backward of this call launches besides
};

struct Sizes {
    int64_t vectors;  // of a row that may be kept
    int tensors;      // that are kept
    int64_t rows, columns;
};

// Launches the resident kernel with the best grid of which the device can hold a cluster, or the streaming one.
// ``arguments`` point to what holds ``split``, which is set. ``name`` and the sizes go into the error's text.
std::string launch(const char* name, const Kernels& kernels, const Sizes& sizes, void** arguments, Split& split,
                   const Queue& queue);

// Whether a device can run what was compiled.
std::string supports_device(int device);

// One translation unit a dtype instantiates the row kernels; that of float serves tensors of any and different ones.
template <class T>
std::string launch_kd_rows(const KDRowsParams& params, const Queue& queue);

std::string launch_slice_sums(const SliceParams& params, const Queue& queue);

// ``scratch`` [N, k] is for the gradient, which is from stats.
std::string launch_rest(const RestParams& params, float* scratch, const Queue& queue);

std::string launch_log_softmax(const LogSoftmaxParams& params, const Queue& queue);
std::string launch_scale(const ScaleParams& params, const float* scalar, const Queue& queue);

// The kernel that scales a gradient of a dtype; null if there is none.
const void* scale_kernel_of(DType dtype);

}  // namespace fastkd
