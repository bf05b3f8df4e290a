/* SPDX-License-Identifier: Apache-2.0 */
/* The part of the C interface that is around a forward: rows of windows, choice of tokens, and the windows after it. */
#ifndef WEDLM_DECODE_H
#define WEDLM_DECODE_H
#include <stdint.h>

#include "capi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct WedlmDecoder WedlmDecoder;

/* DecodeParams of one window (algorithm/params.py). */
typedef struct {
  int64_t row_budget, max_drafts, max_positions, min_eos_position;
  int64_t suffix_length; /* cached tokens that stand after the window */
  double threshold, penalty, draft_entropy; /* threshold: minus infinity fills one position */
  double top_p;
  int64_t top_k, seed;
  float temperature;
  int32_t is_verified, is_block, is_causal, is_adaptive;
  int32_t num_top; /* the most probable tokens that are told of each row */
  const int64_t* stop_tokens;
  int64_t num_stop_tokens;
} WedlmWindowParams;

/* What persists between steps, by slot: [num_slots, capacity] or [num_slots]. The caller's; a step changes windows only
   in its last part. */
typedef struct {
  int64_t capacity, max_pages;
  int64_t *cached, *width, *tokens;
  uint8_t* filled;
  float* logprobs;
  const WedlmWindowParams* params;
  const int32_t* pages;  /* [num_slots, max_pages] */
  const int64_t* num_pages;
  const int32_t* adapter; /* slots of adapters, 0 for none */
} WedlmSlots;

/* One step: windows, and chunks that run before them; a window sees the keys of its slot's chunk. Memory of what is asked
   for is the caller's, of what is told the decoder's until its next step. [S, C] is by window and column, [L] by row with logits. */
typedef struct {
  const WedlmSlots* slots;
  int64_t num_windows, num_chunks;
  const int64_t* slot;                         /* [windows + chunks] */
  const int64_t *chunk_starts, *chunk_counts;  /* [chunks] */
  const int64_t *chunk_tokens, *chunk_positions; /* of all chunks, one after the other */
  int64_t row_limit, most_drafts;              /* what adaptive windows are left */
  int32_t wants_logits;                        /* 1: all rows' logits are kept, to be changed before the choice; 2: as they were, too */
  void *keys, *values;                         /* as in WedlmStep */
  float *key_scale, *value_scale;
  int32_t cache_type, page_size;
  int64_t num_slots;
  const float *cos, *sin;
  int64_t num_positions;
  /* Told by wedlm_decode_put, the caller's memory: tokens that became final, rows, cached tokens, drafts and the first of
     those tokens [S, 4 + capacity]; their log-probabilities [S, capacity]. */
  int64_t* results;
  float* result_logprobs;
  /* Told by wedlm_decode_forward. */
  double forward_s; /* what wedlm_model_forward took */
  int64_t num_logits;
  int64_t *sequence, *column, *target; /* [L] */
  float *logits, *raw_logits;          /* [L, V], or null */
  float* logsumexp;                    /* [L] */
  int64_t most_top;                    /* largest num_top of the windows: T */
  int64_t* top_tokens;                 /* [L, T], the most probable first; a row has those of its window's num_top */
  float* top_logprobs;                 /* of the logits as they were */
  /* The windows of the step [S] and [S, C]: as the forward has them, and after wedlm_decode_update as it left them. */
  int64_t *cached, *width, *tokens;
  uint8_t* filled;
  float* logprobs;
  int64_t *run, *shared;
  /* Told by wedlm_decode_choose [S, C], and taken by wedlm_decode_update. */
  int64_t* choice;
  float *entropy, *choice_logprobs;
  /* Told by wedlm_decode_update: tokens that became final, rows and drafts [S]; [S, C]. */
  int64_t *count, *num_rows, *num_drafts, *emitted;
  float* emitted_logprobs;
} WedlmDecode;

WEDLM_EXPORT WedlmDecoder* wedlm_decoder_new(int32_t vocab_size, int64_t mask_token_id);
WEDLM_EXPORT void wedlm_decoder_free(WedlmDecoder* decoder);
/* The parts of a step, in order; the first can fail, as wedlm_model_forward does, and then nothing has changed. */
WEDLM_EXPORT int32_t wedlm_decode_forward(WedlmDecoder* decoder, WedlmModel* model, WedlmDecode* step, char* error, int64_t error_size);
WEDLM_EXPORT void wedlm_decode_choose(WedlmDecoder* decoder, WedlmDecode* step);
WEDLM_EXPORT void wedlm_decode_update(WedlmDecoder* decoder, WedlmDecode* step);
/* The windows back to their slots, and the results. */
WEDLM_EXPORT void wedlm_decode_put(WedlmDecoder* decoder, const WedlmDecode* step);
/* All of them. */
WEDLM_EXPORT int32_t wedlm_decode_step(WedlmDecoder* decoder, WedlmModel* model, WedlmDecode* step, char* error, int64_t error_size);
/* The choice in `rows` rows of logits [rows, V]: as of `params` for `position` [rows]. */
WEDLM_EXPORT void wedlm_choose(int32_t vocab_size, int64_t rows, const float* logits, const WedlmWindowParams* params,
                               const int64_t* position, int64_t* token);
/* The `count` largest logits of each of `rows` rows [rows, V] and their tokens, both [rows, count]. */
WEDLM_EXPORT void wedlm_top(int32_t vocab_size, int64_t rows, const float* logits, int32_t count, int64_t* tokens, float* values);

#ifdef __cplusplus
}
#endif
#endif
