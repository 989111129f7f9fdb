// The kernels of csrc/cuda under the shim, with C entry points.
#include "../../csrc/cuda/kd_rows.cuh"
#include "../../csrc/cuda/log_softmax.cuh"
#include "../../csrc/cuda/scale.cuh"

using namespace fastkd;

namespace {

struct Grid {
    int cluster, threads;
    bool resident;
    int clusters, rows;
    int64_t vectors;
};

// Sets ``share``, the vectors of a block, which is or is part of the kernel's ``last`` argument.
template <class Resident, class Streaming, class Last, class... Arguments>
void launch(const Grid& grid, Resident resident, Streaming streaming, int& share, const Last& last,
            const Arguments&... arguments) {
    const int cluster = grid.resident ? grid.cluster : 1;
    share = static_cast<int>((grid.vectors + cluster - 1) / cluster);
    if (grid.resident) {  // fewer clusters than rows, which each then walk
        simt::launch(resident, grid.clusters, cluster, grid.threads, kept_bytes(share, 2), arguments..., last);
    } else {
        simt::launch(streaming, grid.rows, cluster, grid.threads, 0, arguments..., last);
    }
}

template <class Visit>
void with_type(DType dtype, Visit&& visit) {
    dtype == DType::kBFloat16 ? visit(bfloat16{}) : dtype == DType::kFloat16 ? visit(float16{}) : visit(0.0f);
}

}  // namespace

extern "C" void simt_kd_rows(const KDRowsParams* p, int cluster, int threads, bool resident, int clusters) {
    const Numbers numbers{static_cast<Formula>(p->formula), p->c_t, p->c_s, p->w};
    with_type(p->common_dtype(), [&](auto element) {
        using T = decltype(element);
        const Grid grid{cluster, threads, resident, clusters, static_cast<int>(p->rows), max_vectors<T>(p->n)};
        const auto run = [&](const auto& functor, auto soft) {
            using Functor = std::decay_t<decltype(functor)>;
            constexpr bool kSoft = decltype(soft)::value;
            KDRowsParams params = *p;
            RowGrid rows = prepare_rows(params, functor);
            launch(grid, kd_rows_kernel<T, Functor, kSoft, true>, kd_rows_kernel<T, Functor, kSoft, false>, rows.share,
                   rows, params, functor);
        };
        if (p->u.data) {
            Divergences::dispatch(numbers, [&](const auto& functor) { run(functor, std::true_type{}); });
        } else {
            run(NoSoftTerm{}, std::false_type{});
        }
    });
}

extern "C" void simt_log_softmax(const LogSoftmaxParams* p, int cluster, int threads, bool resident) {
    const bool backward = p->dy.data != nullptr;
    with_type(p->x.dtype, [&](auto x) {
        with_type(backward ? p->dy.dtype : p->out.dtype, [&](auto other) {
            using T = decltype(x);
            using Out = decltype(other);
            const Grid grid{cluster, threads, resident, static_cast<int>(p->rows), static_cast<int>(p->rows),
                            backward ? max_vectors<Out>(p->columns) : max_vectors<T>(p->columns)};
            int share;
            if (backward) {
                launch(grid, log_softmax_backward_kernel<T, Out, true>, log_softmax_backward_kernel<T, Out, false>, share,
                       share, *p);
            } else {
                launch(grid, log_softmax_kernel<T, Out, true>, log_softmax_kernel<T, Out, false>, share, share, *p);
            }
        });
    });
}

extern "C" void simt_scale(const ScaleParams* p, const float* scalar, int threads) {
    with_type(p->x.dtype, [&](auto x) { simt::launch(scale_kernel<decltype(x)>, static_cast<int>(p->rows), 1, threads, 0, *p, scalar); });
}
