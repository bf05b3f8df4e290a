# SPDX-License-Identifier: Apache-2.0
"""The token cache: equal to encoding directly, complete or absent, made once, made again when something changed."""

import errno
import json
import threading

import numpy as np
import pytest

from tests.train.chat_data import CHATML, THINKING, chat, chat_tokenizer, write_lines
from wedlm.train import token_cache
from wedlm.train.encode import encode_documents
from wedlm.train.sources import read_samples
from wedlm.train.token_cache import build_cache

TOKENIZER = chat_tokenizer()
END = TOKENIZER.token_id("<|im_end|>")
CHATS = [chat(f"question {i}", f"answer {i * i}", "and", "so on") for i in range(20)]


@pytest.fixture
def paths(tmp_path):
    texts = [{"text": "one two three " * (i + 1)} for i in range(5)]
    return [write_lines(tmp_path / "chats.jsonl.gz", *CHATS), write_lines(tmp_path / "texts.jsonl.xz", "", *texts)]


def build(paths, directory, tokenizer=TOKENIZER, **options):
    return build_cache(paths, tokenizer, directory, **{"eos_token_id": END, **options})


def test_holds_what_encoding_gives(tmp_path, paths):
    cache = build(paths, tmp_path / "cache").cache
    samples = [(source, one) for source, path in enumerate(paths) for one in read_samples(path, skip_bad=False)]
    assert cache.num_documents == len(samples) == 25
    for number, (source, sample) in enumerate(samples):
        (expected,) = encode_documents(sample, TOKENIZER, eos_token_id=END)
        span = slice(*cache.offsets[number : number + 2])
        assert cache.tokens[span].tolist() == expected.tokens.tolist()
        assert cache.trainable[span].tolist() == expected.trainable.tolist()
        assert (cache.source[number], cache.line[number]) == (source, sample.line)
        assert cache.num_trainable[number] == expected.trainable.sum()
        assert cache.lengths[number] == len(expected.tokens)
    first, second = cache.sources
    assert (first.samples, second.samples, first.tokens + second.tokens) == (20, 5, len(cache.tokens))
    assert first.trainable + second.trainable == cache.trainable.sum()
    assert cache.largest_token_id == cache.tokens.max()
    with pytest.raises(ValueError, match="read-only"):
        cache.tokens[0] = 1


def test_a_small_buffer_gives_the_same_files(tmp_path, paths, monkeypatch):
    whole = build(paths, tmp_path / "a").cache
    monkeypatch.setattr(token_cache, "_BUFFER_TOKENS", 50)
    parts = build(paths, tmp_path / "b").cache
    for path in sorted(whole.directory.iterdir()):
        assert path.read_bytes() == (parts.directory / path.name).read_bytes()


@pytest.mark.parametrize("characters", [1, 60, 10**6])
def test_batches_give_the_same_files_as_one_sample_after_the_other(tmp_path, paths, monkeypatch, characters):
    odd = [chat("q", "a<|im_end|>"), "{", {"text": "x <|unused|>"}, chat("q", "\n\na", "r", "b"), {"text": " "}]
    paths.append(write_lines(tmp_path / "odd.jsonl", *odd, *CHATS[:5], odd[0]))
    tokenizer = chat_tokenizer(THINKING)
    seen = [], []
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", characters)
    batched = build(paths, tmp_path / "a", tokenizer, skip_bad=True, progress=lambda *line: seen[0].append(line)).cache
    with pytest.raises(ValueError, match=r"odd\.jsonl line 2: not valid JSON"):
        build(paths, tmp_path / "a", tokenizer)
    bad = write_lines(tmp_path / "bad.jsonl", *CHATS[:3], odd[0], chat("q", "<|im_end|>"))
    with pytest.raises(ValueError, match=r"bad\.jsonl:4: a reply contains an end token"):
        build([bad], tmp_path / "a", tokenizer)

    def one_by_one(samples, *arguments, **options):
        for sample in samples:
            try:
                yield encode_documents(sample, *arguments, **options)
            except ValueError as error:
                yield error

    monkeypatch.setattr(token_cache, "encode_batch", one_by_one)
    alone = build(paths, tmp_path / "b", tokenizer, skip_bad=True, progress=lambda *line: seen[1].append(line)).cache
    assert batched.sources[2].refused == {"end token in a reply": 2, "not JSON": 1, "empty": 1}
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20 + 5 + 7
    for path in sorted(batched.directory.iterdir()):
        assert path.read_bytes() == (alone.directory / path.name).read_bytes()


def test_of_two_faults_the_first_is_told(tmp_path):
    """Reading runs ahead of encoding by a batch."""
    path = write_lines(tmp_path / "cut.jsonl.gz", {"text": "a"}, chat("q", "a"), *([{"text": "b"}] * 9))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz:2 is a conversation and .* no chat template"):
        build([path], tmp_path / "cache", chat_tokenizer(None), skip_bad=True)
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz is damaged or cut short after line 11"):
        build([path], tmp_path / "cache", skip_bad=True)


def test_is_made_once(tmp_path, paths):
    seen = []
    first = build(paths, tmp_path / "cache", progress=lambda *figures: seen.append(figures))
    assert first.built
    assert "written to" in first.message
    assert seen[-1] == (str(paths[1]), 6, len(first.cache.tokens))
    second = build(paths, tmp_path / "cache", progress=lambda *figures: pytest.fail("tokenised again"))
    assert not second.built
    assert "reused" in second.message
    assert second.cache.key == first.cache.key
    moved = [path.rename(path.with_name(f"moved_{path.name}")) for path in paths]
    assert build(moved, tmp_path / "cache").cache.paths == tuple(map(str, moved))
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1


