# SPDX-License-Identifier: Apache-2.0
"""Code written for the original WeDLM implementation, on a directory as its checkpoints are (docs/original.md)."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.tiny_llm import END, LENGTH, MASK, PROMPTS, check_empty, save_tiny
from wedlm import LLM, SamplingParams
from wedlm.algorithm import reference
from wedlm.algorithm.params import DecodeParams
from wedlm.attention.sdpa import CausalAttend
from wedlm.model.formats.checkpoint import load_torch, open_checkpoint

# A checkpoint of transformers 4, which newer versions remark on.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
# The keys that its configuration class writes; neither a block size nor a mode is among them.
_CONFIG = {
    "architectures": ["WeDLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_wedlm.WeDLMConfig",
        "AutoModel": "modeling_wedlm.WeDLMModel",
        "AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM",
    },
    "eos_token_id": END,
    "head_dim": 16,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": ["full_attention"] * 2,
    "mask_token_id": MASK,
    "max_window_layers": 28,
    "model_type": "wedlm",
    "qk_norm": True,
    "rope_scaling": None,
    "sliding_window": None,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A checkpoint of random weights with its kind of ``config.json``."""
    directory = save_tiny(tmp_path_factory.mktemp("original"))
    ours = json.loads((directory / "config.json").read_text())
    shape = {
        name: ours[name] for name in ours if name.startswith(("num_", "max_p", "rope_theta", "rms", "tie", "vocab"))
    }
    sizes = {name: ours[name] for name in ("hidden_size", "intermediate_size")}
    (directory / "config.json").write_text(json.dumps({**_CONFIG, **shape, **sizes}))
    return directory


def oracle(directory: Path, prompt: list[int], max_tokens: int, **changes) -> list[int]:
    """What the paper's algorithm gives with the original's defaults, by reference.py."""
    model = load_torch(open_checkpoint(directory), torch.float32, torch.device("cpu"))

    def rows_model(tokens: list[int], positions: list[int], _: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor(tokens), torch.tensor(positions), CausalAttend())

    defaults = DecodeParams("streaming", 16, 0.4, 0.02, mask_token_id=MASK, stop_token_ids=(END,), max_positions=LENGTH)
    return reference.decode(rows_model, prompt, max_tokens, dataclasses.replace(defaults, **changes)).tokens


def test_the_readmes_lines_decode_by_streaming(original):
    """A model and a tokenizer of one directory, a rendered chat as text, brackets for the answer."""
    llm = LLM(model=str(original), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(original), trust_remote_code=True)
    messages = [{"role": "user", "content": "Solve: 2x + 5 = 13"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    outputs = llm.generate([text], SamplingParams(temperature=0.0, max_tokens=60))
    expected = oracle(original, tokenizer(text)["input_ids"], 60)
    assert outputs[0]["token_ids"] == expected
    assert outputs[0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert outputs[0].stats.decoding == "streaming"
    assert "decoding: streaming, unless a request names another" in llm.describe()


def test_the_examples_lines(original):
    """Its example.py: end tokens from the tokenizer, options and parameters by its names, two calls."""
    tokenizer = AutoTokenizer.from_pretrained(str(original), trust_remote_code=True)
    ends = [tokenizer.eos_token_id]
    with pytest.warns(UserWarning, match=f"max_model_len is 4096; the model's length, {LENGTH}, is used instead"):
        llm = LLM(
            model=str(original), max_model_len=4096, gpu_memory_utilization=0.8, wedlm_window_size=8, device="cpu"
        )
    asked = SamplingParams(
        temperature=0.0,
        max_tokens=40,
        stop_token_ids=ends,
        wedlm_entropy_threshold=4.0,
        wedlm_pos_penalty_factor=0.05,
    )
    llm.generate(["generate random 1000 tokens"], SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=ends))
    outputs = llm.generate(PROMPTS, sampling_params=asked, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        changes = {"window_size": 8, "entropy_threshold": 4.0, "pos_penalty": 0.05}
        assert output["token_ids"] == oracle(original, tokenizer(prompt)["input_ids"], 40, **changes)
    stats = outputs[0].get("stats", {})
    assert stats["decode_tokens"] == stats.num_tokens == len(outputs[0]["token_ids"])
    assert stats["decode_forwards"] == stats.num_forwards >= 1
    assert stats["prefill_tokens"] == len(PROMPTS[0])
    assert stats["tokens_per_forward"] == stats["decode_tokens"] / stats["decode_forwards"] > 1
    assert 0 < stats["decode_speed"] == stats.tokens_per_second
    assert 0 < stats["prefill_speed"] <= stats["prefill_tokens"] / stats.time_to_first_token_s
    assert stats.get("nothing", 3) == 3
    assert "decode_tokens" in stats
    assert "nothing" not in stats


def test_its_web_page_streams_a_list_of_one_prompt(original):
    llm = LLM(model=str(original), device="cpu")
    asked = SamplingParams(temperature=0.0, max_tokens=30)
    updates = list(llm.generate_stream([PROMPTS[2]], asked))
    assert [update["is_finished"] for update in updates] == [False] * (len(updates) - 1) + [True]
    (output,) = llm.generate([PROMPTS[2]], asked, use_tqdm=False)
    assert "".join(update["new_text"] for update in updates) == output.text
    assert [token for update in updates for token in update["new_token_ids"]] == output.token_ids
    assert updates[-1]["stats"]["decode_forwards"] == output.stats.num_forwards
    assert updates[0].get("stats") is None
    with pytest.raises(ValueError, match="generate_stream got 2 prompts; expected one: generate takes many"):
        llm.generate_stream(PROMPTS[:2], sampling_params=asked)
    llm.exit()
    check_empty(llm)


def test_a_config_says_another_mode(original, tmp_path):
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "wedlm_decoding": "auto"}))
    short = SamplingParams(max_tokens=4)
    assert LLM(tmp_path, device="cpu").generate("a", short)[0].stats.decoding == "auto"
    assert LLM(original, device="cpu", decoding="block").generate("a", short)[0].stats.decoding == "block"
    named = SamplingParams(max_tokens=4, decoding="verified")
    assert LLM(original, device="cpu").generate("a", named)[0].stats.decoding == "verified"
    (tmp_path / "config.json").write_text(json.dumps({**config, "wedlm_next_token": "causal"}))
    for directory, own in ((original, "masked"), (tmp_path, "causal")):
        llm = LLM(directory, device="cpu")
        for asked, expected in ((None, own), ("masked", "masked"), ("causal", "causal")):
            request = llm.engine.add("r", [1, 2], SamplingParams(max_tokens=1, wedlm_next_token=asked))
            assert request.decode.next_token == expected
            llm.engine.abort("r")
    (tmp_path / "config.json").write_text(json.dumps({**config, "wedlm_next_token": "left"}))
    with pytest.raises(ValueError, match="wedlm_next_token is 'left'; expected masked or causal"):
        LLM(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({**config, "wedlm_decoding": "fast"}))
    with pytest.raises(ValueError, match="wedlm_decoding is 'fast'; expected one of auto, streaming"):
        LLM(tmp_path, device="cpu")


