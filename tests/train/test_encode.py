# SPDX-License-Identifier: Apache-2.0
"""Samples to tokens: what is learned are the replies and their ends, and prompts are those that inference sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.chat_data import CHATML, OPEN_ENDED, THINKING, chat, chat_tokenizer, metaspace_tokenizer
from wedlm.model import Tokenizer, load_tokenizer
from wedlm.train.encode import TemplateRewritesError, encode, encode_batch, encode_documents
from wedlm.train.sources import Sample, SampleError

TOKENIZER = chat_tokenizer()
END = TOKENIZER.token_id("<|im_end|>")
DEMO = pytest.param("demo", marks=pytest.mark.demo_model)
TEXTS = st.text(st.sampled_from("ab 1é🙂\n.<|你"), min_size=1, max_size=12).filter(str.strip)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)

# Refuses some conversations, rewrites others and has no prompt that is a prefix for a third kind.
FICKLE = "{% if '1' in messages[0].content %}{{ raise_exception('no 1 please') }}{% endif %}" + THINKING.replace(
    "assistant\n' }}{% endif", "' + ('tutor' if 'é' in messages[0].content else 'assistant\n') }}{% endif"
)
TOKENIZERS = {
    "chatml": TOKENIZER,
    "thinking": chat_tokenizer(THINKING),
    "fickle": chat_tokenizer(FICKLE),
    "open-ended": chat_tokenizer(OPEN_ENDED),
    "no template": chat_tokenizer(None),
    "metaspace": metaspace_tokenizer(),
}
# Line feeds at its beginning merge with the header of a reply.
PIECES = st.sampled_from(["a", "b ", "1", "é🙂", "\n", "\n\n", "你", "<s>", "<|im_end|>", "<|unused|>", "</s>", "<|"])
PIECED = st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(str.strip)


@st.composite
def any_samples(draw) -> list[Sample]:
    """Texts and conversations, some ending with a question; many of them cannot be encoded."""
    samples = []
    for line in range(1, 1 + draw(st.integers(0, 8))):
        if draw(st.booleans()):
            samples.append(Sample("f.jsonl", line, text=draw(PIECED)))
        else:
            contents = draw(st.lists(PIECED, min_size=2, max_size=7))
            messages = chat(*contents, system=draw(st.sampled_from([None, "", "Be kind."])))
            samples.append(Sample("f.jsonl", line, messages=tuple(messages)))
    return samples


def of_chat(*contents: str, system: str | None = None) -> Sample:
    return Sample("f.jsonl", 3, messages=tuple(chat(*contents, system=system)))


def runs(encoded) -> list[tuple[int, int]]:
    """Maximal trainable spans."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], encoded.trainable.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def decoded(tokenizer: Tokenizer, tokens) -> str:
    return tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


def prompt_ids(tokenizer: Tokenizer, messages) -> list[int]:
    """What ``LLM.chat_prompt`` gives."""
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


@given(CONVERSATIONS, st.booleans(), st.integers(1, 9))
def test_learned_are_exactly_the_replies_and_their_ends(turns, system, num_end_tokens):
    sample = of_chat(*(text for turn in turns for text in turn), system="Be kind." if system else None)
    encoded = encode(sample, TOKENIZER, num_end_tokens=num_end_tokens, eos_token_id=END)
    assert encoded.tokens.dtype == np.int32
    assert encoded.trainable.dtype == np.bool_
    learned = [decoded(TOKENIZER, encoded.tokens[a:b]) for a, b in runs(encoded)]
    ends = [1] * (len(turns) - 1) + [num_end_tokens]
    assert learned == [reply + "<|im_end|>" * count for (_, reply), count in zip(turns, ends, strict=True)]
    whole = TOKENIZER.apply_chat_template(sample.messages, add_generation_prompt=False)
    assert decoded(TOKENIZER, encoded.tokens) == whole.removesuffix("\n") + "<|im_end|>" * (num_end_tokens - 1)


@given(CONVERSATIONS)
def test_the_first_prompt_is_that_of_inference(turns):
    sample = of_chat(*(text for turn in turns for text in turn))
    encoded = encode(sample, TOKENIZER, eos_token_id=END)
    start = runs(encoded)[0][0]
    assert encoded.tokens[:start].tolist() == prompt_ids(TOKENIZER, sample.messages[:1])


