# SPDX-License-Identifier: Apache-2.0
"""Adapters by name: requests with different ones share steps, and each has the text that it has alone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapter_files import KINDS, write_adapter
from tests.engine.native_model import needs_native
from tests.engine.tiny_llm import VOCAB, check_empty, save_tiny
from tests.tiers import EACH_DECODING
from wedlm import LLM, SamplingParams
from wedlm.algorithm.params import DECODINGS
from wedlm.engine.adapters import UnknownAdapter
from wedlm.model import CheckpointError
from wedlm.model.formats.checkpoint import read_config
from wedlm.model.lora.peft import CONFIG_FILE, MASKED_FOLDER, WEIGHTS_FILE
from wedlm.native import NativeTransformer

NAMES = (None, *KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The checkpoint, and an adapter of each kind for it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_tiny(folder / "base")
    config = read_config(base)
    return {"base": base} | {kind: write_adapter(folder / kind, config, kind, i) for i, kind in enumerate(KINDS)}


def load(folders, adapters=KINDS, **options) -> LLM:
    named = {kind: folders[kind] for kind in adapters}
    return LLM(folders["base"], **{"device": "cpu", "max_num_seqs": 16, "adapters": named, **options})


WAYS = {
    "float32": {"dtype": "float32"},
    "int8": {"quantization": "int8"},
    "cuda": {"dtype": "float32", "device": "cuda", "kv_cache_bytes": 1 << 26},
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(
    scope="module", params=["float32", pytest.param("int8", marks=needs_native), pytest.param("cuda", marks=needs_cuda)]
)
def llm(request, folders) -> LLM:
    llm = load(folders, **WAYS[request.param])
    assert isinstance(llm.model, NativeTransformer) == (request.param == "int8")
    return llm


def requests_of(seed: int, count: int = 16) -> list[tuple[list[int], SamplingParams, str | None]]:
    """Prompts of mixed lengths, some with a common beginning, all four kinds of rows among them."""
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB - 3) for _ in range(40)]
    found = []
    for i in range(count):
        prompt = stem[: rng.choice([0, 16, 33])] + [rng.randrange(VOCAB - 3) for _ in range(rng.choice([1, 3, 9]))]
        how = {"max_tokens": rng.choice([5, 12]), "temperature": 0.8 * (i % 5 == 4), "seed": i}
        how |= {"wedlm_window_size": rng.choice([5, 16]), "logprobs": rng.choice([None, 2]), "wedlm_draft_entropy": 4.0}
        how |= {"logit_bias": rng.choice([None, None, {3: 2.0, 9: -1.0}])}
        found.append((prompt, SamplingParams(**how), NAMES[i % 4]))
    return found


def tokens_of(llm: LLM, requests, decoding: str, together: bool) -> list[list[int]]:
    """Of each request, in one batch or one after the other."""
    llm.engine.pool.reset_prefix_cache()
    asked = [(prompt, replace(params, decoding=decoding), name) for prompt, params, name in requests]
    batches = [asked] if together else [[one] for one in asked]
    found = []
    for batch in batches:
        prompts, params, names = (list(part) for part in zip(*batch, strict=True))
        found += [one.token_ids for one in llm.generate(prompts, params, adapter=names, progress=False)]
        check_empty(llm)
    return found


def check_alone(llm: LLM, seed: int, decoding: str, asked: slice) -> None:
    requests = requests_of(seed)
    together = tokens_of(llm, requests, decoding, together=True)
    assert together[asked] == tokens_of(llm, requests[asked], decoding, together=False)
    if decoding in ("verified", "auto"):
        assert together == tokens_of(llm, requests, "autoregressive", together=True)


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_each_text_is_the_one_alone(llm, decoding):
    """In a batch of 16; as many of those by themselves as time allows."""
    is_quick = isinstance(llm.model, NativeTransformer)
    check_alone(llm, 1, decoding, slice(None) if is_quick else slice(1, 16, 3))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("decoding", DECODINGS)
def test_each_text_of_many_batches_is_the_one_alone(llm, seed, decoding):
    check_alone(llm, seed, decoding, slice(None))


def test_the_base_is_untouched_and_adapters_differ(llm, folders):
    """Requests without one get the text of an engine without any; a LoRA changes AR's text, masked rows do not."""
    quantization = "int8" if isinstance(llm.model, NativeTransformer) else "none"
    options = {"quantization": quantization, "device": llm.engine.runner.device.type, "kv_cache_bytes": 1 << 26}
    bare, requests = load(folders, (), dtype="float32", **options), requests_of(seed=2, count=4)
    for decoding in ("autoregressive", "streaming"):
        plain = [(prompt, params, None) for prompt, params, _ in requests]
        expected = tokens_of(bare, plain, decoding, together=True)
        assert tokens_of(llm, plain, decoding, together=True) == expected
        for kind in KINDS:
            named = [(prompt, params, kind) for prompt, params, _ in requests]
            same = tokens_of(llm, named, decoding, together=True) == expected
            assert same == (kind == "masked" and decoding == "autoregressive")


