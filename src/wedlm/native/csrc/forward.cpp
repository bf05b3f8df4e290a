// SPDX-License-Identifier: Apache-2.0
// One forward: all layers for some rows, then the head for the rows asked for.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "logarithm.h"
#include "model.h"
#include "parts.h"

namespace wedlm {

namespace {

constexpr int64_t kRowsAtOnce = 256;     // rows of a long prompt run in turns of this many; it bounds the buffers
constexpr int32_t kHeadOutputs = 1024;   // logits of one piece; the softmax's sums are taken piece by piece, in order
constexpr int32_t kPiecesPerThread = 4;  // of rows
constexpr int64_t kMaskedRows = 4;       // at least so many rows of a piece share the reading of an adapter's matrices

std::string number(int64_t n) { return std::to_string(n); }

}  // namespace

struct Model::Rows {
  struct Part {  // consecutive rows of one sequence
    int64_t sequence, first, first_row, count;  // first: index in the step; first_row: among the sequence's new rows
  };
  int64_t begin = 0, count = 0;
  std::vector<Part> parts;
  std::vector<int64_t> slot;  // of each row
  struct Run {  // consecutive rows with the same factors
    int64_t begin, end;
    Factors* factors;
  };
  std::vector<Run> runs;  // of those that have some
};

// What a row of the step gets beside the weights; null: nothing.
Factors* Model::factors_of(const WedlmStep& step, int64_t row) const {
  if (!step.factors) return nullptr;
  auto at = [&](int32_t number) { return static_cast<size_t>(number) < factors_.size() ? factors_[static_cast<size_t>(number)].get() : nullptr; };
  int32_t number = step.factors[row];
  Factors* own = at(number);
  return own || number % 2 == 0 ? own : at(number - 1);
}

void Model::check(const WedlmStep& step) const {
  int64_t rows = 0;
  for (int64_t s = 0; s < step.num_sequences; s++) {
    int64_t start = step.starts[s], count = step.counts[s], pages = step.page_offsets[s + 1] - step.page_offsets[s];
    if (start < 0 || count < 0) throw Error("a sequence starts at " + number(start) + " with " + number(count) + " rows; expected no negative number");
    if (start + count > pages * step.page_size)
      throw Error("a sequence has " + number(pages) + " pages; expected enough for " + number(start + count) + " keys");
    for (int64_t p = step.page_offsets[s]; p < step.page_offsets[s + 1]; p++)
      if (step.pages[p] < 0 || (int64_t{step.pages[p]} + 1) * step.page_size > step.num_slots)
        throw Error("a page is " + number(step.pages[p]) + "; expected one of the cache's " + number(step.num_slots / step.page_size));
    rows += count;
  }
  if (rows != step.num_rows) throw Error("there are " + number(step.num_rows) + " tokens; expected " + number(rows) + ", the sequences' rows");
  for (int64_t i = 0; i < rows; i++) {
    if (step.tokens[i] < 0 || step.tokens[i] >= shape_.vocab_size)
      throw Error("a token is " + number(step.tokens[i]) + "; expected 0 to " + number(shape_.vocab_size - 1));
    if (step.factors && step.factors[i] < 0) throw Error("a row's factors are " + number(step.factors[i]) + "; expected no negative number");
    if (step.positions[i] < 0 || step.positions[i] >= step.num_positions)
      throw Error("a position is " + number(step.positions[i]) + "; expected 0 to " + number(step.num_positions - 1));
  }
  for (int64_t i = 0; i < step.num_logits; i++) {
    if (step.logits_rows[i] < 0 || step.logits_rows[i] >= rows)
      throw Error("a row whose logits are asked for is " + number(step.logits_rows[i]) + "; expected 0 to " + number(rows - 1));
    if (!step.token) continue;
    for (int64_t b = step.banned_offsets[i]; b < step.banned_offsets[i + 1]; b++)
      if (step.banned[b] < 0 || step.banned[b] >= shape_.vocab_size)
        throw Error("a banned token is " + number(step.banned[b]) + "; expected 0 to " + number(shape_.vocab_size - 1));
  }
}

void Model::restart_after_fork() {
  if (process_ == getpid()) return;
  process_ = getpid();
  pool_.release();  // its threads stayed in the parent, and cannot be joined here
  pool_ = std::make_unique<Pool>(threads_);
}

void Model::reserve(int64_t rows) {
  auto uses = [&](std::initializer_list<const Projection Layer::*> members, InputKind kind) {
    auto reads = [&](const Weights& weights) { return format_info(weights.matrix.format)->input == kind; };
    return std::any_of(layers_.begin(), layers_.end(), [&](const Layer& layer) {
      return std::any_of(members.begin(), members.end(), [&](auto member) { return reads(layer.*member); });
    });
  };
  auto inputs = [&](Inputs& to, int64_t cols, std::initializer_list<const Projection Layer::*> members, const Weights* also) {
    auto kind = [&](InputKind k) { return uses(members, k) || (also && format_info(also->matrix.format)->input == k); };
    to.reserve(rows, cols, reads_floats_ || kind(InputKind::kFloat), reads_blocks_ || kind(InputKind::kInt8Blocks));
  };
  x_.reserve(rows * hidden_);
  normed_.reserve(rows * hidden_);
  q_.reserve(rows * q_width_);
  k_.reserve(rows * kv_width_);
  v_.reserve(rows * kv_width_);
  attended_.reserve(rows * q_width_);
  gated_.reserve(rows * inner_);
  inputs(hidden_inputs_, shape_.hidden_size, {&Layer::q, &Layer::k, &Layer::v, &Layer::gate, &Layer::up}, &head());
  inputs(attended_inputs_, int64_t{shape_.num_heads} * shape_.head_dim, {&Layer::o}, nullptr);
  inputs(inner_inputs_, shape_.intermediate_size, {&Layer::down}, nullptr);
  int64_t widest = std::max({hidden_, q_width_, inner_});
  int64_t panels = round_up(panels_per_piece(static_cast<int32_t>(widest / kPanel), threads_), kInputBlock / kPanel);
  int64_t queries = std::max<int64_t>(kMaxQueries, shape_.num_heads / shape_.num_kv_heads);
  for (auto& scratch : scratch_)
    scratch.reserve(std::max({rows * kHeadOutputs, rows * panels * kPanel, rows * round_up(most_rank_, kPanel), attention_scratch(queries, shape_.head_dim)}));
}

// A x of the rows with factors among those from `begin` to `end`, for the projections that read x.
void Model::lower(std::initializer_list<const Projection*> projections, const Input& x, const Rows& rows, int64_t begin, int64_t end,
                  float* scratch) {
  for (const Rows::Run& run : rows.runs) {
    int64_t first = std::max(begin, run.begin), count = std::min(end, run.end) - first;
    if (count <= 0) continue;
    Inputs* low = run.factors->low;
    for (const Projection* projection : projections) {
      Inputs& to = *low++;
      const Matrix& a = run.factors->pairs[projection->number].a.matrix;
      if (!a.data) continue;
      int64_t width = int64_t{a.panels()} * kPanel;
      kernels_.product(a, x.from(first, a.cols), static_cast<int32_t>(count), 0, a.panels(), scratch, width, false);
      for (int64_t i = 0; i < count; i++) to.put(kernels_, first + i, scratch + i * width);
    }
  }
}

// Adds B A x to the outputs, of panels `begin` to `end`, of the rows with factors; y is row 0's first. `place`: of the
// projection among those that run together.
void Model::add_factors(const Projection& projection, int32_t place, const Rows& rows, int32_t begin, int32_t end, float* y, int64_t stride) const {
  for (const Rows::Run& run : rows.runs) {
    const Matrix& b = run.factors->pairs[projection.number].b.matrix;
    if (!b.data) continue;
    Input low = run.factors->low[place].view().from(run.begin, b.cols);
    kernels_.product(b, low, static_cast<int32_t>(run.end - run.begin), begin, end, y + run.begin * stride, stride, true);
  }
}

void Model::products(std::initializer_list<const Projection*> projections, std::initializer_list<float*> outputs, const Input& x, const Rows& rows) {
  struct Piece {
    const Projection* projection;
    int32_t place;
    float* out;
    int32_t begin, end;
  };
  int32_t panels = 0;
  for (const Projection* one : projections) panels += one->matrix.panels();
  int32_t each = panels_per_piece(panels, threads_);
  std::vector<Piece> pieces;
  auto out = outputs.begin();
  int32_t place = 0;
  for (const Projection* one : projections) {
    for (int32_t p = 0; p < one->matrix.panels(); p += each)
      pieces.push_back({one, place, *out, p, std::min(p + each, one->matrix.panels())});
    ++out;
    ++place;
  }
  pool_->run(static_cast<int32_t>(pieces.size()), [&](int32_t i, int) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    const Matrix& matrix = piece.projection->matrix;
    int64_t stride = int64_t{matrix.panels()} * kPanel, at = int64_t{piece.begin} * kPanel, width = int64_t{piece.end - piece.begin} * kPanel;
    kernels_.product(matrix, x, static_cast<int32_t>(rows.count), piece.begin, piece.end, piece.out + at, stride, false);
    if (piece.projection->has_bias)
      for (int64_t row = 0; row < rows.count; row++) kernels_.add(piece.out + row * stride + at, piece.projection->bias.data() + at, width);
    add_factors(*piece.projection, piece.place, rows, piece.begin, piece.end, piece.out + at, stride);
  });
}

