// SPDX-License-Identifier: Apache-2.0
// What an instruction set supplies. Every set gives the same bits: see docs/native.md.
#pragma once
#include <cstdint>

#include "formats.h"

namespace wedlm {

// Rows of activations in the forms that products read: floats, rows `cols` rounded up to 4 apart; or eight bits.
struct Input {
  const float* values = nullptr;
  // Blocks of 32, the last padded with zeros: value = scale * q; that scale times the sum of its q; -128 times the sum of
  // its q, and of each 16 q.
  const int8_t* block_q = nullptr;
  const float* block_scale = nullptr;
  const float* block_scaled_sum = nullptr;
  const int32_t *minus32 = nullptr, *minus16 = nullptr;

  // The same rows from row `first` on.
  Input from(int64_t first, int64_t cols) const {
    Input rest = *this;
    int64_t blocks = (cols + 31) / 32;
    if (values) rest.values += first * round_up(cols, 4);
    if (block_q)
      rest.block_q += first * 32 * blocks, rest.block_scale += first * blocks, rest.block_scaled_sum += first * blocks,
          rest.minus32 += first * blocks, rest.minus16 += first * 2 * blocks;
    return rest;
  }
};

enum class CacheType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

inline int64_t element_bytes(CacheType type) { return type == CacheType::kFloat32 ? 4 : type == CacheType::kBFloat16 ? 2 : 1; }

// Some rows of one sequence and one key head. Key j lies in slot pages[j / page_size] * page_size + j % page_size.
struct AttentionWork {
  const float* q;         // row i, query head h of this key head: q + i * q_stride + h * head_dim
  float* out;             // likewise
  int64_t q_stride, out_stride;
  int32_t num_rows, share, head_dim;  // share: query heads of this key head
  CacheType type;
  const void *keys, *values;  // of this layer and head, slot 0
  int64_t slot_stride;        // elements
  const float *key_scale, *value_scale;  // likewise, of keys and values in eight bits
  int64_t scale_stride;
  const int32_t* pages;
  int32_t page_size;
  int64_t cached;        // keys that all rows see
  int64_t first_row;     // index of row 0 among the sequence's new rows
  const int64_t *shared, *own_start;  // of the rows; null: plain causal order
  float* scratch;        // attention_scratch floats
};

constexpr int kInputBlock = 32;        // values that share a scale
constexpr int kKeyTile = 64;           // keys of a step of the softmax that runs along; tiles begin at key 0
constexpr int kMaxQueries = 48;        // rows times share that one call takes, or one row's heads where those are more

inline int64_t attention_scratch(int64_t queries, int64_t head_dim) {
  int64_t wide = round_up(head_dim, 16);
  return wide * kKeyTile + queries * (kKeyTile + wide + head_dim + 1 + 16);
}

struct Kernels {
  const char* name;
  // y = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // One row to eight bits in blocks of 32.
  void (*quantize_blocks)(const float* x, int64_t n, int8_t* q, float* scale, float* scaled_sum, int32_t* minus32, int32_t* minus16);
  // One head to eight bits with one scale.
  void (*quantize_head)(const float* x, int64_t n, int8_t* q, float* scale);
  // y[row][16 (panel - first_panel) + o], all 16 outputs of each panel; `adds`: to what is there.
  void (*product)(const Matrix& matrix, const Input& x, int32_t rows, int32_t first_panel, int32_t end_panel, float* y, int64_t stride, bool adds);
  // gate = silu(gate) * up.
  void (*silu_mul)(float* gate, const float* up, int64_t n);
  // y += x.
  void (*add)(float* y, const float* x, int64_t n);
  // Turns one head; cos and sin have half its dimension.
  void (*rotate)(float* head, const float* cos, const float* sin, int64_t dim);
  void (*attention)(const AttentionWork& work);
  void (*to_bfloat)(const float* x, uint16_t* y, int64_t n);
  // Largest of the logits, sum of exp(l - largest), and sum of exp(l - largest) * (l - largest).
  void (*logit_sums)(const float* logits, int64_t n, float* largest, float* sum, float* weighted);
  // And the first place where it is; some place if it is not a number.
  float (*largest)(const float* x, int64_t n, int64_t* where);
  float (*exp)(float x);
};

}  // namespace wedlm
