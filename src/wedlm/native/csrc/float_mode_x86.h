// SPDX-License-Identifier: Apache-2.0
// Round to nearest, keep subnormal numbers: whatever the calling thread has set, for as long as this lives.
#pragma once
#include <xmmintrin.h>

struct FloatMode {
  unsigned before;
  FloatMode() : before(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatMode() { _mm_setcsr(before); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;
};
