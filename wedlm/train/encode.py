# SPDX-License-Identifier: Apache-2.0
"""Samples to token ids, each with the flag that says whether it is to be learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wedlm.model.tokenizer import Tokenizer
from wedlm.train.sources import Sample, SampleError

DEFAULT_END_TOKENS = 8


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSample:
    """One document: ``tokens`` int32 [n] and ``trainable`` bool [n], whether a token may be masked and is learned."""

    tokens: np.ndarray
    trainable: np.ndarray


class TemplateRewritesError(SampleError):
    """The chat template renders a reply differently once the conversation goes on (Qwen3's drops its thinking part)."""


class _Span(NamedTuple):
    """Characters of a rendered conversation: what the model is to write after a prompt."""

    start: int
    end: int


def encode_documents(
    sample: Sample, tokenizer: Tokenizer, *, num_end_tokens: int = DEFAULT_END_TOKENS, eos_token_id: int
) -> list[EncodedSample]:
    """The documents of a sample: one, or one for each reply where the template rewrites earlier replies.

    Such a template shows the model another history in every turn, so that no single sequence holds them all; each of
    those documents learns its last reply alone. Raises SampleError as ``encode`` does.
    """
    try:
        return [encode(sample, tokenizer, num_end_tokens=num_end_tokens, eos_token_id=eos_token_id)]
    except TemplateRewritesError:
        messages = sample.messages or ()
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        return [
            _encode_chat(sample.origin, messages[: reply + 1], [reply], tokenizer, num_end_tokens, eos_token_id)
            for reply in replies
        ]


def encode(
    sample: Sample, tokenizer: Tokenizer, *, num_end_tokens: int = DEFAULT_END_TOKENS, eos_token_id: int
) -> EncodedSample:
    """A sample as one document.

    Text: what the tokenizer puts before a text (BOS, in models that have one; not learned), the text and one end token.
    Chat: the conversation up to its last reply as the chat template writes it, with the tokens that inference sees: a
    prompt's, then the reply's. Trainable are the replies, each with the token that ends its turn. After the last one
    ``eos_token_id`` is repeated until ``num_end_tokens`` (at least 1) end tokens stand there, so that rows past the end
    are trained, too. Raises SampleError naming file and line.
    """
    if num_end_tokens < 1:
        raise ValueError(f"num_end_tokens is {num_end_tokens}; expected at least 1")
    if not 0 <= eos_token_id < tokenizer.vocab_size:
        raise ValueError(f"eos_token_id is {eos_token_id}; expected an id from 0 to {tokenizer.vocab_size - 1}")
    if sample.messages is None:
        assert sample.text is not None, "a sample has messages or text"
        return _encode_text(sample.text, tokenizer, eos_token_id)
    last = max(number for number, message in enumerate(sample.messages) if message["role"] == "assistant")
    messages = sample.messages[: last + 1]
    replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return _encode_chat(sample.origin, messages, replies, tokenizer, num_end_tokens, eos_token_id)


def _encode_text(text: str, tokenizer: Tokenizer, eos_token_id: int) -> EncodedSample:
    encoding = tokenizer.backend.encode(text, add_special_tokens=True)
    tokens = list(encoding.ids)
    trainable = [not added for added in encoding.special_tokens_mask]
    if tokens and tokens[-1] == eos_token_id and not trainable[-1]:  # a post-processor that adds the end itself
        tokens, trainable = tokens[:-1], trainable[:-1]
    return _document([*tokens, eos_token_id], [*trainable, True])


def _encode_chat(
    origin: str,
    messages: Sequence[dict[str, str]],
    replies: Sequence[int],
    tokenizer: Tokenizer,
    num_end_tokens: int,
    eos_token_id: int,
) -> EncodedSample:
    """``messages`` end with a reply; ``replies`` are the indices of those to learn, the last message's included."""
    text, spans = _render(origin, messages, replies, tokenizer)
    borders = [border for span in spans for border in span]
    lengths = _token_borders(tokenizer, text, borders)
    tokens = lengths.tokens
    trainable = [False] * len(tokens)
    ends = tokenizer.special_ids | {eos_token_id}
    stop, closed = 0, False
    for start, end in zip(lengths.borders[::2], lengths.borders[1::2], strict=True):
        stop, closed = _end_of_turn(tokenizer, tokens, start, end, ends)
        written = tokens[start : stop - 1] if closed else tokens[start:stop]
        if eos_token_id in written or (closed and tokens[stop - 1] in written):
            raise SampleError("end token in a reply", f"{origin}: a reply contains an end token; expected it without")
        trainable[start:stop] = [True] * (stop - start)
    added = num_end_tokens - closed
    return _document(tokens[:stop] + [eos_token_id] * added, trainable[:stop] + [True] * added)


def _document(tokens: Sequence[int], trainable: Sequence[bool]) -> EncodedSample:
    return EncodedSample(np.array(tokens, dtype=np.int32), np.array(trainable, dtype=np.bool_))


def _render(
    origin: str, messages: Sequence[dict[str, str]], replies: Sequence[int], tokenizer: Tokenizer
) -> tuple[str, list[_Span]]:
    """The conversation as text and where in it the replies stand."""

    if not tokenizer.has_chat_template:  # a fault of the run, not of the sample
        raise ValueError(
            f"{origin} is a conversation and this model's tokenizer has no chat template; expected plain text, or an "
            "instruct model"
        )

    def rendered(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], add_generation_prompt=prompt)
        except ValueError as error:
            raise SampleError("refused by the template", f"{origin}: {error}") from error

    text = rendered(len(messages), False)
    spans = []
    for reply in replies:
        before = rendered(reply, True)
        through = text if reply == len(messages) - 1 else rendered(reply + 1, False)
        if not text.startswith(before) or not text.startswith(through) or len(through) <= len(before):
            raise TemplateRewritesError(
                "rewritten by the template",
                f"{origin}: the chat template renders message {reply + 1} differently where the conversation goes on; "
                "expected a template whose every rendering is a prefix of the longer ones",
            )
        spans.append(_Span(len(before), len(through)))
    return text, spans


