# SPDX-License-Identifier: Apache-2.0
"""A captured step never waits for the GPU."""

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.test_graph_runner import engine
from wedlm.engine.sampling_params import SamplingParams


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.long
@pytest.mark.parametrize("decoding", ["autoregressive", "verified", "streaming", "block"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_steps_do_not_wait(decoding, temperature):
    one = engine(torch.device("cuda"), True)
    params = SamplingParams(decoding=decoding, max_tokens=40, temperature=temperature, seed=1, ignore_eos=True)
    for name in "abc":
        one.add(name, [3, 4, 5], params)
    while one._flight is None:  # prompts, and the capture of the first step
        one.step()
    plan, flight = one._flight
    flight.read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            later = one.runner.launch(plan)  # the same windows again; their pages last
        shape = list(one.runner._graphs)[-1]
        one.runner.step(shape, one.runner._set_index(shape.num_sequences, []))  # and the step without its graph
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(later.read()) == 3
