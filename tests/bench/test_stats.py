# SPDX-License-Identifier: Apache-2.0
"""From times to figures, on times that can be checked by hand."""

import pytest

from wedlm.bench.stats import Delivered, answer_figures, describe, make_row, percentile, ratio_row


def test_percentile():
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([5.0], 0.99) == 5.0
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([3, 1, 2], 1.0) == 3


def test_answers():
    fast, slow = Delivered(0.0), Delivered(1.0)
    for now, total in ((0.5, 1), (1.0, 3), (1.5, 5)):  # two tokens at a time
        fast.add(now, total)
    for now, total in ((2.0, 1), (4.0, 2), (4.0, 2)):  # told twice of the same tokens
        slow.add(now, total)
    figures = answer_figures([fast, slow], 4.0)
    assert figures["tokens"] == 7
    assert figures["tok_per_s"] == pytest.approx(7 / 4)
    assert figures["stream_tok_per_s"] == pytest.approx((4 / 1 + 1 / 2) / 2)
    assert figures["first_token_ms"] == pytest.approx((500 + 1000) / 2)
    assert figures["between_ms"] == pytest.approx(500)
    assert figures["between_p99_ms"] == pytest.approx(2000)


def test_one_token_has_no_gaps():
    one = Delivered(0.0)
    one.add(2.0, 1)
    figures = answer_figures([one], 2.0)
    assert (figures["between_ms"], figures["stream_tok_per_s"], figures["tok_per_s"]) == (0, 0, 0.5)


def test_rows():
    row = make_row({"mode": "auto", "batch": 2}, [{"x": 3.0}, {"x": 1.0}, {"x": 2.0}], more=7)
    assert row == {"mode": "auto", "batch": 2, "x": 2.0, "more": 7, "runs": 3, "spread": {"x": [1.0, 3.0]}}
    row = ratio_row({"kind": "k"}, [({"x": 1.0}, {"x": 2.0}), ({"x": 4.0}, {"x": 2.0}), ({"x": 1.0}, {"x": 1.0})], "x")
    assert row["median_ratio"] == 1.0
    assert row["ratios"] == [2.0, 0.5, 1.0]
    assert row["ratio_of_means"] == pytest.approx(5 / 6, abs=1e-4)
    assert describe({"mode": "auto", "batch": 2}) == "auto, batch 2"
