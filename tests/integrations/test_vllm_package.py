# SPDX-License-Identifier: Apache-2.0
"""The plug-in's settings, conversion and refusals, without vLLM."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.engine.tiny_llm import END, MASK, save_tiny
from wedlm.model import load_model, load_tokenizer


def settings(**changes):
    from wedlm_vllm.settings import StreamingSettings

    return StreamingSettings(**{"mask_token_id": 5, **changes})


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "WeDLMQwen3ForCausalLM"),
        ({"qk_norm": False, "qkv_bias": True, "entropy_threshold": 0.25}, "WeDLMQwen2ForCausalLM"),
        (
            {"model_type": "llama", "qk_norm": False, "block_size": 4, "next_token": "causal"},
            "WeDLMLlamaForCausalLM",
        ),
    ],
)
def test_a_checkpoint_is_converted(changes, architecture, tmp_path, capsys):
    from wedlm_vllm.convert import main
    from wedlm_vllm.settings import StreamingSettings

    source, output = save_tiny(tmp_path / "tiny", **changes), tmp_path / "out"
    assert main([str(source), str(output), "--window-size", "6", "--pos-penalty", "0.1"]) == 0
    assert "vllm serve" in capsys.readouterr().out
    values = json.loads((output / "config.json").read_text())
    assert values["architectures"] == [architecture]
    assert values["canvas_length"] == 12
    read = StreamingSettings.from_hf(SimpleNamespace(**values))
    assert read == settings(
        window_size=6,
        num_rows=12,
        pos_penalty=0.1,
        mask_token_id=MASK,
        entropy_threshold=changes.get("entropy_threshold", 0.4),
        next_token=changes.get("next_token", "masked"),
    )
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [END]
    # Our own engine reads the result, too, as the same model.
    (ours, config), (first, _) = load_model(output), load_model(source)
    assert config.eos_token_ids == (END,)
    assert config.decoding == "streaming"
    assert load_tokenizer(output).encode("abc") == load_tokenizer(source).encode("abc")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), first.state_dict().values(), strict=True))


def test_conversion_refuses(tmp_path, capsys):
    from wedlm_vllm.convert import main

    plain = save_tiny(tmp_path / "plain", model_type="qwen3", mask_token_id=None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    tiny = save_tiny(tmp_path / "tiny")
    for words, message in (
        ([plain, tmp_path / "a"], "never adapted"),
        ([tiny, tmp_path / "full"], "expected a new or empty directory"),
        ([tiny, tmp_path / "a", "--num-rows", "8"], "num_rows is 8 for a window of 16; expected 17 to 32"),
    ):
        assert main([str(word) for word in words]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 0},
        {"window_size": 4.0},
        {"num_rows": 16},
        {"num_rows": 33},
        {"entropy_threshold": -1.0},
        {"entropy_threshold": "low"},
        {"pos_penalty": None},
        {"next_token": "verified"},
        {"mask_token_id": True},
    ],
)
def test_settings_are_checked(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} is .*; expected|expected"):
        settings(**changes)


def test_settings_survive_the_config():
    from wedlm_vllm.settings import StreamingSettings

    given = settings(window_size=3, num_rows=5, entropy_threshold=None, next_token="causal")
    assert StreamingSettings.from_hf(SimpleNamespace(**json.loads(json.dumps(given.to_hf())))) == given
    with pytest.raises(ValueError, match=r"expected a checkpoint that .* wrote"):
        StreamingSettings.from_hf(SimpleNamespace(canvas_length=4))
    for values in ({"tau": 1}, {"mask_token_id": 5, "num_rows": 4}):
        with pytest.raises(ValueError, match="expected mask_token_id"):
            StreamingSettings.from_hf(SimpleNamespace(canvas_length=4, wedlm_streaming=values))


def vllm_config(**changes):
    """The fields that are read, with vLLM's defaults, by dotted name."""
    config = SimpleNamespace(
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        diffusion_config=None,
        use_v2_model_runner=True,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        scheduler_config=SimpleNamespace(
            max_num_seqs=256, max_num_batched_tokens=8192, max_num_scheduled_tokens=None, long_prefill_token_threshold=0
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
    )
    for name, value in changes.items():
        *parts, last = name.split("__")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculative_config": object()}, "speculative_config is set"),
        ({"lora_config": object()}, "lora_config is set"),
        ({"kv_transfer_config": object()}, "kv_transfer_config is set"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size is 2; expected 1"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"use_v2_model_runner": False}, "VLLM_USE_V2_MODEL_RUNNER"),
        ({"diffusion_config": SimpleNamespace(canvas_length=8)}, "canvas_length 8"),
        ({"scheduler_config__long_prefill_token_threshold": 31}, "long_prefill_token_threshold is 31"),
        ({"scheduler_config__max_num_batched_tokens": 31}, "max_num_batched_tokens is 31"),
    ],
)
def test_options_of_a_server_are_refused(changes, message):
    from wedlm_vllm.checks import refuse_options

    refuse_options(vllm_config(), settings())
    with pytest.raises(ValueError, match=message):
        refuse_options(vllm_config(**changes), settings())


def test_names_of_requests_that_clients_choose_are_refused(monkeypatch):
    from wedlm_vllm.checks import refuse_options

    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    with pytest.raises(ValueError, match="VLLM_DISABLE_REQUEST_ID_RANDOMIZATION is '1'; expected nothing"):
        refuse_options(vllm_config(), settings())


def test_options_that_follow_are_changed_and_said(caplog):
    from wedlm_vllm.checks import fit_options

    config = vllm_config(scheduler_config__max_num_seqs=300)
    fit_options(config, settings())
    assert config.scheduler_config.max_num_seqs == 256
    assert config.cache_config.enable_prefix_caching
    fit_options(config, settings(next_token="causal"))
    assert not config.cache_config.enable_prefix_caching
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@dataclasses.dataclass
class Params:
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict | None = None
    bad_words: list | None = dataclasses.field(default_factory=list)
    extra_args: dict | None = None
    temperature: float = 0.5

    def verify(self, model_config, speculative_config):
        assert speculative_config is None


def test_parameters_of_a_request_are_refused():
    from wedlm_vllm.checks import checked_verify

    verify = checked_verify(Params.verify)
    assert checked_verify(verify) is verify
    ours = SimpleNamespace(hf_config=SimpleNamespace(wedlm_streaming={}))
    verify(Params(), ours, None)
    for changes in (
        {"logprobs": 0},
        {"prompt_logprobs": 1},
        {"min_tokens": 2},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {3: 1.0}},
        {"bad_words": ["x"]},
        {"extra_args": {"wedlm_window_size": 4}},
    ):
        with pytest.raises(
            ValueError, match=rf"(^{next(iter(changes))} is|has wedlm_window_size).*; expected|expected none"
        ):
            verify(Params(**changes), ours, None)
        verify(Params(**changes), SimpleNamespace(hf_config=SimpleNamespace()), None)  # another model's
