// The kernels of csrc/cuda under the shim, with C entry points. SIMT_FEW leaves most instantiations out.
#include <cstring>
#include <vector>

#include "cuda/kd_rows.cuh"
#include "cuda/log_softmax.cuh"
#include "cuda/rest.cuh"
#include "cuda/scale.cuh"
#include "cuda/slices.cuh"

using namespace fastkd;

namespace {

#ifdef SIMT_FEW
using Functors = FunctorList<MixtureKL<true, false, Mix::kStudent>, MixtureKL<true, true, Mix::kBoth>>;

template <class Visit>
void with_type(DType, Visit&& visit) {
    visit(0.0f);
}
#else
using Functors = Divergences;

template <class Visit>
void with_type(DType dtype, Visit&& visit) {
    dtype == DType::kBFloat16 ? visit(bfloat16{}) : dtype == DType::kFloat16 ? visit(float16{}) : visit(0.0f);
}
#endif

struct Order {
    int cluster, threads, clusters;
    bool resident;
    uint64_t seed;
};

// On a grid whose blocks have exactly the shared memory that their share of the vectors takes. A row that is not kept has
// as many parts as a cluster would have blocks, which meet in memory that holds no number. Sets ``split``, which is, or is
// part of, the kernel's last argument.
template <class Resident, class Streaming, class Last, class... Arguments>
void launch(const Order& order, int clusters, int64_t vectors, int tensors, Resident resident, Streaming streaming,
            Split& split, const Last& last, const Arguments&... arguments) {
    std::vector<Meeting> meetings(clusters);
    std::memset(static_cast<void*>(meetings.data()), 0xff, clusters * sizeof(Meeting));
    for (Meeting& meeting : meetings) meeting.arrived = 0;
    split = {static_cast<int>((vectors + order.cluster - 1) / order.cluster), meetings.data()};
    const size_t shared = order.resident ? kept_bytes(split.share, tensors) : 0;
    const int size = order.resident ? order.cluster : 1, parts = order.cluster / size;
    const simt::Grid grid{clusters, size, order.threads, shared, order.seed, parts};
    if (order.resident) {
        simt::launch(grid, resident, arguments..., last);
    } else {
        simt::launch(grid, streaming, arguments..., last);
    }
}

}  // namespace

extern "C" void simt_kd_rows(const KDRowsParams* p, const Order* order) {
    const Numbers numbers{static_cast<Formula>(p->formula), p->c_t, p->c_s, p->w};
    with_type(p->common_dtype(), [&](auto element) {
        using T = decltype(element);
        const auto run = [&](const auto& functor, auto soft) {
            using Functor = std::decay_t<decltype(functor)>;
            constexpr bool kSoft = decltype(soft)::value;
            KDRowsParams params = *p;
            RowGrid rows = prepare_rows(params, functor);
            // A row that is not kept has blocks of its own; of kept ones a cluster walks several.
            const int clusters = order->resident ? order->clusters : static_cast<int>(p->rows);
            launch(*order, clusters, max_vectors<T>(p->n), kSoft ? 2 : 1,
                   kd_rows_kernel<T, Functor, kSoft, true>, kd_rows_kernel<T, Functor, kSoft, false>, rows, rows,
                   params, functor);
        };
        if (p->u.data) {
            Functors::dispatch(numbers, [&](const auto& functor) { run(functor, std::true_type{}); });
        } else {
            run(NoSoftTerm{}, std::false_type{});
        }
    });
}

extern "C" void simt_slice_sums(const SliceParams* p, const Order* order) {
    with_type(p->common_dtype(), [&](auto element) {
        using T = decltype(element);
        Functors::dispatch({static_cast<Formula>(p->formula), p->c_t, p->c_s, p->w}, [&](const auto& functor) {
            SliceParams params = *p;
            RowGrid rows = prepare_rows(params, functor);
            const auto kernel = slice_sums_kernel<T, std::decay_t<decltype(functor)>>;
            launch(*order, static_cast<int>(p->rows), max_vectors<T>(p->n), 2, kernel, kernel, rows, rows, params,
                   functor);
        });
    });
}

extern "C" void simt_rest(const RestParams* p, float* scratch, const Order* order) {
    with_type(p->common_dtype(), [&](auto element) {
        using T = decltype(element);
        RestParams params = *p;
        RowGrid rows = prepare_rows(params, NoSoftTerm{});
        const auto run = [&](auto kernel, auto... arguments) {
            const int clusters = static_cast<int>(p->rows);
            launch(*order, clusters, max_vectors<T>(p->n), 1, kernel, kernel, rows, rows, params, arguments...);
        };
        p->from_stats ? run(rest_grad_kernel<T>, scratch) : run(rest_rows_kernel<T>);
    });
}

extern "C" void simt_log_softmax(const LogSoftmaxParams* p, const Order* order) {
    const bool backward = p->dy.data != nullptr;
    with_type(p->x.dtype, [&](auto x) {
        with_type(backward ? p->dy.dtype : p->out.dtype, [&](auto other) {
            using T = decltype(x);
            using Out = decltype(other);
            const int rows = static_cast<int>(p->rows);
            Split split;
            if (backward) {
                launch(*order, rows, max_vectors<Out>(p->columns), 1, log_softmax_backward_kernel<T, Out, true>,
                       log_softmax_backward_kernel<T, Out, false>, split, split, *p);
            } else {
                launch(*order, rows, max_vectors<T>(p->columns), 1, log_softmax_kernel<T, Out, true>,
                       log_softmax_kernel<T, Out, false>, split, split, *p);
            }
        });
    });
}

extern "C" void simt_scale(const ScaleParams* p, const float* scalar, const Order* order) {
    const simt::Grid grid{static_cast<int>(p->rows), 1, order->threads, 0, order->seed, order->cluster};
    with_type(p->x.dtype, [&](auto x) { simt::launch(grid, scale_kernel<decltype(x)>, *p, scalar); });
}
