// The vectors of one instruction set, for test_cpu.py to call through ctypes.
#include "../../csrc/cpu/lanes.h"

using namespace fastkd;

extern "C" void exp2_of(const float* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(exp2(load(x + i)), out + i);
    const int rest = static_cast<int>(n - i);
    store(exp2(load(x + i, rest)), rest, out + i);
}
