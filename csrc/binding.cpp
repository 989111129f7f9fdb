// The module fastkd._cpu. Pointers and numbers in (arguments.h), no tensor: one build serves every version of PyTorch.
#include <sys/mman.h>

#include <atomic>
#include <string>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "divergence.h"

namespace py = pybind11;

namespace {

using fastkd::Kernels;

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
    const Kernels* one = chosen.load(std::memory_order_relaxed);
    return one ? *one : fastkd::best_kernels();
}

using fastkd::matrix;

// A large output is mostly fresh from the system, which takes 80 ms to hand out 131 MB in pages of 4 KB, as long as the
// kernel needs to fill them, and 10 ms in pages of 2 MB (EPYC 7003, virtual machine). So ask for the large ones,
// if it is 16 MB or more.
void expect_large_pages(const fastkd::Matrix& out, int64_t rows, int64_t columns) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kPage = 2 << 20;
    if (!out.data || out.inner != columns) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(out.data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = reinterpret_cast<uintptr_t>(out.data + rows * columns * size_of(out.dtype)) / kPage * kPage;
    if (end > first + 8 * kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)out, (void)rows, (void)columns;
#endif
}

template <class Params>
void run(const Params& params, int64_t row_bytes, int threads, int64_t scratch_floats,
         void (*row)(const Params&, int64_t, float*)) {
    struct Call {
        const Params& params;
        void (*row)(const Params&, int64_t, float*);
    };
    const Call call{params, row};
    py::gil_scoped_release release;
    fastkd::parallel_rows(params.rows, row_bytes, threads, scratch_floats, &call,
                          [](const void* context, int64_t i, float* scratch) {
                              const Call& it = *static_cast<const Call*>(context);
                              it.row(it.params, i, scratch);
                          });
}

void kd_rows(const py::tuple& z, const py::tuple& u, const py::tuple& dz, uintptr_t labels, uintptr_t hard_scale,
             uintptr_t soft_scale, uintptr_t z_scale, uintptr_t hard, uintptr_t soft, uintptr_t stats, int64_t rows,
             int64_t inner_rows, int64_t n, int64_t columns, float temperature, int formula, float c_t, float c_s,
             float w, float smoothing, bool from_stats, int threads) {
    const fastkd::KDRowsParams p =
        fastkd::kd_rows_params(z, u, dz, labels, hard_scale, soft_scale, z_scale, hard, soft, stats, rows, inner_rows,
                               n, columns, temperature, formula, c_t, c_s, w, smoothing, from_stats);
    const fastkd::Numbers numbers{static_cast<fastkd::Formula>(formula), c_t, c_s, w};
    if (p.u.data && !fastkd::Divergences::dispatch(numbers, [](const auto&) {}))
        throw py::value_error("kd_rows: no functor has these numbers");
    if (p.dz.data != p.z.data) expect_large_pages(p.dz, rows, columns);
    const Kernels& k = kernels();
    run(p, columns * 8, threads, k.kd_scratch(p), k.kd_row);
}

void slice_sums(const py::tuple& z, const py::tuple& u, const py::tuple& dz, uintptr_t labels, uintptr_t hard_scale,
                uintptr_t soft_scale, uintptr_t z_scale, uintptr_t hard, uintptr_t soft, uintptr_t stats, int64_t rows,
                int64_t inner_rows, int64_t n, int64_t columns, float temperature, int formula, float c_t, float c_s,
                float w, float smoothing, bool from_stats, uintptr_t sums, int threads) {
    fastkd::SliceParams p;
    static_cast<fastkd::KDRowsParams&>(p) =
        fastkd::kd_rows_params(z, u, dz, labels, hard_scale, soft_scale, z_scale, hard, soft, stats, rows, inner_rows,
                               n, columns, temperature, formula, c_t, c_s, w, smoothing, from_stats);
    p.sums = fastkd::pointer<float>(sums);
    const Kernels& kernel = kernels();
    run(p, columns * 8, threads, kernel.kd_scratch(p), kernel.sums_row);
}

