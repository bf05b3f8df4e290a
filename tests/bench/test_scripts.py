# SPDX-License-Identifier: Apache-2.0
"""The scripts that measure a checkpoint on GSM8K, on a tiny one with questions of our own."""

import gzip
import json

import pytest

from benchmarks import acceptance, context_32k, gsm8k, masked_adapter, streaming_next_token, streaming_rules
from tests.engine.tiny_llm import save_tiny
from tests.train.tiny_run import questions as chat_questions
from tests.train.tiny_run import save_base, train, write_chats
from wedlm import LLM, SamplingParams
from wedlm.engine.outputs import Totals


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scripts") / "tiny")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl.gz"
    rows = [{"question": question, "answer": "So it is #### 1,234"} for question in ("One?", "And two?", "Three?")]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def run(script, monkeypatch, out, *words):
    monkeypatch.setattr("sys.argv", ["script", *map(str, words), "--device", "cpu", "--out", str(out)])
    script.main()
    return json.loads(out.read_text())


def test_acceptance_counts_what_verification_accepts(monkeypatch, tmp_path, checkpoint, questions):
    report = run(acceptance, monkeypatch, tmp_path / "out.json", checkpoint, "--data", questions, "--max-tokens", "40")
    llm = LLM(checkpoint, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=40, decoding="verified", wedlm_draft_entropy=1e9)
    outputs = llm.chat([[{"role": "user", "content": text}] for text in ("One?", "And two?", "Three?")], params)
    assert report["tokens_per_forward"] == pytest.approx(Totals.of(outputs).tokens_per_forward, abs=1e-3)
    assert report["questions"] == 3
    assert len(report["drafts"]) == 3
    first, second, third = report["drafts"]
    assert first >= second >= third >= 0
    assert second <= round(first * report["accepted"][0])


def test_gsm8k_compares_texts_with_ars(monkeypatch, tmp_path, checkpoint, questions):
    words = (checkpoint, "--data", questions, "--decoding", "autoregressive", "verified", "auto", "--warm", "1")
    report = run(gsm8k, monkeypatch, tmp_path / "out.json", *words, "--max-tokens", "24", "--max-num-seqs", "2")
    tokens = sum(len(one) for one in report["modes"][0]["token_ids"])
    for mode in report["modes"]:
        assert (mode["same_text_as_ar"], mode["tokens_to_first_difference"]) == (3, tokens)
        assert mode["tokens_per_second"] == pytest.approx(tokens / mode["seconds"])
        assert mode["accuracy"] == 0


def test_verified_is_ar_at_the_end_of_a_context(monkeypatch, tmp_path):
    report = run(context_32k, monkeypatch, tmp_path / "out.json", "tiny", "--context", "300", "--tokens", "12")
    ar, verified = report["rows"]
    assert (report["verified_is_ar"], report["same_tokens"]) == (True, 12)
    assert (ar["tokens"], ar["rows_per_forward"]) == (12, 1)
    assert verified["rows_per_forward"] > 8


def test_causal_streaming_takes_a_token_a_forward_at_least(monkeypatch, tmp_path, checkpoint):
    words = (checkpoint, "--window", "4", "--threshold", "3.5", "--of-each-kind", "1", "--max-tokens", "12")
    report = run(streaming_next_token, monkeypatch, tmp_path / "out.json", *words)
    ar, masked, causal = report["runs"]
    assert {kind["fewest"] for kind in ar["chat"].values()} == {1.0}
    assert list(causal["chat"]) == ["all", "sums", "code", "lists", "open questions", "counting"]
    assert min(kind["fewest"] for kind in causal["chat"].values()) >= 1
    assert [one["counting"]["right"] for one in (masked, causal)] == [False, False]
    assert masked["texts"] != causal["texts"]


def test_an_adapter_of_masked_rows_leaves_the_text_alone(monkeypatch, tmp_path):
    base, chats = save_base(tmp_path / "base", mask_token_id=None), write_chats(tmp_path / "chats.jsonl", 6)
    lora = {"lora_rank": 4, "lora_rows": "masked", "merge_lora": False, "enable_ar_loss": False, "max_steps": 2}
    adapter = train(base, chats, tmp_path / "run", **lora)
    words = (base, "--adapter", adapter, "--set", f"a={chats}", "--set", f"b={chats}:2", "--rows", "9", "16")
    words += ("--base-answers", tmp_path / "base.json.gz", "--max-tokens", "12", "--max-num-seqs", "4")
    report = run(masked_adapter, monkeypatch, tmp_path / "out.json", *words)
    assert (report["sets"]["a"]["prompts"], report["sets"]["b"]["prompts"]) == (6, 2)
    for one in report["sets"].values():
        for mode in ("autoregressive", "verified 9", "verified 16"):
            found = one[mode]
            assert found["same_text_as_base"] == one["prompts"] == found["ended"]["answers"] + found["cut"]["answers"]
            assert found["tokens"] == one["autoregressive"]["tokens"]
            assert found["steps"][0] == 1.0
        assert one["autoregressive"]["tokens_per_forward"] == 1.0 == one["autoregressive"]["p_cache"]
        assert one["verified 16"]["p_cache"] < 1
    again = run(masked_adapter, monkeypatch, tmp_path / "again.json", *words)
    assert again["sets"] == report["sets"]  # with the kept answers of the base


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [([], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 2), ([1, 2], [1], 2), ([1], [1, 2, 3], 2), ([4], [5], 1)],
)
def test_tokens_to_the_first_difference(one, other, count):
    assert gsm8k.agreeing(one, other) == count


@pytest.mark.long
def test_streaming_rules_walk_as_the_engine_streams(monkeypatch, tmp_path):
    """Up to the first token that is not AR's."""
    chats = write_chats(tmp_path / "chats.jsonl", 6)
    base = save_base(tmp_path / "base")
    model = train(base, chats, tmp_path / "run", max_steps=120, learning_rate=1e-2)
    llm = LLM(model, device="cpu")
    asked = ([{"role": "user", "content": question}] for question, _ in chat_questions(6))
    prompts = [llm.tokenizer.apply_chat_template(messages) for messages in asked]
    common = {"temperature": 0.0, "max_tokens": 12}
    of_ar = llm.generate(prompts, SamplingParams(decoding="autoregressive", **common))
    lines = ({"prompt": prompt, "token_ids": one.token_ids} for prompt, one in zip(prompts, of_ar, strict=True))
    (tmp_path / "samples").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["read", str(model), "--samples", str(tmp_path / "samples"), "--out", str(tmp_path / "rows")]
    monkeypatch.setattr("sys.argv", ["script", *words, "--depth", "5"])
    streaming_rules.main()
    texts = streaming_rules.texts_of(tmp_path / "rows")
    several = wrong = 0
    for threshold in (0.5, 2.0, 9.0):
        options = {"wedlm_window_size": 5, "wedlm_entropy_threshold": threshold, "wedlm_next_token": "causal"}
        streamed = llm.generate(prompts, SamplingParams(decoding="streaming", **options, **common))
        for text, one in zip(texts, streamed, strict=True):
            expected: list[int] = []
            for step, (right, error) in enumerate(
                streaming_rules.walk(text, streaming_rules.RULES["as it is"], threshold)
            ):
                expected += [step] * right
                several += right > 1
                if error:
                    wrong += 1
                    assert one.token_ids[len(expected)] != text.tokens[len(expected)]
                    break
            assert one.token_ids[: len(expected)] == text.tokens[: len(expected)]
            assert one.token_steps[: len(expected)] == expected
    assert several > 10
    assert wrong > 3
