// Launches: which grid a call gets, and the entry points of the module. Statuses are '' or what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../params.h"

namespace fastkd {

// What one kernel instantiation needs to be launched on rows of ``vectors`` 16-byte vectors in ``tensors`` tensors.
struct Plan {
    bool resident;
    int cluster, threads;
    size_t shared;
    cudaError_t status = cudaSuccess;  // of asking the device; launch reports it
};

// The grid by row size: the only such table.
Plan plan(int64_t vectors, int tensors);

// Launches kernel(arguments) on ``rows`` clusters. ``name`` and the sizes go into the error's text.
std::string launch(const char* name, const void* kernel, const Plan& plan, int64_t rows, int64_t columns,
                   void** arguments, cudaStream_t stream);

// One translation unit a dtype instantiates the row kernels.
template <class T>
std::string launch_kd_rows(const KDRowsParams& params, cudaStream_t stream);

std::string launch_log_softmax(const LogSoftmaxParams& params, cudaStream_t stream);
std::string launch_scale(const ScaleParams& params, const float* scalar, cudaStream_t stream);

}  // namespace fastkd
