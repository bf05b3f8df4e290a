# SPDX-License-Identifier: Apache-2.0
"""The process that runs vLLM, with a stand-in for the package: the calls that vLLM documents, and nothing measured."""

import json
import sys
from dataclasses import replace

import pytest

from tests.bench.conftest import settings
from wedlm.bench import vllm
from wedlm.bench.run import run_bench
from wedlm.model import load_model, save_model
from wedlm.model.config import ModelConfig

STAND_IN = """
import time, types
__version__ = "0.0-stand-in"

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize, stop_token_ids):
        assert ignore_eos == (not stop_token_ids)
        self.max_tokens = max_tokens

class Engine:
    def __init__(self): self.running = {}
    def add_request(self, request_id, prompt, params):
        assert prompt["prompt_token_ids"]
        self.running[request_id] = [0, params.max_tokens]
    def step(self):
        time.sleep(0.001)
        outputs = []
        for name, state in list(self.running.items()):
            state[0] += 1
            outputs.append(types.SimpleNamespace(
                request_id=name + "-5f3a", finished=state[0] == state[1],
                outputs=[types.SimpleNamespace(token_ids=list(range(state[0])))]))
            if state[0] == state[1]: del self.running[name]
        return outputs

class LLM:
    def __init__(self, *, model, load_format, skip_tokenizer_init, dtype, max_model_len, max_num_seqs,
                 max_num_batched_tokens, gpu_memory_utilization, enable_prefix_caching, quantization,
                 speculative_config, tensor_parallel_size, compilation_config=None):
        import os
        multicast = os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"], os.environ["VLLM_ALLREDUCE_USE_FLASHINFER"]
        several = {"pass_config": {"fuse_allreduce_rms": False}}
        assert multicast == ("0", "0")
        assert compilation_config == (several if tensor_parallel_size > 1 else None)
        global __version__
        __version__ += f" on {tensor_parallel_size}"
        assert quantization in (None, "fp8")
        assert speculative_config is None or speculative_config["method"] == "ngram"
        import json, pathlib
        config = json.loads((pathlib.Path(model) / "config.json").read_text())
        if config["model_type"] not in ("qwen3", "llama"): raise ValueError(config["model_type"])
        if load_format == "auto" and not (pathlib.Path(model) / "model.safetensors").exists(): raise OSError(model)
        self.llm_engine = Engine()
    def generate(self, prompts, params, use_tqdm):
        for number, prompt in enumerate(prompts): self.llm_engine.add_request(str(number), prompt, params)
        while self.llm_engine.running: self.llm_engine.step()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(vllm, "find_spec", lambda _: object())
    return tmp_path / "vllm.py"


def test_beside_vllm(stand_in, tmp_path):
    told = []
    asked = settings(parts=("latency", "serving", "prefill", "throughput"), against="vllm")
    record = run_bench(asked, ["bench"], tmp_path / "out", lambda part, row: told.append((part, row)))
    found = record.values["vllm"]
    assert found["versions"] == {"vllm": "0.0-stand-in on 1"}
    assert [row["batch"] for row in found["steps"]] == [1, 2]
    assert [row["load"] for row in found["serving"]] == ["all at once", "arrivals"]
    assert all(row["runs"] == 2 for part in ("steps", "latency", "serving", "prefill") for row in found[part])
    for part in asked.parts:
        assert all("vs_vllm" in row for row in record.values["parts"][part]), part
    # Its capacity sets the rate for both.
    assert record.values["parts"]["serving"][0]["requests_per_s"] == found["serving"][1]["requests_per_s"]
    assert json.loads((tmp_path / "out/bench.json").read_text())["vllm"] == json.loads(json.dumps(found))
    assert told[0] == ("vLLM", None)


def test_what_goes_wrong_is_told_and_the_rest_kept(stand_in):
    stand_in.write_text(STAND_IN.replace("time.sleep(0.001)", "1 / (max(s[1] for s in self.running.values()) - 1)"))
    found = vllm.measure_vllm(settings(parts=("prefill",)), None)
    assert "ZeroDivisionError" in found["error"]
    assert found["steps"]
    assert "prefill" not in found


@pytest.mark.long
def test_a_slow_one_is_ended(stand_in):
    stand_in.write_text(STAND_IN.replace("time.sleep(0.001)", "time.sleep(60)"))
    found = vllm.measure_vllm(settings(), 4.0)
    assert found == {"error": "vLLM took longer than 4 s"}


def test_weights_under_a_name_that_vllm_knows(stand_in, tiny_checkpoint):
    found = vllm.measure_vllm(settings(shape=None, model=str(tiny_checkpoint)), None)
    assert "error" not in found


def test_in_bfloat16_beside_fp8_and_with_its_own_speculation_on_text(stand_in, tiny_checkpoint):
    asked = settings(parts=("latency", "prefill"), engine={"quantization": "fp8"})
    found = vllm.measure_vllm(asked, None)
    assert "error" not in found
    assert {"steps", "prefill", "latency"} <= found.keys()
    assert {"steps", "prefill"} <= found["bfloat16"].keys()
    assert "latency" not in found["bfloat16"]
    assert "ngram" not in found  # random weights have no text to look up
    on_text = vllm.measure_vllm(settings(parts=("latency",), shape=None, model=str(tiny_checkpoint)), None)
    assert set(on_text["ngram"]) == {"versions", "latency"}
    assert "bfloat16" not in on_text


def test_over_as_many_gpus_as_ours(stand_in, monkeypatch):
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "1")
    found = vllm.measure_vllm(settings(parts=("prefill",), engine={"tensor_parallel_size": 2}), None)
    assert "error" not in found
    assert found["versions"] == {"vllm": "0.0-stand-in on 2"}


def test_as_autoregressive(tmp_path, tiny_checkpoint):
    model, config = load_model(tiny_checkpoint)
    assert config.model_type == "wedlm"
    renamed = vllm.as_autoregressive(config)
    assert renamed.model_type == "qwen3"
    save_model(model, renamed, tmp_path / "renamed")
    assert ModelConfig.from_hf(json.loads((tmp_path / "renamed/config.json").read_text())).qk_norm
    assert vllm.as_autoregressive(replace(config, qk_norm=False)).model_type == "llama"
    assert vllm.as_autoregressive(replace(config, qk_norm=False, qkv_bias=True)).model_type == "qwen2"
