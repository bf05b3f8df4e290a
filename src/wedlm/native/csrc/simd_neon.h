// SPDX-License-Identifier: Apache-2.0
// 16 lanes in NEON with the dot product of Armv8.2. What each function gives is said in simd_portable.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "formats.h"

namespace wedlm {
namespace WEDLM_ISA {
namespace {

#define WEDLM_QUARTERS for (int i = 0; i < 4; i++)

struct V { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct B { uint8x16_t v[4]; };

constexpr int kRows = 4;
constexpr int kByteBiasBits = 0;

inline V load(const float* p) { V r; WEDLM_QUARTERS r.v[i] = vld1q_f32(p + 4 * i); return r; }
inline void store(float* p, V a) { WEDLM_QUARTERS vst1q_f32(p + 4 * i, a.v[i]); }
inline V load_n(const float* p, int n) {
  float lanes[16] = {};
  for (int l = 0; l < n; l++) lanes[l] = p[l];
  return load(lanes);
}
inline void store_n(float* p, V a, int n) {
  float lanes[16];
  store(lanes, a);
  for (int l = 0; l < n; l++) p[l] = lanes[l];
}
inline V set1(float x) { V r; WEDLM_QUARTERS r.v[i] = vdupq_n_f32(x); return r; }
inline V operator+(V a, V b) { WEDLM_QUARTERS a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
inline V operator-(V a, V b) { WEDLM_QUARTERS a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
inline V operator*(V a, V b) { WEDLM_QUARTERS a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
inline V operator/(V a, V b) { WEDLM_QUARTERS a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
inline V fma(V a, V b, V c) { WEDLM_QUARTERS c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
inline float32x4_t max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V max(V a, V b) { WEDLM_QUARTERS a.v[i] = max4(a.v[i], b.v[i]); return a; }
inline V min(V a, V b) { WEDLM_QUARTERS a.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); return a; }
inline V abs(V a) { WEDLM_QUARTERS a.v[i] = vabsq_f32(a.v[i]); return a; }
inline V zero_below(V x, float limit, V y) {
  float32x4_t l = vdupq_n_f32(limit);
  WEDLM_QUARTERS y.v[i] = vbslq_f32(vcltq_f32(x.v[i], l), vdupq_n_f32(0), y.v[i]);
  return y;
}
inline float sum(V a) {
  float32x4_t s4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
inline float largest(V a) {
  float32x4_t s4 = max4(max4(a.v[0], a.v[2]), max4(a.v[1], a.v[3]));
  float lanes[4];
  vst1q_f32(lanes, s4);
  float x = lanes[0] > lanes[2] ? lanes[0] : lanes[2], y = lanes[1] > lanes[3] ? lanes[1] : lanes[3];
  return x > y ? x : y;
}
inline int first_equal(V a, V b) {
  uint16x8_t low = vcombine_u16(vmovn_u32(vceqq_f32(a.v[0], b.v[0])), vmovn_u32(vceqq_f32(a.v[1], b.v[1])));
  uint16x8_t high = vcombine_u16(vmovn_u32(vceqq_f32(a.v[2], b.v[2])), vmovn_u32(vceqq_f32(a.v[3], b.v[3])));
  // Four bits for each lane.
  uint8x8_t halves = vshrn_n_u16(vreinterpretq_u16_u8(vcombine_u8(vmovn_u16(low), vmovn_u16(high))), 4);
  uint64_t bits = vget_lane_u64(vreinterpret_u64_u8(halves), 0);
  return bits ? __builtin_ctzll(bits) / 4 : 16;
}
inline V load_half(const uint16_t* p) {
  V r;
  WEDLM_QUARTERS r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
}
inline V load_bfloat(const uint16_t* p) {
  V r;
  WEDLM_QUARTERS r.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * i)), 16));
  return r;
}

inline I set1_int(int32_t x) { I r; WEDLM_QUARTERS r.v[i] = vdupq_n_s32(x); return r; }
inline V load_signed(const int8_t* p) {
  int8x16_t bytes = vld1q_s8(p);
  int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}

inline I zero_int() { return set1_int(0); }
inline I load_int(const void* p) { I r; WEDLM_QUARTERS r.v[i] = vld1q_s32(static_cast<const int32_t*>(p) + 4 * i); return r; }
inline I operator+(I a, I b) { WEDLM_QUARTERS a.v[i] = vaddq_s32(a.v[i], b.v[i]); return a; }
inline I operator-(I a, I b) { WEDLM_QUARTERS a.v[i] = vsubq_s32(a.v[i], b.v[i]); return a; }
inline I operator*(I a, I b) { WEDLM_QUARTERS a.v[i] = vmulq_s32(a.v[i], b.v[i]); return a; }
inline I operator&(I a, I b) { WEDLM_QUARTERS a.v[i] = vandq_s32(a.v[i], b.v[i]); return a; }
inline I operator|(I a, I b) { WEDLM_QUARTERS a.v[i] = vorrq_s32(a.v[i], b.v[i]); return a; }
inline I shift_left(I a, int n) { WEDLM_QUARTERS a.v[i] = vshlq_s32(a.v[i], vdupq_n_s32(n)); return a; }
inline I shift_right(I a, int n) {
  WEDLM_QUARTERS a.v[i] = vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v[i]), vdupq_n_s32(-n)));
  return a;
}
inline I shift_right_signed(I a, int n) { WEDLM_QUARTERS a.v[i] = vshlq_s32(a.v[i], vdupq_n_s32(-n)); return a; }
inline int32_t sum(I a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3]))); }
inline V to_float(I a) { V r; WEDLM_QUARTERS r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
inline I bits_of(V a) { I r; WEDLM_QUARTERS r.v[i] = vreinterpretq_s32_f32(a.v[i]); return r; }
inline V float_of(I a) { V r; WEDLM_QUARTERS r.v[i] = vreinterpretq_f32_s32(a.v[i]); return r; }
inline void store_bytes(int8_t* p, I a) {
  int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

inline B load_bytes(const uint8_t* p) { B r; WEDLM_QUARTERS r.v[i] = vld1q_u8(p + 16 * i); return r; }
inline B low_nibbles(B a) { WEDLM_QUARTERS a.v[i] = vandq_u8(a.v[i], vdupq_n_u8(15)); return a; }
inline B high_nibbles(B a) { WEDLM_QUARTERS a.v[i] = vshrq_n_u8(a.v[i], 4); return a; }
inline B bits_to_4(B a, int n, int mask) {
  uint8x16_t keep = vdupq_n_u8(static_cast<uint8_t>(mask << 4));
  WEDLM_QUARTERS a.v[i] = vandq_u8(vshlq_u8(a.v[i], vdupq_n_s8(static_cast<int8_t>(4 - n))), keep);
  return a;
}
inline B operator|(B a, B b) { WEDLM_QUARTERS a.v[i] = vorrq_u8(a.v[i], b.v[i]); return a; }

inline int8x16_t four_bytes(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
inline I dot_small(I acc, B w, const int8_t* x) {
  int8x16_t v = four_bytes(x);
  WEDLM_QUARTERS acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), v);
  return acc;
}
inline I dot_bytes(I acc, B w, const int8_t* x) {
  WEDLM_QUARTERS w.v[i] = veorq_u8(w.v[i], vdupq_n_u8(128));
  return dot_small(acc, w, x);
}

inline void transpose(const V* rows, float* out) {
  for (int d = 0; d < 4; d++)
    for (int j = 0; j < 16; j += 4) {
      float32x4x2_t ab = vtrnq_f32(rows[j].v[d], rows[j + 1].v[d]), ce = vtrnq_f32(rows[j + 2].v[d], rows[j + 3].v[d]);
      float* to = out + 4 * d * 16 + j;
      vst1q_f32(to, vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(ce.val[0])));
      vst1q_f32(to + 16, vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(ce.val[1])));
      vst1q_f32(to + 32, vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(ce.val[0])));
      vst1q_f32(to + 48, vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(ce.val[1])));
    }
}

struct FloatMode {};

}  // namespace
}  // namespace WEDLM_ISA
}  // namespace wedlm
