// What each build of the kernels (one an instruction set) gives to the rest: functions of one row.
#pragma once

#include "../params.h"

namespace fastkd {

struct Kernels {
    const char* isa;
    int64_t (*kd_scratch)(const KDRowsParams&);  // floats that kd_row needs
    void (*kd_row)(const KDRowsParams&, int64_t row, float* scratch);
    void (*sums_row)(const SliceParams&, int64_t row, float* scratch);  // which needs as many
    int64_t (*rest_scratch)(const RestParams&);
    void (*rest_row)(const RestParams&, int64_t row, float* scratch);
    int64_t (*log_softmax_scratch)(const LogSoftmaxParams&);
    void (*log_softmax_row)(const LogSoftmaxParams&, int64_t row, float* scratch);
    int64_t (*scale_scratch)(const ScaleParams&);
    void (*scale_row)(const ScaleParams&, int64_t row, float* scratch);
    int64_t (*hidden_scratch)(const HiddenParams&);
    void (*hidden_row)(const HiddenParams&, int64_t row, float* scratch);
};

}  // namespace fastkd
