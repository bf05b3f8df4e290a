# SPDX-License-Identifier: Apache-2.0
"""Random histories of add, step, abort and preemption; every finished text is compared with the reference."""

import pytest

from tests.engine.histories import run_histories
from tests.stub import StubModel


def test_histories():
    run_histories(range(10))


def test_histories_of_texts_that_repeat_themselves():
    assert run_histories(range(24), StubModel(period=4, agreement=8.0))["accepted from the text"] > 20


def test_histories_of_blocks():
    run_histories(range(4), StubModel(block_length=3))


@pytest.mark.long
@pytest.mark.parametrize("block_length", [2, 3, 4, 8])
def test_many_histories_of_blocks(block_length):
    run_histories(range(4, 40), StubModel(block_length=block_length))


@pytest.mark.long
@pytest.mark.parametrize("thousand", range(10))
def test_ten_thousand_histories(thousand, record_property):
    for name, value in run_histories(range(thousand * 1000, (thousand + 1) * 1000)).items():
        record_property(name, value)
