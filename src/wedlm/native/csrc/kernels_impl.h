// SPDX-License-Identifier: Apache-2.0
// The kernels, once, in terms of 16 lanes. Each instruction set compiles this file with its own simd_*.h and flags.
// Nothing of the standard library that is not a pure macro or built in may be used here: an inline function of it,
// compiled for AVX-512, could be the copy that the linker keeps for all.
#pragma once
#include "kernels.h"

#if defined(WEDLM_NO_UNROLL)  // where a lane is no register, it would only make the code long
#define WEDLM_UNROLL
#elif defined(__clang__)
#define WEDLM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define WEDLM_UNROLL _Pragma("GCC unroll 16")
#else
#define WEDLM_UNROLL
#endif

namespace wedlm {
namespace WEDLM_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

// ---- norm, activations, RoPE

// e^x for x <= 88: a polynomial of degree 7 (Cephes) of the rest after powers of two. 0 below -87.
inline V exp_lanes(V x) {
  V bounded = min(max(x, set1(-87.0f)), set1(88.0f));
  V shifted = fma(bounded, set1(1.44269504088896341f), set1(kMagic));
  V n = shifted - set1(kMagic);
  V r = fma(n, set1(-0.693359375f), bounded);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  I power = shift_left(bits_of(shifted) - bits_of(set1(kMagic)) + set1_int(127), 23);
  return zero_below(x, -87.0f, p * float_of(power));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  FloatMode mode;
  (void)mode;
  V squares = set1(0.0f);
  int64_t i = 0, whole = n / 16 * 16;
  int rest = static_cast<int>(n - whole);
  for (; i < whole; i += 16) squares = fma(load(x + i), load(x + i), squares);
  if (rest) squares = fma(load_n(x + i, rest), load_n(x + i, rest), squares);
  float mean = sum(squares) / static_cast<float>(n);
  V factor = set1(1.0f / __builtin_sqrtf(mean + eps));
  for (i = 0; i < whole; i += 16) store(y + i, load(x + i) * factor * load(weight + i));
  if (rest) store_n(y + i, load_n(x + i, rest) * factor * load_n(weight + i, rest), rest);
}

void silu_mul(float* gate, const float* up, int64_t n) {  // n is a multiple of 16
  FloatMode mode;
  (void)mode;
  for (int64_t i = 0; i < n; i += 16) {
    V g = load(gate + i);
    V silu = g / (set1(1.0f) + exp_lanes(set1(0.0f) - g));
    store(gate + i, silu * load(up + i));
  }
}

void add(float* y, const float* x, int64_t n) {  // n is a multiple of 16
  FloatMode mode;
  (void)mode;
  for (int64_t i = 0; i < n; i += 16) store(y + i, load(y + i) + load(x + i));
}

void rotate(float* head, const float* cos, const float* sin, int64_t dim) {
  FloatMode mode;
  (void)mode;
  int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    int n = static_cast<int>(smaller(16, half - i));
    V a = load_n(head + i, n), b = load_n(head + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(head + i, fma(b, set1(0.0f) - s, a * c), n);
    store_n(head + half + i, fma(a, s, b * c), n);
  }
}

void to_bfloat(const float* x, uint16_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    y[i] = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// ---- inputs in eight bits

// Nearest integers of x * factor in -127..127 (127 for what is not a number).
inline I rounded(V x, V factor) {
  V bounded = max(min(x * factor, set1(127.0f)), set1(-127.0f));
  return bits_of(bounded + set1(kMagic)) - bits_of(set1(kMagic));
}

// 0 for what is next to nothing: 127 / most would overflow.
inline float inverse_scale(float most) { return most > 1e-36f ? 127.0f / most : 0.0f; }

void quantize_blocks(const float* x, int64_t n, int8_t* q, float* scale, float* scaled_sum, int32_t* minus32, int32_t* minus16) {
  FloatMode mode;
  (void)mode;
  for (int64_t b = 0; 32 * b < n; b++) {
    const float* at = x + 32 * b;
    int rest = static_cast<int>(smaller(32, n - 32 * b));
    V low = rest >= 16 ? load(at) : load_n(at, rest);
    V high = rest == 32 ? load(at + 16) : rest > 16 ? load_n(at + 16, rest - 16) : set1(0.0f);
    float most = largest(max(abs(high), max(abs(low), set1(0.0f))));
    V factor = set1(inverse_scale(most));
    I first = rounded(low, factor), second = rounded(high, factor);
    store_bytes(q + 32 * b, first);
    store_bytes(q + 32 * b + 16, second);
    int32_t sums[2] = {sum(first), sum(second)}, whole = sums[0] + sums[1];
    minus16[2 * b] = -128 * sums[0];
    minus16[2 * b + 1] = -128 * sums[1];
    minus32[b] = -128 * whole;
    scale[b] = most / 127.0f;
    scaled_sum[b] = scale[b] * static_cast<float>(whole);
  }
}

void quantize_head(const float* x, int64_t n, int8_t* q, float* scale) {
  FloatMode mode;
  (void)mode;
  V high = set1(0.0f);
  auto part = [&](int64_t i) { return load_n(x + i, static_cast<int>(smaller(16, n - i))); };
  for (int64_t i = 0; i < n; i += 16) high = max(abs(part(i)), high);
  float most = largest(high);
  V factor = set1(inverse_scale(most));
  for (int64_t i = 0; i < n; i += 16) {
    int8_t bytes[16];
    store_bytes(bytes, rounded(part(i), factor));
    __builtin_memcpy(q + i, bytes, static_cast<size_t>(smaller(16, n - i)));
  }
  *scale = most / 127.0f;
}

// ---- products: blocks with scales

template <class Block>
struct Reader;  // of one block: sub(b) gives 32 inputs' quads, scale and minimum

inline void nibble_quads(const uint8_t (*q)[64], B* quads) {
  WEDLM_UNROLL
  for (int j = 0; j < 4; j++) {
    B both = load_bytes(q[j]);
    quads[j] = low_nibbles(both);
    quads[j + 4] = high_nibbles(both);
  }
}
inline void add_fifths(const uint8_t* h, B* quads) {
  B bits = load_bytes(h);
  WEDLM_UNROLL
  for (int j = 0; j < 8; j++) quads[j] = quads[j] | bits_to_4(bits, j, 1);
}

struct Plain {  // defaults of the formats
  static constexpr int kSubBlocks = 1, kOffsetBits = 0;  // offset: what is taken off each quant, a power of two
  static constexpr bool kBytes = false, kMinimum = false, kHalves = false, kScaleOfOutput = false;
  // Rows from which the next panel is fetched ahead. What does less for each byte of weights, in eight bits, is done so
  // fast that the processor's own prefetching does better until there are more rows.
  static constexpr int kAheadFrom = 2;
};
template <>
struct Reader<PackedINT8> : Plain {
  static constexpr int kOffsetBits = kByteBiasBits;  // dot_bytes takes off what it does not count itself
  static constexpr int kAheadFrom = 5;
  static constexpr bool kBytes = true, kScaleOfOutput = true;
  explicit Reader(const PackedINT8&) {}
  void sub(const PackedINT8& block, int, B* quads, V&, V&) const {
    WEDLM_UNROLL
    for (int j = 0; j < 8; j++) quads[j] = load_bytes(block.q[j]);
  }
};
template <>
struct Reader<PackedQ8_0> : Plain {
  static constexpr int kOffsetBits = kByteBiasBits;
  static constexpr int kAheadFrom = 5;
  static constexpr bool kBytes = true;
  V d;
  explicit Reader(const PackedQ8_0& block) : d(load_half(block.d)) {}
  void sub(const PackedQ8_0& block, int, B* quads, V& scale, V&) const {
    WEDLM_UNROLL
    for (int j = 0; j < 8; j++) quads[j] = load_bytes(block.q[j]);
    scale = d;
  }
};
// Blocks of 32 inputs of four or five bits, with an offset (a power of two) or a minimum.
template <class Block, int offset_bits, bool has_fifth, bool has_minimum>
struct SmallReader : Plain {
  static constexpr int kOffsetBits = offset_bits;
  static constexpr bool kMinimum = has_minimum;
  V d, m;
  explicit SmallReader(const Block& block) : d(load_half(block.d)), m(d) {
    if constexpr (has_minimum) m = load_half(block.m);
  }
  void sub(const Block& block, int, B* quads, V& scale, V& minimum) const {
    nibble_quads(block.q, quads);
    if constexpr (has_fifth) add_fifths(block.h, quads);
    scale = d;
    minimum = m;
  }
};
template <>
struct Reader<PackedQ4_0> : SmallReader<PackedQ4_0, 3, false, false> { using SmallReader::SmallReader; };
template <>
struct Reader<PackedQ4_1> : SmallReader<PackedQ4_1, 0, false, true> { using SmallReader::SmallReader; };
template <>
struct Reader<PackedQ5_0> : SmallReader<PackedQ5_0, 4, true, false> { using SmallReader::SmallReader; };
template <>
struct Reader<PackedQ5_1> : SmallReader<PackedQ5_1, 0, true, true> { using SmallReader::SmallReader; };
// Blocks of 256 inputs: a scale and a minimum of six bits for each 32.
template <class Block, bool has_fifth>
struct ScaledReader : Plain {
  static constexpr int kSubBlocks = 8;
  static constexpr bool kMinimum = true;
  V d, m;
  explicit ScaledReader(const Block& block) : d(load_half(block.d)), m(set1(0.0f) - load_half(block.m)) {}
  void sub(const Block& block, int b, B* quads, V& scale, V& minimum) const {
    nibble_quads(block.q[b], quads);
    if constexpr (has_fifth) add_fifths(block.h[b], quads);
    I high = load_int(block.s[2]);
    I s = (shift_right(load_int(block.s[0]), 4 * b) & set1_int(15)) | shift_left(shift_right(high, 2 * b) & set1_int(3), 4);
    I l = (shift_right(load_int(block.s[1]), 4 * b) & set1_int(15)) | shift_left(shift_right(high, 16 + 2 * b) & set1_int(3), 4);
    scale = d * to_float(s);
    minimum = m * to_float(l);
  }
};
template <>
struct Reader<PackedQ4_K> : ScaledReader<PackedQ4_K, false> { using ScaledReader::ScaledReader; };
template <>
struct Reader<PackedQ5_K> : ScaledReader<PackedQ5_K, true> { using ScaledReader::ScaledReader; };
template <>
struct Reader<PackedQ6_K> : Plain {
  static constexpr int kSubBlocks = 8, kOffsetBits = 5;
  static constexpr int kAheadFrom = 1;
  static constexpr bool kHalves = true;  // a scale for each 16 inputs, whole numbers
  V d;
  explicit Reader(const PackedQ6_K& block) : d(load_half(block.d)) {}
  void sub(const PackedQ6_K& block, int b, B* quads, V& scale, V&) const {
    nibble_quads(block.q[b], quads);
    WEDLM_UNROLL
    for (int half = 0; half < 2; half++) {
      B bits = load_bytes(block.h[b][half]);
      WEDLM_UNROLL
      for (int j = 0; j < 4; j++) quads[4 * half + j] = quads[4 * half + j] | bits_to_4(bits, 2 * j, 3);
    }
    scale = d;
  }
  static I half_scale(const PackedQ6_K& block, int s) {
    return shift_right_signed(shift_left(load_int(block.s[s / 4]), 24 - 8 * (s % 4)), 24);
  }
};

template <bool kBytes>
inline I dot(I acc, B w, const int8_t* x) {
  return kBytes ? dot_bytes(acc, w, x) : dot_small(acc, w, x);
}

// What 2^bits is taken off each quant for: `minus` is -128 times the sum of the inputs.
template <int bits>
inline I offset(int32_t minus) {
  if constexpr (bits == 0) return zero_int();
  if constexpr (bits == 7) return set1_int(minus);
  return shift_right_signed(set1_int(minus), 7 - bits);
}

// M rows, one panel. A sub-block's sum is a whole number; the sub-blocks' products are added in order. `ahead`: the
// panel that comes next is fetched meanwhile, into the second cache, since the first is full of this one and the rows.
template <class Block, int M>
inline void blocks_panel(const Matrix& matrix, const Input& x, int32_t panel, bool ahead, float* y, int64_t stride, bool adds) {
  using R = Reader<Block>;
  int64_t sub_blocks = (int64_t{matrix.cols} + 31) / 32, num_blocks = sub_blocks / R::kSubBlocks;
  const auto* block = reinterpret_cast<const Block*>(matrix.panel(panel));
  V acc[M];
  WEDLM_UNROLL
  for (int m = 0; m < M; m++) acc[m] = set1(0.0f);
  for (int64_t i = 0; i < num_blocks; i++) {
    if (ahead) {
      const auto* next = reinterpret_cast<const char*>(block + i) + matrix.panel_bytes;
      for (size_t line = 0; line < sizeof(Block); line += 64) __builtin_prefetch(next + line, 0, 2);
    }
    R reader(block[i]);
    for (int b = 0; b < R::kSubBlocks; b++) {
      B quads[8];
      V scale = set1(1.0f), minimum = set1(0.0f);
      reader.sub(block[i], b, quads, scale, minimum);
      int64_t at = i * R::kSubBlocks + b;
      auto input = [&](int m) { return x.block_q + 32 * (m * sub_blocks + at); };
      auto start = [&](int m) { return offset<R::kOffsetBits>(x.minus32[m * sub_blocks + at]); };
      auto add = [&](int m, I total) {
        V factor = set1(x.block_scale[m * sub_blocks + at]);
        acc[m] = fma(to_float(total), R::kScaleOfOutput ? factor : scale * factor, acc[m]);
        if constexpr (R::kMinimum) acc[m] = fma(minimum, set1(x.block_scaled_sum[m * sub_blocks + at]), acc[m]);
      };
      if constexpr (R::kHalves) {
        I first_scale = R::half_scale(block[i], 2 * b), second_scale = R::half_scale(block[i], 2 * b + 1);
        WEDLM_UNROLL
        for (int m = 0; m < M; m++) {
          const int32_t* s = x.minus16 + (m * sub_blocks + at) * 2;
          I one = offset<R::kOffsetBits>(s[0]), two = offset<R::kOffsetBits>(s[1]);
          WEDLM_UNROLL
          for (int j = 0; j < 4; j++) {
            one = dot<R::kBytes>(one, quads[j], input(m) + 4 * j);
            two = dot<R::kBytes>(two, quads[j + 4], input(m) + 4 * j + 16);
          }
          add(m, one * first_scale + two * second_scale);
        }
      } else if constexpr (kRows >= 8) {  // enough registers for all rows' sums: none waits for the one before
        I total[M];
        WEDLM_UNROLL
        for (int m = 0; m < M; m++) total[m] = start(m);
        WEDLM_UNROLL
        for (int j = 0; j < 8; j++) {
          WEDLM_UNROLL
          for (int m = 0; m < M; m++) total[m] = dot<R::kBytes>(total[m], quads[j], input(m) + 4 * j);
        }
        WEDLM_UNROLL
        for (int m = 0; m < M; m++) add(m, total[m]);
      } else {
        WEDLM_UNROLL
        for (int m = 0; m < M; m++) {
          I total = start(m);
          WEDLM_UNROLL
          for (int j = 0; j < 8; j++) total = dot<R::kBytes>(total, quads[j], input(m) + 4 * j);
          add(m, total);
        }
      }
    }
  }
  WEDLM_UNROLL
  for (int m = 0; m < M; m++) {
    if constexpr (R::kScaleOfOutput) acc[m] = acc[m] * load(matrix.scale + kPanel * panel);
    store(y + m * stride, adds ? load(y + m * stride) + acc[m] : acc[m]);
  }
}

// ---- products: floats

struct AsFloat { static V weights(const uint8_t* panel, int64_t k) { return load(reinterpret_cast<const float*>(panel) + 16 * k); } };
struct AsHalf { static V weights(const uint8_t* panel, int64_t k) { return load_half(reinterpret_cast<const uint16_t*>(panel) + 16 * k); } };
struct AsBFloat { static V weights(const uint8_t* panel, int64_t k) { return load_bfloat(reinterpret_cast<const uint16_t*>(panel) + 16 * k); } };

// Input k goes to sum k mod 4; then (0 + 1) + (2 + 3).
template <class Type, int M>
inline void floats_panel(const Matrix& matrix, const Input& x, int32_t panel, float* y, int64_t stride, bool adds) {
  int64_t cols = matrix.cols, width = round_up(cols, 4), k = 0;
  const uint8_t* w = matrix.panel(panel);
  V acc[M][4];
  WEDLM_UNROLL
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 4; j++) acc[m][j] = set1(0.0f);
  for (; k + 4 <= cols; k += 4) {
    WEDLM_UNROLL
    for (int j = 0; j < 4; j++) {
      V wv = Type::weights(w, k + j);
      WEDLM_UNROLL
      for (int m = 0; m < M; m++) acc[m][j] = fma(wv, set1(x.values[m * width + k + j]), acc[m][j]);
    }
  }
  for (int j = 0; k < cols; k++, j++) {
    V wv = Type::weights(w, k);
    for (int m = 0; m < M; m++) acc[m][j] = fma(wv, set1(x.values[m * width + k]), acc[m][j]);
  }
  WEDLM_UNROLL
  for (int m = 0; m < M; m++) {
    V total = (acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]);
    store(y + m * stride, adds ? load(y + m * stride) + total : total);
  }
}

