// SPDX-License-Identifier: Apache-2.0
// Weights: what belongs where, and packing.
#include "model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace wedlm {

namespace {

constexpr int32_t kMostFactors = 1 << 16;
constexpr int64_t kSmallBytes = 1 << 16;  // packed sooner than handed over to other threads

std::string number(int64_t n) { return std::to_string(n); }

}  // namespace

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) munmap(chunk.data, static_cast<size_t>(chunk.size));
}

uint8_t* Arena::take(int64_t bytes) {
  constexpr int64_t kLargePage = int64_t{2} << 20, kChunk = int64_t{64} << 20;
  bytes = round_up(bytes, 64);
  if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) {
    int64_t size = round_up(std::max(bytes, kChunk), kLargePage) + kLargePage;
    void* data = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    auto start = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
#ifdef MADV_HUGEPAGE
    madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // refused where there are none: nothing is lost
#endif
    chunks_.push_back({static_cast<uint8_t*>(data), size, round_up(start, kLargePage) - start});
  }
  Chunk& chunk = chunks_.back();
  uint8_t* taken = chunk.data + chunk.used;
  chunk.used += bytes;
  return taken;
}

void Inputs::reserve(int64_t rows, int64_t cols, bool floats, bool blocks) {
  cols_ = cols;
  floats_ = floats;
  blocks_ = blocks;
  int64_t num_blocks = (cols + 31) / 32;
  if (floats) values_.reserve(rows * round_up(cols, 4));
  if (blocks) {
    block_q_.reserve(rows * 32 * num_blocks);
    block_scale_.reserve(rows * num_blocks);
    block_scaled_sum_.reserve(rows * num_blocks);
    minus32_.reserve(rows * num_blocks);
    minus16_.reserve(rows * 2 * num_blocks);
  }
}

void Inputs::put(const Kernels& kernels, int64_t row, int64_t first, int64_t count, const float* x) {
  int64_t blocks = (cols_ + 31) / 32, at = row * blocks + first / 32;
  if (floats_) std::memcpy(values_.data() + row * round_up(cols_, 4) + first, x, static_cast<size_t>(count) * 4);
  if (blocks_)
    kernels.quantize_blocks(x, count, block_q_.data() + 32 * at, block_scale_.data() + at, block_scaled_sum_.data() + at,
                            minus32_.data() + at, minus16_.data() + 2 * at);
}

Input Inputs::view() const {
  Input input;
  if (floats_) input.values = values_.data();
  if (blocks_)
    input.block_q = block_q_.data(), input.block_scale = block_scale_.data(),
    input.block_scaled_sum = block_scaled_sum_.data(), input.minus32 = minus32_.data(),
    input.minus16 = minus16_.data();
  return input;
}

Model::Model(const WedlmShape& shape, const Kernels& kernels, int threads)
    : shape_(shape),
      kernels_(kernels),
      pool_(std::make_unique<Pool>(threads)),
      threads_(threads),
      process_(getpid()),
      layers_(static_cast<size_t>(shape.num_layers)),
      hidden_(round_up(shape.hidden_size, kPanel)),
      q_width_(round_up(int64_t{shape.num_heads} * shape.head_dim, kPanel)),
      kv_width_(round_up(int64_t{shape.num_kv_heads} * shape.head_dim, kPanel)),
      inner_(round_up(shape.intermediate_size, kPanel)),
      scratch_(static_cast<size_t>(threads)) {
  size_t number = 0;
  for (Layer& layer : layers_)
    for (Projection* one : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) one->number = number++;
}