def test_whatever_matters_makes_another(tmp_path, paths):
    directory = tmp_path / "cache"
    other_eos = TOKENIZER.token_id("<|endoftext|>")
    keys = [
        build(paths, directory).cache.key,
        build(paths[::-1], directory).cache.key,
        build(paths[:1], directory).cache.key,
        build(paths, directory, num_end_tokens=3).cache.key,
        build(paths, directory, eos_token_id=other_eos).cache.key,
        build(paths, directory, skip_bad=True).cache.key,
        build(paths, directory, chat_tokenizer(CHATML.replace("im_start", "s"))).cache.key,
        build(paths, directory, chat_tokenizer(eos="<|endoftext|>")).cache.key,
    ]
    write_lines(paths[0], *CHATS[1:])
    keys.append(build(paths, directory).cache.key)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", ["tokens.bin", "trainable.bin", "documents.bin", "uses.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "empty"])
def test_a_damaged_cache_is_made_again(tmp_path, paths, name, damage):
    whole = build(paths, tmp_path / "cache").cache
    path = whole.directory / name
    content = path.read_bytes()
    expected = {file.name: file.read_bytes() for file in whole.directory.iterdir()}
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[:-8], "longer": content + b"12345678", "empty": b""}[damage])
    again = build(paths, tmp_path / "cache")
    assert again.built
    assert f"{name} " in again.message
    assert "damaged" in again.message
    assert "built again" in again.message
    assert {file.name: file.read_bytes() for file in again.cache.directory.iterdir()} == expected


def test_tables_that_contradict_each_other_are_damage(tmp_path, paths):
    directory = build(paths, tmp_path / "cache").cache.directory
    table = np.fromfile(directory / "documents.bin", dtype="<i8")
    table[0] += 10**6
    table.tofile(directory / "documents.bin")
    assert "documents.bin does not fit" in build(paths, tmp_path / "cache").message


def test_of_many_builders_one_builds(tmp_path, paths):
    start, results = threading.Barrier(4), []

    def one():
        start.wait()
        results.append(build(paths, tmp_path / "cache"))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.built for result in results) == [False, False, False, True]
    assert len({result.cache.tokens.tobytes() for result in results}) == 1


def test_a_failed_or_killed_builder_leaves_nothing(tmp_path, paths, monkeypatch):
    directory = tmp_path / "cache"
    kept = build(paths[:1], directory).cache

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache._Writer, "flush", full)
        with pytest.raises(ValueError, match=r"cannot be kept in .* \(.*No space left.*\); expected a place with room"):
            build(paths, directory)
    assert [entry for entry in directory.iterdir() if entry.is_dir()] == [kept.directory]
    key = build(paths, tmp_path / "elsewhere").cache.key
    (directory / ".wedlm-writing-dead" / "whole").mkdir(parents=True)
    build(paths, directory)
    assert {entry.name for entry in directory.iterdir() if entry.is_dir()} == {kept.directory.name, key}
    assert not build(paths[:1], directory).built


def test_bad_lines_stop_it_before_it_tokenises(tmp_path, paths, monkeypatch):
    bad = write_lines(tmp_path / "bad.jsonl", *CHATS[:2], "{", chat("q", "a<|im_end|>"), {"text": ""})
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_batch", lambda *_, **__: pytest.fail("tokenised first"))
        with pytest.raises(ValueError, match=r"bad\.jsonl line 3: not valid JSON"):
            build([*paths, bad], tmp_path / "cache")
    counts = build([*paths, bad], tmp_path / "cache", skip_bad=True).cache.sources[2]
    assert counts.samples == 2
    assert counts.refused == {"empty": 1, "end token in a reply": 1, "not JSON": 1}


def test_a_file_of_which_nothing_can_be_encoded(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", chat("q", "a<|im_end|>"))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: a reply contains an end token"):
        build([path], tmp_path / "cache")
    with pytest.raises(ValueError, match=r"x\.jsonl has no usable sample \(refused: {'end token in a reply': 1}\)"):
        build([path], tmp_path / "cache", skip_bad=True)
    with pytest.raises(ValueError, match=r"missing\.jsonl does not exist"):
        build([tmp_path / "missing.jsonl"], tmp_path / "cache")


def test_a_conversation_may_become_several_documents(tmp_path, paths):
    (counts,) = build(paths[:1], tmp_path / "cache", chat_tokenizer(THINKING)).cache.sources
    assert (counts.samples, counts.documents) == (20, 40)


def test_mask_token_that_the_data_uses(tmp_path, paths, monkeypatch):
    odd = write_lines(tmp_path / "odd.jsonl", *CHATS[:3], {"text": "a Ω b Ω"}, CHATS[3])
    cache = build([*paths, odd], tmp_path / "cache").cache
    monkeypatch.setattr(token_cache, "_BUFFER_TOKENS", 7)  # the search goes on over many buffers
    unused = TOKENIZER.encode("Ω", False)[0]  # the first byte of a letter that no other text has
    with pytest.raises(
        ValueError, match=rf"mask_token_id is {unused}, which 2 tokens .* first in .*odd\.jsonl line 4;"
    ):
        cache.check_mask_token_id(unused)
    with pytest.raises(ValueError, match=rf"mask_token_id is {END}, .*chats\.jsonl\.gz line 1;"):
        cache.check_mask_token_id(END)
    cache.check_mask_token_id(TOKENIZER.token_id("<|endoftext|>"))
    cache.check_mask_token_id(TOKENIZER.vocab_size + 5)


def test_the_cache_says_what_it_was_made_from(tmp_path, paths):
    cache = build(paths, tmp_path / "cache", num_end_tokens=4).cache
    made_from = json.loads((cache.directory / "meta.json").read_text())["made_from"]
    assert made_from["num_end_tokens"] == 4
    assert len(made_from["files"]) == 2
