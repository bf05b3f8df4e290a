# SPDX-License-Identifier: Apache-2.0
"""A captured step never waits for the GPU, with chunks of prompts or without, nor does loading a request."""

import warnings

import pytest
import torch

pytest.importorskip("triton")
from tests.engine.tiny_llm import save_tiny
from tests.kernels.graph_engine import engine
from wedlm.engine.llm import LLM
from wedlm.engine.plan import StepPlan
from wedlm.engine.sampling_params import SamplingParams


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.long
@pytest.mark.parametrize(
    ("decoding", "lookup_drafts"),
    [("autoregressive", None), ("verified", None), ("verified", 7), ("streaming", None), ("block", None)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("window", [16, 36])
def test_captured_steps_do_not_wait(tmp_path, decoding, lookup_drafts, temperature, quantization, window):
    if quantization == "none":
        one = engine(torch.device("cuda"), True, length=128, most_rows=256, num_pages=200)
    else:
        directory = save_tiny(tmp_path, hidden_size=64, intermediate_size=128)
        options = {"dtype": "bfloat16", "quantization": quantization, "kv_cache_bytes": 1 << 26, "max_num_seqs": 4}
        one = LLM(directory, device="cuda", **options).engine
    captured = one.runner.executors[0]
    plans: list[StepPlan] = []
    launch = one.runner.launch
    one.runner.launch = lambda plan: plans.append(plan) or launch(plan)
    params = SamplingParams(
        decoding=decoding, max_tokens=40, temperature=temperature, seed=1, ignore_eos=True,
        wedlm_lookup_drafts=lookup_drafts, wedlm_window_size=window,
    )  # fmt: skip
    for name in "abc":
        one.add(name, [3, 4, 5, 3, 4, 5], params)
    while one._pending is None:  # prompts, and the capture of the first step
        one.step()
    plan, pending = one._pending
    pending.wait()
    prompts = plans[0]
    assert [work.is_window for work in prompts.scheduled] == [True] * 3 + [False] * 3
    chunks = StepPlan(prompts.scheduled[3:])
    assert all(work.is_window for work in plan.scheduled)
    assert all((work.proposal is not None) == (lookup_drafts is not None) for work in plan.scheduled)
    both = StepPlan([*plan.scheduled[:2], chunks.scheduled[2]])  # whose window stands still meanwhile
    launch(both)
    launch(chunks)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():  # the first call warns, after it has set the mode
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            later = launch(plan)  # the same windows again; their pages last
        launch(prompts)
        launch(both)
        launch(chunks)
        for shape in list(captured.graphs._graphs)[-4:]:  # and the steps without their graphs
            nothing = captured._set_index(shape.num_sequences, []), captured._set_chunks(shape, [])
            captured.step(shape, *nothing)
        for work in plan.scheduled:
            one.runner.unload(work.request)
        last = launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(later.wait()) == len(last.wait()) == len(plan.scheduled)