void Model::add_product(const Projection& projection, const Input& x, const Rows& rows) {
  const Matrix& matrix = projection.matrix;
  int32_t each = panels_per_piece(matrix.panels(), threads_);
  pool_->run((matrix.panels() + each - 1) / each, [&](int32_t i, int thread) {
    int32_t begin = i * each, end = std::min(begin + each, matrix.panels());
    int64_t at = int64_t{begin} * kPanel, width = int64_t{end - begin} * kPanel;
    float* y = scratch_[static_cast<size_t>(thread)].data();
    kernels_.product(matrix, x, static_cast<int32_t>(rows.count), begin, end, y, width, false);
    if (projection.has_bias)
      for (int64_t row = 0; row < rows.count; row++) kernels_.add(y + row * width, projection.bias.data() + at, width);
    add_factors(projection, 0, rows, begin, end, y, width);
    for (int64_t row = 0; row < rows.count; row++) kernels_.add(x_.data() + row * hidden_ + at, y + row * width, width);
  });
}

void Model::gated_product(const Layer& layer, const Input& x, const Rows& rows) {
  constexpr int32_t kStep = kInputBlock / kPanel;  // whole blocks of the next product's inputs
  int32_t panels = layer.gate.matrix.panels(), each = panels_per_piece(panels, threads_, kStep);
  pool_->run((panels + each - 1) / each, [&](int32_t i, int thread) {
    int32_t begin = i * each, end = std::min(begin + each, panels);
    int64_t at = int64_t{begin} * kPanel, width = int64_t{end - begin} * kPanel;
    float *gate = gated_.data() + at, *up = scratch_[static_cast<size_t>(thread)].data();
    kernels_.product(layer.gate.matrix, x, static_cast<int32_t>(rows.count), begin, end, gate, inner_, false);
    kernels_.product(layer.up.matrix, x, static_cast<int32_t>(rows.count), begin, end, up, width, false);
    for (int64_t row = 0; row < rows.count; row++) {
      if (layer.gate.has_bias) kernels_.add(gate + row * inner_, layer.gate.bias.data() + at, width);
      if (layer.up.has_bias) kernels_.add(up + row * width, layer.up.bias.data() + at, width);
    }
    add_factors(layer.gate, 0, rows, begin, end, gate, inner_);
    add_factors(layer.up, 1, rows, begin, end, up, width);
    for (int64_t row = 0; row < rows.count; row++) {
      kernels_.silu_mul(gate + row * inner_, up + row * width, width);
      inner_inputs_.put(kernels_, row, at, std::min(width, shape_.intermediate_size - at), gate + row * inner_);
    }
  });
}

