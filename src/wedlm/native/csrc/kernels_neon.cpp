// SPDX-License-Identifier: Apache-2.0
#if defined(__aarch64__)
#define WEDLM_ISA neon
#define WEDLM_ISA_NAME "neon-dotprod"
#include "simd_neon.h"

#include "kernels_impl.h"
#endif
