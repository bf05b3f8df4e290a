# SPDX-License-Identifier: Apache-2.0
"""A captured step never waits for the GPU, with chunks of prompts or without, nor does loading a request."""

import warnings

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.test_graph_runner import engine
from wedlm.engine.request import StepPlan
from wedlm.engine.sampling_params import SamplingParams


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.long
@pytest.mark.parametrize("decoding", ["autoregressive", "verified", "streaming", "block"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_steps_do_not_wait(decoding, temperature):
    one = engine(torch.device("cuda"), True)
    plans: list[StepPlan] = []
    launch = one.runner.launch
    one.runner.launch = lambda plan: plans.append(plan) or launch(plan)
    params = SamplingParams(decoding=decoding, max_tokens=40, temperature=temperature, seed=1, ignore_eos=True)
    for name in "abc":
        one.add(name, [3, 4, 5], params)
    while one._flight is None:  # prompts, and the capture of the first step
        one.step()
    plan, flight = one._flight
    flight.read()
    prompts = plans[0]
    assert not any(work.decodes for work in prompts.work)
    assert all(work.decodes for work in plan.work)
    both = StepPlan([*plan.work[:2], prompts.work[2]])  # whose window stands still meanwhile
    launch(both)
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():  # the first call warns, after it has set the mode
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            later = launch(plan)  # the same windows again; their pages last
        launch(prompts)
        launch(both)
        for shape in list(one.runner._graphs)[-3:]:  # and the steps without their graphs
            nothing = one.runner._set_index(shape.num_sequences, []), one.runner._set_chunks(shape, [])
            one.runner.step(shape, *nothing)
        for work in plan.work:
            one.runner.unload(work.request)
        last = launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(later.read()) == len(last.read()) == len(plan.work)
