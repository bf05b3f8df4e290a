// SPDX-License-Identifier: Apache-2.0
// Random models and steps through every instruction set that runs here: equal bits, or it says where they differ.
// selfcheck FIRST COUNT prints a hash for each seed; equal on every machine. Built and run by test_selfcheck.py, also
// with sanitizers, and for another architecture under an emulator.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "capi.h"
#include "decode.h"

namespace {

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  float real() { return static_cast<float>(static_cast<int64_t>(next() >> 40) - (1 << 23)) * 0x1p-22f; }  // -2..2
};

struct Format {
  int number, block, bytes;
  std::vector<int> halves;  // where half-precision numbers lie in a block
};

const Format kFormats[] = {
    {0, 1, 4, {}}, {1, 1, 2, {0}}, {30, 1, 2, {}}, {100, 1, 1, {}}, {8, 32, 34, {0}}, {2, 32, 18, {0}}, {3, 32, 20, {0, 2}},
    {6, 32, 22, {0}}, {7, 32, 24, {0, 2}}, {12, 256, 144, {0, 2}}, {13, 256, 176, {0, 2}}, {14, 256, 210, {208}},
};

struct Matrix {
  int format, rows, cols;
  std::vector<uint8_t> data;
  std::vector<float> scale;
};

Matrix random_matrix(Random& random, int rows, int cols) {
  const Format* format;
  do format = &kFormats[random.below(sizeof kFormats / sizeof kFormats[0])];
  while (cols % format->block);
  Matrix matrix{format->number, rows, cols, {}, {}};
  int64_t blocks = int64_t{rows} * cols / format->block;
  matrix.data.resize(static_cast<size_t>(blocks * format->bytes));
  if (format->number == 0) {
    for (int64_t i = 0; i < blocks; i++) {
      float x = random.real() * 0.1f;
      std::memcpy(&matrix.data[static_cast<size_t>(4 * i)], &x, 4);
    }
    return matrix;
  }
  for (auto& byte : matrix.data) byte = static_cast<uint8_t>(random.next());
  if (format->number == 100) {
    for (auto& byte : matrix.data) byte = byte == 128 ? 0 : byte;  // -127..127
    for (int i = 0; i < rows; i++) matrix.scale.push_back(random.real() * 0.001f);
  }
  for (int64_t b = 0; b < blocks; b++) {
    uint8_t* block = &matrix.data[static_cast<size_t>(b * format->bytes)];
    // Of either sign, 2^-10 to 2^-9; K-quants multiply theirs by scales of up to 6 bits.
    for (int at : format->halves) block[at + 1] = static_cast<uint8_t>((block[at + 1] & 0x83) | (format->block == 256 ? 0x08 : 0x14));
    if (format->number == 1) block[1] = static_cast<uint8_t>((block[1] & 0x83) | 0x28);
    if (format->number == 30) block[1] = static_cast<uint8_t>((block[1] & 0x80) | 0x3d), block[0] &= 0x7f;
  }
  return matrix;
}

constexpr int kFactors = 6;

