# SPDX-License-Identifier: Apache-2.0
"""The embedded adapter of masked rows: found by its name, small, and without an effect on the base's text."""

import json
from pathlib import Path

import pytest

from tests.engine.native_model import needs_native
from wedlm import LLM, SamplingParams
from wedlm.evaluate.provenance import provenance_of_files
from wedlm.model import CheckpointError
from wedlm.model.demo import DEMO_ADAPTER, DEMO_MASK_TOKEN_ID
from wedlm.model.formats.resolve import locate_adapter
from wedlm.model.lora.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter

MOST_BYTES = 12_000_000
PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Tom has 3 apples and buys 4 more. How many apples does he have now?",
    "List three facts about the moon.",
]


def test_it_is_small_and_whole():
    assert sorted(path.name for path in DEMO_ADAPTER.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "config.json"]
    assert sum(path.stat().st_size for path in DEMO_ADAPTER.iterdir()) < MOST_BYTES
    adapter = read_adapter("demo-masked")
    assert adapter.masked_rows
    assert len(adapter.low_rank) == 30 * 7
    rank = json.loads((DEMO_ADAPTER / CONFIG_FILE).read_text())["r"]
    assert {len(delta.a) for delta in adapter.low_rank.values()} == {rank}


def test_a_directory_of_its_name_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo-masked").mkdir()
    assert locate_adapter("demo-masked") == DEMO_ADAPTER
    assert locate_adapter("./demo-masked") == Path("demo-masked")
    with pytest.raises(CheckpointError, match=r"demo-masked: there is no adapter_config\.json"):
        read_adapter("./demo-masked")


@pytest.mark.demo_model
def test_the_adapted_model_does_not_take_it():
    with pytest.raises(ValueError, match=r"adapter is 'demo-masked', .* and model is 'demo'; expected 'demo-base'"):
        LLM("demo", adapter="demo-masked", device="cpu")


@pytest.mark.demo_model
def test_results_know_it_by_name_and_content():
    plain, adapted = (provenance_of_files("demo-base", name, "float32", "cpu") for name in (None, "demo-masked"))
    assert (plain.adapter, adapted.adapter) == (None, "demo-masked")
    assert plain.hash != adapted.hash


@pytest.mark.demo_model
@pytest.mark.parametrize(
    "weights",
    [
        pytest.param({"dtype": "float32"}, marks=pytest.mark.long),
        pytest.param({"quantization": "int8"}, marks=[needs_native, pytest.mark.long]),
    ],
    ids=["torch", "native"],
)
def test_text_is_that_of_the_base_alone_in_fewer_forwards(weights):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]

    def answers(llm: LLM, decoding: str) -> tuple[list[list[int]], float]:
        params = SamplingParams(temperature=0.0, max_tokens=48, decoding=decoding)  # type: ignore[arg-type]
        outputs = llm.chat(chats, params)
        forwards = sum(one.stats.num_forwards for one in outputs if one.stats)
        return [one.token_ids for one in outputs], sum(len(one.token_ids) for one in outputs) / forwards

    options = {"device": "cpu", "kv_cache_bytes": 2**27, **weights}
    alone = LLM("demo-base", **options)
    expected, _ = answers(alone, "autoregressive")
    _, unaided = answers(LLM("demo-base", mask_token_id=DEMO_MASK_TOKEN_ID, **options), "verified")
    adapted = LLM("demo-base", adapter="demo-masked", **options)
    assert answers(adapted, "autoregressive")[0] == expected
    found, per_forward = answers(adapted, "verified")
    assert found == expected
    assert unaided < 1.2
    assert per_forward > 1.6
