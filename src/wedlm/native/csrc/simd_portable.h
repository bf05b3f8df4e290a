// SPDX-License-Identifier: Apache-2.0
// 16 lanes in plain C++: the definition that the other instruction sets equal, bit for bit.
//
// V: 16 floats. I: 16 int32. B: 64 bytes. fma rounds once, on every instruction set. min and max give their second
// argument where either is not a number.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace wedlm {
namespace WEDLM_ISA {
namespace {

#define WEDLM_LANES for (int l = 0; l < 16; l++)

struct V { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };

constexpr int kRows = 4;  // of a product's block in registers
constexpr int kByteBiasBits = 0;                 // dot_bytes adds 2^7 to each weight, or 0: nothing

inline V load(const float* p) { V r; std::memcpy(&r, p, 64); return r; }
inline V load_n(const float* p, int n) { V r = {}; for (int l = 0; l < n; l++) r.v[l] = p[l]; return r; }
inline void store(float* p, V a) { std::memcpy(p, &a, 64); }
inline void store_n(float* p, V a, int n) { for (int l = 0; l < n; l++) p[l] = a.v[l]; }
inline V set1(float x) { V r; WEDLM_LANES r.v[l] = x; return r; }
inline V operator+(V a, V b) { WEDLM_LANES a.v[l] = a.v[l] + b.v[l]; return a; }
inline V operator-(V a, V b) { WEDLM_LANES a.v[l] = a.v[l] - b.v[l]; return a; }
inline V operator*(V a, V b) { WEDLM_LANES a.v[l] = a.v[l] * b.v[l]; return a; }
inline V operator/(V a, V b) { WEDLM_LANES a.v[l] = a.v[l] / b.v[l]; return a; }
inline V fma(V a, V b, V c) { WEDLM_LANES c.v[l] = std::fma(a.v[l], b.v[l], c.v[l]); return c; }
inline V max(V a, V b) { WEDLM_LANES a.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l]; return a; }
inline V min(V a, V b) { WEDLM_LANES a.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l]; return a; }
inline V abs(V a) { WEDLM_LANES a.v[l] = std::fabs(a.v[l]); return a; }
inline V zero_below(V x, float limit, V value) { WEDLM_LANES value.v[l] = x.v[l] < limit ? 0.0f : value.v[l]; return value; }
inline float sum(V a) {  // lanes l and l + 8, then l + 4, l + 2, l + 1
  for (int width = 8; width; width /= 2)
    for (int l = 0; l < width; l++) a.v[l] = a.v[l] + a.v[l + width];
  return a.v[0];
}
inline float largest(V a) {
  for (int width = 8; width; width /= 2)
    for (int l = 0; l < width; l++) a.v[l] = a.v[l] > a.v[l + width] ? a.v[l] : a.v[l + width];
  return a.v[0];
}
// The first lane in which both are equal; 16 if there is none.
inline int first_equal(V a, V b) {
  int l = 0;
  while (l < 16 && a.v[l] != b.v[l]) l++;
  return l;
}
inline V load_half(const uint16_t* p) { V r; WEDLM_LANES r.v[l] = half_to_float(p[l]); return r; }
inline V load_bfloat(const uint16_t* p) {
  V r;
  WEDLM_LANES { uint32_t bits = static_cast<uint32_t>(p[l]) << 16; std::memcpy(&r.v[l], &bits, 4); }
  return r;
}

inline V load_signed(const int8_t* p) { V r; WEDLM_LANES r.v[l] = static_cast<float>(p[l]); return r; }

inline I zero_int() { return {}; }
inline I set1_int(int32_t x) { I r; WEDLM_LANES r.v[l] = x; return r; }
inline I load_int(const void* p) { I r; std::memcpy(&r, p, 64); return r; }
inline I operator+(I a, I b) { WEDLM_LANES a.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) + static_cast<uint32_t>(b.v[l])); return a; }
inline I operator-(I a, I b) { WEDLM_LANES a.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) - static_cast<uint32_t>(b.v[l])); return a; }
inline I operator*(I a, I b) { WEDLM_LANES a.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) * static_cast<uint32_t>(b.v[l])); return a; }
inline I operator&(I a, I b) { WEDLM_LANES a.v[l] &= b.v[l]; return a; }
inline I operator|(I a, I b) { WEDLM_LANES a.v[l] |= b.v[l]; return a; }
inline I shift_left(I a, int n) { WEDLM_LANES a.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) << n); return a; }
inline I shift_right(I a, int n) { WEDLM_LANES a.v[l] = static_cast<int32_t>(static_cast<uint32_t>(a.v[l]) >> n); return a; }
inline I shift_right_signed(I a, int n) { WEDLM_LANES a.v[l] >>= n; return a; }
inline int32_t sum(I a) { int32_t total = 0; WEDLM_LANES total += a.v[l]; return total; }
inline V to_float(I a) { V r; WEDLM_LANES r.v[l] = static_cast<float>(a.v[l]); return r; }
inline I bits_of(V a) { I r; std::memcpy(&r, &a, 64); return r; }
inline V float_of(I a) { V r; std::memcpy(&r, &a, 64); return r; }
inline void store_bytes(int8_t* p, I a) { WEDLM_LANES p[l] = static_cast<int8_t>(a.v[l]); }

inline B load_bytes(const uint8_t* p) { B r; std::memcpy(&r, p, 64); return r; }
inline B low_nibbles(B a) { for (auto& b : a.v) b &= 15; return a; }
inline B high_nibbles(B a) { for (auto& b : a.v) b >>= 4; return a; }
// Bits n and above of each byte, `mask` of them, moved to bit 4.
inline B bits_to_4(B a, int n, int mask) {
  for (auto& b : a.v) b = static_cast<uint8_t>((b >> n & mask) << 4);
  return a;
}
inline B operator|(B a, B b) { for (int i = 0; i < 64; i++) a.v[i] |= b.v[i]; return a; }

// acc[o] + sum over i of w[4 o + i] * x[i]; weights of at most 7 bits.
inline I dot_small(I acc, B w, const int8_t* x) {
  WEDLM_LANES for (int i = 0; i < 4; i++) acc.v[l] += static_cast<int32_t>(w.v[4 * l + i]) * x[i];
  return acc;
}
// The same for weights that are stored + 128, taken as value + 2^kByteBiasBits (0: value).
inline I dot_bytes(I acc, B w, const int8_t* x) {
  WEDLM_LANES for (int i = 0; i < 4; i++) acc.v[l] += (static_cast<int32_t>(w.v[4 * l + i]) - 128) * x[i];
  return acc;
}

// out[d * 16 + j] = rows[j][d] for d < 16.
inline void transpose(const V* rows, float* out) {
  for (int d = 0; d < 16; d++)
    for (int j = 0; j < 16; j++) out[d * 16 + j] = rows[j].v[d];
}

#if defined(__x86_64__)
#include "float_mode_x86.h"
#else
struct FloatMode {};
#endif

}  // namespace
}  // namespace WEDLM_ISA
}  // namespace wedlm
