/* SPDX-License-Identifier: Apache-2.0 */
/* The library's only interface, for ctypes. Functions that can fail return 0 for success and write one sentence. */
#ifndef WEDLM_CAPI_H
#define WEDLM_CAPI_H
#include <stdint.h>

#define WEDLM_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct WedlmModel WedlmModel;

typedef struct {
  int32_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size;
  float rms_norm_eps;
} WedlmShape;

/* Matrices and vectors of a model. Layer -1: the model's own (EMBEDDING, HEAD, FINAL_NORM). */
enum {
  WEDLM_Q, WEDLM_K, WEDLM_V, WEDLM_O, WEDLM_GATE, WEDLM_UP, WEDLM_DOWN, WEDLM_EMBEDDING, WEDLM_HEAD,
  WEDLM_Q_BIAS, WEDLM_K_BIAS, WEDLM_V_BIAS, WEDLM_O_BIAS, WEDLM_GATE_BIAS, WEDLM_UP_BIAS, WEDLM_DOWN_BIAS,
  WEDLM_INPUT_NORM, WEDLM_POST_NORM, WEDLM_Q_NORM, WEDLM_K_NORM, WEDLM_FINAL_NORM
};

/* One forward: rows of several sequences, packed. All arrays are the caller's. */
typedef struct {
  int64_t num_rows, num_sequences;
  const int64_t *tokens, *positions;  /* [num_rows] */
  const int64_t *starts, *counts;     /* [num_sequences] */
  const int32_t* pages;               /* of all sequences, one after the other */
  const int64_t* page_offsets;        /* [num_sequences + 1] */
  const int64_t *shared, *own_start;  /* [num_rows], or both null: plain causal order */
  const int32_t* factors;             /* [num_rows], or null: none; twice the slot of the row's adapter, 0 for none, and one
                                         more for a masked row */
  void *keys, *values;                /* [layers, num_slots, kv heads, head_dim] */
  float *key_scale, *value_scale;     /* of each head in eight bits: [layers, num_slots, kv heads] */
  int32_t cache_type;                 /* 0 float32, 1 bfloat16, 2 int8 */
  int32_t page_size;
  int64_t num_slots;
  const float *cos, *sin;             /* [num_positions, head_dim / 2] */
  int64_t num_positions;
  int64_t num_logits;
  const int64_t* logits_rows;         /* [num_logits] */
  float* logits;                      /* [num_logits, vocab_size], or null: not asked for */
  /* Choices, all null or none: the largest logit of each row but for its banned ids, the lowest id where several are
     equal; entropy (nats) and log of the sum of exponentials are of all logits, banned ones included. */
  int64_t* token;                     /* [num_logits] */
  float *token_logit, *entropy, *logsumexp;
  const int64_t* banned;              /* ids, row after row */
  const int64_t* banned_offsets;      /* [num_logits + 1] */
} WedlmStep;

WEDLM_EXPORT int32_t wedlm_abi_version(void);
WEDLM_EXPORT int32_t wedlm_physical_cores(void);
/* Path i: 0 and its name, whether it runs here and what it needs; -1 if there are fewer. */
WEDLM_EXPORT int32_t wedlm_path(int32_t i, const char** name, int32_t* runs, const char** needs);

/* Null and a sentence if the path does not run here. `path` empty: the fastest. */
WEDLM_EXPORT WedlmModel* wedlm_model_new(const WedlmShape* shape, const char* path, int32_t threads, char* error, int64_t error_size);
WEDLM_EXPORT void wedlm_model_free(WedlmModel* model);
WEDLM_EXPORT const char* wedlm_model_path(const WedlmModel* model);
/* Copies and packs. `data` is the source's rows; `scale` only for INT8: [rows] floats. */
WEDLM_EXPORT int32_t wedlm_model_set_matrix(WedlmModel* model, int32_t layer, int32_t which, int32_t format, int32_t rows,
                                            int32_t cols, const void* data, const float* scale, char* error, int64_t error_size);
WEDLM_EXPORT int32_t wedlm_model_set_vector(WedlmModel* model, int32_t layer, int32_t which, int64_t size, const float* data,
                                            char* error, int64_t error_size);
/* What rows of `factors` get beside a layer's matrix `which` [O, C]: B A x, A [rank, C] and B [O, rank] in one format.
   Masked rows of an adapter that has nothing for them alone get what its other rows do. */
WEDLM_EXPORT int32_t wedlm_model_set_factors(WedlmModel* model, int32_t factors, int32_t layer, int32_t which, int32_t format,
                                             int32_t rank, const void* a, const float* a_scale, const void* b,
                                             const float* b_scale, char* error, int64_t error_size);
/* What those rows start from in place of their token's embedding: [size], the hidden size. */
WEDLM_EXPORT int32_t wedlm_model_set_start(WedlmModel* model, int32_t factors, int64_t size, const float* data, char* error,
                                           int64_t error_size);
WEDLM_EXPORT void wedlm_model_drop_factors(WedlmModel* model, int32_t factors);
/* The head is the embedding's matrix. */
WEDLM_EXPORT void wedlm_model_tie(WedlmModel* model);
WEDLM_EXPORT int64_t wedlm_model_bytes(const WedlmModel* model);
WEDLM_EXPORT int32_t wedlm_model_forward(WedlmModel* model, const WedlmStep* step, char* error, int64_t error_size);

/* Parts alone, for tests. */
WEDLM_EXPORT int32_t wedlm_test_product(const char* path, int32_t format, int32_t rows, int32_t cols, const void* data,
                                        const float* scale, int32_t num_inputs, const float* inputs, float* outputs);
WEDLM_EXPORT int32_t wedlm_test_unpack(int32_t format, int32_t rows, int32_t cols, const void* data, const float* scale, float* out);
WEDLM_EXPORT int32_t wedlm_test_norm(const char* path, const float* x, const float* weight, float eps, int64_t n, float* y);
WEDLM_EXPORT int32_t wedlm_test_rotate(const char* path, float* head, const float* cos, const float* sin, int64_t dim);
WEDLM_EXPORT int32_t wedlm_test_silu_mul(const char* path, float* gate, const float* up, int64_t n);
WEDLM_EXPORT int32_t wedlm_test_exp(const char* path, const float* x, int64_t n, float* y);

#ifdef __cplusplus
}
#endif
#endif