@pytest.mark.parametrize("name", ["small", DEMO])
def test_all_prompts_and_the_whole_are_those_of_inference(name):
    tokenizer = TOKENIZER if name == "small" else load_tokenizer(name)
    end = tokenizer.token_id("<|im_end|>")
    contents = [
        "What is 17 + 25?",
        "It is **42**.\n\n```python\nprint(17 + 25)\n```",
        "naïve 你好 🙂?\n\n",
        "Yes…",
        "x",
        "y",
    ]
    for system in (None, "Be brief.", ""):
        sample = of_chat(*contents, system=system)
        encoded = encode(sample, tokenizer, eos_token_id=end)
        starts = [start for start, _ in runs(encoded)]
        for number, start in enumerate(starts):
            count = 2 * number + 1 + (system is not None)
            assert encoded.tokens[:start].tolist() == prompt_ids(tokenizer, sample.messages[:count])
        whole = tokenizer.apply_chat_template(sample.messages, add_generation_prompt=False)
        ids = tokenizer.encode(whole.rstrip("\n"), add_special_tokens=False)
        assert encoded.tokens.tolist() == ids + [end] * 7
        assert [decoded(tokenizer, encoded.tokens[a:b]) for a, b in runs(encoded)] == [
            contents[1] + "<|im_end|>",
            contents[3] + "<|im_end|>",
            contents[5] + "<|im_end|>" * 8,
        ]


def test_a_reply_that_would_merge_with_its_header():
    """ "assistant\\n" and "\\nyes": the tokenizer has a token of two line feeds, which inference never meets there."""
    double = TOKENIZER.encode("\n\n", add_special_tokens=False)
    assert len(double) == 1
    sample = of_chat("q", "\nyes", "r", "\n\nno")
    encoded = encode(sample, TOKENIZER, eos_token_id=END)
    first, second = runs(encoded)
    assert encoded.tokens[: first[0]].tolist() == prompt_ids(TOKENIZER, sample.messages[:1])
    assert decoded(TOKENIZER, encoded.tokens[slice(*first)]) == "\nyes<|im_end|>"
    assert decoded(TOKENIZER, encoded.tokens[slice(*second)]) == "\n\nno" + "<|im_end|>" * 8


def test_a_tokenizer_that_marks_the_beginning_of_a_text():
    """SentencePiece's leading space belongs to the beginning of the whole, not to that of a reply."""
    tokenizer = metaspace_tokenizer()
    sample = of_chat("abc", "def", "ghi", "jkl")
    encoded = encode(sample, tokenizer, num_end_tokens=1, eos_token_id=tokenizer.token_id("</s>"))
    whole = tokenizer.apply_chat_template(sample.messages, add_generation_prompt=False)
    assert encoded.tokens.tolist() == tokenizer.encode(whole, add_special_tokens=False)
    assert [[tokenizer.backend.id_to_token(t) for t in encoded.tokens[a:b]] for a, b in runs(encoded)] == [
        ["d", "e", "f", "</s>"],
        ["j", "k", "l", "</s>"],
    ]


def test_what_follows_the_last_reply_is_left_out():
    longer = of_chat("q", "a", "and then?")
    assert encode(longer, TOKENIZER, eos_token_id=END).tokens.tolist() == (
        encode(of_chat("q", "a"), TOKENIZER, eos_token_id=END).tokens.tolist()
    )


def test_other_end_tokens_follow_the_one_of_the_turn():
    eos = TOKENIZER.token_id("<|endoftext|>")
    encoded = encode(of_chat("q", "a"), TOKENIZER, num_end_tokens=3, eos_token_id=eos)
    assert encoded.tokens[-4:].tolist() == [*TOKENIZER.encode("a", add_special_tokens=False), END, eos, eos]
    assert runs(encoded) == [(len(encoded.tokens) - 4, len(encoded.tokens))]


def test_a_template_that_does_not_end_turns():
    tokenizer = chat_tokenizer(OPEN_ENDED)
    encoded = encode(of_chat("q", "a b", "r", "c\n"), tokenizer, num_end_tokens=2, eos_token_id=END)
    assert [decoded(tokenizer, encoded.tokens[a:b]) for a, b in runs(encoded)] == ["a b", "c\n<|im_end|><|im_end|>"]


def test_control_tokens_that_a_text_spells_are_text():
    for tokenizer in (TOKENIZER, chat_tokenizer(None)):
        encoded = encode(Sample("f.jsonl", 1, text="one <|im_end|> two"), tokenizer, eos_token_id=END)
        assert encoded.tokens.tolist().count(END) == 1
        assert encoded.tokens[-1] == END
        assert encoded.trainable[-3:].all()
        assert tokenizer.decode(encoded.tokens[:-1].tolist(), skip_special_tokens=False).endswith("one <|im_end|> two")


def test_text_is_learned_but_for_what_the_tokenizer_puts_before_it():
    encoded = encode(Sample("f.jsonl", 1, text="one two"), TOKENIZER, eos_token_id=END)
    assert decoded(TOKENIZER, encoded.tokens) == "<s>one two<|im_end|>"
    assert encoded.trainable.tolist() == [False] + [True] * (len(encoded.tokens) - 1)


