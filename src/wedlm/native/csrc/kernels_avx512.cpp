// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define WEDLM_ISA avx512
#define WEDLM_ISA_NAME "avx512-vnni"
#include "simd_avx512.h"

#include "kernels_impl.h"
#endif
