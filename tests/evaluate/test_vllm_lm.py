# SPDX-License-Identifier: Apache-2.0
"""vLLM as a baseline: a stub of its interface over our own AR decoding has to give our own results."""

import importlib.metadata
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.cli.command import wedlm
from tests.engine.tiny_llm import save_tiny
from tests.evaluate.eval_data import write_small_sets
from tests.evaluate.result_files import samples, without_time
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.llm import LLM
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.harness import EngineBackend
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.report import ar_twin, choose_baseline
from wedlm.evaluate.result_folder import read_runs
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.settings import Params, Settings
from wedlm.evaluate.vllm_lm import VllmBackend

TASKS = ("gsm8k", "arc_e")
PARAMS = Params(decoding="autoregressive", max_tokens=12)


class StubLLM:
    """``vllm.LLM`` as far as it is used, over an LLM of ours."""

    made = ()

    def __init__(self, model, seed, enable_prefix_caching, **options):
        StubLLM.made = (*self.made, options)
        self.inner = LLM(model, device="cpu", dtype=options["dtype"])
        facts = SimpleNamespace(
            max_model_len=self.inner.engine.config.max_model_len,
            dtype=torch.float32,
            hf_config=SimpleNamespace(eos_token_id=list(self.inner.model_config.eos_token_ids)),
        )
        self.llm_engine = SimpleNamespace(model_config=facts)

    def generate(self, prompts, params, use_tqdm):
        return [self._one(p["prompt_token_ids"], ask) for p, ask in zip(prompts, params, strict=True)]

    def _one(self, ids, ask):
        if ask.prompt_logprobs is not None:
            return SimpleNamespace(prompt_logprobs=self._prompt_logprobs(ids))
        known = {name: value for name, value in vars(ask).items() if name not in ("prompt_logprobs", "detokenize")}
        output = self.inner.generate([ids], SamplingParams(decoding="autoregressive", **known))[0]
        # vLLM's tokens end with the end token, as ours do.
        return SimpleNamespace(
            outputs=[
                SimpleNamespace(text=output.text, token_ids=tuple(output.token_ids), finish_reason=output.finish_reason)
            ]
        )

    @torch.inference_mode()
    def _prompt_logprobs(self, ids):
        logits = self.inner.model(torch.tensor(ids), torch.arange(len(ids)), CausalAttend(), torch.arange(len(ids)))
        rows = logits.log_softmax(-1)
        found = [None]
        for row, token in zip(rows, ids[1:], strict=False):
            rank = int((row > row[token]).sum()) + 1
            best = int(row.argmax())
            one = {best: SimpleNamespace(logprob=float(row[best]), rank=1)}
            found.append(one | {token: SimpleNamespace(logprob=float(row[token]), rank=rank)})
        return found


class StubParams(SimpleNamespace):
    def __init__(self, **values):
        super().__init__(**({"prompt_logprobs": None} | values))


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StubLLM, StubParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    version = importlib.metadata.version
    monkeypatch.setattr("wedlm.evaluate.vllm_lm.version", lambda name: "0.24.0" if name == "vllm" else version(name))


@pytest.fixture
def directory(tmp_path):
    return save_tiny(tmp_path / "tiny", max_position_embeddings=512)


def test_the_same_tasks_give_the_same_results(directory, tmp_path, vllm):
    settings = Settings(TASKS, write_small_sets(tmp_path / "data"), tmp_path / "out", num_fewshot=1)
    llm = LLM(directory, device="cpu", dtype="float32")
    ours = Evaluation(EngineBackend(llm, model_provenance(llm, str(directory), None)), settings, load_tasks(settings))
    options = {"model": directory, "dtype": "float32", "max_model_len": None, "max_num_seqs": 8}
    theirs = Evaluation(VllmBackend(options), settings, load_tasks(settings))

    own, other = ours.run(PARAMS, {}), theirs.run(PARAMS, {})

    assert StubLLM.made[-1] == {"dtype": "float32", "max_num_seqs": 8}
    assert own["key"] != other["key"]
    assert (other["model"]["engine"], other["environment"]["vllm"]) == ("vllm", "0.24.0")
    for name in TASKS:
        assert [without_time(x) for x in samples(theirs, other, name)] == [
            without_time(x) for x in samples(ours, own, name)
        ]
    assert math.isclose(other["tasks"]["gsm8k"]["speed"]["tokens_per_forward"], 1)
    runs = read_runs([settings.output])
    by_engine = {run.engine: run for run in runs}
    assert choose_baseline(runs, "vllm") is by_engine["vllm"]
    assert ar_twin(by_engine["wedlm"], runs, "gsm8k") is by_engine["wedlm"]  # vLLM's is no twin


def test_other_decoding_is_refused(directory, tmp_path, vllm):
    with pytest.raises(ValueError, match="decoding is streaming; expected autoregressive"):
        VllmBackend({"model": directory, "dtype": "float32"}).lm(
            SimpleNamespace(params=replace(PARAMS, decoding="streaming").sampling_params())
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoding", "streaming"], "--decoding is streaming; expected autoregressive with --engine vllm"),
        (["--kv-cache-gb", "1"], "--kv-cache-gb is 1.0; expected no such option with --engine vllm"),
        ([], "vllm is not installed"),
    ],
)
def test_the_command_says_what_vllm_cannot(directory, tmp_path, monkeypatch, options, message):
    monkeypatch.setitem(sys.modules, "vllm", None)
    data = write_small_sets(tmp_path / "data")
    call = ["eval", "--model", str(directory), "--data-dir", str(data), "--output", str(tmp_path / "out")]

    result = wedlm(*call, "--tasks", "gsm8k", "--engine", "vllm", *options)

    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
