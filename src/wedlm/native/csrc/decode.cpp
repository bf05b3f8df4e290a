// SPDX-License-Identifier: Apache-2.0
// A step around its forward: the rows of windows and chunks, the choice of tokens, and the windows after it. What
// algorithm/window.py, verify.py, reorder.py and select.py say in tensors, its slow twin.
#include "decode.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

#include "choice.h"

namespace {

// `masked` rows shared out over groups, one for each number of drafts that may be accepted; the last groups have one
// more where that is uneven.
struct Groups {
  int64_t first, small, size;

  Groups(int64_t num_drafts, int64_t width) {
    first = std::max<int64_t>(num_drafts, 0) + 1;
    int64_t masked = std::max<int64_t>(width - first, 0);
    small = first - masked % first;
    size = masked / first;
  }
  int64_t start(int64_t group) const { return first + group * size + std::max<int64_t>(group - small, 0); }
  int64_t of_column(int64_t column) const {
    int64_t place = column - first, in_small = small * size;
    return place < in_small ? place / size : small + (place - in_small) / (size + 1);
  }
};

int64_t leading(const uint8_t* flags, int64_t width) {
  int64_t run = 0;
  while (run < width && flags[run]) run++;
  return run;
}

int64_t final_run(const uint8_t* filled, int64_t width, bool is_block) {
  int64_t run = leading(filled, width);
  return is_block && run < width ? 0 : run;
}

}  // namespace

struct WedlmDecoder {
  int32_t vocab_size;
  int64_t mask_token_id;

  // The step's windows and what became of them, [S] and [S, C].
  std::vector<int64_t> cached, width, tokens, run, shared, choice, count, num_rows, num_drafts, emitted;
  std::vector<uint8_t> filled;
  std::vector<float> logprobs, entropy, choice_logprobs, emitted_logprobs;
  // Rows of the forward, and those with logits.
  std::vector<int64_t> row_token, row_position, row_shared, row_own, starts, counts, page_offsets;
  std::vector<int32_t> pages;
  std::vector<int32_t> row_factors;
  std::vector<int64_t> logits_rows, sequence, column, target, token, banned, banned_offsets;
  std::vector<int64_t> top_tokens;
  std::vector<float> token_logit, row_entropy, logsumexp, logits, raw, top_logprobs;

  const WedlmWindowParams& params(const WedlmDecode& step, int64_t s) const { return step.slots->params[step.slot[s]]; }

  void take_windows(const WedlmDecode& step) {
    const WedlmSlots& slots = *step.slots;
    int64_t windows = step.num_windows, capacity = slots.capacity;
    auto size = static_cast<size_t>(windows), whole = static_cast<size_t>(windows * capacity);
    for (auto* each : {&cached, &width, &run, &count, &num_rows, &num_drafts}) each->assign(size, 0);
    for (auto* each : {&tokens, &shared, &choice, &emitted}) each->assign(whole, 0);
    for (auto* each : {&logprobs, &entropy, &choice_logprobs, &emitted_logprobs}) each->assign(whole, 0.0f);
    filled.assign(whole, 0);
    for (int64_t s = 0; s < windows; s++) {
      int64_t slot = step.slot[s];
      size_t at = static_cast<size_t>(s * capacity), from = static_cast<size_t>(slot * capacity);
      auto columns = static_cast<size_t>(capacity);
      cached[static_cast<size_t>(s)] = slots.cached[slot];
      width[static_cast<size_t>(s)] = slots.width[slot];
      std::memcpy(&tokens[at], slots.tokens + from, columns * sizeof(int64_t));
      std::memcpy(&logprobs[at], slots.logprobs + from, columns * sizeof(float));
      std::memcpy(&filled[at], slots.filled + from, columns);
    }
  }

  // Extends windows by as many masked positions as they will commit, and packs the rows of all. Whether rows are hidden
  // from others.
  bool take_rows(const WedlmDecode& step) {
    for (auto* each : {&row_token, &row_position, &row_shared, &row_own, &starts, &counts, &logits_rows, &sequence, &column, &target, &banned})
      each->clear();
    pages.clear();
    row_factors.clear();
    page_offsets.assign(1, 0);
    banned_offsets.assign(1, 0);
    // Chunks first: a window may see the keys of one, and a long step runs its rows in turns.
    const int64_t *token_of = step.chunk_tokens, *position_of = step.chunk_positions;
    for (int64_t c = 0; c < step.num_chunks; c++) {
      int64_t start = step.chunk_starts[c], many = step.chunk_counts[c];
      int64_t slot = step.slot[step.num_windows + c];
      add_sequence(step, slot, start, many);
      for (int64_t i = 0; i < many; i++) add_row(*token_of++, *position_of++, 0, 0, 2 * step.slots->adapter[slot]);
    }
    bool hides = false;
    for (int64_t s = 0; s < step.num_windows; s++) hides = take_window(step, s) || hides;
    return hides;
  }

