// SPDX-License-Identifier: Apache-2.0
// Choosing a token. Every operation is exactly rounded or on integers, so that each processor chooses the same.
#include "choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "logarithm.h"

namespace wedlm {

namespace {

constexpr int32_t kBlock = 1024;  // tokens looked at together
constexpr float kNever = -std::numeric_limits<float>::infinity();

// ---- the noise

struct Key {  // of a row
  int32_t low, high;
};

constexpr uint64_t kGolden64 = 0x9E3779B97F4A7C15u;

uint64_t splitmix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

Key key_of(int64_t seed, int64_t position) {
  uint64_t mixed = splitmix(splitmix(static_cast<uint64_t>(seed) + kGolden64) ^ (static_cast<uint64_t>(position) * kGolden64));
  return {static_cast<int32_t>(static_cast<uint32_t>(mixed)), static_cast<int32_t>(static_cast<uint32_t>(mixed >> 32))};
}

// A number in (0, 1) that the key gives the token.
inline __attribute__((always_inline)) float uniform(Key key, int32_t token) {
  uint32_t x = static_cast<uint32_t>(token) * 0x9E3779B9u + static_cast<uint32_t>(key.low);
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= static_cast<uint32_t>(key.high);
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  x ^= x >> 16;
  float u = (__builtin_fabsf(static_cast<float>(static_cast<int32_t>(x))) + 0.5f) * 0x1p-31f;
  return u < 1 - 0x1p-24f ? u : 1 - 0x1p-24f;
}

// -log(1 - u): 1 - u would lose the digits of a small u.
double minus_log1p(double u) {
  if (u > 0.25) return -log_of(1 - u);
  return twice_atanh(u / (2 - u));
}

// Standard Gumbel noise of a uniform number, rounded where torch rounds it.
float gumbel(float u) { return static_cast<float>(-log_of(static_cast<float>(minus_log1p(u)))); }

// ---- loops over the vocabulary, compiled for what the processor has

inline __attribute__((always_inline)) float largest_of(const float* x, int32_t n) {
  float lanes[16];
  for (auto& lane : lanes) lane = kNever;
  int32_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; l++) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  for (; i < n; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  float best = kNever;
  for (float lane : lanes) best = lane > best ? lane : best;
  return best;
}

// An upper bound of each token's score, and the largest of them. The noise of u is at most -log u, and log2 of
// m 2^e at least e + m - 1.
inline __attribute__((always_inline)) float bounds_of(const float* logits, int32_t first, int32_t n, float best, float temperature,
                                                      Key key, float* bounds) {
  for (int32_t i = 0; i < n; i++) {
    float u = uniform(key, first + i);
    int32_t bits;
    __builtin_memcpy(&bits, &u, 4);
    float noise = (127.0f - static_cast<float>(bits) * 0x1p-23f) * 0.69315f + 1e-3f;
    bounds[i] = (logits[first + i] - best) / temperature + noise;
  }
  return largest_of(bounds, n);
}

// e^x for x in [-87, 0], else 0: Cephes' polynomial without fused products, the same on every processor.
inline __attribute__((always_inline)) float exp_of(float x) {
  constexpr float kMagic = 12582912.0f;
  float bounded = x > -87.0f ? x : -87.0f;
  float shifted = bounded * 1.44269504088896341f + kMagic, n = shifted - kMagic;
  float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t power = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23, all = 0u - static_cast<uint32_t>(x > -87.0f);
  float scale;
  __builtin_memcpy(&scale, &power, 4);
  float value = p * scale;
  __builtin_memcpy(&power, &value, 4);
  power &= all;
  __builtin_memcpy(&value, &power, 4);
  return value;
}

inline __attribute__((always_inline)) double mass_of(const float* logits, int32_t n, float best) {
  float part[kBlock];
  double lanes[16] = {};
  for (int32_t first = 0; first < n; first += kBlock) {
    int32_t size = n - first < kBlock ? n - first : kBlock;
    for (int32_t i = 0; i < size; i++) part[i] = exp_of(logits[first + i] - best);
    for (int32_t i = size; i % 16; i++) part[i] = 0;
    for (int32_t i = 0; i < size; i += 16)
      for (int l = 0; l < 16; l++) lanes[l] += static_cast<double>(part[i + l]);
  }
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

struct Loops {
  float (*largest)(const float* x, int32_t n);
  float (*bounds)(const float* logits, int32_t first, int32_t n, float best, float temperature, Key key, float* bounds);
  double (*mass)(const float* logits, int32_t n, float best);
};

#define WEDLM_LOOPS(name, attribute)                                                                                           \
  namespace name {                                                                                                             \
  attribute float largest(const float* x, int32_t n) { return largest_of(x, n); }                                              \
  attribute float bounds(const float* logits, int32_t first, int32_t n, float best, float temperature, Key key, float* to) {   \
    return bounds_of(logits, first, n, best, temperature, key, to);                                                            \
  }                                                                                                                            \
  attribute double mass(const float* logits, int32_t n, float best) { return mass_of(logits, n, best); }                       \
  constexpr Loops loops = {largest, bounds, mass};                                                                             \
  }

WEDLM_LOOPS(plain, )
#if defined(__x86_64__)
WEDLM_LOOPS(wide, __attribute__((target("avx2"))))
WEDLM_LOOPS(widest, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))))
#endif

