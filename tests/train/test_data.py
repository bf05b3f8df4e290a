# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: what they hold, that a number finds them again, and that what is held out stays out."""

import dataclasses
import json
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from tests.train.chat_data import THINKING, chat, chat_tokenizer, write_lines
from tests.train.packed_data import END, LENGTH, TOKENIZER, digest, packed
from wedlm.model import ModelConfig
from wedlm.train.config import TrainConfig
from wedlm.train.data import PackedData, load_data, split_validation
from wedlm.train.token_cache import TokenCache, build_cache

UNUSED = TOKENIZER.token_id("<|unused|>")
MODEL = ModelConfig(
    model_type="llama",
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=512,
    eos_token_ids=(END,),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("data")
    chats = [chat(f"add {i} to {i}", f"it is {2 * i}") for i in range(60)]
    long_prompt = chat("the cat sat " * 80, "on the mat")  # its first pieces have nothing to learn
    texts = [{"text": f"text {i}: " + "one two three " * (i % 9)} for i in range(40)]
    return [
        str(write_lines(directory / "chats.jsonl", *chats, long_prompt)),
        str(write_lines(directory / "texts.jsonl.gz", *texts)),
    ]


@pytest.fixture(scope="module")
def cache(files, tmp_path_factory) -> TokenCache:
    return build_cache(files, TOKENIZER, tmp_path_factory.mktemp("cache"), eos_token_id=END).cache


def documents_of(sequence) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Tokens and flags of each piece of a sequence, whose layout is checked."""
    for name, dtype in [("tokens", "int64"), ("positions", "int64"), ("documents", "int64"), ("trainable", "bool")]:
        array = getattr(sequence, name)
        assert (array.shape, array.dtype) == ((LENGTH,), np.dtype(dtype))
    used = int((sequence.documents >= 0).sum())
    assert (sequence.documents[used:] == -1).all()
    assert (sequence.tokens[used:] == END).all()
    assert not sequence.trainable[used:].any()
    assert not sequence.positions[used:].any()
    found = []
    for number in range(sequence.documents.max() + 1):
        (where,) = np.nonzero(sequence.documents == number)
        assert where.tolist() == list(range(where[0], where[-1] + 1))
        assert sequence.positions[where].tolist() == list(range(len(where)))
        found.append((tuple(sequence.tokens[where].tolist()), tuple(sequence.trainable[where].tolist())))
    assert (np.diff(sequence.documents[:used]) >= 0).all()
    return found


def pieces_of(cache, documents=None) -> Counter:
    """What an epoch must show: every document in pieces of LENGTH, those with a token to learn."""
    found = Counter()
    for document in range(cache.num_documents) if documents is None else documents:
        for start in range(cache.offsets[document], cache.offsets[document + 1], LENGTH):
            span = slice(start, min(start + LENGTH, cache.offsets[document + 1]))
            if cache.trainable[span].any():
                found[tuple(cache.tokens[span].tolist()), tuple(cache.trainable[span].tolist())] += 1
    return found


def epoch_of(data, epoch: int) -> Counter:
    first = sum(data.sequences_in_epoch(before) for before in range(epoch))
    sequences = range(first, first + data.sequences_in_epoch(epoch))
    return Counter(piece for index in sequences for piece in documents_of(data.sequence(index)))


def test_an_epoch_shows_everything_once(cache):
    data = packed(cache)
    for epoch in range(3):
        assert epoch_of(data, epoch) == pieces_of(cache)


def test_sources_are_repeated_as_asked(cache):
    data = packed(cache, repeats=(2, 0.5))
    chats, texts = (pieces_of(cache, np.flatnonzero(cache.source == source)) for source in (0, 1))
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert {piece: count for piece, count in first.items() if piece in chats} == {p: 2 * n for p, n in chats.items()}
    assert first - chats - chats + second - chats - chats == texts


def test_rows_are_found_by_number(cache):
    in_order = packed(cache)
    indices = range(3 * in_order.sequences_in_epoch(0))
    expected = digest(in_order, indices)
    count = in_order.sequences_in_epoch(0)
    assert expected[:count] != expected[count : 2 * count]
    backwards = packed(cache)
    assert digest(backwards, indices[::-1]) == expected[::-1]
    assert digest(packed(cache), [indices[-1], 0]) == [expected[-1], expected[0]]
    assert digest(packed(cache, seed=6), indices) != expected


@pytest.mark.long
def test_rows_are_the_same_in_another_process_and_thread(cache, files):
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tests.train.packed_data import digest, packed\n"
        "from wedlm.train.token_cache import TokenCache\n"
        "data = packed(TokenCache(Path(sys.argv[1]), sys.argv[2:]), repeats=(1.5, 0.3))\n"
        "print(json.dumps([data.fingerprint, digest(data, range(20, 40))]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(cache.directory), *files], capture_output=True, text=True, check=True
    )
    data = packed(cache, repeats=(1.5, 0.3))
    expected = digest(data, range(20, 40))
    assert json.loads(result.stdout) == [data.fingerprint, expected]
    fresh, found = packed(cache, repeats=(1.5, 0.3)), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: digest(fresh, range(20, 40))})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 4


def test_fingerprint_tells_whatever_rows_depend_on(cache):
    data = packed(cache)
    others = [
        packed(cache, repeats=(1, 2)),
        packed(cache, seed=6),
        packed(cache, documents=np.arange(50)),
        PackedData(cache, (1, 1), LENGTH + 1, 5, pad_token_id=END),
        PackedData(cache, (1, 1), LENGTH, 5, pad_token_id=END + 1),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert packed(cache).fingerprint == data.fingerprint


def test_stats_add_up(cache):
    data = packed(cache, repeats=(3, 1))
    stats = data.stats()
    assert [one.documents for one in stats.sources] == [61, 40]
    assert [one.repeat for one in stats.sources] == [3, 1]
    assert sum(one.tokens for one in stats.sources) == len(cache.tokens)
    assert sum(one.trainable for one in stats.sources) == cache.trainable.sum()
    assert stats.sequences == data.sequences_in_epoch(0)
    assert stats.cut_documents == (cache.lengths > LENGTH).sum() > 1
    assert stats.dropped_pieces > 3
    assert stats.pieces == pieces_of(cache).total()
    shown = sum(int((data.sequence(i).documents >= 0).sum()) for i in range(stats.sequences))
    assert stats.fill == pytest.approx(shown / (stats.sequences * LENGTH))
    once = packed(cache).stats()
    assert round(once.fill * once.sequences * LENGTH) + once.dropped_tokens == len(cache.tokens)
    first, _, last = data.describe()
    assert first.startswith("chats.jsonl: 61 documents, ")
    assert f"{stats.dropped_pieces} pieces without a token to learn" in last


@pytest.mark.parametrize(("amount", "count"), [(0, 0), (7, 7), (0.25, 25), (0.0, 0)])
def test_held_out_documents_stay_out(cache, amount, count):
    train, held_out = split_validation(cache, amount, seed=1)
    assert len(held_out) == count
    assert sorted([*train, *held_out]) == list(range(cache.num_documents))
    assert split_validation(cache, amount, seed=1)[1].tolist() == held_out.tolist()
    assert epoch_of(packed(cache, documents=train), 0) == pieces_of(cache, train)
    if count:
        assert epoch_of(packed(cache, documents=held_out), 0) == pieces_of(cache, held_out)
        assert split_validation(cache, amount, seed=2)[1].tolist() != held_out.tolist()


def test_documents_of_one_sample_are_held_out_together(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *(chat("q", "a", "r", f"b{i}") for i in range(10)))
    cache = build_cache([path], chat_tokenizer(THINKING), tmp_path / "cache", eos_token_id=END).cache
    _, held_out = split_validation(cache, 3, seed=0)
    assert len(held_out) == 4
    assert Counter(cache.line[held_out].tolist()).most_common()[-1][1] == 2


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1e-6, 1)])
def test_a_small_share_of_the_documents_is_one(cache, share, count):
    assert len(split_validation(cache, share, seed=0)[1]) == count


def test_impossible_amounts_and_repeats(cache):
    for amount in (101, 1.0, -1, 2.5):
        with pytest.raises(ValueError, match=f"validation_documents is {amount}; expected "):
            split_validation(cache, amount, seed=0)
    with pytest.raises(ValueError, match="repeats has 1 numbers; expected 2"):
        packed(cache, repeats=(1,))
    with pytest.raises(ValueError, match=r"repeats are \[1, 0\]; expected numbers > 0"):
        packed(cache, repeats=(1, 0))
    with pytest.raises(ValueError, match="no documents to train on"):
        packed(cache, documents=np.arange(0))
    with pytest.raises(ValueError, match="the sequence's number is -1; expected >= 0"):
        packed(cache).sequence(-1)


def test_load_data(files, tmp_path):
    config = TrainConfig(
        model_path="x",
        train_data=[files[0], {"path": files[1], "repeat": 2}],
        cache_dir=str(tmp_path),
        max_seq_length=LENGTH,
        validation_documents=9,
    )
    train, held_out = load_data(config, TOKENIZER, MODEL, UNUSED)
    assert held_out is not None
    assert train.repeats == (1, 2)
    assert held_out.repeats == (1, 1)
    assert len(held_out.documents) == 9
    assert not set(train.documents.tolist()) & set(held_out.documents.tolist())
    assert train.pad_token_id == END
    assert load_data(config.model_copy(update={"validation_documents": 0}), TOKENIZER, MODEL, UNUSED)[1] is None


def test_load_data_refuses_what_the_model_cannot_learn(files, tmp_path):
    config = TrainConfig(model_path="x", train_data=files, cache_dir=str(tmp_path), max_seq_length=LENGTH)
    with pytest.raises(ValueError, match=rf"mask_token_id is {END}, which .*chats\.jsonl line 1; expected an id"):
        load_data(config, TOKENIZER, MODEL, END)
    autoregressive = config.model_copy(update={"objective": "autoregressive"})
    assert load_data(autoregressive, TOKENIZER, MODEL, END)[0].sequences_in_epoch(0)  # which masks nothing
    small = dataclasses.replace(MODEL, vocab_size=END, eos_token_ids=())
    with pytest.raises(ValueError, match=rf"the data uses token {END}; expected ids below the model's {END}"):
        load_data(config, TOKENIZER, small, UNUSED)


def test_the_end_token_is_one_at_which_generation_stops(files, tmp_path):
    config = TrainConfig(model_path="x", train_data=files, cache_dir=str(tmp_path), max_seq_length=LENGTH)
    other = TOKENIZER.token_id("<|endoftext|>")
    for ids, expected in [((other, END), END), ((other,), other), ((), END)]:
        model = dataclasses.replace(MODEL, eos_token_ids=ids)
        assert load_data(config, TOKENIZER, model, UNUSED)[0].pad_token_id == expected
    nameless = chat_tokenizer(eos="")
    with pytest.raises(ValueError, match="neither the model's config nor its tokenizer names an end token"):
        load_data(config, nameless, dataclasses.replace(MODEL, eos_token_ids=()), UNUSED)