// Norms and turns row `row`'s queries and keys, and writes its key and value to their slot.
void Model::write_cache(const WedlmStep& step, const Rows& rows, const Layer& layer, int32_t index, int64_t row) {
  int64_t dim = shape_.head_dim, position = step.positions[rows.begin + row];
  const float *cos = step.cos + position * (dim / 2), *sin = step.sin + position * (dim / 2);
  auto turn = [&](float* heads, int32_t count, const Buffer<float>& norm, bool has_norm) {
    for (int32_t h = 0; h < count; h++) {
      float* head = heads + h * dim;
      if (has_norm) kernels_.rms_norm(head, norm.data(), shape_.rms_norm_eps, dim, head);
      kernels_.rotate(head, cos, sin, dim);
    }
  };
  float *k = k_.data() + row * kv_width_, *v = v_.data() + row * kv_width_;
  turn(q_.data() + row * q_width_, shape_.num_heads, layer.q_norm, layer.has_q_norm);
  turn(k, shape_.num_kv_heads, layer.k_norm, layer.has_k_norm);
  int64_t width = int64_t{shape_.num_kv_heads} * dim;
  int64_t at = (index * step.num_slots + rows.slot[static_cast<size_t>(row)]) * width;
  auto write = [&](const float* x, void* cache, float* scale) {
    switch (static_cast<CacheType>(step.cache_type)) {
      case CacheType::kFloat32: std::memcpy(static_cast<float*>(cache) + at, x, static_cast<size_t>(width) * 4); return;
      case CacheType::kBFloat16: kernels_.to_bfloat(x, static_cast<uint16_t*>(cache) + at, width); return;
      case CacheType::kInt8:
        for (int64_t i = 0; i < width; i += dim) kernels_.quantize_head(x + i, dim, static_cast<int8_t*>(cache) + at + i, scale + (at + i) / dim);
    }
  };
  write(k, step.keys, step.key_scale);
  write(v, step.values, step.value_scale);
}

