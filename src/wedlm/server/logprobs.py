# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities in OpenAI's two forms. A token's text is what it decodes to alone; a part of a character is shown
as U+FFFD and has no bytes. -inf, which JSON does not have, becomes OpenAI's -9999."""

from collections.abc import Callable, Sequence
from typing import Any

from wedlm.engine.request import TopLogprobs

Decode = Callable[[list[int]], str]
LOWEST = -9999.0


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[TopLogprobs], decode: Decode
) -> dict[str, Any]:
    """For a chat: an object per token; ``top`` may be empty."""
    entries = []
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        ranked = [_entry(other, value, decode) for other, value in (top[i] if top else ())]
        entries.append({**_entry(token, logprob, decode), "top_logprobs": ranked})
    return {"content": entries, "refusal": None}


def text_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[TopLogprobs],
    offsets: Sequence[int],
    decode: Decode,
) -> dict[str, Any]:
    """For a completion: parallel lists; ``offsets``, in characters, are where the tokens' texts begin."""
    ranked: list[dict[str, float]] | None = None
    if top:
        ranked = [_by_text(one, decode) for one in top]
    return {
        "tokens": [decode([token]) for token in tokens],
        "token_logprobs": [max(logprob, LOWEST) for logprob in logprobs],
        "top_logprobs": ranked,
        "text_offset": list(offsets),
    }


def _by_text(top: TopLogprobs, decode: Decode) -> dict[str, float]:
    """If two tokens are spelled alike, the likelier one keeps the text; the others are called "token_id:" and
    their id."""
    found: dict[str, float] = {}
    for token, value in top:
        text = decode([token])
        found[f"token_id:{token}" if text in found else text] = max(value, LOWEST)
    return found


def _entry(token: int, logprob: float, decode: Decode) -> dict[str, Any]:
    text = decode([token])
    return {
        "token": text,
        "logprob": max(logprob, LOWEST),
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }
