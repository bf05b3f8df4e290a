// SPDX-License-Identifier: Apache-2.0
// A decoder's weights and the buffers of its forward.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "capi.h"
#include "formats.h"
#include "kernels.h"
#include "pool.h"

namespace wedlm {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory aligned to cache lines, zeroed when it grows.
template <class T>
class Buffer {
 public:
  T* data() const { return data_.get(); }
  void reserve(int64_t size) {
    if (size <= size_) return;
    auto bytes = static_cast<size_t>(round_up(size * static_cast<int64_t>(sizeof(T)), 64));
    void* fresh = nullptr;
    if (posix_memalign(&fresh, 64, bytes)) throw std::bad_alloc();
    __builtin_memset(fresh, 0, bytes);
    data_.reset(static_cast<T*>(fresh));
    size_ = size;
  }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// Memory of many matrices, one after the other, on large pages where the system has them: small ones cost a third of the
// speed at which a step of one row reads its weights. Zeroed; untouched memory takes no room.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  uint8_t* take(int64_t bytes);

 private:
  struct Chunk {
    uint8_t* data;
    int64_t size, used;
  };
  std::vector<Chunk> chunks_;
};

struct Weights {  // a matrix and its bias (padded to panels; empty: none)
  Matrix matrix;
  Buffer<float> scale, bias;
  bool has_bias = false;
};

struct Projection : Weights {
  size_t number = 0;  // of all layers' projections
};

constexpr int32_t kProjections = 7;  // of a layer

struct Layer {
  Projection q, k, v, o, gate, up, down;
  Buffer<float> input_norm, post_norm, q_norm, k_norm;
  bool has_q_norm = false, has_k_norm = false;
};

// Rows in the forms that the next products read.
class Inputs {
 public:
  void reserve(int64_t rows, int64_t cols, bool floats, bool blocks);
  // `count` values of row `row` from `first` on, a multiple of kInputBlock.
  void put(const Kernels& kernels, int64_t row, int64_t first, int64_t count, const float* x);
  void put(const Kernels& kernels, int64_t row, const float* x) { put(kernels, row, 0, cols_, x); }
  Input view() const;

 private:
  int64_t cols_ = 0;
  bool floats_ = false, blocks_ = false;
  Buffer<float> values_, block_scale_, block_scaled_sum_;
  Buffer<int8_t> block_q_;
  Buffer<int32_t> minus32_, minus16_;
};

// What some rows get beside the weights: b a x is added to their outputs of a projection. Memory of its own, which goes
// with it.
struct Factors {
  struct Pair {
    Weights a, b;
  };
  Arena arena;
  std::vector<Pair> pairs;  // by the projection's number; without data: nothing is added there
  Buffer<float> start;      // what the rows start from, if it is set
  bool has_start = false;
  Inputs low[3];  // a x of the rows, of the projections that run together
};

// Panels of a piece of work, a multiple of `step`; several for each thread, so that one that is late delays little.
inline int32_t panels_per_piece(int32_t panels, int threads, int32_t step = 1) {
  constexpr int32_t kPiecesPerThread = 4;
  int32_t each = panels / (threads * kPiecesPerThread) / step * step;
  return each < step ? step : each;
}

class Model {
 public:
  Model(const WedlmShape& shape, const Kernels& kernels, int threads);

  void set_matrix(int32_t layer, int32_t which, int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale);
  void set_factors(int32_t factors, int32_t layer, int32_t which, int32_t format, int32_t rank, const void* a, const float* a_scale,
                   const void* b, const float* b_scale);
  void set_start(int32_t factors, int64_t size, const float* data);
  void drop_factors(int32_t factors);
  void set_vector(int32_t layer, int32_t which, int64_t size, const float* data);
  void tie() { tied_ = true; }
  int64_t bytes() const;
  void forward(const WedlmStep& step);
  const Kernels& kernels() const { return kernels_; }

 private:
  struct Rows;  // some rows of a step that run together

  Projection& projection_of(int32_t layer, int32_t which, int32_t& rows, int32_t& cols);
  Weights& matrix_of(int32_t layer, int32_t which, int32_t& rows, int32_t& cols);
  void fill(Weights& weights, Arena& arena, int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale);
  Factors& factors_at(int32_t number);
  Factors* factors_of(const WedlmStep& step, int64_t row) const;
  Buffer<float>& vector_of(int32_t layer, int32_t which, int64_t& size, bool*& present);
  const Weights& head() const { return tied_ ? embedding_ : head_; }
  void check(const WedlmStep& step) const;
  void check_complete();
  void restart_after_fork();
  void reserve(int64_t rows);
  void run_rows(const WedlmStep& step, const Rows& rows);
  void products(std::initializer_list<const Projection*> projections, std::initializer_list<float*> outputs, const Input& x, const Rows& rows);
  void add_product(const Projection& projection, const Input& x, const Rows& rows);
  void gated_product(const Layer& layer, const Input& x, const Rows& rows);
  void lower(std::initializer_list<const Projection*> projections, const Input& x, const Rows& rows, int64_t begin, int64_t end, float* scratch);
  void add_factors(const Projection& projection, int32_t place, const Rows& rows, int32_t begin, int32_t end, float* y, int64_t stride) const;
  void write_cache(const WedlmStep& step, const Rows& rows, const Layer& layer, int32_t index, int64_t row);
  void attend(const WedlmStep& step, const Rows& rows, int32_t index);
  void logits(const WedlmStep& step, const std::vector<int64_t>& wanted, const std::vector<int64_t>& at);

  const WedlmShape shape_;
  const Kernels& kernels_;
  std::unique_ptr<Pool> pool_;
  int threads_;
  long process_;
  std::mutex mutex_;
  Arena arena_;
  std::vector<Layer> layers_;
  Weights embedding_, head_;
  Buffer<float> final_norm_;
  std::vector<std::unique_ptr<Factors>> factors_;  // by number; null: none
  bool reads_floats_ = false, reads_blocks_ = false;  // what some factors' a has read
  bool tied_ = false, complete_ = false;
  int32_t most_rank_ = 0;  // of all factors that there were

  // Rows of the step, and what each thread works in.
  int64_t hidden_, q_width_, kv_width_, inner_;  // padded to panels
  Buffer<float> x_, q_, k_, v_, attended_, gated_, normed_;
  Inputs hidden_inputs_, attended_inputs_, inner_inputs_;
  std::vector<Buffer<float>> scratch_;
};

}  // namespace wedlm