def test_sampling_params_by_position():
    """In the order of its own class."""
    given = SamplingParams(0.5, 0.9, 7, 20, [3], ["x"], None, 0.1)
    assert given == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        max_tokens=20,
        stop_token_ids=[3],
        stop=["x"],
        wedlm_entropy_threshold=None,
        wedlm_pos_penalty_factor=0.1,
    )
    assert SamplingParams(0.0).temperature == 0


def test_its_engine_options(original):
    """All fields of its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(
            model=str(original),
            device="cpu",
            max_num_batched_tokens=16384,
            max_num_seqs=512,
            max_model_len=LENGTH,
            gpu_memory_utilization=0.9,
            tensor_parallel_size=1,
            enforce_eager=True,
            kvcache_block_size=256,
            num_kvcache_blocks=-1,
            wedlm_window_size=16,
            mask_token_id=MASK,
            hf_config=None,
            nccl_port=2333,
        )
    options = llm.engine.config.options
    assert (options.cuda_graphs, options.page_size, options.max_num_seqs) == (False, 256, 512)
    assert llm.generate(PROMPTS[0], SamplingParams(0.0, max_tokens=30))[0]["token_ids"] == oracle(
        original, llm.tokenizer.encode(PROMPTS[0]), 30
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size is 3; expected a divisor of the model's 4"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size is True; expected an integer >= 1"),
        ({"num_kvcache_blocks": 100}, "num_kvcache_blocks is 100; expected -1: kv_cache_bytes is the cache's size"),
        ({"hf_config": {"a": 1}}, "hf_config is {'a': 1}; expected none: the checkpoint's config.json is read"),
        ({"enforce_eager": 1}, "enforce_eager is 1; expected True or False"),
        ({"enforce_eager": True, "cuda_graphs": True}, "enforce_eager is True and cuda_graphs is True; expected one"),
        ({"kvcache_block_size": 256, "page_size": 16}, "kvcache_block_size is set and so is page_size"),
        ({"kvcache_block_size": 0}, "page_size is 0; expected an integer >= 1"),
    ],
)
def test_refused_options_say_what_to_use(original, options, said):
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        LLM(original, device="cpu", **options)


def test_refused_methods_say_what_to_use(original):
    llm = LLM(original, device="cpu")
    for name in ("add_request", "step", "is_finished"):
        with pytest.raises(AttributeError, match=f"'LLM' object has no attribute '{name}': generate"):
            getattr(llm, name)
    assert not hasattr(llm, "nothing")
    with pytest.raises(ValueError, match="params and sampling_params are both given; expected one of them"):
        llm.generate("a", SamplingParams(), sampling_params=SamplingParams())
    with pytest.raises(ValueError, match="progress and use_tqdm are both given; expected one of them"):
        llm.generate("a", SamplingParams(), True, progress=True)