  void add_sequence(const WedlmDecode& step, int64_t slot, int64_t start, int64_t many) {
    const WedlmSlots& slots = *step.slots;
    const int32_t* table = slots.pages + slot * slots.max_pages;
    starts.push_back(start);
    counts.push_back(many);
    pages.insert(pages.end(), table, table + slots.num_pages[slot]);
    page_offsets.push_back(static_cast<int64_t>(pages.size()));
  }

  void add_row(int64_t token_id, int64_t position, int64_t sees, int64_t own, int32_t factors) {
    row_token.push_back(token_id);
    row_factors.push_back(factors);
    row_position.push_back(position);
    row_shared.push_back(sees);
    row_own.push_back(own);
  }

  bool take_window(const WedlmDecode& step, int64_t s) {
    const WedlmWindowParams& own = params(step, s);
    int64_t capacity = step.slots->capacity, &wide = width[static_cast<size_t>(s)], start = cached[static_cast<size_t>(s)];
    uint8_t* is_filled = &filled[static_cast<size_t>(s * capacity)];
    int64_t moved = 0;
    if (!own.is_verified) {
      moved = final_run(is_filled, wide, own.is_block);
      int64_t room = own.max_positions - start;
      run[static_cast<size_t>(s)] = moved;
      wide = std::min({wide + moved, std::max(room, wide), capacity});
    }
    int64_t many = std::count(is_filled, is_filled + wide, 1), drafts = std::max<int64_t>(many - 1, 0);
    num_rows[static_cast<size_t>(s)] = wide;
    num_drafts[static_cast<size_t>(s)] = own.is_verified ? drafts : 0;
    add_sequence(step, step.slot[s], start, wide);
    Groups groups(many - 1, wide);
    int64_t first = start - own.suffix_length;  // position of column 0
    bool hides = false;
    for (int filled_ones = 1; filled_ones >= 0; filled_ones--)  // filled columns before masked ones
      for (int64_t c = 0; c < wide; c++) {
        if (is_filled[c] != filled_ones) continue;
        int64_t offset = c, sees = 0, own_start = 0;
        if (own.is_verified && !filled_ones) {
          int64_t group = groups.of_column(c);
          own_start = groups.start(group);
          sees = group + 1;
          offset = c - own_start + group + 1;
          hides = true;
          shared[static_cast<size_t>(s * capacity + c)] = sees;
        }
        // Causal: the row of the last token of the leading run decides the position after it.
        bool is_next = own.is_causal && filled_ones && c == moved - 1 && moved < wide;
        if (!filled_ones || own.is_verified || is_next) add_choice(own, s, c + is_next, first + offset + filled_ones);
        add_row(filled_ones ? tokens[static_cast<size_t>(s * capacity + c)] : mask_token_id, first + offset, sees, own_start, 2 * step.slots->adapter[step.slot[s]] + !filled_ones);
      }
    return hides;
  }

  // The row that is added next has logits: column `c` is to have a token for position `position`.
  void add_choice(const WedlmWindowParams& own, int64_t s, int64_t c, int64_t position) {
    logits_rows.push_back(static_cast<int64_t>(row_token.size()));
    sequence.push_back(s);
    column.push_back(c);
    target.push_back(position);
    banned.push_back(mask_token_id);
    if (position < own.min_eos_position) banned.insert(banned.end(), own.stop_tokens, own.stop_tokens + own.num_stop_tokens);
    banned_offsets.push_back(static_cast<int64_t>(banned.size()));
  }

  bool is_sampled(const WedlmDecode& step) const {
    for (int64_t s = 0; s < step.num_windows; s++)
      if (params(step, s).temperature > 0) return true;
    return false;
  }

  int64_t most_top(const WedlmDecode& step) const {
    int64_t most = 0;
    for (int64_t s = 0; s < step.num_windows; s++) most = std::max<int64_t>(most, params(step, s).num_top);
    return std::min<int64_t>(most, vocab_size);
  }

