# SPDX-License-Identifier: Apache-2.0
"""Turn samples into token ids, each with a flag that says whether it should be learned.

The encoding of a sample is written once, as a generator that yields the texts whose tokens it needs (``_Texts``) and is
sent their encodings. A single sample is answered text by text; in a batch, all that wait are answered together.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import Encoding

from wedlm.model.formats.control_tokens import ChatPrompt
from wedlm.model.formats.tokenizer import Tokenizer
from wedlm.train.sources import Sample, SampleError

DEFAULT_END_TOKENS = 8


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSample:
    """One document: ``tokens`` int32 [n] and ``trainable`` bool [n], whether a token may be masked and is learned."""

    tokens: np.ndarray
    trainable: np.ndarray


class TemplateRewritesError(SampleError):
    """The chat template renders a reply differently in a longer conversation (Qwen3's drops its thinking part)."""


class _Span(NamedTuple):
    """Characters of a rendered conversation: what the model should write after a prompt."""

    start: int
    end: int


class _Texts(NamedTuple):
    """A request for an Encoding of each of these texts, in this order."""

    texts: Sequence[str]
    add_special_tokens: bool


_T = TypeVar("_T")
_Steps = Generator[_Texts, Any, _T]  # is sent a list[Encoding] for each _Texts, and None to start


def encode_documents(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    num_end_tokens: int = DEFAULT_END_TOKENS,
    eos_token_id: int,
    last_message: bool = False,
) -> list[EncodedSample]:
    """The documents of a sample: one, or one for each reply if the template rewrites earlier replies.

    Such a template shows the model another history in every turn, so no single sequence holds them all; each of those
    documents only learns its last reply. With ``last_message`` conversations are encoded as in the original
    (``_encode_last_message``). Raises SampleError like ``encode``.
    """
    return _alone(_documents(sample, tokenizer, num_end_tokens, eos_token_id, last_message), tokenizer)


def encode(
    sample: Sample, tokenizer: Tokenizer, *, num_end_tokens: int = DEFAULT_END_TOKENS, eos_token_id: int
) -> EncodedSample:
    """Encode a sample as one document.

    Text: what the tokenizer puts before a text (BOS, in models that have one; not learned), the text, in which the
    spelling of a control token is ordinary text, and one end token.

    Chat: the conversation up to its last reply as the chat template writes it, with the tokens that inference sees,
    first a prompt's, then the reply's; a control token that a message spells is ordinary text. Trainable are the
    replies, each with the token that ends its turn, which they must not spell themselves. After the last one, if it is
    finished, ``eos_token_id`` is repeated until there are ``num_end_tokens`` (at least 1) end tokens, so that rows past
    the end are trained, too. Raises SampleError naming file and line.
    """
    return _alone(_one_document(sample, tokenizer, num_end_tokens, eos_token_id), tokenizer)


def encode_batch(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    num_end_tokens: int = DEFAULT_END_TOKENS,
    eos_token_id: int,
    last_message: bool = False,
) -> list[list[EncodedSample] | ValueError]:
    """``encode_documents`` for each sample, or its error, on the cores that ``tokenizers`` may use.

    What all samples request at one time is tokenised together. All of it is in memory at once, some hundred bytes per
    token.
    """
    going = {
        number: _documents(sample, tokenizer, num_end_tokens, eos_token_id, last_message)
        for number, sample in enumerate(samples)
    }
    results: dict[int, list[EncodedSample] | ValueError] = {}
    given: dict[int, list[Encoding]] = {}
    while going:
        wanted: dict[int, _Texts] = {}
        for number, steps in going.items():
            try:
                wanted[number] = steps.send(given.pop(number, None))
            except StopIteration as end:
                results[number] = end.value
            except ValueError as error:
                results[number] = error.with_traceback(None)  # whose frames would keep the batch in memory
        going = {number: going[number] for number in wanted}
        given = _encodings(tokenizer, wanted)
    return [results[number] for number in range(len(samples))]


def _encodings(tokenizer: Tokenizer, wanted: Mapping[int, _Texts]) -> dict[int, list[Encoding]]:
    given: dict[int, list[Encoding]] = {}
    for special in (False, True):
        chosen = {number: one.texts for number, one in wanted.items() if one.add_special_tokens == special}
        texts = list(chain.from_iterable(chosen.values()))
        # "Fast" leaves out where in the text each token stands, which is not needed here.
        encodings = iter(tokenizer.backend.encode_batch_fast(texts, add_special_tokens=special))
        given |= {number: list(islice(encodings, len(some))) for number, some in chosen.items()}
    return given


def _alone(steps: _Steps[_T], tokenizer: Tokenizer) -> _T:
    given: list[Encoding] | None = None
    while True:
        try:
            texts, special = steps.send(given)
        except StopIteration as end:
            return end.value
        given = [tokenizer.backend.encode(text, add_special_tokens=special) for text in texts]


def _documents(
    sample: Sample, tokenizer: Tokenizer, num_end_tokens: int, eos_token_id: int, last_message: bool
) -> _Steps[list[EncodedSample]]:
    if last_message and sample.messages is not None:
        return [(yield from _encode_last_message(sample, tokenizer, num_end_tokens, eos_token_id))]
    try:
        return [(yield from _one_document(sample, tokenizer, num_end_tokens, eos_token_id))]
    except TemplateRewritesError:
        messages = sample.messages or ()
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    documents = []
    for reply in replies:
        messages_so_far = messages[: reply + 1]
        last = reply == replies[-1]
        ends = 0 if sample.unfinished and last else num_end_tokens
        steps = _encode_chat(sample.origin, messages_so_far, [reply], tokenizer, ends, eos_token_id)
        documents.append((yield from steps))
    return documents


def _one_document(
    sample: Sample, tokenizer: Tokenizer, num_end_tokens: int, eos_token_id: int
) -> _Steps[EncodedSample]:
    if num_end_tokens < 1:
        raise ValueError(f"num_end_tokens is {num_end_tokens}; expected at least 1")
    if not 0 <= eos_token_id < tokenizer.vocab_size:
        raise ValueError(f"eos_token_id is {eos_token_id}; expected an id from 0 to {tokenizer.vocab_size - 1}")
    if sample.messages is None:
        assert sample.text is not None, "a sample has messages or text"
        return (yield from _encode_text(tokenizer.plain_text(sample.text), eos_token_id))
    last = max(number for number, message in enumerate(sample.messages) if message["role"] == "assistant")
    messages = sample.messages[: last + 1]
    replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    ends = 0 if sample.unfinished else num_end_tokens
    return (yield from _encode_chat(sample.origin, messages, replies, tokenizer, ends, eos_token_id))


def _encode_text(text: ChatPrompt, eos_token_id: int) -> _Steps[EncodedSample]:
    first, *others = text.pieces()
    (encoding,) = yield _Texts([first], add_special_tokens=True)
    tokens = list(encoding.ids)
    trainable = [not added for added in encoding.special_tokens_mask]
    if tokens and tokens[-1] == eos_token_id and not trainable[-1]:  # a post-processor that adds the end itself
        tokens, trainable = tokens[:-1], trainable[:-1]
    if others:
        for encoding in (yield _Texts(others, add_special_tokens=False)):
            tokens += encoding.ids
            trainable += [True] * len(encoding.ids)
    return _document([*tokens, eos_token_id], [*trainable, True])


def _encode_chat(
    origin: str,
    messages: Sequence[dict[str, str]],
    replies: Sequence[int],
    tokenizer: Tokenizer,
    num_end_tokens: int,
    eos_token_id: int,
) -> _Steps[EncodedSample]:
    """``messages`` end with a reply; ``replies`` are the indices of those to learn, including the last message's.

    With ``num_end_tokens`` 0 the last reply has no end.
    """
    prompt, spans = _render(origin, messages, replies, tokenizer)
    borders = [border for span in spans for border in span]
    lengths = yield from _token_borders(prompt, borders)
    tokens = lengths.tokens
    trainable = [False] * len(tokens)
    ends = tokenizer.special_ids | {eos_token_id}
    stop, closed = 0, False
    for span, start, end in zip(spans, lengths.borders[::2], lengths.borders[1::2], strict=True):
        stop, closed = _end_of_turn(tokenizer, tokens, start, end, ends)
        written = tokens[start : stop - 1] if closed else tokens[start:stop]
        final = {eos_token_id, tokens[stop - 1]} if closed else {eos_token_id}
        if not final.isdisjoint(written) or _spells(tokenizer, prompt, span, final):
            raise SampleError("end token in a reply", f"{origin}: a reply contains an end token; expected it without")
        trainable[start:stop] = [True] * (stop - start)
    if not num_end_tokens:
        stop = start + len(written)
    added = max(num_end_tokens - closed, 0)
    return _document(tokens[:stop] + [eos_token_id] * added, trainable[:stop] + [True] * added)


def _encode_last_message(
    sample: Sample, tokenizer: Tokenizer, num_end_tokens: int, eos_token_id: int
) -> _Steps[EncodedSample]:
    """Encode a conversation as the original's code does: everything that the template writes, including a line feed
    after the last end; trainable from the length of the prompt of all messages except the last, whoever wrote that one;
    then ``num_end_tokens`` - 1 times <|im_end|>, or ``eos_token_id`` if there is no such token."""
    if sample.unfinished:
        raise SampleError(
            "unfinished",
            f"{sample.origin} is unfinished; expected trainable_messages replies, since last learns an end",
        )
    messages = sample.messages or ()
    whole = _chat_prompt(sample.origin, messages, tokenizer, False)
    before = _chat_prompt(sample.origin, messages[:-1], tokenizer, True)
    (tokens,) = yield from _ids(whole, [(0, len(whole.text))])
    (prompt,) = yield from _ids(before, [(0, len(before.text))])
    end = tokenizer.token_id("<|im_end|>")
    added = [eos_token_id if end is None else end] * (num_end_tokens - 1)
    learnt = [number >= len(prompt) for number in range(len(tokens))]
    return _document(tokens + added, learnt + [True] * len(added))


def _chat_prompt(origin: str, messages: Sequence[dict[str, str]], tokenizer: Tokenizer, prompt: bool) -> ChatPrompt:
    if not tokenizer.has_chat_template:  # a fault of the run, not of the sample
        raise ValueError(
            f"{origin} is a conversation and this model's tokenizer has no chat template; expected plain text, or an "
            "instruct model"
        )
    try:
        return tokenizer.chat_prompt(messages, add_generation_prompt=prompt)
    except ValueError as error:
        raise SampleError("refused by the template", f"{origin}: {error}") from error


def _document(tokens: Sequence[int], trainable: Sequence[bool]) -> EncodedSample:
    return EncodedSample(np.array(tokens, dtype=np.int32), np.array(trainable, dtype=np.bool_))


def _render(
    origin: str, messages: Sequence[dict[str, str]], replies: Sequence[int], tokenizer: Tokenizer
) -> tuple[ChatPrompt, list[_Span]]:
    """The conversation as it will be encoded, and where the replies are in it."""

    def rendered(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], add_generation_prompt=prompt)
        except ValueError as error:
            raise SampleError("refused by the template", f"{origin}: {error}") from error

    whole = _chat_prompt(origin, messages, tokenizer, False)
    text = whole.text
    spans = []
    for reply in replies:
        before = rendered(reply, True)
        through = text if reply == len(messages) - 1 else rendered(reply + 1, False)
        if not text.startswith(before) or not text.startswith(through) or len(through) <= len(before):
            raise TemplateRewritesError(
                "rewritten by the template",
                f"{origin}: the chat template renders message {reply + 1} differently when the conversation continues; "
                "expected a template whose every rendering is a prefix of the longer ones",
            )
        spans.append(_Span(len(before), len(through)))
    return whole, spans


