# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3 for prompt chunks: a stub of its package against PagedSdpa, when it is used, and on a Hopper GPU the
package itself against our kernel."""

import random
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.comparing import close
from tests.kernels.flash_stub import NAME, Stub, install, pretend_hopper
from tests.kernels.graph_engine import LENGTH, MASK, engine, few_rows_beside_chunks, outcomes
from tests.kernels.random_batches import random_batch
from tests.model.tiny import our_model
from wedlm.attention import flash
from wedlm.attention.base import FP8, ExtendBatch, KVCache
from wedlm.attention.paged import PagedAttend, plan_paged
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine import factory
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.kernels.attention import PagedRows, paged_attention
from wedlm.model.inference.layers import pack_for_inference

HEADS, KV_HEADS, D, PAGE = 6, 2, 16, 8
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the stub waits for the device, which no graph can hold")


def new_cache(num_pages, dtype=torch.float16, device="cpu", page_size=PAGE):
    cache = KVCache(1, num_pages, page_size, KV_HEADS, D, dtype, torch.device(device))
    if dtype != FP8:
        cache.keys.copy_(torch.randn(cache.keys.shape))
        cache.values.copy_(torch.randn(cache.values.shape))
    return cache


def attended(plan, q, k, v):
    """Through the whole of ``PagedAttend``, with RoPE's angles 0."""
    cos = torch.ones(len(q), D, device=q.device, dtype=q.dtype)
    qkv = torch.cat((q, k, v), dim=1).flatten(1)
    return plan(0, qkv, cos, torch.zeros_like(cos), None)


@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 40)],
        [(37, 40)],
        [(0, 40), (70, 35)],
        pytest.param([(64, 33), (3, 50), (130, 5), (0, 1)], marks=pytest.mark.long),  # windows behind the chunks
        pytest.param(
            [(5, 40), (130, 3), (64, 50), (0, 1), (9, 33)], marks=pytest.mark.long
        ),  # and short chunks between them
        [(2, 2), (5, 64)],
    ],
    ids=str,
)
def test_it_is_sdpa(device, monkeypatch, lengths):
    stub = Stub(without_keys=torch.nan)
    install(monkeypatch, stub)
    monkeypatch.setattr(flash, "FEWEST_ROWS", 33)
    torch.manual_seed(1)
    batch, num_pages = random_batch(random.Random(repr(lengths)), lengths, PAGE, device, False)
    cache = new_cache(num_pages, device=device)
    total = sum(batch.counts)
    q, k, v = (torch.randn(total, heads, D, device=device).half() for heads in (HEADS, KV_HEADS, KV_HEADS))
    plan = plan_paged(cache, batch)
    assert plan.flash is not None
    tried = stub.num_calls
    actual = attended(plan, q, k, v)
    assert stub.num_calls == tried + 1
    close(actual, PagedSdpa(cache, batch)(0, q, k, v), torch.float16)


def padded_rows(tables, starts, counts, first, num_rows, device):
    """Chunks as the last of the rows of a captured step, and two without rows."""
    counts, starts = (torch.tensor([*numbers, 0, 0], device=device) for numbers in (counts, starts))
    row_start = first + counts.cumsum(0) - counts
    row = torch.tensor([*range(len(tables)), len(tables), len(tables)], device=device)
    width = max(map(len, tables))
    table = torch.tensor([pages + [0] * (width + 3 - len(pages)) for pages in [*tables, []]], device=device)
    return PagedRows(row_start, counts, starts, row, table, PAGE, num_rows, (width + 3) * PAGE)


