# SPDX-License-Identifier: Apache-2.0
"""Small runs on random weights."""

import pytest

from tests.engine.tiny_llm import save_tiny
from wedlm.bench.settings import Settings, Workload
from wedlm.bench.target import Target, load_target

WORKLOAD = Workload(
    batches=(1, 2),
    runs=2,
    pairs=2,
    steps=3,
    warm_steps=1,
    answer=6,
    prompt=12,
    requests=3,
    contexts=(20,),
    long_prompt=40,
)


def settings(**changes) -> Settings:
    given = {"parts": ("latency",), "modes": ("autoregressive", "auto"), "workload": WORKLOAD, "shape": "tiny"}
    return Settings(**{**given, "dtype": "float32", "device": "cpu", **changes})


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target(settings())


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bench") / "tiny")