// ---- products: which

// Calls panel.template run<M>(x from a row on, y at that row) until all rows are done.
template <class Panel>
inline void in_row_blocks(const Panel& panel, const Matrix& matrix, const Input& x, int32_t rows, float* y, int64_t stride) {
  int32_t row = 0;
  auto rest = [&] { return x.from(row, matrix.cols); };
  auto ahead = [&] { return row == 0 && rows >= Panel::kAheadFrom; };
  for (; kRows >= 8 && row + 8 <= rows; row += 8) panel.template run<(kRows >= 8 ? 8 : 1)>(rest(), ahead(), y + row * stride);
  for (; row + 4 <= rows; row += 4) panel.template run<4>(rest(), ahead(), y + row * stride);
  switch (rows - row) {
    case 3: panel.template run<3>(rest(), ahead(), y + row * stride); break;
    case 2: panel.template run<2>(rest(), ahead(), y + row * stride); break;
    case 1: panel.template run<1>(rest(), ahead(), y + row * stride); break;
    default: break;
  }
}

template <class Block>
struct BlockPanel {
  static constexpr int kAheadFrom = Reader<Block>::kAheadFrom;
  const Matrix& matrix;
  int32_t panel;
  int64_t stride;
  bool adds;
  template <int M>
  void run(const Input& x, bool ahead, float* y) const { blocks_panel<Block, M>(matrix, x, panel, ahead, y, stride, adds); }
};
template <class Type>
struct FloatPanel {
  static constexpr int kAheadFrom = 1;  // of no use: it does not fetch ahead
  const Matrix& matrix;
  int32_t panel;
  int64_t stride;
  bool adds;
  template <int M>
  void run(const Input& x, bool, float* y) const {
    floats_panel<Type, (M > 4 ? 4 : M)>(matrix, x, panel, y, stride, adds);
    if constexpr (M > 4) floats_panel<Type, M - 4>(matrix, x.from(4, matrix.cols), panel, y + 4 * stride, stride, adds);
  }
};