void Model::attend(const WedlmStep& step, const Rows& rows, int32_t index) {
  struct Piece {
    const Rows::Part* part;
    int64_t row, count;
    int32_t kv_head;
  };
  int32_t share = shape_.num_heads / shape_.num_kv_heads;
  int64_t dim = shape_.head_dim, heads = shape_.num_kv_heads, width = heads * dim;
  auto type = static_cast<CacheType>(step.cache_type);
  int64_t each = std::max<int64_t>(1, kMaxQueries / share);
  std::vector<Piece> pieces;
  for (const Rows::Part& part : rows.parts)
    for (int64_t row = 0; row < part.count; row += each)
      for (int32_t h = 0; h < shape_.num_kv_heads; h++) pieces.push_back({&part, row, std::min(each, part.count - row), h});
  auto base = [&](void* cache, int32_t h) { return static_cast<const char*>(cache) + (index * step.num_slots * width + h * dim) * element_bytes(type); };
  auto scales = [&](const float* all, int32_t h) { return all ? all + index * step.num_slots * heads + h : nullptr; };
  pool_->run(static_cast<int32_t>(pieces.size()), [&](int32_t i, int thread) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    const Rows::Part& part = *piece.part;
    int64_t row = part.first + piece.row, local = row - rows.begin, head = int64_t{piece.kv_head} * share * dim;
    AttentionWork work;
    work.q = q_.data() + local * q_width_ + head;
    work.out = attended_.data() + local * q_width_ + head;
    work.q_stride = work.out_stride = q_width_;
    work.num_rows = static_cast<int32_t>(piece.count);
    work.share = share;
    work.head_dim = shape_.head_dim;
    work.type = type;
    work.keys = base(step.keys, piece.kv_head);
    work.values = base(step.values, piece.kv_head);
    work.slot_stride = width;
    work.key_scale = scales(step.key_scale, piece.kv_head);
    work.value_scale = scales(step.value_scale, piece.kv_head);
    work.scale_stride = heads;
    work.pages = step.pages + step.page_offsets[part.sequence];
    work.page_size = step.page_size;
    work.cached = step.starts[part.sequence];
    work.first_row = part.first_row + piece.row;
    work.shared = step.shared ? step.shared + row : nullptr;
    work.own_start = step.shared ? step.own_start + row : nullptr;
    work.scratch = scratch_[static_cast<size_t>(thread)].data();
    kernels_.attention(work);
  });
}

