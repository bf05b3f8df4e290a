// SPDX-License-Identifier: Apache-2.0
// 16 lanes in AVX2 with FMA and F16C, and AVX-VNNI where WEDLM_AVX_VNNI is defined. What each function gives is said in
// simd_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "formats.h"

namespace wedlm {
namespace WEDLM_ISA {
namespace {

#include "float_mode_x86.h"

struct V { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };

constexpr int kRows = 4;

inline const __m256i* at(const void* p) { return static_cast<const __m256i*>(p); }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256i first(int n) {  // lanes below n; n may be negative or above 8
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))}; }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline void store_n(float* p, V x, int n) { _mm256_maskstore_ps(p, first(n), x.a); _mm256_maskstore_ps(p + 8, first(n - 8), x.b); }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V operator+(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V operator-(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V operator*(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V operator/(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V abs(V x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline V zero_below(V x, float limit, V y) {
  __m256 l = _mm256_set1_ps(limit);
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, l, _CMP_LT_OQ), y.a), _mm256_andnot_ps(_mm256_cmp_ps(x.b, l, _CMP_LT_OQ), y.b)};
}
inline float sum(V x) {
  __m256 s8 = _mm256_add_ps(x.a, x.b);
  __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float largest(V x) {
  __m256 s8 = _mm256_max_ps(x.a, x.b);
  __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline int first_equal(V x, V y) {
  int a = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ)), b = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ));
  return __builtin_ctz(static_cast<unsigned>(a | b << 8) | 1u << 16);
}
inline __m128i eight_halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline V load_half(const uint16_t* p) { return {_mm256_cvtph_ps(eight_halves(p)), _mm256_cvtph_ps(eight_halves(p + 8))}; }
inline V load_bfloat(const uint16_t* p) {
  __m256i a = _mm256_cvtepu16_epi32(eight_halves(p)), b = _mm256_cvtepu16_epi32(eight_halves(p + 8));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}

inline V load_signed(const int8_t* p) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

inline I zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I set1_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I load_int(const void* p) { return {_mm256_loadu_si256(at(p)), _mm256_loadu_si256(at(p) + 1)}; }
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I operator*(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I operator|(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I shift_left(I x, int n) { __m128i c = _mm_cvtsi32_si128(n); return {_mm256_sll_epi32(x.a, c), _mm256_sll_epi32(x.b, c)}; }
inline I shift_right(I x, int n) { __m128i c = _mm_cvtsi32_si128(n); return {_mm256_srl_epi32(x.a, c), _mm256_srl_epi32(x.b, c)}; }
inline I shift_right_signed(I x, int n) { __m128i c = _mm_cvtsi32_si128(n); return {_mm256_sra_epi32(x.a, c), _mm256_sra_epi32(x.b, c)}; }
inline int32_t sum(I x) {
  __m256i s8 = _mm256_add_epi32(x.a, x.b);
  __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  __m128i s2 = _mm_add_epi32(s4, _mm_unpackhi_epi64(s4, s4));
  return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 1)));
}
inline V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I bits_of(V x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline V float_of(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline void store_bytes(int8_t* p, I x) {  // values are in -128..127, so saturation changes none
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline B load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(at(p)), _mm256_loadu_si256(at(p) + 1)}; }
inline B low_nibbles(B x) {
  __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline B high_nibbles(B x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline B bits_to_4(B x, int n, int mask) {
  __m128i count = _mm_cvtsi32_si128(n < 4 ? 4 - n : n - 4);
  __m256i keep = _mm256_set1_epi8(static_cast<char>(mask << 4));
  __m256i a = n < 4 ? _mm256_sll_epi16(x.a, count) : _mm256_srl_epi16(x.a, count);
  __m256i b = n < 4 ? _mm256_sll_epi16(x.b, count) : _mm256_srl_epi16(x.b, count);
  return {_mm256_and_si256(a, keep), _mm256_and_si256(b, keep)};
}
inline B operator|(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }

inline __m256i four_bytes(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
#ifdef WEDLM_AVX_VNNI
constexpr int kByteBiasBits = 7;
#ifdef WEDLM_EVEX_VNNI  // for tests: AVX-512's encoding of the same instruction, where AVX-VNNI's is missing
inline __m256i dot_lanes(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(acc, w, x); }
#else
inline __m256i dot_lanes(__m256i acc, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(acc, w, x); }
#endif
inline I dot_small(I acc, B w, const int8_t* x) {
  __m256i v = four_bytes(x);
  return {dot_lanes(acc.a, w.a, v), dot_lanes(acc.b, w.b, v)};
}
inline I dot_bytes(I acc, B w, const int8_t* x) { return dot_small(acc, w, x); }
#else
constexpr int kByteBiasBits = 0;
inline __m256i add_pairs(__m256i acc, __m256i unsigned_bytes, __m256i signed_bytes) {
  __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);  // saturates above 32767: see the callers
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// 2 * 127 * 127 = 32258: no pair saturates.
inline I dot_small(I acc, B w, const int8_t* x) {
  __m256i v = four_bytes(x);
  return {add_pairs(acc.a, w.a, v), add_pairs(acc.b, w.b, v)};
}
// Weights are signed here. |w| <= 128 is unsigned and x, in -127..127, takes its sign: 2 * 128 * 127 = 32512.
inline __m256i add_signed(__m256i acc, __m256i stored, __m256i x) {
  __m256i w = _mm256_xor_si256(stored, _mm256_set1_epi8(static_cast<char>(128)));
  return add_pairs(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
inline I dot_bytes(I acc, B w, const int8_t* x) {
  __m256i v = four_bytes(x);
  return {add_signed(acc.a, w.a, v), add_signed(acc.b, w.b, v)};
}
#endif

inline void transpose8(const __m256* r, float* out) {  // out[d * 16 + j] = r[j][d]
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(out + c * 16, _mm256_permute2f128_ps(u[c], u[c + 4], 0x20));
    _mm256_storeu_ps(out + (c + 4) * 16, _mm256_permute2f128_ps(u[c], u[c + 4], 0x31));
  }
}
inline void transpose(const V* rows, float* out) {
  __m256 r[8];
  for (int j = 0; j < 16; j += 8) {
    for (int i = 0; i < 8; i++) r[i] = rows[j + i].a;
    transpose8(r, out + j);
    for (int i = 0; i < 8; i++) r[i] = rows[j + i].b;
    transpose8(r, out + 8 * 16 + j);
  }
}

}  // namespace
}  // namespace WEDLM_ISA
}  // namespace wedlm