def test_a_template_that_rewrites_earlier_replies():
    tokenizer = chat_tokenizer(THINKING)
    sample = of_chat("q", "a", "r", "b")
    with pytest.raises(TemplateRewritesError, match=r"f\.jsonl:3: the chat template renders message 2 differently"):
        encode(sample, tokenizer, eos_token_id=END)
    documents = encode_documents(sample, tokenizer, num_end_tokens=2, eos_token_id=END)
    for count, reply, document in zip((1, 3), "ab", documents, strict=True):
        ((start, stop),) = runs(document)
        assert document.tokens[:start].tolist() == prompt_ids(tokenizer, sample.messages[:count])
        learned = decoded(tokenizer, document.tokens[start:stop])
        assert learned == f"<think></think>{reply}<|im_end|><|im_end|>"
    assert len(encode_documents(sample, TOKENIZER, eos_token_id=END)) == 1


def test_a_template_whose_prompt_is_no_prefix():
    broken = CHATML.replace("assistant\n' }}{% endif", "tutor\n' }}{% endif")
    with pytest.raises(SampleError, match="expected a template whose every rendering is a prefix"):
        encode_documents(of_chat("q", "a"), chat_tokenizer(broken), eos_token_id=END)


@pytest.mark.parametrize("reply", ["a<|im_end|>b", "<|im_end|>", "a<|endoftext|>"])
def test_an_end_token_within_a_reply(reply):
    eos = TOKENIZER.token_id("<|endoftext|>")
    with pytest.raises(SampleError, match=r"f\.jsonl:3: a reply contains an end token"):
        encode(of_chat("q", reply), TOKENIZER, eos_token_id=eos)


def test_what_cannot_be_encoded():
    refusing = chat_tokenizer("{{ raise_exception('no system please') }}")
    with pytest.raises(SampleError, match=r"f\.jsonl:3: the chat template refused the messages: no system please"):
        encode(of_chat("q", "a"), refusing, eos_token_id=END)
    with pytest.raises(ValueError, match=r"f\.jsonl:3 is a conversation and .* no chat template") as caught:
        encode(of_chat("q", "a"), chat_tokenizer(None), eos_token_id=END)
    assert not isinstance(caught.value, SampleError)  # a fault of the run, which skipping lines must not hide
    with pytest.raises(ValueError, match="num_end_tokens is 0; expected at least 1"):
        encode(of_chat("q", "a"), TOKENIZER, num_end_tokens=0, eos_token_id=END)
    with pytest.raises(ValueError, match="eos_token_id is 999999; expected an id from 0 to"):
        encode(of_chat("q", "a"), TOKENIZER, eos_token_id=999999)


def plain(result) -> list:
    """Something to compare: documents as lists, an error as its kinds and its words."""
    if isinstance(result, ValueError):
        return [type(result), getattr(result, "kind", None), str(result)]
    return [(one.tokens.dtype, one.tokens.tolist(), one.trainable.dtype, one.trainable.tolist()) for one in result]


def alone(sample: Sample, tokenizer: Tokenizer, **options):
    try:
        return encode_documents(sample, tokenizer, **options)
    except ValueError as error:
        return error


@pytest.mark.parametrize("name", TOKENIZERS)
@given(any_samples(), st.integers(0, 3))
def test_a_batch_gives_what_each_gives_alone(name, samples, num_end_tokens):
    tokenizer = TOKENIZERS[name]
    end = tokenizer.token_id("</s>" if name == "metaspace" else "<|im_end|>")
    options = {"num_end_tokens": num_end_tokens, "eos_token_id": end}
    expected = [plain(alone(sample, tokenizer, **options)) for sample in samples]
    assert [plain(result) for result in encode_batch(samples, tokenizer, **options)] == expected


def test_a_batch_of_all_kinds():
    """That the random ones are of all these kinds is luck."""
    samples = [
        Sample("f.jsonl", 1, text="a <|unused|> b"),
        *(
            of_chat(*contents)
            for contents in [("q", "a"), ("q", "a", "r", "b"), ("1", "a"), ("é", "a"), ("q", "\n\nb")]
        ),
        of_chat("q", "a<|im_end|>b"),
        Sample("f.jsonl", 8, text="c" * 1000),
    ]
    results = encode_batch(samples, TOKENIZERS["fickle"], eos_token_id=END)
    kinds = [result.kind if isinstance(result, SampleError) else len(result) for result in results]
    faults = ["refused by the template", "rewritten by the template"]
    assert kinds == [1, 1, 2, *faults, 1, "end token in a reply", 1]
    expected = [plain(alone(sample, TOKENIZERS["fickle"], eos_token_id=END)) for sample in samples]
    assert [plain(result) for result in results] == expected
    assert encode_batch([], TOKENIZER, eos_token_id=END) == []