void Model::run_rows(const WedlmStep& step, const Rows& rows) {
  int64_t count = rows.count;
  // Pieces of rows: body(first row, end, thread).
  auto each_rows = [&](auto body) {
    // A row alone takes a microsecond, less than handing it over.
    int64_t most = rows.runs.empty() ? count : (count + kMaskedRows - 1) / kMaskedRows;
    auto pieces = static_cast<int32_t>(std::min<int64_t>(count >= 4 ? threads_ * kPiecesPerThread : 1, most));
    pool_->run(pieces, [&](int32_t piece, int thread) { body(count * piece / pieces, count * (piece + 1) / pieces, thread); });
  };
  auto each_row = [&](auto body) {
    each_rows([&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; row++) body(row);
    });
  };
  // Fills `inputs` row by row by `put`, and lowers rows with factors for the projections that read them.
  auto inputs = [&](const Inputs& to, std::initializer_list<const Projection*> readers, auto put) {
    for (const Rows::Run& run : rows.runs) {
      Inputs* low = run.factors->low;
      for (const Projection* reader : readers) {
        const Matrix& b = run.factors->pairs[reader->number].b.matrix;
        if (b.data) {
          InputKind kind = format_info(b.format)->input;
          low->reserve(count, b.cols, kind == InputKind::kFloat, kind == InputKind::kInt8Blocks);
        }
        low++;
      }
    }
    each_rows([&](int64_t begin, int64_t end, int thread) {
      for (int64_t row = begin; row < end; row++) put(row);
      lower(readers, to.view(), rows, begin, end, scratch_[static_cast<size_t>(thread)].data());
    });
    return to.view();
  };
  auto normed = [&](const Buffer<float>& norm, std::initializer_list<const Projection*> readers) {
    return inputs(hidden_inputs_, readers, [&](int64_t row) {
      float* y = normed_.data() + row * hidden_;
      kernels_.rms_norm(x_.data() + row * hidden_, norm.data(), shape_.rms_norm_eps, shape_.hidden_size, y);
      hidden_inputs_.put(kernels_, row, y);
    });
  };
  auto part = [](const char* name, auto body) {
    Part timed(name);
    (void)timed;
    return body();
  };
  auto embed = [&](int64_t row) {
    float* x = x_.data() + row * hidden_;
    const Factors* own = factors_of(step, rows.begin + row);
    if (own && own->has_start)
      std::memcpy(x, own->start.data(), static_cast<size_t>(shape_.hidden_size) * 4);
    else
      unpack_row(embedding_.matrix, static_cast<int32_t>(step.tokens[rows.begin + row]), x);
  };
  part("embedding", [&] { each_row(embed); });
  for (int32_t index = 0; index < shape_.num_layers; index++) {
    const Layer& layer = layers_[static_cast<size_t>(index)];
    Input x = part("norms and inputs", [&] { return normed(layer.input_norm, {&layer.q, &layer.k, &layer.v}); });
    part("q, k, v", [&] { products({&layer.q, &layer.k, &layer.v}, {q_.data(), k_.data(), v_.data()}, x, rows); });
    part("RoPE and cache", [&] { each_row([&](int64_t row) { write_cache(step, rows, layer, index, row); }); });
    part("attention", [&] { attend(step, rows, index); });
    x = part("norms and inputs", [&] {
      return inputs(attended_inputs_, {&layer.o}, [&](int64_t row) { attended_inputs_.put(kernels_, row, attended_.data() + row * q_width_); });
    });
    part("o", [&] { add_product(layer.o, x, rows); });
    x = part("norms and inputs", [&] { return normed(layer.post_norm, {&layer.gate, &layer.up}); });
    part("gate, up", [&] { gated_product(layer, x, rows); });
    if (!rows.runs.empty())
      part("norms and inputs", [&] { inputs(inner_inputs_, {&layer.down}, [](int64_t) {}); });
    part("down", [&] { add_product(layer.down, inner_inputs_.view(), rows); });
  }
}