Projection& Model::projection_of(int32_t layer, int32_t which, int32_t& rows, int32_t& cols) {
  int32_t hidden = shape_.hidden_size, inner = shape_.intermediate_size;
  int32_t q = shape_.num_heads * shape_.head_dim, kv = shape_.num_kv_heads * shape_.head_dim;
  if (layer >= 0 && layer < shape_.num_layers) {
    Layer& own = layers_[static_cast<size_t>(layer)];
    switch (which) {
      case WEDLM_Q: case WEDLM_Q_BIAS: rows = q, cols = hidden; return own.q;
      case WEDLM_K: case WEDLM_K_BIAS: rows = kv, cols = hidden; return own.k;
      case WEDLM_V: case WEDLM_V_BIAS: rows = kv, cols = hidden; return own.v;
      case WEDLM_O: case WEDLM_O_BIAS: rows = hidden, cols = q; return own.o;
      case WEDLM_GATE: case WEDLM_GATE_BIAS: rows = inner, cols = hidden; return own.gate;
      case WEDLM_UP: case WEDLM_UP_BIAS: rows = inner, cols = hidden; return own.up;
      case WEDLM_DOWN: case WEDLM_DOWN_BIAS: rows = hidden, cols = inner; return own.down;
      default: break;
    }
  }
  throw Error("there is no weight " + number(which) + " in layer " + number(layer));
}

Weights& Model::matrix_of(int32_t layer, int32_t which, int32_t& rows, int32_t& cols) {
  rows = shape_.vocab_size;
  cols = shape_.hidden_size;
  if (layer == -1 && which == WEDLM_EMBEDDING) return embedding_;
  if (layer == -1 && which == WEDLM_HEAD) return head_;
  return projection_of(layer, which, rows, cols);
}

Buffer<float>& Model::vector_of(int32_t layer, int32_t which, int64_t& size, bool*& present) {
  static bool always;
  present = &always;
  size = shape_.hidden_size;
  if (layer == -1 && which == WEDLM_FINAL_NORM) return final_norm_;
  if (layer >= 0 && layer < shape_.num_layers) {
    Layer& own = layers_[static_cast<size_t>(layer)];
    if (which == WEDLM_INPUT_NORM) return own.input_norm;
    if (which == WEDLM_POST_NORM) return own.post_norm;
    if (which == WEDLM_Q_NORM || which == WEDLM_K_NORM) {
      size = shape_.head_dim;
      present = which == WEDLM_Q_NORM ? &own.has_q_norm : &own.has_k_norm;
      return which == WEDLM_Q_NORM ? own.q_norm : own.k_norm;
    }
    if (which >= WEDLM_Q_BIAS && which <= WEDLM_DOWN_BIAS) {
      int32_t rows, cols;
      Weights& weights = matrix_of(layer, which, rows, cols);
      size = rows;
      present = &weights.has_bias;
      return weights.bias;
    }
  }
  throw Error("there is no vector " + number(which) + " in layer " + number(layer));
}

void Model::set_matrix(int32_t layer, int32_t which, int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale) {
  int32_t expected_rows, expected_cols;
  Weights& weights = matrix_of(layer, which, expected_rows, expected_cols);
  if (rows != expected_rows || cols != expected_cols)
    throw Error("a matrix is " + number(rows) + " x " + number(cols) + "; expected " + number(expected_rows) + " x " + number(expected_cols));
  fill(weights, arena_, format, rows, cols, data, scale);
}

Factors& Model::factors_at(int32_t number) {
  if (number < 0 || number > kMostFactors) throw Error("factors have the number " + std::to_string(number) + "; expected 0 to " + std::to_string(kMostFactors));
  auto at = static_cast<size_t>(number);
  if (factors_.size() <= at) factors_.resize(at + 1);
  if (!factors_[at]) {
    factors_[at] = std::make_unique<Factors>();
    factors_[at]->pairs.resize(layers_.size() * kProjections);
  }
  return *factors_[at];
}

