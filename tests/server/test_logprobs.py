# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of completions: tokens that are spelled alike stay apart."""

from wedlm.server.logprobs import text_logprobs


def test_tokens_that_are_spelled_alike_keep_their_entries():
    spelled = {1: "a", 2: "\ufffd", 3: "\ufffd", 4: "\ufffd"}
    top = [[(2, -0.5), (1, -1.0), (3, -2.0), (4, float("-inf"))]]
    found = text_logprobs([2], [-0.5], top, [0], lambda ids: "".join(spelled[i] for i in ids))
    assert found["top_logprobs"] == [{"\ufffd": -0.5, "a": -1.0, "token_id:3": -2.0, "token_id:4": -9999.0}]