  // The most probable tokens of the rows whose windows want them, by the logits as the model gave them.
  void take_top(WedlmDecode& step) {
    auto most = static_cast<size_t>(step.most_top);
    top_tokens.assign(logits_rows.size() * most, 0);
    top_logprobs.assign(logits_rows.size() * most, 0.0f);
    for (size_t i = 0; most && i < logits_rows.size(); i++) {
      int32_t count = std::min(params(step, sequence[i]).num_top, vocab_size);
      if (count < 1) continue;
      float* values = &top_logprobs[i * most];
      wedlm::top_tokens(&logits[i * static_cast<size_t>(vocab_size)], vocab_size, count, &top_tokens[i * most], values);
      for (int32_t j = 0; j < count; j++) values[j] -= logsumexp[i];
    }
    step.top_tokens = top_tokens.data(), step.top_logprobs = top_logprobs.data();
  }

  void tell(WedlmDecode& step) {
    step.num_logits = static_cast<int64_t>(logits_rows.size());
    step.sequence = sequence.data(), step.column = column.data(), step.target = target.data();
    step.logsumexp = logsumexp.data();
    step.cached = cached.data(), step.width = width.data(), step.tokens = tokens.data(), step.filled = filled.data();
    step.logprobs = logprobs.data(), step.run = run.data(), step.shared = shared.data();
    step.choice = choice.data(), step.entropy = entropy.data(), step.choice_logprobs = choice_logprobs.data();
    step.count = count.data(), step.num_rows = num_rows.data(), step.num_drafts = num_drafts.data();
    step.emitted = emitted.data(), step.emitted_logprobs = emitted_logprobs.data();
  }

  int32_t forward(WedlmModel* model, WedlmDecode& step, char* error, int64_t error_size) {
    take_windows(step);
    step.most_top = most_top(step);
    bool hides = take_rows(step), keeps = step.wants_logits || step.most_top || is_sampled(step);
    size_t rows = logits_rows.size(), vocabulary = static_cast<size_t>(vocab_size);
    for (auto* each : {&token_logit, &row_entropy, &logsumexp}) each->resize(rows);
    token.resize(rows);
    if (keeps && logits.size() < rows * vocabulary) logits.resize(rows * vocabulary);
    WedlmStep one = {};
    one.num_rows = static_cast<int64_t>(row_token.size());
    one.num_sequences = static_cast<int64_t>(starts.size());
    one.tokens = row_token.data(), one.positions = row_position.data();
    one.starts = starts.data(), one.counts = counts.data();
    one.pages = pages.data(), one.page_offsets = page_offsets.data();
    if (hides) one.shared = row_shared.data(), one.own_start = row_own.data();
    one.factors = row_factors.data();
    one.keys = step.keys, one.values = step.values;
    one.key_scale = step.key_scale, one.value_scale = step.value_scale;
    one.cache_type = step.cache_type, one.page_size = step.page_size, one.num_slots = step.num_slots;
    one.cos = step.cos, one.sin = step.sin, one.num_positions = step.num_positions;
    one.num_logits = static_cast<int64_t>(rows);
    one.logits_rows = logits_rows.data();
    one.logits = keeps ? logits.data() : nullptr;
    one.token = token.data(), one.token_logit = token_logit.data();
    one.entropy = row_entropy.data(), one.logsumexp = logsumexp.data();
    one.banned = banned.data(), one.banned_offsets = banned_offsets.data();
    auto began = std::chrono::steady_clock::now();
    if (wedlm_model_forward(model, &one, error, error_size)) return -1;
    step.forward_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    take_top(step);
    if (step.wants_logits == 2) raw.assign(logits.begin(), logits.begin() + static_cast<int64_t>(rows * vocabulary));
    for (size_t i = 0; keeps && i < rows; i++)
      for (int64_t b = banned_offsets[i]; b < banned_offsets[i + 1]; b++)
        logits[i * vocabulary + static_cast<size_t>(banned[static_cast<size_t>(b)])] = -std::numeric_limits<float>::infinity();
    tell(step);
    step.logits = keeps ? logits.data() : nullptr;
    step.raw_logits = step.wants_logits == 2 ? raw.data() : nullptr;
    return 0;
  }

