# SPDX-License-Identifier: Apache-2.0
"""The benchmark of gaps: what the gaps are, that likelihoods are those of one forward after the other, and going on."""

import gzip
import json

import pytest
import torch

from benchmarks import infilling
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM
from wedlm.attention.sdpa import CausalAttend

PROGRAM = "def f(x):\n    y = x + 1\n    if y:\n        return y\n    return x\n"
SOLUTION = "    a = 1\n    b = 2\n    return a\n"
PASSAGE = "One is here. The second of all the words in it goes on. And so does the third one of them. It ends. There."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "humaneval": [{"prompt": 'def g(x):\n    """Say."""\n', "canonical_solution": SOLUTION}],
        "mbpp_test": [{"text": f"Task {i}.", "code": PROGRAM.replace("1", str(i))} for i in range(3)],
        "boolq_val": [{"query": f"Passage: {PASSAGE}{i}\nQuestion: is it?"} for i in range(3)],
    }
    for name, of_name in rows.items():
        path = folder / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in of_name).encode()))
    return folder


def test_what_the_gaps_are(data):
    code, sentences = infilling.code_spans(data, 9, 0), infilling.sentence_spans(data, 2, 0)
    assert code == infilling.code_spans(data, 9, 0)
    assert (len(code), len(sentences)) == (4, 2)
    for span in code:
        text = span.prefix + span.middle + span.suffix
        assert text.endswith(("return x\n", "return a\n"))
        assert span.middle.strip() in ("y = x + 0", "y = x + 1", "y = x + 2", "if y:", "return y", "b = 2")
        assert span.middle == " " + span.middle.strip()
        assert span.suffix.startswith("\n")
    for span in sentences:
        text = span.prefix + span.middle + span.suffix
        assert len(text) > 60
        assert any(text in PASSAGE + str(i) for i in range(3))
        assert 1 <= len(span.middle.split()) <= 8


def test_likelihoods_are_those_of_one_forward_after_the_other(tmp_path):
    llm = LLM(save_tiny(tmp_path), device="cpu")
    mask = llm.engine.config.mask_token_id
    for prefix, suffix in (([5, 6, 7], [8, 9]), ([5] * 20, []), ([5], [1, 2, 3])):
        middle = [11, 12, 13, 14]
        expected = []
        for i in range(len(middle)):  # the row of the first masked position, after all known tokens
            tokens = [*prefix, *suffix, *middle[:i], mask]
            end, start = len(prefix) + len(middle), len(prefix)
            places = [*range(start), *range(end, end + len(suffix)), *range(start, start + i + 1)]
            with torch.inference_mode():
                logits = llm.model(torch.tensor(tokens), torch.tensor(places), CausalAttend())[-1].float()
                logits[mask] = -torch.inf
            expected.append(float(torch.log_softmax(logits, -1)[middle[i]]))
        assert infilling.gap_logprobs(llm, prefix, suffix, middle) == pytest.approx(expected, abs=1e-4)
    llm.engine.pool.check_integrity()
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_a_run_goes_on_where_it_was_cut(data, tmp_path, monkeypatch):
    model, out = save_tiny(tmp_path / "tiny", max_position_embeddings=512), tmp_path / "out"

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["infilling", str(model), "--data", str(data), "--output", str(out), *words])
        infilling.main()
        return (out / "items.jsonl").read_text()

    monkeypatch.setattr(infilling, "BATCH", 2)
    first = run("--count", "2", "--choose", "2")
    second = run("--count", "4", "--choose", "2")
    assert second.startswith(first)
    items = [json.loads(line) for line in second.splitlines()]
    assert sorted((one["kind"], one["index"]) for one in items) == sorted(
        (kind, i) for kind, count in (("code", 4), ("sentences", 3)) for i in range(count)
    )
    assert [("chosen_tokens" in one) for one in items] == [one["index"] < 2 for one in items]
    assert all(one["logprob"][name] < 0 for one in items for name in infilling.LIKELIHOODS)
    report = (out / "report.md").read_text()
    assert "## 4 lines of code" in report
    assert "## 3 gaps in sentences" in report
