// SPDX-License-Identifier: Apache-2.0
// Logarithms in double: own, so that no library decides about bits.
#pragma once
#include <cmath>

namespace wedlm {

// 2 atanh t = log((1 + t) / (1 - t)), for small t.
static inline double twice_atanh(double t) {
  double t2 = t * t, power = t, total = 0;
  for (int k = 1; k < 32; k += 2) {
    total += power / k;
    power *= t2;
  }
  return 2 * total;
}

// log x of a positive x = m 2^e with m near 1.
static inline double log_of(double x) {
  int e;
  double m = std::frexp(x, &e);
  if (m < 0.70710678118654752) m *= 2, e--;
  return twice_atanh((m - 1) / (m + 1)) + e * 0.69314718055994531;
}

}  // namespace wedlm
