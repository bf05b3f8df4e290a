# SPDX-License-Identifier: Apache-2.0
"""A row's result depends on nothing but its own sequence: not on company, chunks or threads."""

import os

import numpy as np
import pytest
import torch

from tests.native.conftest import PATHS
from tests.native.shapes import parts_of, random_cache, random_rows, tiny_model
from wedlm.algorithm.sample import entropy_and_logsumexp
from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.native import NativeAttend, NativeError
from wedlm.native.weights import native_from_torch

PAGE = 8


def one_by_one(native, tokens, sizes, cache, pages):
    """Logits of one sequence's rows, given in steps of ``sizes`` rows."""
    parts, start = [], 0
    for size in sizes:
        stop = min(start + size, len(tokens))
        if stop == start:
            break
        attend = NativeAttend(cache, ExtendBatch([start], [stop - start], [pages]))
        parts.append(native(tokens[start:stop], torch.arange(start, stop), attend))
        start = stop
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("quantization", ["int8", None])
@pytest.mark.parametrize("path", PATHS)
def test_chunks_and_threads_change_no_bit(path, quantization, dtype):
    model = tiny_model(5, qkv_bias=True, out_bias=True, max_position_embeddings=1024)
    tokens = torch.randint(0, 131, (300,), generator=torch.Generator().manual_seed(1))
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(2)).tolist()
    results, caches = [], []
    for threads, sizes in ((1, [1] * 300), (2, [300]), (2, [7] * 50), (1, [256, 44]), (2, [3, 64, 1, 200, 32])):
        native = native_from_torch(model, quantization, path=path, threads=min(threads, os.cpu_count() or 1))
        cache = random_cache(3, model.config, 40, PAGE, dtype)
        results.append(one_by_one(native, tokens, sizes, cache, pages))
        caches.append(cache)
    for logits, cache in zip(results[1:], caches[1:], strict=True):
        assert torch.equal(logits, results[0])
        assert all(map(torch.equal, parts_of(cache), parts_of(caches[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_company_changes_no_bit(path, dtype):
    """A sequence alone, and in batches of up to 32 others."""
    model = tiny_model(6)
    native = native_from_torch(model, "int8", path=path)
    cache = random_cache(4, model.config, 200, PAGE, dtype)
    rng = np.random.default_rng(5)
    tokens, positions = torch.tensor([3, 99, 7]), torch.tensor([20, 25, 21])
    alone = native(tokens, positions, NativeAttend(cache, ExtendBatch([20], [3], [[5, 0, 9]])))
    for others in range(1, 33):
        counts = rng.integers(1, 4, others).tolist()
        starts = rng.integers(0, 20, others).tolist()
        pages = [[10 + 4 * i, 11 + 4 * i, 12 + 4 * i] for i in range(others)]
        at = int(rng.integers(0, others + 1))
        before, total = sum(counts[:at]), sum(counts)
        all_tokens, all_positions = (torch.from_numpy(rng.integers(0, 131, total)) for _ in range(2))
        batch = ExtendBatch(
            [*starts[:at], 20, *starts[at:]], [*counts[:at], 3, *counts[at:]], [*pages[:at], [5, 0, 9], *pages[at:]]
        )
        insert = lambda x, own: torch.cat((x[:before], own, x[before:]))  # noqa: E731, B023
        together = native(insert(all_tokens, tokens), insert(all_positions, positions), NativeAttend(cache, batch))
        assert torch.equal(together[before : before + 3], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_slots_that_nobody_sees_change_no_bit(dtype):
    model = tiny_model(7)
    native = native_from_torch(model, "int8")
    cache = random_cache(4, model.config, 4, PAGE, dtype)
    attend = NativeAttend(cache, ExtendBatch([10], [2], [[2, 1]]))
    before = native(torch.tensor([1, 2]), torch.tensor([10, 11]), attend)
    for values in (part for part in parts_of(cache) if part.is_floating_point()):
        values.view(-1, 4, PAGE, *values.shape[2:])[:, 1, 4:] = torch.nan
        values.view(-1, 4, PAGE, *values.shape[2:])[:, 0] = torch.inf
    assert torch.equal(native(torch.tensor([1, 2]), torch.tensor([10, 11]), attend), before)


@pytest.mark.parametrize("vocab_size", [131, 2500])
def test_greedy_rows(vocab_size):
    """Choice, entropy and logsumexp are those of the logits; banned ids are passed over, in the choice alone."""
    model, rng = tiny_model(8, vocab_size=vocab_size), np.random.default_rng(9)
    native = native_from_torch(model, "int8")
    cache = random_cache(5, model.config, 24, PAGE, torch.float32)
    rows = random_rows(rng, vocab_size, 24, PAGE, hides=True)
    attend = NativeAttend(cache, rows.batch)
    wanted = torch.from_numpy(rng.permutation(len(rows.tokens)))[: max(2, len(rows.tokens) // 2)]
    logits = native(rows.tokens, rows.positions, attend, wanted)
    best = logits.argsort(dim=-1, descending=True, stable=True)
    banned = [best[i, : i % 3].tolist() for i in range(len(wanted))]

    greedy = native.greedy(rows.tokens, rows.positions, attend, wanted, banned)

    expected = torch.stack([best[i, i % 3] for i in range(len(wanted))])
    assert torch.equal(greedy.token, expected)
    assert torch.equal(greedy.token_logit, logits.gather(1, expected[:, None])[:, 0])
    entropy, logsumexp = entropy_and_logsumexp(logits)
    torch.testing.assert_close(greedy.entropy, entropy, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(greedy.logsumexp, logsumexp, rtol=1e-6, atol=1e-6)


def test_equal_logits_go_to_the_lowest_id():
    model = tiny_model(8, vocab_size=2500)
    with torch.no_grad():
        model.lm_head.weight[1:] = model.lm_head.weight[0]
    native = native_from_torch(model, "int8")
    cache = KVCache(2, 4, PAGE, 2, 16, torch.float32, torch.device("cpu"))
    attend = NativeAttend(cache, ExtendBatch([0], [1], [[0]]))
    arguments = torch.tensor([1]), torch.tensor([0]), attend, torch.tensor([0])
    assert native.greedy(*arguments).token.tolist() == [0]
    assert native.greedy(*arguments, banned=[[0, 1, 1024]]).token.tolist() == [2]


def test_after_a_fork_and_after_closing():
    native = native_from_torch(tiny_model(9), "int8", threads=min(2, os.cpu_count() or 1))
    cache = KVCache(2, 4, PAGE, 2, 16, torch.float32, torch.device("cpu"))
    arguments = torch.tensor([1, 2, 3, 4, 5]), torch.arange(5), NativeAttend(cache, ExtendBatch([0], [5], [[0]]))
    expected = native(*arguments)
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(0 if torch.equal(native(*arguments), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(native(*arguments), expected)
    native.close()
    with pytest.raises(NativeError, match="closed"):
        native(*arguments)


@pytest.mark.parametrize("threads", [0, 10_000, -1, True, 1.5])
def test_bad_threads(threads):
    with pytest.raises(NativeError, match=r"threads is .*; expected 1 to"):
        native_from_torch(tiny_model(1), "int8", threads=threads)


def test_bad_instruction_set(monkeypatch):
    with pytest.raises(NativeError, match=r"instruction set is 'mmx'; expected one of .*portable"):
        native_from_torch(tiny_model(1), "int8", path="mmx")
    monkeypatch.setenv("WEDLM_NATIVE_PATH", "portable")
    assert native_from_torch(tiny_model(1), "int8").path == "portable"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [131]}, "token is 131; expected 0 to 130"),
        ({"tokens": [-1]}, "token is -1"),
        ({"positions": [100_000]}, "position is 100000; expected 0 to"),
        ({"positions": [-1]}, "position is -1"),
        ({"starts": [8]}, "1 pages; expected enough for 9 keys"),
        ({"counts": [2]}, "there are 1 tokens; expected 2"),
        ({"pages": [[4]]}, "page is 4; expected one of the cache's 4"),
        ({"logits_rows": [1]}, "asked for is 1; expected 0 to 0"),
        ({"banned": [[131]]}, "banned token is 131"),
        ({"banned": []}, "0 lists of banned tokens; expected 1"),
    ],
)
def test_bad_steps_are_refused_alone(change, message):
    native = native_from_torch(tiny_model(9), "int8")
    cache = KVCache(2, 4, PAGE, 2, 16, torch.float32, torch.device("cpu"))

    def run(tokens=(1,), positions=(0,), starts=(0,), counts=(1,), pages=((0,),), logits_rows=(0,), banned=((),)):
        batch = ExtendBatch(list(starts), list(counts), [list(one) for one in pages])
        step = torch.tensor(tokens), torch.tensor(positions), NativeAttend(cache, batch), torch.tensor(logits_rows)
        return native.greedy(*step, banned=banned)

    expected = run()
    with pytest.raises(NativeError, match=message):
        run(**change)
    assert torch.equal(run().token_logit, expected.token_logit)