  void choose(const WedlmDecode& step) {
    int64_t capacity = step.slots->capacity;
    for (size_t i = 0; i < logits_rows.size(); i++) {
      const WedlmWindowParams& own = params(step, sequence[i]);
      int64_t chosen = token[i];
      float logit = token_logit[i];
      if (step.wants_logits || own.temperature > 0) {
        const float* row = &logits[i * static_cast<size_t>(vocab_size)];
        chosen = wedlm::choose_token(row, vocab_size, own, target[i]);
        logit = (step.raw_logits ? step.raw_logits + i * static_cast<size_t>(vocab_size) : row)[chosen];
      }
      auto at = static_cast<size_t>(sequence[i] * capacity + column[i]);
      entropy[at] = row_entropy[i];
      // Causal: the first masked column's own row comes after the one that decided it, and is uncertain if it differs.
      if (i > 0 && sequence[i] == sequence[i - 1] && column[i] == column[i - 1]) {
        if (chosen != choice[at]) entropy[at] = std::numeric_limits<float>::infinity();
        continue;
      }
      choice[at] = chosen;
      choice_logprobs[at] = logit - logsumexp[i];
    }
  }

  void update(const WedlmDecode& step) {
    for (int64_t s = 0; s < step.num_windows; s++) {
      if (params(step, s).is_verified)
        update_verified(step, s);
      else
        update_streaming(step, s);
    }
  }

  void update_verified(const WedlmDecode& step, int64_t s) {
    const WedlmWindowParams& own = params(step, s);
    int64_t capacity = step.slots->capacity, &wide = width[static_cast<size_t>(s)], &start = cached[static_cast<size_t>(s)];
    auto first = static_cast<size_t>(s * capacity);
    if (wide <= 0) return;
    uint8_t* is_filled = &filled[first];
    int64_t* held = &tokens[first];
    const int64_t* chosen = &choice[first];
    int64_t many = std::count(is_filled, is_filled + wide, 1), accepted = 0;
    while (accepted + 1 < many && held[accepted + 1] == chosen[accepted]) accepted++;
    count[static_cast<size_t>(s)] = accepted + 1;
    std::copy(chosen, chosen + accepted + 1, &emitted[first]);
    std::copy(&choice_logprobs[first], &choice_logprobs[first] + accepted + 1, &emitted_logprobs[first]);
    start += accepted + 1;
    int64_t row_budget = own.row_budget, max_drafts = own.max_drafts, room = own.max_positions - start;
    if (own.is_adaptive) row_budget = std::min(row_budget, step.row_limit), max_drafts = std::min(max_drafts, step.most_drafts);
    // The group that foresaw what was accepted has drafts for what follows AR's token.
    Groups groups(many - 1, wide);
    int64_t begin = groups.start(accepted), end = groups.start(accepted + 1);
    int64_t drafts = 0, most = std::max<int64_t>(0, std::min(max_drafts, room - 1));
    while (drafts < most && begin + drafts + 1 < end &&
           static_cast<double>(entropy[first + static_cast<size_t>(begin + drafts + 1)]) < own.draft_entropy)
      drafts++;
    held[0] = chosen[accepted];
    for (int64_t i = 1; i <= drafts; i++) held[i] = chosen[begin + i];
    int64_t needed = drafts + 1, masked = std::min(std::min(row_budget, room) - needed, max_drafts > 0 ? needed * (max_drafts + 1) : 0);
    wide = std::max<int64_t>(0, std::min(room, needed + (masked > needed ? masked : 0)));
    for (int64_t c = 0; c < capacity; c++) is_filled[c] = c <= drafts && c < wide, logprobs[first + static_cast<size_t>(c)] = 0;
  }

  void update_streaming(const WedlmDecode& step, int64_t s) {
    const WedlmWindowParams& own = params(step, s);
    int64_t capacity = step.slots->capacity, moved = run[static_cast<size_t>(s)];
    int64_t &wide = width[static_cast<size_t>(s)], &start = cached[static_cast<size_t>(s)];
    auto first = static_cast<size_t>(s * capacity);
    // The window covers W positions again, as far as the model reaches.
    int64_t room = own.max_positions - start - moved;
    wide = wide > 0 ? std::min(std::max<int64_t>(0, std::min(own.row_budget, room)), capacity) : 0;
    start += moved;
    int64_t first_masked = -1, smallest = -1;
    double least = 0;
    bool any = false, unbroken = true;
    for (int64_t c = 0; c < capacity; c++) {
      auto to = first + static_cast<size_t>(c), from = to + static_cast<size_t>(moved);
      bool was = c + moved < capacity;
      bool was_filled = was && filled[from];
      tokens[to] = !was ? 0 : was_filled ? tokens[from] : choice[from];
      logprobs[to] = !was ? 0 : was_filled ? logprobs[from] : choice_logprobs[from];
      filled[to] = was_filled && c < wide;
      if (c >= wide || filled[to]) continue;
      if (first_masked < 0) first_masked = c;
      double uncertain = (was ? static_cast<double>(entropy[from]) : 0.0) + own.penalty * static_cast<double>(c - first_masked);
      // What is not a number counts as least certain: a step must fill something, or decoding would never end.
      if (std::isnan(uncertain)) uncertain = std::numeric_limits<double>::infinity();
      if (smallest < 0 || (uncertain < least && !own.is_causal)) smallest = c, least = uncertain;
      if (uncertain < own.threshold && unbroken)
        filled[to] = any = true;
      else
        unbroken = !own.is_causal;  // whose masked rows count up to the first that is not certain
    }
    if (!any && smallest >= 0) filled[first + static_cast<size_t>(smallest)] = 1;
    int64_t final = final_run(&filled[first], wide, own.is_block);
    count[static_cast<size_t>(s)] = final;
    std::memcpy(&emitted[first], &tokens[first], static_cast<size_t>(capacity) * sizeof(int64_t));
    std::memcpy(&emitted_logprobs[first], &logprobs[first], static_cast<size_t>(capacity) * sizeof(float));
  }