@pytest.mark.parametrize("kind", KINDS)
def test_by_name_it_is_what_it_is_for_all_requests(folders, kind):
    """In float32 an adapter by name gives the text of the engine that has it merged, or beside its weights."""
    by_name, for_all = load(folders, (kind,)), LLM(folders["base"], device="cpu", adapter=str(folders[kind]))
    for decoding in ("autoregressive", "verified", "streaming"):
        requests = [(prompt, params, kind) for prompt, params, _ in requests_of(seed=3, count=4)]
        plain = [(prompt, params, None) for prompt, params, _ in requests]
        expected = tokens_of(for_all, plain, decoding, together=True)
        assert tokens_of(by_name, requests, decoding, together=True) == expected


def test_a_lora_keeps_the_models_own_factors_for_masked_rows(folders):
    """By name on a base with an adapter of masked rows for all, a LoRA is as both in one directory; what has its own
    for masked rows has those."""
    base = folders["base"]
    beside = load(folders, ("lora", "both"), adapter=str(folders["masked"]))
    requests = requests_of(seed=4, count=4)
    mixed = folders["base"].parent / "mixed"
    write_adapter(mixed, read_config(base), "lora", 0)
    write_adapter(mixed / MASKED_FOLDER, read_config(base), "masked", 1)  # what ``folders`` has for masked rows
    by_name = LLM(base, device="cpu", adapters={"lora": mixed, "both": folders["both"]})
    for kind in ("lora", "both"):
        asked = [(prompt, params, kind) for prompt, params, _ in requests]
        for decoding in ("streaming", "verified"):
            expected = tokens_of(by_name, asked, decoding, together=True)
            assert tokens_of(beside, asked, decoding, together=True) == expected


def reused(llm: LLM, prompt: list[int], adapter: str | None, salt: str = "") -> int:
    params = SamplingParams(max_tokens=1, cache_salt=salt)
    (output,) = llm.generate([prompt], params, adapter=adapter)
    assert output.stats is not None
    return output.stats.num_reused_tokens


