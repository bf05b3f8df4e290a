// SPDX-License-Identifier: Apache-2.0
#include "formats.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace wedlm {

namespace {

const FormatInfo kF32{"F32", 1, 4, InputKind::kFloat};
const FormatInfo kF16{"F16", 1, 2, InputKind::kFloat};
const FormatInfo kBF16{"BF16", 1, 2, InputKind::kFloat};
const FormatInfo kINT8{"INT8", 32, 32, InputKind::kInt8Blocks};
const FormatInfo kQ8_0{"Q8_0", 32, 34, InputKind::kInt8Blocks};
const FormatInfo kQ4_0{"Q4_0", 32, 18, InputKind::kInt8Blocks};
const FormatInfo kQ4_1{"Q4_1", 32, 20, InputKind::kInt8Blocks};
const FormatInfo kQ5_0{"Q5_0", 32, 22, InputKind::kInt8Blocks};
const FormatInfo kQ5_1{"Q5_1", 32, 24, InputKind::kInt8Blocks};
const FormatInfo kQ4_K{"Q4_K", 256, 144, InputKind::kInt8Blocks};
const FormatInfo kQ5_K{"Q5_K", 256, 176, InputKind::kInt8Blocks};
const FormatInfo kQ6_K{"Q6_K", 256, 210, InputKind::kInt8Blocks};

uint16_t read_u16(const uint8_t* at) { return static_cast<uint16_t>(at[0] | at[1] << 8); }

uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Scale or minimum `j` of a K-quant's 12 bytes.
void scale_min(const uint8_t* s, int j, uint32_t& scale, uint32_t& min) {
  if (j < 4) {
    scale = s[j] & 63;
    min = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    min = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
  }
}

// Puts input k (0..31) of a sub-block, output o.
void put_nibble(uint8_t (*q)[64], int k, int o, unsigned value) {
  int quad = k / 4;
  q[quad % 4][4 * o + k % 4] |= static_cast<uint8_t>(value << (quad < 4 ? 0 : 4));
}

void put_fifth(uint8_t* h, int k, int o, unsigned bit) { h[4 * o + k % 4] |= static_cast<uint8_t>(bit << (k / 4)); }

unsigned nibble(const uint8_t (*q)[64], int k, int o) {
  int quad = k / 4;
  return q[quad % 4][4 * o + k % 4] >> (quad < 4 ? 0 : 4) & 15;
}

unsigned fifth(const uint8_t* h, int k, int o) { return h[4 * o + k % 4] >> (k / 4) & 1; }

// Source blocks of 32: 16 bytes whose low nibbles are inputs 0..15, and whose high ones are inputs 16..31.
void pack_nibbles32(uint8_t (*q)[64], int o, const uint8_t* source) {
  for (int i = 0; i < 16; i++) {
    put_nibble(q, i, o, source[i] & 15);
    put_nibble(q, i + 16, o, source[i] >> 4);
  }
}

void pack_fifths32(uint8_t* h, int o, const uint8_t* source) {
  for (int k = 0; k < 32; k++) put_fifth(h, k, o, source[k / 8] >> (k % 8) & 1);
}

void pack_block(PackedQ8_0& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  for (int k = 0; k < 32; k++) block.q[k / 4][4 * o + k % 4] = source[2 + k] ^ 128;
}

void pack_block(PackedQ4_0& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  pack_nibbles32(block.q, o, source + 2);
}

void pack_block(PackedQ4_1& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  block.m[o] = read_u16(source + 2);
  pack_nibbles32(block.q, o, source + 4);
}

void pack_block(PackedQ5_0& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  pack_fifths32(block.h, o, source + 2);
  pack_nibbles32(block.q, o, source + 6);
}

void pack_block(PackedQ5_1& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  block.m[o] = read_u16(source + 2);
  pack_fifths32(block.h, o, source + 4);
  pack_nibbles32(block.q, o, source + 8);
}

void pack_scales(uint32_t (*s)[16], int o, const uint8_t* source) {
  for (int j = 0; j < 8; j++) {
    uint32_t scale, min;
    scale_min(source, j, scale, min);
    s[0][o] |= (scale & 15) << (4 * j);
    s[1][o] |= (min & 15) << (4 * j);
    s[2][o] |= (scale >> 4) << (2 * j) | (min >> 4) << (16 + 2 * j);
  }
}

// Source: 4 times 32 bytes, whose low nibbles are an even sub-block and whose high nibbles the odd one after it.
void pack_nibbles256(uint8_t (*q)[4][64], int o, const uint8_t* source) {
  for (int b = 0; b < 8; b++)
    for (int k = 0; k < 32; k++) put_nibble(q[b], k, o, source[b / 2 * 32 + k] >> (b % 2 * 4) & 15);
}

void pack_block(PackedQ4_K& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  block.m[o] = read_u16(source + 2);
  pack_scales(block.s, o, source + 4);
  pack_nibbles256(block.q, o, source + 16);
}

void pack_block(PackedQ5_K& block, int o, const uint8_t* source) {
  block.d[o] = read_u16(source);
  block.m[o] = read_u16(source + 2);
  pack_scales(block.s, o, source + 4);
  for (int b = 0; b < 8; b++)
    for (int k = 0; k < 32; k++) put_fifth(block.h[b], k, o, source[16 + k] >> b & 1);
  pack_nibbles256(block.q, o, source + 48);
}

void pack_block(PackedQ6_K& block, int o, const uint8_t* source) {
  const uint8_t *low = source, *high = source + 128, *scales = source + 192;
  block.d[o] = read_u16(source + 208);
  for (int s = 0; s < 16; s++) block.s[s / 4][o] |= static_cast<uint32_t>(scales[s]) << (s % 4 * 8);
  for (int b = 0; b < 8; b++) {
    int half = b / 4, quarter = b % 4;  // 128 inputs lie together: their nibbles in 64 bytes, their high bits in 32
    for (int k = 0; k < 32; k++) {
      unsigned four = low[half * 64 + quarter % 2 * 32 + k] >> (quarter / 2 * 4) & 15;
      unsigned two = high[half * 32 + k] >> (2 * quarter) & 3;
      put_nibble(block.q[b], k, o, four);
      int quad = k / 4;
      block.h[b][quad / 4][4 * o + k % 4] |= static_cast<uint8_t>(two << (quad % 4 * 2));
    }
  }
}

void unpack_block(const PackedQ8_0& block, int o, float* out) {
  float d = half_to_float(block.d[o]);
  for (int k = 0; k < 32; k++) out[k] = d * static_cast<float>(static_cast<int>(block.q[k / 4][4 * o + k % 4]) - 128);
}

void unpack_block(const PackedQ4_0& block, int o, float* out) {
  float d = half_to_float(block.d[o]);
  for (int k = 0; k < 32; k++) out[k] = d * static_cast<float>(static_cast<int>(nibble(block.q, k, o)) - 8);
}

void unpack_block(const PackedQ4_1& block, int o, float* out) {
  float d = half_to_float(block.d[o]), m = half_to_float(block.m[o]);
  for (int k = 0; k < 32; k++) {
    float product = d * static_cast<float>(nibble(block.q, k, o));
    out[k] = product + m;
  }
}

void unpack_block(const PackedQ5_0& block, int o, float* out) {
  float d = half_to_float(block.d[o]);
  for (int k = 0; k < 32; k++)
    out[k] = d * static_cast<float>(static_cast<int>(nibble(block.q, k, o) | fifth(block.h, k, o) << 4) - 16);
}

void unpack_block(const PackedQ5_1& block, int o, float* out) {
  float d = half_to_float(block.d[o]), m = half_to_float(block.m[o]);
  for (int k = 0; k < 32; k++) {
    float product = d * static_cast<float>(nibble(block.q, k, o) | fifth(block.h, k, o) << 4);
    out[k] = product + m;
  }
}

template <class Block>
void unpack_k(const Block& block, int o, int b, unsigned (*value)(const Block&, int, int, int), float* out) {
  uint32_t scale = (block.s[0][o] >> (4 * b) & 15) | (block.s[2][o] >> (2 * b) & 3) << 4;
  uint32_t min = (block.s[1][o] >> (4 * b) & 15) | (block.s[2][o] >> (16 + 2 * b) & 3) << 4;
  float d = half_to_float(block.d[o]) * static_cast<float>(scale);
  float m = half_to_float(block.m[o]) * static_cast<float>(min);
  for (int k = 0; k < 32; k++) {
    float product = d * static_cast<float>(value(block, o, b, k));
    out[k] = product - m;
  }
}

unsigned value_q4k(const PackedQ4_K& block, int o, int b, int k) { return nibble(block.q[b], k, o); }

unsigned value_q5k(const PackedQ5_K& block, int o, int b, int k) {
  return nibble(block.q[b], k, o) | fifth(block.h[b], k, o) << 4;
}

void unpack_block(const PackedQ4_K& block, int o, float* out) {
  for (int b = 0; b < 8; b++) unpack_k(block, o, b, value_q4k, out + 32 * b);
}

void unpack_block(const PackedQ5_K& block, int o, float* out) {
  for (int b = 0; b < 8; b++) unpack_k(block, o, b, value_q5k, out + 32 * b);
}

void unpack_block(const PackedQ6_K& block, int o, float* out) {
  for (int k = 0; k < 256; k++) {
    int b = k / 32, in = k % 32, quad = in / 4, s = k / 16;
    unsigned two = block.h[b][quad / 4][4 * o + in % 4] >> (quad % 4 * 2) & 3;
    int value = static_cast<int>(nibble(block.q[b], in, o) | two << 4) - 32;
    int scale = static_cast<int>(block.s[s / 4][o] >> (s % 4 * 8) & 255);
    scale = scale < 128 ? scale : scale - 256;
    out[k] = half_to_float(block.d[o]) * static_cast<float>(scale) * static_cast<float>(value);
  }
}

template <class Block>
void pack_blocks(Matrix& matrix, const uint8_t* source, const FormatInfo& info, int32_t first, int32_t end) {
  int32_t blocks = matrix.cols / info.block;
  int64_t row_bytes = int64_t{blocks} * info.block_bytes;
  static_assert(sizeof(Block) % 16 == 0, "a block of 16 outputs");
  for (int32_t row = first; row < end; row++) {
    auto* panel = reinterpret_cast<Block*>(matrix.data + row / kPanel * matrix.panel_bytes);
    for (int32_t b = 0; b < blocks; b++)
      pack_block(panel[b], row % kPanel, source + row * row_bytes + int64_t{b} * info.block_bytes);
  }
}

template <class Block>
void unpack_blocks(const Matrix& matrix, int32_t row, float* out, const FormatInfo& info) {
  const auto* panel = reinterpret_cast<const Block*>(matrix.panel(row / kPanel));
  for (int32_t b = 0; b < matrix.cols / info.block; b++) unpack_block(panel[b], row % kPanel, out + int64_t{b} * info.block);
}

template <class Element>
void pack_elements(Matrix& matrix, const uint8_t* source, int64_t first, int64_t end) {
  constexpr int64_t kBytes = sizeof(Element);
  for (int64_t row = first; row < end; row++)
    for (int64_t k = 0; k < matrix.cols; k++)
      std::memcpy(matrix.data + row / kPanel * matrix.panel_bytes + (k * kPanel + row % kPanel) * kBytes,
                  source + (row * matrix.cols + k) * kBytes, kBytes);
}

// Signed bytes `values` of row `row`, four at a time; weights beyond the last are 0.
void pack_bytes(Matrix& matrix, int64_t row, const uint8_t* values) {
  uint8_t* at = matrix.data + row / kPanel * matrix.panel_bytes + row % kPanel * 4;
  for (int64_t k = 0; k < matrix.cols; k += 4, at += 64) {
    uint32_t four = 0;
    std::memcpy(&four, values + k, static_cast<size_t>(std::min<int64_t>(4, matrix.cols - k)));
    four ^= 0x80808080u;
    std::memcpy(at, &four, 4);
  }
}

// All weights 0, those of padding too.
void clear_bytes(Matrix& matrix, int64_t first_panel, int64_t end_panel) {
  std::memset(matrix.data + first_panel * matrix.panel_bytes, 128, static_cast<size_t>((end_panel - first_panel) * matrix.panel_bytes));
}

void element_row(int32_t format, const uint8_t* source, int64_t row, int64_t cols, float* out) {
  if (format == F32) {
    std::memcpy(out, source + row * cols * 4, static_cast<size_t>(cols) * 4);
    return;
  }
  for (int64_t k = 0; k < cols; k++) {
    uint16_t bits = read_u16(source + (row * cols + k) * 2);
    out[k] = format == F16 ? half_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
  }
}

}  // namespace

