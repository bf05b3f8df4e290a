# SPDX-License-Identifier: Apache-2.0
"""JSON schemas and grammars through llguidance, with real tokenizers: every text that ended by itself is valid, and
verified decoding's text is AR's."""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence

import jsonschema
import pytest

from tests.engine.random_schemas import Schema, random_schema
from tests.engine.tiny_llm import PROMPTS, check_empty, save_tiny
from wedlm import LLM, SamplingParams
from wedlm.algorithm.params import DECODINGS, Decoding
from wedlm.engine.constraints.grammar import grammars_of

# Four ways in each of twelve parts: multiplied out, 16 million objects.
HUGE = [{"anyOf": [{"type": "object", "properties": {f"{i}-{j}": {}}} for j in range(4)]} for i in range(12)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Tokens are single characters, positions enough for all that the schemas admit."""
    return LLM(save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512), device="cpu", max_num_seqs=16)


def check_schemas(
    llm: LLM, schemas: Sequence[Schema], prompts: Sequence[list[int]], decoding: Decoding, **options
) -> tuple[Counter, list[list[int]]]:
    """Figures, and the texts' tokens."""
    params = [
        SamplingParams(decoding=decoding, json_schema=schema, temperature=i % 2, seed=i, **options)
        for i, schema in enumerate(schemas)
    ]
    figures: Counter = Counter()
    outputs = llm.generate(list(prompts), params, progress=False)
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
        figures[output.finish_reason] += 1
        figures["tokens"] += len(output.token_ids)
        figures["forwards"] += output.stats.num_forwards
    return figures, [output.token_ids for output in outputs]


def test_random_schemas(llm):
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(6)]
    prompts = [llm.tokenizer.encode(rng.choice(PROMPTS)) for _ in schemas]
    texts = {}
    for decoding in DECODINGS:
        figures, texts[decoding] = check_schemas(
            llm, schemas, prompts, decoding, max_tokens=200, wedlm_window_size=6, frequency_penalty=0.2
        )
        assert figures["stop"] >= 5, figures
    assert texts["verified"] == texts["auto"] == texts["autoregressive"]
    check_empty(llm)


@pytest.mark.long
def test_preemption_keeps_the_place_in_the_grammar(llm, tmp_path_factory):
    """A cache for a few of them: requests lose their keys in the middle of their JSON and go on with the same text."""
    directory = save_tiny(tmp_path_factory.mktemp("tight"), max_position_embeddings=512)
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(8)]
    prompts = [llm.tokenizer.encode(rng.choice(PROMPTS)) for _ in schemas]
    tight = LLM(directory, device="cpu", max_num_seqs=8, kv_cache_bytes=200 * 2 * 2 * 2 * 16 * 4, page_size=8)
    for mode in ({"decoding": "streaming"}, {"decoding": "streaming", "wedlm_next_token": "causal"}, {}):
        shared = {"decoding": "verified", "max_tokens": 120, "wedlm_window_size": 6, **mode}
        params = [SamplingParams(json_schema=schema, **shared) for schema in schemas]
        outputs = tight.generate(prompts, params, progress=False)
        assert [one.token_ids for one in outputs] == [one.token_ids for one in llm.generate(prompts, params)]
        assert sum(one.stats.num_preemptions for one in outputs) > 0
    check_empty(tight)


def test_neighbours_keep_their_text(llm):
    free = SamplingParams(max_tokens=40, wedlm_window_size=6)
    alone = llm.generate(PROMPTS, free, progress=False)
    schema = SamplingParams(max_tokens=40, wedlm_window_size=6, json_schema={"type": "array", "maxItems": 9})
    mixed = llm.generate([p for prompt in PROMPTS for p in (prompt, prompt)], [free, schema] * len(PROMPTS))
    assert [output.token_ids for output in mixed[::2]] == [output.token_ids for output in alone]
    assert all(output.text.startswith("[") for output in mixed[1::2])


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_grammar_of_ones_own(llm, decoding):
    grammar = 'start: "abc" digits\ndigits: /[0-9]{3,5}/'
    params = SamplingParams(decoding=decoding, grammar=grammar, temperature=1, seed=4, max_tokens=50)
    (output,) = llm.generate("x", params)
    assert re.fullmatch("abc[0-9]{3,5}", output.text)
    assert output.finish_reason == "stop"


def test_the_text_ends_without_an_end_token(llm):
    """A complete grammar ends the answer, also where end tokens are ignored; a longer minimum cannot hold it up."""
    for options in ({"ignore_eos": True}, {"min_tokens": 9}, {"stop_token_ids": (3,)}):
        (output,) = llm.generate("x", SamplingParams(grammar='start: "yes"', max_tokens=20, **options))
        assert (output.text, output.finish_reason, len(output.token_ids)) == ("yes", "stop", 3)