class _Tokenised(NamedTuple):
    tokens: list[int]
    borders: list[int]  # number of tokens before each border


def _ids(prompt: ChatPrompt, spans: Sequence[tuple[int, int]]) -> _Steps[list[list[int]]]:
    """The tokens of each of these spans of the prompt's text."""
    parts = [prompt.pieces(start, end) for start, end in spans]
    encodings = iter((yield _Texts([piece for part in parts for piece in part], add_special_tokens=False)))
    return [[token for encoding in islice(encodings, len(part)) for token in encoding.ids] for part in parts]


def _token_borders(prompt: ChatPrompt, borders: Sequence[int]) -> _Steps[_Tokenised]:
    """Tokens of the text up to its last border, such that no token crosses one of the ``borders`` (in characters)."""
    parts = list(zip([0, *borders], borders, strict=False))
    whole, *pieces = yield from _ids(prompt, [(0, borders[-1]), *parts])
    joined = [token for piece in pieces for token in piece]
    if joined == whole:
        return _Tokenised(joined, [int(length) for length in np.cumsum([len(piece) for piece in pieces])])
    # Either a token of the whole crosses a border, or the tokenizer writes the beginning of a text in a special way
    # (SentencePiece's leading space). A prompt is tokenised whole in inference, so each border is tried like that. A
    # reply that would merge with its header is cut there; in the prompts of later turns inference has it merged.
    tokens: list[int] = []
    lengths = []
    for piece, border in zip(pieces, borders, strict=True):
        # One at a time: of a long conversation, all of them together would be many times as long as it is.
        (longer,) = yield from _ids(prompt, [(0, border)])
        tokens = longer if longer[: len(tokens)] == tokens else tokens + piece
        lengths.append(len(tokens))
    return _Tokenised(tokens, lengths)


def _spells(tokenizer: Tokenizer, prompt: ChatPrompt, span: _Span, ids: Iterable[int]) -> bool:
    """Whether the span contains one of these tokens in ordinary letters, which should not be learned."""
    cuts = [cut for cut in prompt.cuts if span.start < cut < span.end]
    spellings = [tokenizer.backend.id_to_token(token_id) or "" for token_id in ids] if cuts else []
    return any(
        spelling and spelling in prompt.text[max(span.start, cut - len(spelling)) : min(span.end, cut + len(spelling))]
        for cut in cuts
        for spelling in spellings
    )


def _end_of_turn(
    tokenizer: Tokenizer, tokens: Sequence[int], start: int, end: int, ends: frozenset[int]
) -> tuple[int, bool]:
    """Where the reply tokens[start:end] stops: after the special token that ends it, if at most white space follows.

    Without such a token (second value False) the reply is all of it.
    """
    stop = end
    while stop > start and tokens[stop - 1] not in ends and not tokenizer.decode([tokens[stop - 1]]).strip():
        stop -= 1
    return (stop, True) if stop > start and tokens[stop - 1] in ends else (end, False)