const FormatInfo* format_info(int32_t format) {
  switch (format) {
    case F32: return &kF32;
    case F16: return &kF16;
    case BF16: return &kBF16;
    case INT8: return &kINT8;
    case Q8_0: return &kQ8_0;
    case Q4_0: return &kQ4_0;
    case Q4_1: return &kQ4_1;
    case Q5_0: return &kQ5_0;
    case Q5_1: return &kQ5_1;
    case Q4_K: return &kQ4_K;
    case Q5_K: return &kQ5_K;
    case Q6_K: return &kQ6_K;
    default: return nullptr;
  }
}

int64_t source_bytes(int32_t format, int64_t rows, int64_t cols) {
  const FormatInfo* info = format_info(format);
  return format == INT8 ? rows * cols : rows * (cols / info->block) * info->block_bytes;
}

void pack(Matrix& matrix, const uint8_t* source, int32_t first_panel, int32_t end_panel) {
  const FormatInfo& info = *format_info(matrix.format);
  int32_t first = first_panel * kPanel, end = std::min(matrix.rows, end_panel * kPanel);
  switch (matrix.format) {
    case F32: return pack_elements<uint32_t>(matrix, source, first, end);
    case F16:
    case BF16: return pack_elements<uint16_t>(matrix, source, first, end);
    case INT8:
      clear_bytes(matrix, first_panel, end_panel);
      for (int64_t row = first; row < end; row++) pack_bytes(matrix, row, source + row * matrix.cols);
      return;
    case Q8_0: return pack_blocks<PackedQ8_0>(matrix, source, info, first, end);
    case Q4_0: return pack_blocks<PackedQ4_0>(matrix, source, info, first, end);
    case Q4_1: return pack_blocks<PackedQ4_1>(matrix, source, info, first, end);
    case Q5_0: return pack_blocks<PackedQ5_0>(matrix, source, info, first, end);
    case Q5_1: return pack_blocks<PackedQ5_1>(matrix, source, info, first, end);
    case Q4_K: return pack_blocks<PackedQ4_K>(matrix, source, info, first, end);
    case Q5_K: return pack_blocks<PackedQ5_K>(matrix, source, info, first, end);
    case Q6_K: return pack_blocks<PackedQ6_K>(matrix, source, info, first, end);
  }
}

