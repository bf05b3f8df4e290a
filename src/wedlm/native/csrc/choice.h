// SPDX-License-Identifier: Apache-2.0
// The token of one row of logits: the largest, or a random one by the row's key.
#pragma once
#include <cstdint>

#include "decode.h"

namespace wedlm {

// As algorithm/sample.py's choose_tokens: `params` says how, the noise is a function of its seed, `position` and the
// token. Of equal tokens the lowest.
int64_t choose_token(const float* logits, int32_t vocab_size, const WedlmWindowParams& params, int64_t position);

// The `count` (1 to vocab_size) largest logits and their tokens, the largest first; of equal ones the lowest token first.
void top_tokens(const float* logits, int32_t vocab_size, int32_t count, int64_t* tokens, float* values);

}  // namespace wedlm
