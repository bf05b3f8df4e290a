# SPDX-License-Identifier: Apache-2.0
"""Real questions and real weights: every score equals that of the harness's transformers backend."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from tests.evaluate.eval_data import REAL, needs_data
from wedlm.engine.llm import LLM
from wedlm.evaluate.harness import EngineLM
from wedlm.evaluate.run import load_tasks
from wedlm.evaluate.settings import Settings
from wedlm.model import load_model, load_tokenizer
from wedlm.model.formats.checkpoint import save_model

NUM_QUESTIONS = int(os.environ.get("WEDLM_EVAL_QUESTIONS", "200"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo-base")
    model, config = load_model("demo-base", torch.float32, torch.device("cpu"))
    save_model(model, config, path)
    load_tokenizer("demo-base").save(path)
    return path


@needs_data
@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("name", ["arc_e", "hellaswag"])
def test_scores_equal_those_of_transformers(directory, tmp_path, name, record_property):
    from lm_eval.models.huggingface import HFLM

    (task,) = load_tasks(Settings((name,), Path(REAL), tmp_path, num_fewshot=0)).values()
    task.build_all_requests(limit=NUM_QUESTIONS, rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=16)
        theirs = hf.loglikelihood(task.instances, disable_tqdm=True)
    ours = EngineLM(LLM(directory, device="cpu", dtype="float32")).loglikelihood(task.instances)

    difference = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    record_property("scores", len(ours))
    record_property("largest_difference", f"{difference:.1e}")
    assert len({instance.doc_id for instance in task.instances}) == NUM_QUESTIONS
    assert difference < 1e-3
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
