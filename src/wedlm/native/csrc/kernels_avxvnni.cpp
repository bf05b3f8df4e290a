// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define WEDLM_ISA avxvnni
#define WEDLM_ISA_NAME "avx-vnni"
#define WEDLM_AVX_VNNI
#include "simd_avx2.h"

#include "kernels_impl.h"
#endif