def test_the_prefix_cache_keeps_adapters_apart(llm, folders):
    """An adapter of masked rows shares the base's pages, because its known rows are the base's; others share none, not
    even with one of their name from before, and no salt of a client's leads there."""
    llm.engine.pool.reset_prefix_cache()
    whole = max(1, 32 // llm.engine.pool.page_size) * llm.engine.pool.page_size  # of pages
    prompt = [number % 40 for number in range(whole + 8)]
    assert reused(llm, prompt, None) == 0
    assert reused(llm, prompt, "masked") == whole
    for name in ("lora", "both"):
        assert reused(llm, prompt, name) == 0
        assert reused(llm, prompt, name) == whole
    serial = llm.engine.adapters.get("lora").serial
    for salt in (str(serial), f"adapter{serial}", "lora"):
        assert reused(llm, prompt, None, salt) == 0
    assert reused(llm, prompt, "lora", "mine") == 0
    llm.unload_adapter("lora")
    llm.load_adapter("lora", folders["lora"])
    assert reused(llm, prompt, "lora") == 0


def test_names_and_lists(llm):
    with pytest.raises(ValueError, match="adapter is 'other'; expected one of "):
        llm.generate("x", adapter="other")
    with pytest.raises(ValueError, match="adapter has 1 entries; expected one, or one for each of the 2 prompts"):
        llm.generate(["x", "y"], adapter=["lora"])
    with pytest.raises(ValueError, match="adapter is 3; expected a name, None, or a list of these"):
        llm.generate("x", adapter=3)
    assert sorted(llm.adapters) == sorted(KINDS)
    check_empty(llm)


def test_bounds_and_refusals(folders, tmp_path):
    llm = load(folders, ("lora",), max_adapters=2, max_adapter_rank=8)
    config = read_config(folders["base"])
    wide = write_adapter(tmp_path / "wide", config, "both", 5, rank=5)
    with pytest.raises(CheckpointError, match=r"has rank 10; expected at most 8 \(max_adapter_rank\)"):
        llm.load_adapter("wide", wide)
    huge = write_adapter(tmp_path / "huge", replace(config, intermediate_size=30_000), "lora", 5, rank=8)
    with pytest.raises(CheckpointError, match=r"bytes of weights; expected at most \d+, an adapter of rank 8"):
        llm.load_adapter("huge", huge)
    with pytest.raises(CheckpointError, match=r"there is no adapter_config\.json"):
        llm.load_adapter("nothing", tmp_path)
    with pytest.raises(ValueError, match="an adapter is called 'lora' already"):
        llm.load_adapter("lora", folders["lora"])
    with pytest.raises(ValueError, match="the adapter's name is ''; expected 1 to 256"):
        llm.load_adapter("", folders["lora"])
    llm.load_adapter("masked", folders["masked"])
    with pytest.raises(ValueError, match=r"2 adapters are loaded; expected fewer than 3|expected fewer than 2"):
        llm.load_adapter("both", folders["both"])
    with pytest.raises(UnknownAdapter, match="adapter is 'both'"):
        llm.unload_adapter("both")
    assert llm.adapters == ["lora", "masked"]


def test_what_cannot_differ_by_row_is_refused(folders, tmp_path):
    llm = load(folders, ())
    lora = write_adapter(tmp_path / "lora", read_config(folders["base"]), "lora", 1)
    tensors = load_file(lora / WEIGHTS_FILE)
    save_file(
        tensors | {"base_model.model.model.norm.weight": torch.ones(32)}, lora / WEIGHTS_FILE
    )  # saved whole, as modules_to_save has it
    with pytest.raises(CheckpointError, match=r"changes model\.norm\.weight, which cannot differ from row to row"):
        llm.load_adapter("lora", lora)
    save_file(tensors, lora / WEIGHTS_FILE)
    write_adapter(lora / MASKED_FOLDER, read_config(folders["base"]), "lora", 2)
    with pytest.raises(CheckpointError, match="and its folder masked_rows LORA; expected LORA and MASKED_LORA"):
        llm.load_adapter("lora", lora)
    masked = write_adapter(tmp_path / "masked", read_config(folders["base"]), "masked", 1)
    tensors = load_file(masked / WEIGHTS_FILE)
    del tensors["base_model.model.model.mask_embedding"]
    save_file(tensors, masked / WEIGHTS_FILE)
    values = json.loads((folders["base"] / "config.json").read_text())
    (masked / "config.json").write_text(json.dumps(values | {"mask_token_id": 5}))
    with pytest.raises(ValueError, match="was trained with mask token 5; expected"):
        llm.load_adapter("masked", masked)
    assert (masked / CONFIG_FILE).is_file()
    assert not llm.adapters


def test_unloaded_while_requests_have_it(llm, folders):
    """They end with it, with the text that they would have had; its slot is free after the last one."""
    prompt, params = [1, 2, 3], SamplingParams(max_tokens=12)
    (expected,) = llm.generate([prompt], params, adapter="both")
    stream = llm.generate_stream(prompt, params, adapter="both")
    found = list(next(stream).token_ids)
    llm.unload_adapter("both")
    with pytest.raises(ValueError, match="adapter is 'both'; expected one of"):
        llm.generate([prompt], params, adapter="both")
    llm.load_adapter("both", folders["lora"])  # another one by that name meanwhile
    for piece in stream:
        found += piece.token_ids
        assert llm.engine.adapters.any_unloaded == (piece.output is None)
    assert found == expected.token_ids
    llm.engine.adapters.check_integrity(())
    llm.unload_adapter("both")
    llm.load_adapter("both", folders["both"])
    assert llm.generate([prompt], params, adapter="both")[0].token_ids == expected.token_ids
