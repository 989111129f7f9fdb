#pragma once

#include <cstring>

#include "kernels.h"

namespace fastkd {

const Kernels& best_kernels();

// The build for this instruction set, or null if this processor has not got it. Tests compare the builds.
const Kernels* kernels_named(const char* isa);

}  // namespace fastkd
