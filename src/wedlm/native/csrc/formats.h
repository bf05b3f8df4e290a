// SPDX-License-Identifier: Apache-2.0
// Weight formats: how a matrix of N outputs and K inputs lies in memory, and how it gets there.
//
// A packed matrix is a row of panels, one for every 16 outputs (the last padded with zeros). Within a panel the 16
// outputs lie side by side, so that one vector lane is one output on every instruction set. A packed matrix takes as
// many bytes as the original.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wedlm {

constexpr int kPanel = 16;  // outputs in a panel

// GGUF's own numbers; INT8 (one scale for each output, inputs padded with zeros to blocks of 32) is ours.
enum Format : int32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  BF16 = 30,
  INT8 = 100,
};

// What a product of this format reads of its input.
enum class InputKind { kFloat, kInt8Blocks };

struct FormatInfo {
  const char* name;
  int32_t block;        // inputs in a block of the source, and of the packed form
  int32_t block_bytes;  // bytes of a block of one output
  InputKind input;
};

// Null for a format that is not supported.
const FormatInfo* format_info(int32_t format);

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A packed matrix.
struct Matrix {
  Format format = F32;
  int32_t rows = 0, cols = 0;       // N outputs, K inputs
  int64_t panel_bytes = 0;
  uint8_t* data = nullptr;          // panels, aligned to 64 bytes
  float* scale = nullptr;           // INT8: of each output, padded to panels
  int32_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t bytes() const { return panels() * panel_bytes; }
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes; }
};

// Bytes of `rows` x `cols` in source form, row after row.
int64_t source_bytes(int32_t format, int64_t rows, int64_t cols);

// Fills panels `first` to `end` of `matrix.data` (zeroed, bytes() of it) from the source's rows. INT8's source is one signed
// byte a weight, in -127..127.
void pack(Matrix& matrix, const uint8_t* source, int32_t first, int32_t end);

// The same for INT8 from rows of F32, F16 or BF16, `format`: each row's scale is its largest absolute value / 127.
void round_and_pack(Matrix& matrix, int32_t format, const uint8_t* source, int32_t first, int32_t end);

// Row `row` as float32 [cols]; equal to the dequantised source, operation by operation of the gguf package.
void unpack_row(const Matrix& matrix, int32_t row, float* out);

float half_to_float(uint16_t bits);

// Packed blocks of 16 outputs. Quants of a sub-block of 32 inputs are 8 "quads" of 64 bytes: byte 4 o + i of quad j is
// input 4 j + i of output o. Four-bit formats hold quad j in the low nibbles of q[j] and quad j + 4 in its high ones;
// bit j of h is the fifth bit of quad j; Q6_K has two bits of quad j in bits 2 (j % 4) of h[j / 4].
struct PackedINT8 {
  uint8_t q[8][64];  // value + 128
};
struct PackedQ8_0 {
  uint16_t d[16];
  uint8_t q[8][64];  // value + 128
};
struct PackedQ4_0 {
  uint16_t d[16];
  uint8_t q[4][64];
};
struct PackedQ4_1 {
  uint16_t d[16], m[16];
  uint8_t q[4][64];
};
struct PackedQ5_0 {
  uint16_t d[16];
  uint8_t h[64];
  uint8_t q[4][64];
};
struct PackedQ5_1 {
  uint16_t d[16], m[16];
  uint8_t h[64];
  uint8_t q[4][64];
};
// 8 scales and 8 minima of 6 bits: s[0] has the low four bits of the scales, s[1] of the minima, s[2] the high two bits
// of the scales in its lower half and of the minima in its upper one.
struct PackedQ4_K {
  uint16_t d[16], m[16];
  uint32_t s[3][16];
  uint8_t q[8][4][64];
};
struct PackedQ5_K {
  uint16_t d[16], m[16];
  uint32_t s[3][16];
  uint8_t h[8][64];
  uint8_t q[8][4][64];
};
struct PackedQ6_K {
  uint16_t d[16];
  uint32_t s[4][16];  // 16 signed bytes: the scale of each 16 inputs
  uint8_t h[8][2][64];
  uint8_t q[8][4][64];
};

}  // namespace wedlm