def test_end_tokens_only_where_the_text_may_end(llm):
    """With a bias for it the end token comes as soon as it may, which is after three letters."""
    end = llm.model_config.eos_token_ids[0]
    for decoding in DECODINGS:
        params = SamplingParams(grammar="start: /[a-z]{3,30}/", logit_bias={end: 100}, decoding=decoding, max_tokens=40)
        (output,) = llm.generate("x", params)
        assert re.fullmatch("[a-z]{3}", output.text), decoding
        assert output.token_ids[-1] == end
        assert output.finish_reason == "stop"


@pytest.mark.parametrize("decoding", DECODINGS)
def test_what_the_tokens_cannot_write_cuts_the_text(llm, decoding):
    """This tokenizer has no token for most letters outside ASCII: the text ends before one, and nothing hangs."""
    schema = {"type": "object", "properties": {"größe": {"type": "null"}}, "required": ["größe"]}
    params = SamplingParams(json_schema=schema, decoding=decoding, max_tokens=60, wedlm_window_size=6)
    (output,) = llm.generate("x", params)
    assert output.finish_reason == "length"
    assert "größe" not in output.text
    check_empty(llm)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"json_schema": {"type": "wrong"}}, r"^json_schema is not usable: Invalid type: wrong$"),
        ({"json_schema": {"$ref": "#/nowhere"}}, r"^json_schema is not usable: "),
        ({"json_schema": {"$ref": "#"}}, r"^json_schema is not usable: it admits no text"),
        ({"grammar": "start: nothing"}, r"^grammar is not usable: "),
        ({"grammar": "not a grammar"}, r"^grammar is not usable: "),
        ({"json_schema": {"allOf": HUGE}}, r"^json_schema is not usable: schema too large"),
    ],
)
def test_unusable_grammars_are_refused_alone(llm, options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        llm.generate("x", SamplingParams(**options))
    assert "\n" not in str(caught.value)
    check_empty(llm)


def test_the_library_is_asked_for_by_name(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars_of.cache_clear()
    with pytest.raises(ValueError, match=r"need the package llguidance; expected pip install"):
        llm.generate("x", SamplingParams(json_schema={}))
    assert llm.generate("x", SamplingParams(max_tokens=2))[0].finish_reason == "length"


@pytest.mark.long
@pytest.mark.demo_model
def test_500_schemas_on_the_demo_model(record_property):
    """Float32. A few at a time in each mode in turn, so that a prompt's keys are computed once."""
    options = {"max_model_len": 1024, "max_num_seqs": 32, "kv_cache_bytes": 2**30}
    demo = LLM("demo", dtype="float32", device="cpu", **options)
    rng = random.Random(2)
    schemas = [random_schema(rng) for _ in range(500)]
    question = "Answer with JSON for this schema: "
    prompts = [demo.chat_prompt([{"role": "user", "content": question + json.dumps(schema)}]) for schema in schemas]
    modes: tuple[Decoding, ...] = ("streaming", "verified", "autoregressive")
    totals = {decoding: Counter() for decoding in modes}
    same = 0
    for start in range(0, len(schemas), 25):
        some = slice(start, start + 25)
        texts = {}
        for decoding in modes:
            figures, texts[decoding] = check_schemas(
                demo, schemas[some], prompts[some], decoding, max_tokens=160, wedlm_window_size=6
            )
            totals[decoding] += figures
        same += sum(a == b for a, b in zip(texts["verified"], texts["autoregressive"], strict=True))
    for decoding, figures in totals.items():
        share = f"{figures['length'] / len(schemas):.1%} cut by length"
        cost = f"{figures['tokens']} tokens in {figures['forwards']} forwards"
        record_property(decoding, f"{figures['stop']} ended by themselves, all valid; {share}; {cost}")
        assert figures["stop"] + figures["length"] == len(schemas)
        assert figures["stop"] > 450
    record_property("verified texts that are AR's", f"{same} of {len(schemas)}")
    assert same >= len(schemas) - 2  # nearly tied logits may be ordered either way by forwards of other sizes


@pytest.mark.parametrize("decoding", ["streaming", "verified", "block", "autoregressive"])
def test_a_grammar_whose_last_character_is_the_first_token(llm, decoding):
    """llguidance takes token 0 for the end of the text where it knows no end token, and then refuses what it admits:
    block decoding filled such a place for ever."""
    assert llm.tokenizer.encode("!") == [0]
    params = SamplingParams(grammar='start: /[a-c]{2}/ "!"', max_tokens=9, decoding=decoding, temperature=1, seed=4)
    (output,) = llm.generate(["abc"], params, progress=False)
    assert output.finish_reason == "stop"
    assert len(output.text) == 3
    assert output.text[2] == "!"
