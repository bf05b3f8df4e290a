// SPDX-License-Identifier: Apache-2.0
// Attention of a few rows of one sequence over its pages, one key head. Included by kernels_impl.h.
//
// Each score is one chain of fma over the dimensions, in order; each output one chain over the keys, in order, with the
// softmax's maximum and sum taken along in tiles of 64 keys that begin at key 0. Hidden keys are left out, not
// multiplied by 0. So nothing depends on which rows run together, or on what a slot that nobody sees holds.
namespace wedlm {
namespace WEDLM_ISA {
namespace {

constexpr float kHidden = -3.0e38f;  // below every score

inline V load_cached(const float* p, int n) { return n == 16 ? load(p) : load_n(p, n); }
inline V load_cached(const uint16_t* p, int n) {
  if (n == 16) return load_bfloat(p);
  uint16_t part[16] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load_bfloat(part);
}

inline V load_cached(const int8_t* p, int n) {
  if (n == 16) return load_signed(p);
  int8_t part[16] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load_signed(part);
}

// Keys of a tile that a row sees: those below `common_end`, and from `own_begin` up to `end`.
struct Seen {
  int common_end, own_begin, end;
};

inline Seen seen_keys(const AttentionWork& work, int64_t row, int64_t tile) {
  int64_t end = larger(0, smaller(kKeyTile, work.cached + work.first_row + row + 1 - tile));
  int64_t common = end, own = end;
  if (work.shared) {
    common = smaller(end, larger(0, work.cached + work.shared[row] - tile));
    own = smaller(end, larger(common, work.cached + work.own_start[row] - tile));
  }
  return {static_cast<int>(common), static_cast<int>(own), static_cast<int>(end)};
}

// acc[query][wide] += sum over keys of p[query][key] * value[key], dimensions first .. first + 16 * kVectors.
template <class Cached, int kQueries, int kVectors>
inline void add_values(const Cached* const* values, const float* p, float* acc, int64_t wide, int64_t dim, int begin, int end) {
  V sums[kQueries][kVectors];
  WEDLM_UNROLL
  for (int q = 0; q < kQueries; q++)
    for (int v = 0; v < kVectors; v++) sums[q][v] = load(acc + q * wide + 16 * v);
  for (int key = begin; key < end; key++) {
    V value[kVectors];
    WEDLM_UNROLL
    for (int v = 0; v < kVectors; v++) value[v] = load_cached(values[key] + 16 * v, static_cast<int>(smaller(16, dim - 16 * v)));
    WEDLM_UNROLL
    for (int q = 0; q < kQueries; q++) {
      V weight = set1(p[q * kKeyTile + key]);
      WEDLM_UNROLL
      for (int v = 0; v < kVectors; v++) sums[q][v] = fma(weight, value[v], sums[q][v]);
    }
  }
  WEDLM_UNROLL
  for (int q = 0; q < kQueries; q++)
    for (int v = 0; v < kVectors; v++) store(acc + q * wide + 16 * v, sums[q][v]);
}

template <class Cached, int kQueries>
inline void add_values_of(const Cached* const* values, const float* p, float* acc, int64_t wide, int64_t dim, Seen seen) {
  const Cached* shifted[kKeyTile];
  for (int64_t d = 0; d < dim; d += 64) {
    const Cached* const* at = values;
    if (d) {
      for (int key = 0; key < seen.end; key++) shifted[key] = values[key] + d;
      at = shifted;
    }
    int vectors = static_cast<int>((smaller(64, dim - d) + 15) / 16);
    auto both = [&](auto run) {
      if (seen.common_end > 0) run(0, seen.common_end);
      if (seen.end > seen.own_begin) run(seen.own_begin, seen.end);
    };
    switch (vectors) {
      case 1: both([&](int b, int e) { add_values<Cached, kQueries, 1>(at, p, acc + d, wide, dim - d, b, e); }); break;
      case 2: both([&](int b, int e) { add_values<Cached, kQueries, 2>(at, p, acc + d, wide, dim - d, b, e); }); break;
      case 3: both([&](int b, int e) { add_values<Cached, kQueries, 3>(at, p, acc + d, wide, dim - d, b, e); }); break;
      default: both([&](int b, int e) { add_values<Cached, kQueries, 4>(at, p, acc + d, wide, dim - d, b, e); }); break;
    }
  }
}

// scores[query][16 * kGroups keys] for kQueries queries, from groups of keys laid out [dim][16].
template <int kQueries, int kGroups>
inline void score(const float* q, int64_t dim, int64_t wide, const float* keys, float* scores) {
  V sums[kQueries][kGroups];
  WEDLM_UNROLL
  for (int i = 0; i < kQueries; i++)
    for (int g = 0; g < kGroups; g++) sums[i][g] = set1(0.0f);
  for (int64_t d = 0; d < dim; d++) {
    V key[kGroups];
    WEDLM_UNROLL
    for (int g = 0; g < kGroups; g++) key[g] = load(keys + g * wide * 16 + 16 * d);
    WEDLM_UNROLL
    for (int i = 0; i < kQueries; i++) {
      V one = set1(q[i * dim + d]);
      WEDLM_UNROLL
      for (int g = 0; g < kGroups; g++) sums[i][g] = fma(key[g], one, sums[i][g]);
    }
  }
  WEDLM_UNROLL
  for (int i = 0; i < kQueries; i++)
    for (int g = 0; g < kGroups; g++) store(scores + i * kKeyTile + 16 * g, sums[i][g]);
}

template <int kGroups>
inline void scores_of(const float* q, int64_t queries, int64_t dim, int64_t wide, const float* keys, float* scores) {
  int64_t i = 0;
  for (; i + 6 <= queries; i += 6) score<6, kGroups>(q + i * dim, dim, wide, keys, scores + i * kKeyTile);
  for (; i + 3 <= queries; i += 3) score<3, kGroups>(q + i * dim, dim, wide, keys, scores + i * kKeyTile);
  for (; i < queries; i++) score<1, kGroups>(q + i * dim, dim, wide, keys, scores + i * kKeyTile);
}

// Where the keys and values of a tile are.
template <class Cached>
struct Places {
  static constexpr bool kScaled = sizeof(Cached) == 1;  // a number for each key multiplies its scores, one its weights
  const Cached *keys[kKeyTile], *values[kKeyTile];
  float key_scale[kScaled ? kKeyTile : 1], value_scale[kScaled ? kKeyTile : 1];
  int count = 0;

