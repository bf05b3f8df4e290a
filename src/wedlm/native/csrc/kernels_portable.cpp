// SPDX-License-Identifier: Apache-2.0
#define WEDLM_ISA portable
#define WEDLM_ISA_NAME "portable"
#define WEDLM_NO_UNROLL
#include "simd_portable.h"

#include "kernels_impl.h"