void round_and_pack(Matrix& matrix, int32_t format, const uint8_t* source, int32_t first_panel, int32_t end_panel) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
  auto cols = static_cast<size_t>(matrix.cols);
  std::vector<float> values(cols);
  std::vector<uint8_t> bytes(cols);
  clear_bytes(matrix, first_panel, end_panel);
  for (int32_t row = first_panel * kPanel; row < std::min(matrix.rows, end_panel * kPanel); row++) {
    element_row(format, source, row, matrix.cols, values.data());
    float most = 1.17549435e-38f;
    for (float x : values) {
      float size = x < 0 ? -x : x;
      most = size > most ? size : most;
    }
    float scale = most / 127.0f;
    for (size_t k = 0; k < cols; k++)
      bytes[k] = static_cast<uint8_t>(float_bits(values[k] / scale + kMagic) - float_bits(kMagic));
    matrix.scale[row] = scale;
    pack_bytes(matrix, row, bytes.data());
  }
}

void unpack_row(const Matrix& matrix, int32_t row, float* out) {
  const FormatInfo& info = *format_info(matrix.format);
  const uint8_t* panel = matrix.panel(row / kPanel);
  int64_t o = row % kPanel;
  switch (matrix.format) {
    case F32:
      for (int64_t k = 0; k < matrix.cols; k++) std::memcpy(out + k, panel + (k * kPanel + o) * 4, 4);
      return;
    case F16:
      for (int64_t k = 0; k < matrix.cols; k++) out[k] = half_to_float(read_u16(panel + (k * kPanel + o) * 2));
      return;
    case BF16:
      for (int64_t k = 0; k < matrix.cols; k++)
        out[k] = bits_float(static_cast<uint32_t>(read_u16(panel + (k * kPanel + o) * 2)) << 16);
      return;
    case INT8:
      for (int64_t k = 0; k < matrix.cols; k++)
        out[k] = static_cast<float>(static_cast<int>(panel[k / 4 * 64 + o * 4 + k % 4]) - 128) * matrix.scale[row];
      return;
    case Q8_0: return unpack_blocks<PackedQ8_0>(matrix, row, out, info);
    case Q4_0: return unpack_blocks<PackedQ4_0>(matrix, row, out, info);
    case Q4_1: return unpack_blocks<PackedQ4_1>(matrix, row, out, info);
    case Q5_0: return unpack_blocks<PackedQ5_0>(matrix, row, out, info);
    case Q5_1: return unpack_blocks<PackedQ5_1>(matrix, row, out, info);
    case Q4_K: return unpack_blocks<PackedQ4_K>(matrix, row, out, info);
    case Q5_K: return unpack_blocks<PackedQ5_K>(matrix, row, out, info);
    case Q6_K: return unpack_blocks<PackedQ6_K>(matrix, row, out, info);
  }
}

float half_to_float(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | rest << 13);  // inf, nan
  if (rest >= 0x0400) return bits_float(sign | ((rest << 13) + (112u << 23)));
  float tiny = static_cast<float>(rest) * 5.9604644775390625e-08f;  // subnormal: exact
  return bits_float(sign | float_bits(tiny));
}

}  // namespace wedlm