template <class Panel>
inline void each_panel(const Matrix& matrix, const Input& x, int32_t rows, int32_t panel, int32_t end, float* y, int64_t stride, bool adds) {
  for (int32_t p = panel; p < end; p++)
    in_row_blocks(Panel{matrix, p, stride, adds}, matrix, x, rows, y + kPanel * (p - panel), stride);
}

void product(const Matrix& matrix, const Input& x, int32_t rows, int32_t panel, int32_t end, float* y, int64_t stride, bool adds) {
  FloatMode mode;
  (void)mode;
  switch (matrix.format) {
    case INT8: return each_panel<BlockPanel<PackedINT8>>(matrix, x, rows, panel, end, y, stride, adds);
    case F32: return each_panel<FloatPanel<AsFloat>>(matrix, x, rows, panel, end, y, stride, adds);
    case F16: return each_panel<FloatPanel<AsHalf>>(matrix, x, rows, panel, end, y, stride, adds);
    case BF16: return each_panel<FloatPanel<AsBFloat>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q8_0: return each_panel<BlockPanel<PackedQ8_0>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q4_0: return each_panel<BlockPanel<PackedQ4_0>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q4_1: return each_panel<BlockPanel<PackedQ4_1>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q5_0: return each_panel<BlockPanel<PackedQ5_0>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q5_1: return each_panel<BlockPanel<PackedQ5_1>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q4_K: return each_panel<BlockPanel<PackedQ4_K>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q5_K: return each_panel<BlockPanel<PackedQ5_K>>(matrix, x, rows, panel, end, y, stride, adds);
    case Q6_K: return each_panel<BlockPanel<PackedQ6_K>>(matrix, x, rows, panel, end, y, stride, adds);
  }
}

