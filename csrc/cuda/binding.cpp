// The module fastkd._cuda. Pointers, numbers, a device and a stream in, no tensor: one build serves every version of
// PyTorch. The status that goes back is '' or what went wrong, and Python raises.
#include "../arguments.h"
#include "launch.h"

namespace {

namespace py = pybind11;
using namespace fastkd;

// (device, stream, a function that gives the address of so many bytes).
Queue queue(const py::tuple& on) {
    const py::object memory = on[2];
    return {on[0].cast<int>(), reinterpret_cast<cudaStream_t>(on[1].cast<uintptr_t>()),
            [memory](int64_t bytes) { return pointer<void>(memory(bytes).cast<uintptr_t>()); }};
}

std::string kd_rows(const py::tuple& z, const py::tuple& u, const py::tuple& dz, uintptr_t labels,
                    uintptr_t hard_scale, uintptr_t soft_scale, uintptr_t z_scale, uintptr_t hard, uintptr_t soft,
                    uintptr_t stats, int64_t rows, int64_t inner_rows, int64_t n, int64_t columns, float temperature,
                    int formula, float c_t, float c_s, float w, float smoothing, bool from_stats, const py::tuple& on) {
    const KDRowsParams p =
        kd_rows_params(z, u, dz, labels, hard_scale, soft_scale, z_scale, hard, soft, stats, rows, inner_rows, n,
                       columns, temperature, formula, c_t, c_s, w, smoothing, from_stats);
    const DType kernel = p.common_dtype();
    return kernel == DType::kBFloat16  ? launch_kd_rows<bfloat16>(p, queue(on))
           : kernel == DType::kFloat16 ? launch_kd_rows<float16>(p, queue(on))
                                       : launch_kd_rows<float>(p, queue(on));
}

std::string slice_sums(const py::tuple& z, const py::tuple& u, const py::tuple& dz, uintptr_t labels,
                       uintptr_t hard_scale, uintptr_t soft_scale, uintptr_t z_scale, uintptr_t hard, uintptr_t soft,
                       uintptr_t stats, int64_t rows, int64_t inner_rows, int64_t n, int64_t columns,
                       float temperature, int formula, float c_t, float c_s, float w, float smoothing, bool from_stats,
                       uintptr_t sums, const py::tuple& on) {
    SliceParams p;
    static_cast<KDRowsParams&>(p) =
        kd_rows_params(z, u, dz, labels, hard_scale, soft_scale, z_scale, hard, soft, stats, rows, inner_rows, n,
                       columns, temperature, formula, c_t, c_s, w, smoothing, from_stats);
    p.sums = pointer<float>(sums);
    return launch_slice_sums(p, queue(on));
}

// ``scratch`` is of the outcomes' size, where there is a gradient.
std::string rest_rows(const py::tuple& z, const py::tuple& u, const py::tuple& dz, uintptr_t labels,
                      uintptr_t hard_scale, uintptr_t soft_scale, uintptr_t z_scale, uintptr_t hard, uintptr_t rest,
                      uintptr_t stats, int64_t rows, int64_t inner_rows, int64_t n, int64_t columns,
                      float temperature, int formula, float c_t, float c_s, float w, float smoothing, bool from_stats,
                      uintptr_t listed, int64_t k, uintptr_t outcome_grad, uintptr_t scratch, const py::tuple& on) {
    RestParams p;
    static_cast<KDRowsParams&>(p) =
        kd_rows_params(z, u, dz, labels, hard_scale, soft_scale, z_scale, hard, rest, stats, rows, inner_rows, n,
                       columns, temperature, formula, c_t, c_s, w, smoothing, from_stats);
    p.listed = pointer<const int32_t>(listed), p.k = k;
    p.outcome_grad = pointer<const float>(outcome_grad);
    return launch_rest(p, pointer<float>(scratch), queue(on));
}

std::string log_softmax(const py::tuple& x, const py::tuple& out, const py::tuple& dy, uintptr_t lse, int64_t rows,
                        int64_t inner_rows, int64_t columns, float temperature, const py::tuple& on) {
    return launch_log_softmax(log_softmax_params(x, out, dy, lse, rows, inner_rows, columns, temperature),
                              queue(on));
}

std::string scale(const py::tuple& x, int64_t rows, int64_t inner_rows, int64_t columns, uintptr_t scalar,
                  const py::tuple& on) {
    ScaleParams p;
    p.x = matrix(x), p.rows = rows, p.inner_rows = inner_rows, p.columns = columns;
    return launch_scale(p, pointer<const float>(scalar), queue(on));
}

// For tests, as is parts: the grids that a device with these limits gives, each as (resident, cluster, threads, bytes of
// shared memory), the best first.
py::list plans_for(int major, int block_shared, int sm_shared, int reserved_shared, int64_t vectors, int tensors) {
    py::list grids;
    for (const Plan& plan : plans({major, block_shared, sm_shared, reserved_shared}, vectors, tensors))
        grids.append(py::make_tuple(plan.resident, plan.cluster, plan.threads, plan.shared));
    return grids;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.def("kd_rows", &kd_rows);
    m.def("slice_sums", &slice_sums);
    m.def("rest_rows", &rest_rows);
    m.def("log_softmax", &log_softmax);
    m.def("scale", &scale);
    m.def("supports_device", &supports_device);
    m.def("plans", &plans_for);
    m.def("parts", &parts_of);
}
