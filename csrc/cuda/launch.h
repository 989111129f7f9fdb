// Launches: which grid a call gets, and the entry points of the module. Statuses are '' or what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../params.h"

namespace fastkd {

// Where a launch goes. The device is set, since this runtime, linked statically, need not know of another's choice.
struct Queue {
    int device;
    cudaStream_t stream;
};

// What of a device decides a grid; sizes in bytes.
struct Limits {
    int major;                                     // of its compute capability
    int block_shared, sm_shared, reserved_shared;  // shared memory: the most of a block, of an SM; CUDA's of a block
};

struct Plan {
    bool resident;
    int cluster, threads;
    int64_t shared;  // bytes, dynamic
};

// The grid for rows of ``vectors`` 16-byte vectors in ``tensors`` tensors: the only such table.
Plan plan(const Limits& limits, int64_t vectors, int tensors);

// The two instantiations of a kernel. A null ``resident`` is one that nothing is kept for.
struct Kernels {
    const void *resident, *streaming;
};

// Launches the kernel on ``rows`` rows: the resident one if the device can hold the clusters of its plan. ``name`` and
// the sizes go into the error's text.
std::string launch(const char* name, Kernels kernels, int64_t vectors, int tensors, int64_t rows, int64_t columns,
                   void** arguments, const Queue& queue);

// Whether a device can run what was compiled.
std::string supports_device(int device);

// One translation unit a dtype instantiates the row kernels.
template <class T>
std::string launch_kd_rows(const KDRowsParams& params, const Queue& queue);

std::string launch_log_softmax(const LogSoftmaxParams& params, const Queue& queue);
std::string launch_scale(const ScaleParams& params, const float* scalar, const Queue& queue);

}  // namespace fastkd