// ---- logits

void logit_sums(const float* logits, int64_t n, float* most, float* total, float* weighted) {
  FloatMode mode;
  (void)mode;
  constexpr float kLeast = -3.402823466e38f;
  V high = set1(kLeast);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) high = max(load(logits + i), high);
  for (int64_t j = i; j < n; j++) high = max(set1(logits[j]), high);
  *most = largest(high);
  V m = set1(*most), sums = set1(0.0f), products = set1(0.0f);
  for (i = 0; i < n; i += 16) {
    int count = static_cast<int>(smaller(16, n - i));
    float part[16];
    V difference = load_n(logits + i, count) - m, e = exp_lanes(difference);
    if (count < 16) {  // lanes beyond the end add nothing
      store(part, e);
      e = load_n(part, count);
    }
    sums = sums + e;
    products = fma(e, max(difference, set1(-1e30f)), products);
  }
  *total = sum(sums);
  *weighted = sum(products);
}

float largest_of(const float* x, int64_t n, int64_t* where) {
  float most = x[0];
  int64_t i = 0;
  if (n >= 16) {
    V high = load(x);
    for (i = 16; i + 16 <= n; i += 16) high = max(load(x + i), high);
    most = largest(high);
  }
  for (; i < n; i++) most = x[i] > most ? x[i] : most;
  int lane = 16;
  for (i = 0; i + 16 <= n && (lane = first_equal(load(x + i), set1(most))) == 16;) i += 16;
  if (lane < 16) i += lane;
  else
    while (i + 1 < n && x[i] != most) i++;
  *where = i;
  return most;
}

float exp_one(float x) {
  FloatMode mode;
  (void)mode;
  float out[16];
  store(out, exp_lanes(set1(x)));
  return out[0];
}

}  // namespace
}  // namespace WEDLM_ISA
}  // namespace wedlm

#include "attention_impl.h"

namespace wedlm {
namespace WEDLM_ISA {
extern const Kernels kernels;
const Kernels kernels{
    WEDLM_ISA_NAME, rms_norm, quantize_blocks, quantize_head, product, silu_mul, add, rotate, attention, to_bfloat, logit_sums, largest_of, exp_one,
};
}  // namespace WEDLM_ISA
}  // namespace wedlm
