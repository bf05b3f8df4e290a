// SPDX-License-Identifier: Apache-2.0
// 16 lanes in AVX-512 (F, BW, DQ, VL) with VNNI. What each function gives is said in simd_portable.h.
#pragma once
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers initialise "undefined" vectors with themselves and then warn of it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <cstdint>

#include "formats.h"

namespace wedlm {
namespace WEDLM_ISA {
namespace {

#include "float_mode_x86.h"

struct V { __m512 v; };
struct I { __m512i v; };
struct B { __m512i v; };

constexpr int kRows = 8;
constexpr int kByteBiasBits = 7;

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V abs(V a) { return {_mm512_abs_ps(a.v)}; }
inline V zero_below(V x, float limit, V value) {
  __mmask16 below = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(below, value.v, _mm512_setzero_ps())};
}
inline float sum(V a) {
  __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float largest(V a) {
  __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline int first_equal(V a, V b) { return __builtin_ctz(static_cast<unsigned>(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)) | 1u << 16); }
inline V load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline V load_bfloat(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

inline V load_signed(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

inline I zero_int() { return {_mm512_setzero_si512()}; }
inline I set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I load_int(const void* p) { return {_mm512_loadu_si512(p)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I shift_left(I a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline I shift_right(I a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline I shift_right_signed(I a, int n) { return {_mm512_sra_epi32(a.v, _mm_cvtsi32_si128(n))}; }
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline V to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I bits_of(V a) { return {_mm512_castps_si512(a.v)}; }
inline V float_of(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline void store_bytes(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

inline B load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline B low_nibbles(B a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline B high_nibbles(B a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
inline B bits_to_4(B a, int n, int mask) {
  __m512i moved = n < 4 ? _mm512_sll_epi16(a.v, _mm_cvtsi32_si128(4 - n)) : _mm512_srl_epi16(a.v, _mm_cvtsi32_si128(n - 4));
  return {_mm512_and_si512(moved, _mm512_set1_epi8(static_cast<char>(mask << 4)))};
}
inline B operator|(B a, B b) { return {_mm512_or_si512(a.v, b.v)}; }

inline __m512i four_bytes(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
inline I dot_small(I acc, B w, const int8_t* x) { return {_mm512_dpbusd_epi32(acc.v, w.v, four_bytes(x))}; }
inline I dot_bytes(I acc, B w, const int8_t* x) { return {_mm512_dpbusd_epi32(acc.v, w.v, four_bytes(x))}; }

inline void transpose(const V* rows, float* out) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // u[i + c]: column c of each group of four, rows i..i + 3
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; c++) {
    __m512 a = _mm512_shuffle_f32x4(u[c], u[c + 4], 0x88), b = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0x88);
    __m512 e = _mm512_shuffle_f32x4(u[c], u[c + 4], 0xdd), f = _mm512_shuffle_f32x4(u[c + 8], u[c + 12], 0xdd);
    _mm512_storeu_ps(out + c * 16, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(out + (c + 4) * 16, _mm512_shuffle_f32x4(e, f, 0x88));
    _mm512_storeu_ps(out + (c + 8) * 16, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(out + (c + 12) * 16, _mm512_shuffle_f32x4(e, f, 0xdd));
  }
}

}  // namespace
}  // namespace WEDLM_ISA
}  // namespace wedlm