def test_padded_chunks_behind_windows(device, monkeypatch):
    """As in captured steps: nothing that depends on data is known to the host."""
    install(monkeypatch, Stub())
    torch.manual_seed(2)
    monkeypatch.setattr(flash, "FEWEST_ROWS", 20)
    batch, num_pages = random_batch(random.Random(2), [(30, 2), (9, 3), (17, 40), (0, 35)], PAGE, device, False)
    cache = new_cache(num_pages, device=device)
    gap = 4  # between windows and chunks
    q, k, v = (torch.randn(80 + gap, heads, D, device=device).half() for heads in (HEADS, KV_HEADS, KV_HEADS))
    windows = replace(padded_rows(batch.pages[:2], [30, 9], [2, 3], 0, 3, device), within=9)
    chunks = padded_rows(batch.pages[2:], [17, 0], [40, 35], 9, 84, device)
    real = torch.tensor([*range(5), *range(9, 84)], device=device)
    slots = torch.full((84,), (num_pages - 1) * PAGE, device=device)
    slots[real] = plan_paged(cache, batch).slots
    plan = PagedAttend(cache, [windows, chunks], slots)
    assert plan.flash is not None
    actual = attended(plan, q, k, v)
    close(actual[real], PagedSdpa(cache, batch)(0, q[real], k[real], v[real]), torch.float16)
    assert not actual[5:9].any()


@on_cpu
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # of padding
@pytest.mark.long
def test_engine_with_it_writes_the_same(device, monkeypatch):
    """Prompts in several chunks beside windows, in captured steps (run directly) and in those that need the host."""
    few_rows_beside_chunks(device, monkeypatch)
    requests = [
        ([7 + i for i in range(length)], SamplingParams(decoding=name, max_tokens=4, wedlm_window_size=3, **more))
        for length, name, more in ((20, "verified", {}), (26, "auto", {}), (22, "autoregressive", {"logprobs": 1}))
    ]
    found = []
    for stub in (None, Stub()):
        if stub is not None:
            install(monkeypatch, stub)
            monkeypatch.setattr(flash, "FEWEST_ROWS", 2)
            monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
        one = engine(device, True)
        one.scheduler.max_num_batched_tokens = 18
        found.append([done[::3] for done in outcomes(one, requests)[0]])
    assert stub.num_calls > 10
    assert found[0] == found[1]


def test_when_it_is_used(monkeypatch):
    install(monkeypatch, Stub())
    batch = ExtendBatch([3, 0], [128, 128], [list(range(20)), list(range(20, 40))])
    few = replace(batch, counts=[128, 127])
    hidden, _ = random_batch(random.Random(0), [(0, 200)], PAGE, torch.device("cpu"), True)
    cache = new_cache(40)
    assert plan_paged(cache, batch).flash is not None
    assert plan_paged(new_cache(40, torch.bfloat16), batch).flash is not None
    assert plan_paged(cache, few).flash is None
    assert plan_paged(cache, hidden).flash is None
    assert plan_paged(cache, batch, fixed=True).flash is None
    for dtype in (torch.float32, FP8):
        assert plan_paged(new_cache(40, dtype), batch).flash is None


def test_it_is_imported_only_where_it_may_be_used(monkeypatch):
    imported = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == NAME:
                imported.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    kind = 2, 16, 8
    assert flash.find_flash(torch.device("cpu"), torch.float16, *kind) == flash.Flash()
    pretend_hopper(monkeypatch)
    assert flash.find_flash(torch.device("cpu"), torch.float32, *kind) == flash.Flash()
    assert not imported
    if find_spec(NAME) is None:
        imported.clear()
        assert flash.find_flash(torch.device("cpu"), torch.float16, *kind) == flash.Flash()
        assert imported == [NAME]