  void put(const WedlmDecode& step) const {
    const WedlmSlots& slots = *step.slots;
    auto columns = static_cast<size_t>(slots.capacity);
    for (int64_t s = 0; s < step.num_windows; s++) {
      int64_t slot = step.slot[s];
      size_t from = static_cast<size_t>(s) * columns, at = static_cast<size_t>(slot) * columns;
      slots.cached[slot] = cached[static_cast<size_t>(s)];
      slots.width[slot] = width[static_cast<size_t>(s)];
      std::memcpy(slots.tokens + at, &tokens[from], columns * sizeof(int64_t));
      std::memcpy(slots.logprobs + at, &logprobs[from], columns * sizeof(float));
      std::memcpy(slots.filled + at, &filled[from], columns);
      int64_t* told = step.results + s * (4 + slots.capacity);
      told[0] = count[static_cast<size_t>(s)], told[1] = num_rows[static_cast<size_t>(s)];
      told[2] = cached[static_cast<size_t>(s)], told[3] = num_drafts[static_cast<size_t>(s)];
      std::memcpy(told + 4, &emitted[from], static_cast<size_t>(told[0]) * sizeof(int64_t));
      std::memcpy(step.result_logprobs + from, &emitted_logprobs[from], static_cast<size_t>(told[0]) * sizeof(float));
    }
  }
};

WedlmDecoder* wedlm_decoder_new(int32_t vocab_size, int64_t mask_token_id) {
  auto* decoder = new (std::nothrow) WedlmDecoder();
  if (decoder) decoder->vocab_size = vocab_size, decoder->mask_token_id = mask_token_id;
  return decoder;
}

void wedlm_decoder_free(WedlmDecoder* decoder) { delete decoder; }

int32_t wedlm_decode_forward(WedlmDecoder* decoder, WedlmModel* model, WedlmDecode* step, char* error, int64_t error_size) {
  try {
    return decoder->forward(model, *step, error, error_size);
  } catch (const std::exception&) {  // all that this part itself can meet
    std::strncpy(error, "there is not enough memory", static_cast<size_t>(error_size));
    return -1;
  }
}

void wedlm_decode_choose(WedlmDecoder* decoder, WedlmDecode* step) { decoder->choose(*step); }

void wedlm_decode_update(WedlmDecoder* decoder, WedlmDecode* step) { decoder->update(*step); }

void wedlm_decode_put(WedlmDecoder* decoder, const WedlmDecode* step) { decoder->put(*step); }

int32_t wedlm_decode_step(WedlmDecoder* decoder, WedlmModel* model, WedlmDecode* step, char* error, int64_t error_size) {
  if (wedlm_decode_forward(decoder, model, step, error, error_size)) return -1;
  decoder->choose(*step);
  decoder->update(*step);
  decoder->put(*step);
  return 0;
}

void wedlm_choose(int32_t vocab_size, int64_t rows, const float* logits, const WedlmWindowParams* params, const int64_t* position,
                  int64_t* token) {
  for (int64_t i = 0; i < rows; i++) token[i] = wedlm::choose_token(logits + i * vocab_size, vocab_size, params[i], position[i]);
}

void wedlm_top(int32_t vocab_size, int64_t rows, const float* logits, int32_t count, int64_t* tokens, float* values) {
  for (int64_t i = 0; i < rows; i++) wedlm::top_tokens(logits + i * vocab_size, vocab_size, count, tokens + i * count, values + i * count);
}