const Loops& loops() {
#if defined(__x86_64__)
  static const Loops chosen = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                                  ? widest::loops
                              : __builtin_cpu_supports("avx2") ? wide::loops
                                                               : plain::loops;
  return chosen;
#else
  return plain::loops;
#endif
}

// ---- the choice

struct Best {
  float score = kNever;
  int64_t token = -1;

  void take(float other, int64_t id) {
    if (other > score || (other == score && id < token)) score = other, token = id;
  }
};

struct Candidate {
  float logit;
  int32_t token;
};

// What top-k and then top-p leave: best first, equal ones by their id.
std::vector<Candidate> kept(const float* logits, int32_t vocab_size, float best, const WedlmWindowParams& params) {
  auto better = [](const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.token < b.token; };
  auto most = static_cast<size_t>(params.top_k > 0 ? std::min<int64_t>(params.top_k, vocab_size) : vocab_size);
  // Only few are near the best: those are sorted, and more only where they do not suffice.
  double total = params.top_k > 0 ? 0 : loops().mass(logits, vocab_size, best);
  std::vector<Candidate> found;
  for (float depth = 4;; depth *= 2) {
    found.clear();
    for (int32_t i = 0; i < vocab_size; i++)
      if (logits[i] - best >= -depth) found.push_back({logits[i], i});
    bool all = depth > 1e30f;
    if (params.top_k > 0 && found.size() < most && !all) continue;
    std::sort(found.begin(), found.end(), better);
    if (found.size() > most) found.resize(most);
    if (params.top_p >= 1) return found;
    if (params.top_k > 0) {
      total = 0;
      for (const Candidate& one : found) total += static_cast<double>(exp_of(one.logit - best));
    }
    double before = 0;
    for (size_t i = 0; i < found.size(); i++) {
      if (i > 0 && before >= params.top_p) {
        found.resize(i);
        return found;
      }
      before += static_cast<double>(static_cast<float>(static_cast<double>(exp_of(found[i].logit - best)) / total));
    }
    if (params.top_k > 0 || all || before >= params.top_p) return found;
  }
}

}  // namespace

int64_t choose_token(const float* logits, int32_t vocab_size, const WedlmWindowParams& params, int64_t position) {
  const float best = loops().largest(logits, vocab_size);
  const int64_t greedy = std::min<int64_t>(std::find(logits, logits + vocab_size, best) - logits, vocab_size - 1);
  if (!(params.temperature > 0) || !(best > kNever) || std::isinf(best)) return greedy;
  const Key key = key_of(params.seed, position);
  Best chosen;
  auto score = [&](int32_t token) { chosen.take((logits[token] - best) / params.temperature + gumbel(uniform(key, token)), token); };
  if (params.top_k > 0 || params.top_p < 1) {
    for (const Candidate& one : kept(logits, vocab_size, best, params)) score(one.token);
  } else {
    // Beginning where the best is: hardly any other token then comes near enough to need its noise.
    score(static_cast<int32_t>(greedy));
    float bounds[kBlock];
    for (int32_t first = 0; first < vocab_size; first += kBlock) {
      int32_t n = std::min(kBlock, vocab_size - first);
      if (!(loops().bounds(logits, first, n, best, params.temperature, key, bounds) >= chosen.score)) continue;
      for (int32_t i = 0; i < n; i++)
        if (bounds[i] >= chosen.score) score(first + i);
    }
  }
  return chosen.token < 0 ? greedy : chosen.token;
}

void top_tokens(const float* logits, int32_t vocab_size, int32_t count, int64_t* tokens, float* values) {
  std::fill(values, values + count, kNever);
  std::fill(tokens, tokens + count, int64_t{0});
  int32_t held = 0;
  auto offer = [&](int32_t token) {
    float value = logits[token] > kNever ? logits[token] : kNever;  // also what is not a number
    int32_t at = held < count ? held++ : count - 1;
    for (; at > 0 && values[at - 1] < value; at--) values[at] = values[at - 1], tokens[at] = tokens[at - 1];
    values[at] = value;
    tokens[at] = token;
  };
  for (int32_t token = 0; token < count; token++) offer(token);
  constexpr int32_t kAtOnce = 64;  // few of which are large, and all are compared at once
  for (int32_t first = count; first < vocab_size; first += kAtOnce) {
    int32_t end = std::min(first + kAtOnce, vocab_size), any = 0;
    for (int32_t token = first; token < end; token++) any |= logits[token] > values[count - 1];
    for (int32_t token = first; any && token < end; token++)
      if (logits[token] > values[count - 1]) offer(token);
  }
}

}  // namespace wedlm