void Model::set_factors(int32_t factors, int32_t layer, int32_t which, int32_t format, int32_t rank, const void* a, const float* a_scale,
                        const void* b, const float* b_scale) {
  int32_t rows, cols;
  const Projection& projection = projection_of(layer, which, rows, cols);
  if (rank < 1) throw Error("the rank is " + number(rank) + "; expected at least 1");
  Factors& own = factors_at(factors);
  Factors::Pair& pair = own.pairs[projection.number];
  fill(pair.a, own.arena, format, rank, cols, a, a_scale);
  fill(pair.b, own.arena, format, rows, rank, b, b_scale);
  most_rank_ = std::max(most_rank_, rank);
  bool floats = format_info(format)->input == InputKind::kFloat;
  reads_floats_ = reads_floats_ || floats;
  reads_blocks_ = reads_blocks_ || !floats;
}

void Model::set_start(int32_t factors, int64_t size, const float* data) {
  if (size != shape_.hidden_size) throw Error("a vector has " + number(size) + " entries; expected " + number(shape_.hidden_size));
  Factors& own = factors_at(factors);
  own.start.reserve(size);
  std::memcpy(own.start.data(), data, static_cast<size_t>(size) * 4);
  own.has_start = true;
}

void Model::drop_factors(int32_t factors) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (factors >= 0 && static_cast<size_t>(factors) < factors_.size()) factors_[static_cast<size_t>(factors)].reset();
}

void Model::fill(Weights& weights, Arena& arena, int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale) {
  const FormatInfo* info = format_info(format);
  if (!info) throw Error("weight format " + number(format) + " is not supported");
  if (format != INT8 && cols % info->block)
    throw Error("a row has " + number(cols) + " weights; expected a multiple of " + number(info->block) + " for " + info->name);
  Matrix& matrix = weights.matrix;
  matrix.format = static_cast<Format>(format);
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.panel_bytes = source_bytes(format, kPanel, format == INT8 ? round_up(cols, 32) : cols);
  matrix.data = arena.take(matrix.bytes());
  if (format == INT8) {
    weights.scale.reserve(int64_t{matrix.panels()} * kPanel);
    matrix.scale = weights.scale.data();
    std::memcpy(matrix.scale, scale, static_cast<size_t>(rows) * 4);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  restart_after_fork();
  int32_t panels = matrix.panels(), each = matrix.bytes() < kSmallBytes ? panels : panels_per_piece(panels, threads_);
  pool_->run((panels + each - 1) / each, [&](int32_t i, int) {
    pack(matrix, static_cast<const uint8_t*>(data), i * each, std::min((i + 1) * each, panels));
  });
}

void Model::set_vector(int32_t layer, int32_t which, int64_t size, const float* data) {
  int64_t expected;
  bool* present;
  Buffer<float>& vector = vector_of(layer, which, expected, present);
  if (size != expected) throw Error("a vector has " + number(size) + " entries; expected " + number(expected));
  vector.reserve(round_up(size, kPanel));
  std::memcpy(vector.data(), data, static_cast<size_t>(size) * 4);
  *present = true;
}

int64_t Model::bytes() const {
  int64_t total = final_norm_.bytes();
  auto add = [&](const Weights& weights) { total += weights.matrix.bytes() + weights.scale.bytes() + weights.bias.bytes(); };
  add(embedding_);
  add(head_);
  for (const Layer& layer : layers_) {
    for (const Projection* one : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      add(*one);
    total += layer.input_norm.bytes() + layer.post_norm.bytes() + layer.q_norm.bytes() + layer.k_norm.bytes();
  }
  for (const auto& factors : factors_)
    if (factors)
      for (const Factors::Pair& pair : factors->pairs) add(pair.a), add(pair.b);
  return total;
}

void Model::check_complete() {
  if (complete_) return;
  bool whole = embedding_.matrix.data && head().matrix.data && final_norm_.data();
  for (const Layer& layer : layers_) {
    for (const Projection* one : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      whole = whole && one->matrix.data;
    whole = whole && layer.input_norm.data() && layer.post_norm.data() && layer.has_q_norm == layer.has_k_norm;
  }
  if (!whole) throw Error("the model lacks weights");
  complete_ = true;
}

}  // namespace wedlm