  void find(const AttentionWork& work, int64_t tile, int64_t num_keys) {
    count = static_cast<int>(larger(0, smaller(kKeyTile, num_keys - tile)));
    for (int j = 0; j < count; j++) {
      int64_t key = tile + j, slot = int64_t{work.pages[key / work.page_size]} * work.page_size + key % work.page_size;
      keys[j] = static_cast<const Cached*>(work.keys) + slot * work.slot_stride;
      values[j] = static_cast<const Cached*>(work.values) + slot * work.slot_stride;
      if constexpr (kScaled) key_scale[j] = work.key_scale[slot * work.scale_stride], value_scale[j] = work.value_scale[slot * work.scale_stride];
    }
    if constexpr (kScaled)
      for (int j = count; j < kKeyTile; j++) key_scale[j] = value_scale[j] = 0.0f;
  }
  // Of one head a slot holds too little for the processor to see what comes next.
  void fetch(int begin, int end, int64_t dim) const {
    constexpr int64_t kLine = 64 / sizeof(Cached);
    for (int j = begin; j < end && j < count; j++)
      for (int64_t d = 0; d < dim; d += kLine) {
        __builtin_prefetch(keys[j] + d, 0, 2);
        __builtin_prefetch(values[j] + d, 0, 2);
      }
  }
};

template <class Cached>
void attend(const AttentionWork& work) {
  const int64_t dim = work.head_dim, wide = round_up(dim, 16), queries = int64_t{work.num_rows} * work.share;
  float* turned = work.scratch;               // [kKeyTile / 16][wide][16] keys
  float* scores = turned + wide * kKeyTile;   // [queries][kKeyTile]
  float* acc = scores + queries * kKeyTile;   // [queries][wide]
  float* sums = acc + queries * wide;         // [queries][16]
  float* scaled = sums + queries * 16;        // [queries][dim]
  float* most = scaled + queries * dim;       // [queries]
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  for (int64_t i = 0; i < queries; i++) {
    const float* q = work.q + i / work.share * work.q_stride + i % work.share * dim;
    for (int64_t d = 0; d < dim; d++) scaled[i * dim + d] = q[d] * scale;
    for (int64_t d = 0; d < wide; d++) acc[i * wide + d] = 0.0f;
    for (int l = 0; l < 16; l++) sums[i * 16 + l] = 0.0f;
    most[i] = kHidden;
  }
  const int64_t num_keys = work.cached + work.first_row + work.num_rows;
  Places<Cached> places[2];
  places[0].find(work, 0, num_keys);
  places[0].fetch(0, kKeyTile, dim);
  for (int64_t tile = 0; tile < num_keys; tile += kKeyTile) {
    const Places<Cached>& now = places[tile / kKeyTile % 2];
    const Cached *const *keys = now.keys, *const *values = now.values;
    const int count = now.count;
    Places<Cached>& next = places[tile / kKeyTile % 2 ^ 1];
    next.find(work, tile + kKeyTile, num_keys);
    for (int j = 0; j < count; j += 16) {
      int here = static_cast<int>(smaller(16, count - j));
      for (int64_t d = 0; d < dim; d += 16) {
        V rows[16];
        for (int i = 0; i < 16; i++)
          rows[i] = i < here ? load_cached(keys[j + i] + d, static_cast<int>(smaller(16, dim - d))) : set1(0.0f);
        transpose(rows, turned + j * wide + 16 * d);
      }
      next.fetch(j, j + 16, dim);
    }
    constexpr int kAll = kRows >= 8 ? kKeyTile / 16 : 1;  // as registers allow
    int j = 0;
    for (; j + 16 * (kAll - 1) < count; j += 16 * kAll) scores_of<kAll>(scaled, queries, dim, wide, turned + j * wide, scores + j);
    for (; j < count; j += 16) scores_of<1>(scaled, queries, dim, wide, turned + j * wide, scores + j);
    for (int64_t row = 0; row < work.num_rows; row++) {
      Seen seen = seen_keys(work, row, tile);
      if (seen.common_end == 0 && seen.end == seen.own_begin) continue;
      int padded = static_cast<int>(round_up(seen.end, 16));
      for (int64_t i = row * work.share; i < (row + 1) * work.share; i++) {
        float* p = scores + i * kKeyTile;
        if constexpr (Places<Cached>::kScaled)
          for (int j = 0; j < padded; j += 16) store(p + j, load(p + j) * load(now.key_scale + j));
        for (int j = seen.common_end; j < seen.own_begin; j++) p[j] = kHidden;
        for (int j = seen.end; j < padded; j++) p[j] = kHidden;
        V high = set1(most[i]);
        for (int j = 0; j < padded; j += 16) high = max(load(p + j), high);
        float peak = largest(high);
        if (peak > most[i]) {
          V shrink = exp_lanes(set1(most[i] - peak));
          for (int64_t d = 0; d < wide; d += 16) store(acc + i * wide + d, load(acc + i * wide + d) * shrink);
          store(sums + i * 16, load(sums + i * 16) * shrink);
          most[i] = peak;
        }
        V total = load(sums + i * 16);
        for (int j = 0; j < padded; j += 16) {
          V weight = exp_lanes(load(p + j) - set1(peak));
          total = total + weight;
          if constexpr (Places<Cached>::kScaled) weight = weight * load(now.value_scale + j);
          store(p + j, weight);
        }
        store(sums + i * 16, total);
      }
      int64_t i = row * work.share, end = i + work.share;
      for (; i + 3 <= end; i += 3) add_values_of<Cached, 3>(values, scores + i * kKeyTile, acc + i * wide, wide, dim, seen);
      for (; i + 2 <= end; i += 2) add_values_of<Cached, 2>(values, scores + i * kKeyTile, acc + i * wide, wide, dim, seen);
      for (; i < end; i++) add_values_of<Cached, 1>(values, scores + i * kKeyTile, acc + i * wide, wide, dim, seen);
    }
  }
  for (int64_t i = 0; i < queries; i++) {
    float* out = work.out + i / work.share * work.out_stride + i % work.share * dim;
    float total = sum(load(sums + i * 16));
    for (int64_t d = 0; d < dim; d++) out[d] = acc[i * wide + d] / total;
  }
}

void attention(const AttentionWork& work) {
  FloatMode mode;
  (void)mode;
  if (work.type == CacheType::kFloat32)
    attend<float>(work);
  else if (work.type == CacheType::kBFloat16)
    attend<uint16_t>(work);
  else
    attend<int8_t>(work);
}

}  // namespace
}  // namespace WEDLM_ISA
}  // namespace wedlm