void rest_rows(const py::tuple& z, const py::tuple& u, const py::tuple& dz, uintptr_t labels, uintptr_t hard_scale,
               uintptr_t soft_scale, uintptr_t z_scale, uintptr_t hard, uintptr_t rest, uintptr_t stats, int64_t rows,
               int64_t inner_rows, int64_t n, int64_t columns, float temperature, int formula, float c_t, float c_s,
               float w, float smoothing, bool from_stats, uintptr_t listed, int64_t k, uintptr_t outcome_grad,
               uintptr_t outcomes, uintptr_t outcome_scale, int64_t count, int threads) {
    fastkd::RestParams p;
    static_cast<fastkd::KDRowsParams&>(p) =
        fastkd::kd_rows_params(z, u, dz, labels, hard_scale, soft_scale, z_scale, hard, rest, stats, rows, inner_rows,
                               n, columns, temperature, formula, c_t, c_s, w, smoothing, from_stats);
    p.listed = fastkd::pointer<const int32_t>(listed), p.k = k;
    p.outcome_grad = fastkd::pointer<const float>(outcome_grad);
    p.outcomes = fastkd::pointer<const float>(outcomes), p.count = count;
    p.outcome_scale = fastkd::pointer<const float>(outcome_scale);
    if (p.dz.data != p.z.data) expect_large_pages(p.dz, rows, columns);
    const Kernels& kernel = kernels();
    run(p, columns * 4, threads, kernel.rest_scratch(p), kernel.rest_row);
}

void log_softmax(const py::tuple& x, const py::tuple& out, const py::tuple& dy, uintptr_t lse, int64_t rows,
                 int64_t inner_rows, int64_t columns, float temperature, int threads) {
    const fastkd::LogSoftmaxParams p =
        fastkd::log_softmax_params(x, out, dy, lse, rows, inner_rows, columns, temperature);
    expect_large_pages(p.out, rows, columns);
    const Kernels& k = kernels();
    run(p, columns * 4, threads, k.log_softmax_scratch(p), k.log_softmax_row);
}

void scale(const py::tuple& x, int64_t rows, int64_t inner_rows, int64_t columns, float scalar, int threads) {
    fastkd::ScaleParams p;
    p.x = matrix(x), p.rows = rows, p.inner_rows = inner_rows, p.columns = columns, p.scalar = scalar;
    const Kernels& k = kernels();
    run(p, columns * 2, threads, k.scale_scratch(p), k.scale_row);
}

void hidden_rows(const py::tuple& s, const py::tuple& t, const py::tuple& ds, uintptr_t scale, uintptr_t loss,
                 int64_t rows, int64_t inner_rows, int64_t columns, int kind, int threads) {
    fastkd::HiddenParams p;
    p.s = matrix(s), p.t = matrix(t), p.ds = matrix(ds);
    p.scale = fastkd::pointer<const float>(scale), p.loss = fastkd::pointer<float>(loss);
    p.rows = rows, p.inner_rows = inner_rows, p.columns = columns, p.kind = static_cast<fastkd::HiddenKind>(kind);
    expect_large_pages(p.ds, rows, columns);
    const Kernels& k = kernels();
    run(p, columns * 8, threads, k.hidden_scratch(p), k.hidden_row);
}

// '' returns to the best one.
py::object use_isa(const std::string& isa) {
    const Kernels* one = isa.empty() ? &fastkd::best_kernels() : fastkd::kernels_named(isa.c_str());
    if (!one) return py::str("this processor cannot run the build for " + isa);
    chosen.store(one);
    return py::none();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.def("kd_rows", &kd_rows);
    m.def("slice_sums", &slice_sums);
    m.def("rest_rows", &rest_rows);
    m.def("log_softmax", &log_softmax);
    m.def("scale", &scale);
    m.def("hidden_rows", &hidden_rows);
    m.def("isa", [] { return kernels().isa; });
    m.def("use_isa", &use_isa);
}