def without_paged_keys(*args, **options):
    raise RuntimeError("This flash attention build does not support paged KV.\nException raised from mha_fwd")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            Stub(),
            "steps: Triton kernels, FlashAttention-3 for the attention of long prompt chunks, in CUDA graphs, with",
        ),
        (
            without_paged_keys,
            "steps: Triton kernels in CUDA graphs, with prompt chunks (FlashAttention-3 is installed, but cannot be "
            "used: RuntimeError: This flash attention build does not support paged KV.)",
        ),
    ],
    ids=["works", "fails"],
)
def test_users_are_told(monkeypatch, caplog, call, said, deterministic):
    install(monkeypatch, call)
    monkeypatch.setattr(factory, "eager_reason", lambda *_: None)
    options = EngineOptions(kv_cache_bytes=2**20, deterministic=deterministic)
    model = pack_for_inference(our_model("wedlm-qwen3").to(torch.bfloat16))
    caplog.set_level("INFO")
    blueprint = factory.plan_engine(model, EngineConfig(96, MASK, (5,), LENGTH, options), None)
    if deterministic:
        assert "steps: deterministic Triton kernels in CUDA graphs, with prompt chunks" in blueprint.describe()
        assert "FlashAttention" not in blueprint.describe()
    else:
        assert said in blueprint.describe()
    fails = call is without_paged_keys and not deterministic
    assert [record.levelname for record in caplog.records] == ["WARNING" if fails else "INFO"]


def test_package_that_cannot_be_imported(monkeypatch):
    pretend_hopper(monkeypatch)

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == NAME:
                raise ImportError("flash_attn_3/_C.abi3.so: undefined symbol: of another torch")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    found = flash.find_flash(torch.device("cpu"), torch.float16, 2, 16, 8)
    assert found.call is None
    assert found.fault == "ImportError: flash_attn_3/_C.abi3.so: undefined symbol: of another torch"


needs_package = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9 or find_spec(NAME) is None,
    reason="no Hopper GPU, or no flash_attn_interface",
)


@needs_package
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize(
    "lengths",
    [[(0, 2048)], [(6144, 2048)], [(100, 700), (3000, 1300)], [(70, 300), (9, 5), (2000, 400), (64, 16)]],
    ids=str,
)
def test_package_is_our_kernel(device, lengths, page_size, head_dim):
    torch.manual_seed(0)
    batch, num_pages = random_batch(random.Random(1), lengths, page_size, device, False)
    cache = KVCache(1, num_pages, page_size, 8, head_dim, torch.bfloat16, device)
    cache.keys.normal_()
    cache.values.normal_()
    q = torch.randn(sum(batch.counts), 32, head_dim, device=device, dtype=torch.bfloat16)
    plan = plan_paged(cache, batch)
    assert plan.flash is not None
    actual = plan.flash(q, cache.keys[0], cache.values[0])
    long = torch.cat([torch.full((count,), count > 32, device=device) for count in batch.counts])
    expected = paged_attention(q, cache.keys[0], cache.values[0], plan.groups[-1])
    close(actual[long], expected[long], torch.bfloat16)


@needs_package
def test_captured_call_reads_what_is_there_at_replay(device):
    torch.manual_seed(0)
    table = torch.randperm(256, device=device).view(2, 128)
    cache = KVCache(1, 257, 64, 8, 128, torch.bfloat16, device)
    cache.keys.normal_()
    cache.values.normal_()
    q = torch.randn(2048, 32, 128, device=device, dtype=torch.bfloat16)
    first, count, cached = (torch.zeros(4, dtype=torch.long, device=device) for _ in range(3))
    rows = PagedRows(
        first, count, cached, torch.tensor([0, 1, 0, 0], device=device), table, 64, len(q), table.shape[1] * 64
    )
    slots = torch.zeros(len(q), dtype=torch.long, device=device)

    def step():
        plan = PagedAttend(cache, [rows], slots)
        assert plan.flash is not None
        return plan.flash(q, cache.keys[0], cache.values[0])

    first.fill_(2048)
    step()  # imports, and captures nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for starts, counts in (((6144, 0), (2048, 0)), ((100, 5000), (700, 900)), ((0, 0), (300, 0))):
        number = torch.tensor([*counts, 0, 0], device=device)
        first.copy_(2048 - sum(counts) + number.cumsum(0) - number)
        count.copy_(number)
        cached.copy_(torch.tensor([*starts, 0, 0], device=device))
        graph.replay()
        expected = paged_attention(q, cache.keys[0], cache.values[0], rows)
        close(out[2048 - sum(counts) :], expected[2048 - sum(counts) :], torch.bfloat16)
