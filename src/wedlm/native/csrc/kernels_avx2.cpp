// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define WEDLM_ISA avx2
#define WEDLM_ISA_NAME "avx2"
#include "simd_avx2.h"

#include "kernels_impl.h"
#endif