class _Tokenised(NamedTuple):
    tokens: list[int]
    borders: list[int]  # number of tokens before each border


def _token_borders(tokenizer: Tokenizer, text: str, borders: Sequence[int]) -> _Tokenised:
    """Tokens of ``text`` up to its last border, such that no token crosses one of the ``borders`` (in characters)."""

    def ids(start: int, end: int) -> list[int]:
        return tokenizer.encode(text[start:end], add_special_tokens=False)

    whole = ids(0, borders[-1])
    pieces = [ids(start, end) for start, end in zip([0, *borders], borders, strict=False)]
    joined = [token for piece in pieces for token in piece]
    if joined == whole:
        return _Tokenised(joined, [int(length) for length in np.cumsum([len(piece) for piece in pieces])])
    # Either a token of the whole crosses a border, or the tokenizer writes the beginning of a text in a special way
    # (SentencePiece's leading space). A prompt is tokenised whole in inference, so each border is tried like that. A
    # reply that would merge with its header is cut there; in the prompts of later turns inference has it merged.
    tokens: list[int] = []
    lengths = []
    for piece, border in zip(pieces, borders, strict=True):
        longer = ids(0, border)
        tokens = longer if longer[: len(tokens)] == tokens else tokens + piece
        lengths.append(len(tokens))
    return _Tokenised(tokens, lengths)


def _end_of_turn(
    tokenizer: Tokenizer, tokens: Sequence[int], start: int, end: int, ends: frozenset[int]
) -> tuple[int, bool]:
    """Where the reply tokens[start:end] stops: behind the special token that ends it, if white space at most follows.

    Without such a token (second value False) the reply is all of it.
    """
    stop = end
    while stop > start and tokens[stop - 1] not in ends and not tokenizer.decode([tokens[stop - 1]]).strip():
        stop -= 1
    return (stop, True) if stop > start and tokens[stop - 1] in ends else (end, False)
