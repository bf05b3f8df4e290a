# SPDX-License-Identifier: Apache-2.0
"""Documents with a gap: what is rearranged, who then sees whom, and that training runs the rows that decoding runs."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.train.chat_data import chat, chat_tokenizer, write_lines
from wedlm.algorithm.dual_stream import dense_mask
from wedlm.attention.dual_stream import DenseAttend
from wedlm.attention.sdpa import CausalAttend
from wedlm.model import ModelConfig, Transformer
from wedlm.train.batch import noised_rows
from wedlm.train.config import TrainConfig, load_config
from wedlm.train.data import PackedData
from wedlm.train.infill import with_gaps
from wedlm.train.packing import PackedSequence
from wedlm.train.token_cache import build_cache

END, MASK, LENGTH = 90, 91, 40


def documents_of(rng: np.random.Generator) -> PackedSequence:
    """Several documents, some with a part that is not learnt, and padding."""
    tokens, positions, documents, trainable = (np.zeros(LENGTH, dtype=np.int64) for _ in range(4))
    documents[:] = -1
    at = number = 0
    for length in rng.integers(1, 20, 4).tolist():
        here = slice(at, min(at + length, LENGTH - 3))
        count = here.stop - here.start
        if count < 1:
            break
        tokens[here], positions[here], documents[here] = rng.integers(1, 80, count), np.arange(count), number
        trainable[here] = np.arange(count) >= (0 if rng.random() < 0.5 else count // 2)
        at, number = here.stop, number + 1
    return PackedSequence(tokens, positions, documents, trainable.astype(np.bool_))


def test_what_is_rearranged():
    rng, gaps, padded_gaps = np.random.default_rng(0), 0, 0
    for _ in range(150):
        before = documents_of(rng)
        after = with_gaps(before, 0.7, 5, END, rng)
        assert (after.documents == before.documents).all()
        for document in range(before.documents.max() + 1):
            here = before.documents == document
            old, new = before.tokens[here].tolist(), after.tokens[here].tolist()
            positions, learnt = after.positions[here].tolist(), after.trainable[here].tolist()
            assert sorted(positions) == list(range(len(old)))
            if positions == sorted(positions):
                assert (new, learnt) == (old, before.trainable[here].tolist())
                continue
            gaps += 1
            start = next(i for i in range(len(old)) if positions[i] != i)
            border = next(i for i in range(start, len(old)) if positions[i] < positions[i - 1])
            suffix, middle = range(start, border), range(border, len(old))
            ends = sum(new[i] == END for i in middle)
            padded_gaps += ends > 0
            # By position it is the old text, with end tokens at the end of the gap and as many less at the text's own.
            text = [token for _, token in sorted(zip(positions, new, strict=True))]
            gap_end = positions[start]
            assert text[gap_end - ends : gap_end] == [END] * ends
            assert text[: gap_end - ends] + text[gap_end:] == old[: len(old) - ends]
            assert 1 <= len(middle) - ends <= 5
            assert ends <= len(middle) - ends
            assert [positions[i] for i in middle] == list(range(start, start + len(middle)))
            assert not any(learnt[i] for i in suffix)
            assert all(learnt[i] for i in middle)
            assert all(before.trainable[here][start : gap_end - ends])
            assert learnt[:start] == before.trainable[here].tolist()[:start]
    assert gaps > 100
    assert padded_gaps > 40


def settings(**changes) -> TrainConfig:
    values = {"model_path": "x", "train_data": "x", "max_seq_length": LENGTH, "block_size": 4, "seed": 3}
    return load_config(None, values | changes)


@pytest.mark.parametrize("suffix_noise", [0.0, 1.0])
def test_who_sees_whom_by_hand(suffix_noise):
    rng, config = np.random.default_rng(1), settings(suffix_noise=suffix_noise)
    masked_in_gaps = 0
    for index in range(25):
        sequence = with_gaps(documents_of(rng), 1.0, 6, END, rng)
        stream = noised_rows(sequence, index, config, MASK)
        sees, labels = dense_mask(stream.labels), stream.labels
        order = {}  # of a document's tokens: where each position stands
        for place, (document, position) in enumerate(zip(sequence.documents, sequence.positions, strict=True)):
            order[int(document), int(position)] = place
        for row in torch.nonzero(labels.document >= 0).flatten().tolist():
            document, position = int(labels.document[row]), int(stream.positions[row])
            own = order[document, position]
            seen = torch.nonzero(sees[row]).flatten().tolist()
            clean = {int(stream.positions[key]) for key in seen if not labels.prediction[key]}
            earlier = [
                int(p) for p, d in zip(sequence.positions[:own], sequence.documents[:own], strict=True) if d == document
            ]
            if not labels.prediction[row]:  # prefix, suffix, middle: each what comes before it in that order
                assert clean == {*earlier, position}
                if stream.is_ar[row]:  # in the prefix alone
                    assert clean == set(range(position + 1))
                    assert stream.target[row] == sequence.tokens[order[document, position + 1]]
                continue
            # A block: consecutive positions, of the prefix or of the gap, and all known tokens before it.
            block = sorted(
                int(stream.positions[key])
                for key in range(len(sees))
                if labels.prediction[key]
                and labels.document[key] == document
                and labels.block[key] == labels.block[row]
            )
            assert block == list(range(block[0], block[0] + len(block)))
            first = order[document, block[0]]
            assert clean == {int(sequence.positions[i]) for i in range(first) if sequence.documents[i] == document}
            jumps = [
                i
                for i in range(1, len(sequence.positions))
                if sequence.documents[i] == document
                and sequence.documents[i - 1] == document
                and sequence.positions[i] < sequence.positions[i - 1]
            ]
            if jumps and own >= jumps[0] and stream.masked[row]:
                masked_in_gaps += 1
                assert stream.ar_row[row] == -1
                suffix = {p for p in range(position, len(order)) if order.get((document, p), LENGTH) < jumps[0]}
                assert suffix
                assert suffix <= clean, "all of the suffix is observed"
            before = int(stream.ar_row[row])
            if before >= 0:
                assert (stream.positions[before], labels.prediction[before]) == (position - 1, False)
                assert stream.target[row] == stream.target[before] or not stream.is_ar[before]
    assert masked_in_gaps > 40


def test_training_runs_the_rows_that_decoding_runs():
    """A gap that is masked as a whole is the first window over it: the same logits."""
    config = ModelConfig(
        model_type="qwen3", vocab_size=92, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64, qk_norm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config)
    rng = np.random.default_rng(5)
    sequence = PackedSequence(
        rng.integers(1, 80, LENGTH),
        np.arange(LENGTH),
        np.zeros(LENGTH, dtype=np.int64),
        np.ones(LENGTH, dtype=np.bool_),
    )
    sequence = with_gaps(sequence, 1.0, 4, END, rng)
    stream = noised_rows(sequence, 0, settings(suffix_noise=1.0, block_size=64, seed=2), MASK)
    jump = int(np.flatnonzero(np.diff(sequence.positions) < 0)[0]) + 1
    gap = [
        row
        for row in torch.nonzero(stream.masked).flatten().tolist()
        if stream.labels.block[row] == stream.labels.block[stream.masked][-1]
    ]
    positions = [int(stream.positions[row]) for row in gap]
    assert positions == sequence.positions[LENGTH - len(gap) :].tolist()
    known = LENGTH - len(gap)
    assert known >= jump
    attend = DenseAttend(dense_mask(stream.labels)[None, None], 1)
    with torch.inference_mode():
        trained = model(stream.tokens, stream.positions, attend)[gap]
        tokens = [*sequence.tokens[:known].tolist(), *[MASK] * len(gap)]
        decoded = model(torch.tensor(tokens), torch.tensor(sequence.positions), CausalAttend())[known:]
    assert torch.allclose(trained, decoded, atol=1e-4)


def test_a_share_of_the_data_has_gaps(tmp_path):
    tokenizer = chat_tokenizer()
    end = tokenizer.token_id("<|im_end|>")
    lines = [chat(f"add {i} to {i}", f"it is {2 * i}") for i in range(40)]
    cache = build_cache([str(write_lines(tmp_path / "a.jsonl", *lines))], tokenizer, tmp_path, eos_token_id=end).cache

    def data(**options) -> PackedData:
        return PackedData(cache, [1], 48, 5, pad_token_id=end, **options)

    plain, none, some = data(), data(infill_share=0.0, infill_length=9), data(infill_share=0.5)
    assert plain.fingerprint == none.fingerprint != some.fingerprint
    jumps = documents = 0
    for index in range(plain.sequences_in_epoch(0)):
        one, other, again = plain.sequence(index), none.sequence(index), some.sequence(index)
        for field in dataclasses.fields(PackedSequence):
            assert (getattr(one, field.name) == getattr(other, field.name)).all()
            assert (getattr(again, field.name) == getattr(some.sequence(index), field.name)).all()
        documents += one.documents.max() + 1
        inside = again.documents[1:] == again.documents[:-1]
        jumps += int((np.diff(again.positions)[inside & (again.documents[1:] >= 0)] < 0).sum())
    assert 0.3 < jumps / documents < 0.7
    with pytest.raises(ValueError, match=r"infill_share is 0\.1; expected objective wedlm with it"):
        settings(infill_share=0.1, objective="autoregressive")