// Logits of the rows at `at` of those that just ran; `wanted` are their indices in the step's outputs.
void Model::logits(const WedlmStep& step, const std::vector<int64_t>& wanted, const std::vector<int64_t>& at) {
  Part timed("head and sums");
  (void)timed;
  auto count = static_cast<int64_t>(wanted.size());
  for (int64_t i = 0; i < count; i++) {
    float* y = normed_.data() + i * hidden_;
    kernels_.rms_norm(x_.data() + at[static_cast<size_t>(i)] * hidden_, final_norm_.data(), shape_.rms_norm_eps, shape_.hidden_size, y);
    hidden_inputs_.put(kernels_, i, y);
  }
  const Matrix& matrix = head().matrix;
  int32_t vocabulary = shape_.vocab_size, pieces = (vocabulary + kHeadOutputs - 1) / kHeadOutputs;
  struct Sums {
    float most, total, weighted, best;
    int64_t token;
  };
  std::vector<Sums> sums(step.token ? static_cast<size_t>(pieces * count) : 0);
  Input x = hidden_inputs_.view();
  pool_->run(pieces, [&](int32_t piece, int thread) {
    int32_t first = piece * kHeadOutputs, size = std::min(kHeadOutputs, vocabulary - first);
    int32_t begin = first / kPanel, end = std::min(begin + kHeadOutputs / kPanel, matrix.panels());
    int64_t stride = int64_t{end - begin} * kPanel;
    float* y = scratch_[static_cast<size_t>(thread)].data();
    kernels_.product(matrix, x, static_cast<int32_t>(count), begin, end, y, stride, false);
    for (int64_t i = 0; i < count; i++) {
      float* row = y + i * stride;
      int64_t out = wanted[static_cast<size_t>(i)];
      if (step.logits) std::memcpy(step.logits + out * vocabulary + first, row, static_cast<size_t>(size) * 4);
      if (!step.token) continue;
      Sums& own = sums[static_cast<size_t>(piece * count + i)];
      kernels_.logit_sums(row, size, &own.most, &own.total, &own.weighted);
      for (int64_t b = step.banned_offsets[out]; b < step.banned_offsets[out + 1]; b++)
        if (step.banned[b] >= first && step.banned[b] < first + size) row[step.banned[b] - first] = -INFINITY;
      own.best = kernels_.largest(row, size, &own.token);
      own.token += first;
    }
  });
  for (int64_t i = 0; step.token && i < count; i++) {
    auto part = [&](int32_t piece) -> const Sums& { return sums[static_cast<size_t>(piece * count + i)]; };
    Sums all = part(0);
    for (int32_t piece = 1; piece < pieces; piece++) {
      if (part(piece).best > all.best) all.best = part(piece).best, all.token = part(piece).token;
      all.most = std::max(all.most, part(piece).most);
    }
    double total = 0, weighted = 0;
    for (int32_t piece = 0; piece < pieces; piece++) {
      float lower = part(piece).most - all.most;
      double factor = kernels_.exp(lower);
      total += factor * part(piece).total;
      weighted += factor * (part(piece).weighted + double{part(piece).total} * lower);
    }
    int64_t out = wanted[static_cast<size_t>(i)];
    double log_total = log_of(total);
    step.token[out] = std::min<int64_t>(all.token, vocabulary - 1);
    step.token_logit[out] = all.best;
    step.logsumexp[out] = static_cast<float>(all.most + log_total);
    step.entropy[out] = static_cast<float>(std::max(0.0, log_total - weighted / total));
  }
}

void Model::forward(const WedlmStep& step) {
  std::lock_guard<std::mutex> lock(mutex_);
  restart_after_fork();
  check_complete();
  check(step);
  reserve(std::min(step.num_rows, kRowsAtOnce));
  std::vector<std::vector<int64_t>> outputs(static_cast<size_t>(step.num_rows));  // of each row; a row may be asked for twice
  for (int64_t i = 0; i < step.num_logits; i++) outputs[static_cast<size_t>(step.logits_rows[i])].push_back(i);
  int64_t sequence = 0, first_row = 0;
  for (int64_t begin = 0; begin < step.num_rows; begin += kRowsAtOnce) {
    Rows rows;
    rows.begin = begin;
    rows.count = std::min(kRowsAtOnce, step.num_rows - begin);
    for (int64_t row = 0; row < rows.count;) {
      while (first_row == step.counts[sequence]) sequence++, first_row = 0;
      int64_t count = std::min(rows.count - row, step.counts[sequence] - first_row);
      rows.parts.push_back({sequence, begin + row, first_row, count});
      const int32_t* pages = step.pages + step.page_offsets[sequence];
      for (int64_t i = 0; i < count; i++) {
        int64_t key = step.starts[sequence] + first_row + i;
        rows.slot.push_back(int64_t{pages[key / step.page_size]} * step.page_size + key % step.page_size);
      }
      row += count;
      first_row += count;
    }
    for (int64_t row = 0; row < rows.count; row++) {
      Factors* own = factors_of(step, begin + row);
      if (!own) continue;
      if (rows.runs.empty() || rows.runs.back().end < row || rows.runs.back().factors != own) rows.runs.push_back({row, row, own});
      rows.runs.back().end = row + 1;
    }
    run_rows(step, rows);
    std::vector<int64_t> wanted, at;
    auto flush = [&] {
      if (!wanted.empty()) logits(step, wanted, at);
      wanted.clear();
      at.clear();
    };
    for (int64_t row = 0; row < rows.count; row++)
      for (int64_t out : outputs[static_cast<size_t>(begin + row)]) {
        wanted.push_back(out);
        at.push_back(row);
        if (static_cast<int64_t>(wanted.size()) == std::min(step.num_rows, kRowsAtOnce)) flush();
      }
    flush();
  }
}

}  // namespace wedlm
