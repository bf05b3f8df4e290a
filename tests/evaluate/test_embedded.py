# SPDX-License-Identifier: Apache-2.0
"""The embedded model on samples of all sets: verified answers are AR's, scores and tokens a forward go to the report.

The whole sets are run on a GPU (benchmarks/embedded_eval.py).
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluate.eval_data import REAL, needs_data
from wedlm.engine.llm import LLM
from wedlm.evaluate.divergence import divergences
from wedlm.evaluate.harness import EngineBackend
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.settings import Params, Settings

NUM_QUESTIONS = int(os.environ.get("WEDLM_EVAL_SAMPLES", "100"))
MODES = ("autoregressive", "verified", "streaming")
# Where AR's two best logits are nearer, floating point decides.
UNDECIDED = 1e-4


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", device="cpu", dtype="float32", kv_cache_bytes=2 * 10**9)


def run(llm, task, num_fewshot, params, tmp_path):
    limits = {"limit": NUM_QUESTIONS, "num_fewshot": num_fewshot, "chat_template": True}
    settings = Settings((task,), Path(REAL), tmp_path, **limits)
    record = Evaluation(EngineBackend(llm, model_provenance(llm, "demo", None)), settings, load_tasks(settings)).run(
        params, {}
    )
    result = record["tasks"][task]
    lines = (tmp_path / result["samples_file"]).read_text(encoding="utf-8").splitlines()
    return result, [json.loads(line) for line in lines]


@needs_data
@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("task", ["gsm8k", "math500", "humaneval", "humaneval_plus", "mbpp"])
def test_generated_answers(llm, task, tmp_path, record_property):
    results = {}
    for mode in MODES:
        params = Params(decoding=mode, max_tokens=128)
        results[mode] = run(llm, task, 0, params, tmp_path)
        result, _ = results[mode]
        error = f" ± {100 * result['stderr']:.1f}" if result["stderr"] is not None else ""
        speed = f"{result['speed']['tokens_per_forward']:.2f} tokens/forward"
        record_property(mode, f"{100 * result['value']:.1f}{error} %, {speed}")

    (ar, ar_lines), (verified, verified_lines) = results["autoregressive"], results["verified"]
    differing = divergences(llm, ar_lines, verified_lines, chat=True)
    record_property("verified = AR", f"{len(ar_lines) - len(differing)}/{len(ar_lines)}")
    assert len(ar_lines) == min(NUM_QUESTIONS, 164 if "human" in task else 500)
    assert [one for one in differing if one.gap >= UNDECIDED] == []
    assert differing or verified["value"] == ar["value"]
    assert verified["speed"]["tokens_per_forward"] > 1.2


@needs_data
@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("task", ["arc_c", "arc_e", "hellaswag", "mmlu"])
def test_likelihoods(llm, task, tmp_path, record_property):
    result, lines = run(llm, task, None, replace(Params(), decoding="autoregressive"), tmp_path)

    record_property(result["metric"], f"{100 * result['value']:.1f} ± {100 * result['stderr']:.1f} %")
    assert len(lines) == NUM_QUESTIONS
    chance = sum(1 / len(line["choices"]) for line in lines) / len(lines)
    assert result["value"] > chance - 3 * (chance * (1 - chance) / len(lines)) ** 0.5