void check(int32_t status, const char* error) {
  if (!status) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

uint64_t hash(uint64_t seed, const void* data, size_t bytes) {  // FNV-1a
  for (size_t i = 0; i < bytes; i++) seed = (seed ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
  return seed;
}

// Some steps of windows in all modes over a cache of pages of 8: what they emit.
uint64_t decode(Random& random, WedlmModel* model, const WedlmShape& shape, const float* cos, const float* sin, int64_t num_positions) {
  constexpr int64_t kWindows = 3, kCapacity = 24, kPages = 16, kPageSize = 8;
  std::vector<int32_t> adapters;
  for (int i = 0; i < kWindows; i++) adapters.push_back(static_cast<int32_t>(random.below(kFactors / 2)));
  std::vector<int64_t> cached, width, tokens(kWindows * kCapacity), num_pages(kWindows, kPages), slot{2, 0, 1}, stops{1, 2};
  std::vector<uint8_t> filled(kWindows * kCapacity);
  std::vector<float> logprobs(kWindows * kCapacity), result_logprobs(kWindows * kCapacity);
  std::vector<int64_t> results(kWindows * (4 + kCapacity));
  std::vector<int32_t> pages;
  for (int32_t i = 0; i < kWindows * kPages; i++) pages.push_back(i);
  std::vector<WedlmWindowParams> params(kWindows);
  for (int64_t s = 0; s < kWindows; s++) {
    WedlmWindowParams& own = params[static_cast<size_t>(s)];
    own.is_verified = random.below(2), own.is_adaptive = own.is_verified && random.below(2), own.is_block = !own.is_verified && random.below(2);
    own.is_causal = !own.is_verified && !own.is_block && random.below(2);
    own.row_budget = 1 + random.below(own.is_verified ? kCapacity : kCapacity / 2);
    own.max_drafts = random.below(4);
    own.max_positions = 20 + random.below(num_positions - 19);
    own.min_eos_position = random.below(30);
    own.threshold = random.real(), own.penalty = 0.02, own.draft_entropy = 2 + random.real();
    own.temperature = random.below(2) ? 0.0f : 1.0f;
    own.top_k = random.below(3) ? 0 : 5, own.top_p = random.below(3) ? 1 : 0.8;
    own.seed = random.below(1000);
    own.num_top = static_cast<int32_t>(random.below(3) ? 0 : random.below(30));
    own.stop_tokens = stops.data(), own.num_stop_tokens = random.below(3);
    cached.push_back(random.below(15));
    width.push_back(own.row_budget);
    tokens[static_cast<size_t>(s * kCapacity)] = random.below(shape.vocab_size);
    filled[static_cast<size_t>(s * kCapacity)] = static_cast<uint8_t>(own.is_verified || own.is_causal);
  }
  size_t cache_size = static_cast<size_t>(shape.num_layers * kWindows * kPages * kPageSize * shape.num_kv_heads * shape.head_dim);
  std::vector<float> keys(cache_size), values(cache_size), scales(2 * cache_size);
  WedlmSlots slots{kCapacity, kPages, cached.data(), width.data(), tokens.data(), filled.data(), logprobs.data(), params.data(), pages.data(), num_pages.data(), adapters.data()};
  WedlmDecode step{};
  step.slots = &slots, step.num_windows = kWindows, step.slot = slot.data();
  step.keys = keys.data(), step.values = values.data(), step.key_scale = scales.data(), step.value_scale = scales.data() + cache_size;
  step.cache_type = static_cast<int32_t>(random.below(3)), step.page_size = kPageSize, step.num_slots = kWindows * kPages * kPageSize;
  step.cos = cos, step.sin = sin, step.num_positions = num_positions;
  step.results = results.data(), step.result_logprobs = result_logprobs.data();
  WedlmDecoder* decoder = wedlm_decoder_new(shape.vocab_size, 0);
  char error[512] = "";
  uint64_t h = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < 6; i++) {
    step.row_limit = 1 + random.below(8), step.most_drafts = random.below(3);
    step.wants_logits = static_cast<int32_t>(random.below(3));
    check(wedlm_decode_forward(decoder, model, &step, error, sizeof error), error);
    wedlm_decode_choose(decoder, &step);
    wedlm_decode_update(decoder, &step);
    wedlm_decode_put(decoder, &step);
    h = hash(h, results.data(), results.size() * 8);
    auto told = static_cast<size_t>(step.num_logits * step.most_top);
    h = hash(hash(h, step.top_tokens, told * 8), step.top_logprobs, told * 4);
  }
  wedlm_decoder_free(decoder);
  h = hash(h, filled.data(), filled.size());
  for (const std::vector<float>* part : {&keys, &values, &scales}) h = hash(h, part->data(), part->size() * 4);
  return hash(h, logprobs.data(), logprobs.size() * 4);
}

uint64_t run(uint64_t seed, const char* path) {
  Random random{seed};
  const int dims[] = {8, 10, 16, 32, 64, 80}, hiddens[] = {32, 50, 64, 256}, inners[] = {48, 96, 256, 512};
  WedlmShape shape{};
  shape.num_layers = 1 + static_cast<int>(random.below(2));
  shape.num_kv_heads = 1 + static_cast<int>(random.below(3));
  shape.num_heads = shape.num_kv_heads * (1 + static_cast<int>(random.below(4)));
  shape.head_dim = dims[random.below(6)];
  shape.hidden_size = hiddens[random.below(4)];
  shape.intermediate_size = inners[random.below(4)];
  shape.vocab_size = 20 + static_cast<int>(random.below(1500));
  shape.rms_norm_eps = 1e-5f;
  int threads = 1 + static_cast<int>(random.below(3));
  bool qkv_bias = random.below(2), other_bias = random.below(2), norms = random.below(2), tied = random.below(2);
  char error[512] = "";
  WedlmModel* model = wedlm_model_new(&shape, path, threads, error, sizeof error);
  if (!model) check(-1, error);
  auto matrix = [&](int layer, int which, int rows, int cols) {
    Matrix m = random_matrix(random, rows, cols);
    check(wedlm_model_set_matrix(model, layer, which, m.format, rows, cols, m.data.data(), m.scale.data(), error, sizeof error), error);
  };
  auto vector = [&](int layer, int which, int size, float middle) {
    std::vector<float> v;
    for (int i = 0; i < size; i++) v.push_back(middle + 0.2f * random.real());
    check(wedlm_model_set_vector(model, layer, which, size, v.data(), error, sizeof error), error);
  };
  int q = shape.num_heads * shape.head_dim, kv = shape.num_kv_heads * shape.head_dim;
  auto of_each_product = [&](const auto& set, int layer) {
    set(layer, WEDLM_Q, q, shape.hidden_size);
    set(layer, WEDLM_K, kv, shape.hidden_size);
    set(layer, WEDLM_V, kv, shape.hidden_size);
    set(layer, WEDLM_O, shape.hidden_size, q);
    set(layer, WEDLM_GATE, shape.intermediate_size, shape.hidden_size);
    set(layer, WEDLM_UP, shape.intermediate_size, shape.hidden_size);
    set(layer, WEDLM_DOWN, shape.hidden_size, shape.intermediate_size);
  };
  for (int layer = 0; layer < shape.num_layers; layer++) {
    of_each_product(matrix, layer);
    vector(layer, WEDLM_INPUT_NORM, shape.hidden_size, 1);
    vector(layer, WEDLM_POST_NORM, shape.hidden_size, 1);
    if (norms) vector(layer, WEDLM_Q_NORM, shape.head_dim, 1), vector(layer, WEDLM_K_NORM, shape.head_dim, 1);
    if (qkv_bias) vector(layer, WEDLM_Q_BIAS, q, 0), vector(layer, WEDLM_K_BIAS, kv, 0), vector(layer, WEDLM_V_BIAS, kv, 0);
    if (other_bias) {
      vector(layer, WEDLM_O_BIAS, shape.hidden_size, 0);
      vector(layer, WEDLM_GATE_BIAS, shape.intermediate_size, 0);
      vector(layer, WEDLM_UP_BIAS, shape.intermediate_size, 0);
      vector(layer, WEDLM_DOWN_BIAS, shape.hidden_size, 0);
    }
  }
  int number = 0;
  auto factors = [&](int layer, int which, int rows, int cols) {
    if (random.below(3) == 0) return;
    const int ranks[] = {1, 3, 16, 40, 64, 256};
    int rank = ranks[random.below(6)];
    Matrix a = random_matrix(random, rank, cols), b = random_matrix(random, rows, rank);
    for (int i = 0; a.format != b.format; i++) {  // both in one
      if (i % 2) a = random_matrix(random, rank, cols);
      else b = random_matrix(random, rows, rank);
    }
    check(wedlm_model_set_factors(model, number, layer, which, a.format, rank, a.data.data(), a.scale.data(), b.data.data(), b.scale.data(), error, sizeof error), error);
  };
  auto start = [&] {
    std::vector<float> v;
    for (int i = 0; i < shape.hidden_size; i++) v.push_back(0.2f * random.real());
    check(wedlm_model_set_start(model, number, shape.hidden_size, v.data(), error, sizeof error), error);
  };
  bool adapted = random.below(2);
  for (number = 0; adapted && number < kFactors; number++) {  // some are dropped again
    if (random.below(2)) continue;
    for (int layer = 0; layer < shape.num_layers; layer++) of_each_product(factors, layer);
    if (random.below(2)) start();
    if (random.below(4) == 0) wedlm_model_drop_factors(model, number);
  }
  matrix(-1, WEDLM_EMBEDDING, shape.vocab_size, shape.hidden_size);
  if (tied) wedlm_model_tie(model);
  else matrix(-1, WEDLM_HEAD, shape.vocab_size, shape.hidden_size);
  vector(-1, WEDLM_FINAL_NORM, shape.hidden_size, 1);

  constexpr int kPositions = 64;
  std::vector<float> cos, sin;
  for (int i = 0; i < kPositions * shape.head_dim / 2; i++) {
    float t = random.real() * 0.5f, r = 1 / (1 + t * t);  // on the circle, without a library's cosine
    cos.push_back((1 - t * t) * r);
    sin.push_back(2 * t * r);
  }
  const int page_sizes[] = {1, 4, 16};
  int page_size = page_sizes[random.below(3)], num_slots = 480;
  std::vector<int32_t> pages(static_cast<size_t>(num_slots / page_size));
  for (size_t i = 0; i < pages.size(); i++) pages[i] = static_cast<int32_t>(i);
  for (size_t i = pages.size(); i > 1; i--) std::swap(pages[i - 1], pages[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  std::vector<int64_t> starts, counts, offsets{0}, tokens, positions, shared, own;
  std::vector<int32_t> row_factors;
  int64_t num_sequences = 1 + random.below(4);
  for (int64_t s = 0; s < num_sequences; s++) {
    int64_t longest = s == 0 && random.below(8) == 0 ? 110 : 20;
    starts.push_back(random.below(90));
    counts.push_back(1 + random.below(longest));
    offsets.push_back(offsets.back() + (starts[static_cast<size_t>(s)] + counts[static_cast<size_t>(s)] + page_size - 1) / page_size);
    for (int64_t row = 0; row < counts[static_cast<size_t>(s)]; row++) {
      tokens.push_back(random.below(shape.vocab_size));
      positions.push_back(random.below(kPositions));
      shared.push_back(random.below(row + 1));
      own.push_back(random.below(row + 1));
      row_factors.push_back(static_cast<int32_t>(random.below(kFactors + 2)));
    }
  }
  auto num_rows = static_cast<int64_t>(tokens.size());
  int32_t cache_type = static_cast<int32_t>(random.below(3));
  size_t cache_size = static_cast<size_t>(shape.num_layers) * static_cast<size_t>(num_slots) * static_cast<size_t>(kv);
  std::vector<float> keys(cache_size), values(cache_size);  // twice as long as bfloat16 needs
  for (size_t i = 0; i < cache_size; i++) keys[i] = random.real() * 0.5f, values[i] = random.real();
  for (size_t i = 0; cache_type == 1 && i < 2 * cache_size; i++) {
    for (std::vector<float>* cache : {&keys, &values}) {
      uint32_t bits;
      float x = random.real();
      std::memcpy(&bits, &x, 4);
      auto high = static_cast<uint16_t>(bits >> 16);
      std::memcpy(reinterpret_cast<char*>(cache->data()) + 2 * i, &high, 2);
    }
  }
  std::vector<float> key_scale, value_scale;
  for (size_t i = 0; cache_type == 2 && i < cache_size / static_cast<size_t>(shape.head_dim); i++) key_scale.push_back(random.real() * 0.01f), value_scale.push_back(random.real() * 0.01f);
  std::vector<int64_t> wanted, banned, banned_offsets{0};
  for (int64_t i = random.below(6); i >= 0; i--) {
    wanted.push_back(random.below(num_rows));
    if (random.below(2)) banned.push_back(random.below(shape.vocab_size));
    banned_offsets.push_back(static_cast<int64_t>(banned.size()));
  }
  auto num_logits = wanted.size();
  std::vector<float> logits(num_logits * static_cast<size_t>(shape.vocab_size)), token_logit(num_logits), entropy(num_logits), logsumexp(num_logits);
  std::vector<int64_t> token(num_logits);
  bool hides = random.below(2);
  WedlmStep step{num_rows, num_sequences, tokens.data(), positions.data(), starts.data(), counts.data(), pages.data(), offsets.data(),
                 hides ? shared.data() : nullptr, hides ? own.data() : nullptr, row_factors.data(), keys.data(), values.data(), key_scale.data(), value_scale.data(), cache_type, page_size,
                 num_slots, cos.data(), sin.data(), kPositions, static_cast<int64_t>(num_logits), wanted.data(), logits.data(),
                 token.data(), token_logit.data(), entropy.data(), logsumexp.data(), banned.data(), banned_offsets.data()};
  check(wedlm_model_forward(model, &step, error, sizeof error), error);
  uint64_t decoded = decode(random, model, shape, cos.data(), sin.data(), kPositions);
  wedlm_model_free(model);
  for (float x : logits)
    if (!(x - x == 0)) check(-1, "a logit is not finite");
  uint64_t h = decoded;
  for (const std::vector<float>* part : {&logits, &keys, &values, &key_scale, &value_scale, &token_logit, &entropy, &logsumexp}) h = hash(h, part->data(), part->size() * 4);
  return hash(h, token.data(), token.size() * 8);
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0, count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 10;
  std::vector<std::string> paths;
  const char *name, *needs;
  int32_t runs;
  for (int32_t i = 0; wedlm_path(i, &name, &runs, &needs) == 0; i++)
    if (runs) paths.push_back(name);
  for (uint64_t seed = first; seed < first + count; seed++) {
    uint64_t twin = run(seed, paths.back().c_str());
    for (const std::string& path : paths)
      if (run(seed, path.c_str()) != twin) {
        std::fprintf(stderr, "seed %llu: %s differs from %s\n", static_cast<unsigned long long>(seed), path.c_str(), paths.back().c_str());
        return 1;
      }
    std::printf("%llu %016llx\n", static_cast<unsigned long long>(seed), static_cast<unsigned long long>(twin));
  }
  std::fprintf(stderr, "paths:");
  for (const std::string& path : paths) std::fprintf(stderr, " %s", path.c_str());
  std::fprintf(stderr, "\n");
}
