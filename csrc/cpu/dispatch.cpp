// Which build of the kernels this processor runs. Decided once.
#include "dispatch.h"

namespace fastkd {

#if defined(FASTKD_X86)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace generic {
extern const Kernels kernels;
}

const Kernels& best_kernels() {
    static const Kernels& best = []() -> const Kernels& {
#if defined(FASTKD_X86)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return avx512::kernels;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
        return generic::kernels;
    }();
    return best;
}

const Kernels* kernels_named(const char* isa) {
    const Kernels& best = best_kernels();
    const Kernels* all[] = {
#if defined(FASTKD_X86)
        &avx512::kernels, &avx2::kernels,
#endif
        &generic::kernels};
    bool can_run = false;  // those after the best one are its subsets
    for (const Kernels* one : all) {
        can_run = can_run || one == &best;
        if (can_run && std::strcmp(one->isa, isa) == 0) return one;
    }
    return nullptr;
}

}  // namespace fastkd
