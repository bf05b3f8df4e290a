# SPDX-License-Identifier: Apache-2.0
"""Which GPU a step runs on."""

from types import SimpleNamespace

import pytest
import torch

from wedlm.engine.execution.runner import Runner


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")] * 3), ("cuda", []), ("cpu", [])])
def test_steps_make_their_gpu_the_current_one(monkeypatch, device, current):
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    executor = SimpleNamespace(
        cache=None,
        runs_ahead=False,
        has_padded_costs=False,
        takes=lambda _: True,
        launch=lambda _: SimpleNamespace(wait=lambda: []),
        measure_costs=lambda *_: None,
    )
    ahead = SimpleNamespace(**{**vars(executor), "runs_ahead": True})
    runner = Runner(SimpleNamespace(device=torch.device(device)), executor, [ahead])
    runner.measure_costs(None, 1)
    runner.launch(None)
    runner.run(None)
    assert made == current
