# SPDX-License-Identifier: Apache-2.0
"""Each rank's part of a checkpoint: together they are the whole, and together they compute what it does."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine.native_model import attach_random
from tests.engine.tiny_llm import save_tiny
from tests.model.fp8_files import save_fp8
from tests.model.gguf_files import write_gguf
from tests.model.thread_ranks import ThreadRanks
from tests.model.tiny import CASES, hf_config, our_model
from wedlm.attention.sdpa import CausalAttend
from wedlm.model import ModelConfig, Transformer, pack_for_inference, save_model
from wedlm.model.formats import checkpoint as checkpoints
from wedlm.model.formats.checkpoint import load_torch, open_checkpoint
from wedlm.model.formats.int8_rows import Int8Rows, write_int8
from wedlm.model.inference.tensor_parallel import connect_ranks
from wedlm.model.lora.masked_rows import masked_lora
from wedlm.model.lora.peft import Adapter, LowRank, Rows, _shard_of
from wedlm.model.sharding import Shard

TOKENS = torch.tensor([1, 5, 42, 7, 96, 3, 3, 60])


def saved(directory: Path, name: str) -> Path:
    save_model(our_model(name), ModelConfig.from_hf(hf_config(name)), directory)
    return directory


def wide(tensor: Tensor | Int8Rows) -> Tensor:
    return tensor.widened() if isinstance(tensor, Int8Rows) else tensor


def check_parts(path: Path, size: int) -> None:
    """All ranks' parts, put side by side, are the tensors; sums' biases are rank 0's."""
    checkpoint = open_checkpoint(path)
    whole = {name: wide(tensor) for name, tensor in checkpoint.tensors()}
    shards = [Shard(checkpoint.config, rank, size) for rank in range(size)]
    parts = [{name: wide(one) for name, one in checkpoint.tensors(shard=shard)} for shard in shards]
    for name, tensor in whole.items():
        rebuilt = torch.full_like(tensor.float(), torch.nan)
        for shard, mine in zip(shards, parts, strict=True):
            cut = shard.cut(name, tuple(tensor.shape))
            if cut.counts:
                place = cut.rows if tensor.ndim == 1 else (cut.rows, cut.columns)
                rebuilt[place] = mine[name].float()
            else:
                assert not mine[name].any()
        assert torch.equal(rebuilt, tensor.float()), name
    matrices = sum(tensor.numel() for tensor in whole.values() if tensor.ndim == 2)
    for mine in parts:  # key and value heads may be on several ranks
        assert sum(one.numel() for one in mine.values() if one.ndim == 2) < matrices * (1 / size + 0.1)


@pytest.mark.parametrize("name", ["qwen3-bias", "llama-biases", "llama-tied", "wedlm-qwen2.5"])
@pytest.mark.parametrize("size", [2])
def test_safetensors(tmp_path, name, size):
    check_parts(saved(tmp_path, name), size)


def test_fewer_key_heads_than_ranks_are_on_several(tmp_path):
    check_parts(save_tiny(tmp_path), 4)
    shards = [Shard(open_checkpoint(tmp_path).config, rank, 4) for rank in range(4)]
    cuts = [shard.cut("model.layers.0.self_attn.k_proj.weight", (32, 32)) for shard in shards]
    assert [cut.rows.start for cut in cuts] == [0, 0, 16, 16]


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf(tmp_path, arch):
    check_parts(write_gguf(tmp_path / "m.gguf", our_model("llama" if arch == "llama" else "qwen2"), arch), 2)


@pytest.mark.parametrize("layout", ["blocks", "one", "outputs"])
def test_fp8(tmp_path, layout):
    check_parts(save_fp8(tmp_path, layout, "llama"), 2)


def test_int8(tmp_path):
    model = our_model("llama")
    saved(tmp_path, "llama")
    tensors = dict(model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_int8(tmp_path / "model.safetensors", tensors.items(), shapes, torch.float32, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "wedlm-int8"}}))
    check_parts(tmp_path, 2)


def test_no_more_is_read_than_the_part(tmp_path, monkeypatch):
    """A part is a slice of the file; ``get_tensor``, which reads all, is for what every rank has."""
    saved(tmp_path, "llama")
    read: dict[str, int] = {}
    opened = checkpoints.safe_open

    class Counting:
        def __init__(self, *arguments, **options):
            self.file = opened(*arguments, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            raise AssertionError(f"{name} is read whole")

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, place):
                    read[name] = part[place].nbytes
                    return part[place]

            return Slice()

    whole = sum(tensor.nbytes for tensor in our_model("llama").state_dict().values())
    monkeypatch.setattr(checkpoints, "safe_open", Counting)
    checkpoint = open_checkpoint(tmp_path)
    load_torch(checkpoint, shard=Shard(checkpoint.config, 1, 2))
    assert sum(read.values()) < 0.52 * whole


def logits_over(size: int, path: Path, **packing) -> Tensor:
    """Of all ranks as threads, side by side."""
    checkpoint = open_checkpoint(path)
    ranks = ThreadRanks(size)
    models = []
    for rank in range(size):
        shard = Shard(checkpoint.config, rank, size)
        model = pack_for_inference(load_torch(checkpoint, packing.get("dtype"), shard=shard), packing.get("bits"))
        connect_ranks(model, shard, ranks.of(rank))
        models.append(model)
    with torch.inference_mode():
        forward = torch.inference_mode()(lambda rank: models[rank](TOKENS, torch.arange(len(TOKENS)), CausalAttend()))
        return torch.cat(ranks.run(forward), dim=1).float()


def logits_of_one(path: Path, **packing) -> Tensor:
    model = pack_for_inference(load_torch(open_checkpoint(path), packing.get("dtype")), packing.get("bits"))
    with torch.inference_mode():
        return model(TOKENS, torch.arange(len(TOKENS)), CausalAttend()).float()


@pytest.mark.parametrize("name", [name for name in CASES if name != "llama3-rope"])
def test_ranks_compute_what_one_does(tmp_path, name):
    """float32: the sums differ in their last bits alone."""
    path = saved(tmp_path, name)
    one, two = logits_of_one(path), logits_over(2, path)
    assert torch.allclose(one, two, rtol=0, atol=2e-5 * one.abs().max()), (one - two).abs().max()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, None), (torch.float32, "fp8")])
def test_ranks_in_few_bits(tmp_path, fp8_anywhere, dtype, bits):
    """As near to the exact logits as one rank: bfloat16 rounds each rank's part of a sum, and FP8 has a scale for each
    rank's part of a row."""
    exact, one, two = [], [], []
    for seed in range(6):  # what rounding does to one random model depends on the CPU's order of sums
        path = save_tiny(tmp_path / str(seed), seed=seed, intermediate_size=64)
        exact.append(logits_of_one(path))
        one.append(logits_of_one(path, dtype=dtype, bits=bits) - exact[-1])
        two.append(logits_over(2, path, dtype=dtype, bits=bits) - exact[-1])
    exact_rms, one_rms, two_rms = (torch.stack(each).square().mean().sqrt() for each in (exact, one, two))
    assert two_rms < 1.3 * one_rms
    # Random weights this narrow, in three bits of mantissa, are an eighth off on one rank, too.
    assert two_rms < (0.2 if bits else 0.1) * exact_rms


def test_an_adapter_of_masked_rows_is_divided_too(tmp_path):
    path = saved(tmp_path, "llama")
    checkpoint, ranks = open_checkpoint(path), ThreadRanks(2)
    whole = load_torch(checkpoint)
    attach_random(whole)
    matrices, embedding = masked_lora(whole)
    adapter = Adapter(
        {} if embedding is None else {"model.mask_embedding": embedding.detach()},
        {},
        {name: LowRank(a, b, 1.0) for name, (a, b) in matrices.items()},
        masked_rows=True,
    )
    masked = torch.tensor([3, 6])

    def parts(rank: int) -> Transformer:
        shard = Shard(checkpoint.config, rank, 2)
        model = load_torch(checkpoint, shard=shard)
        with torch.device("meta"):
            meta = Transformer(checkpoint.config)
        mine = _shard_of(adapter, shard, meta)
        from wedlm.model.lora.masked_rows import attach_masked_lora

        attach_masked_lora(
            model, {name: (one.a, one.b) for name, one in mine.low_rank.items()}, mine.whole.get("model.mask_embedding")
        )
        packed = pack_for_inference(model)
        connect_ranks(packed, shard, ranks.of(rank))
        return packed

    models = [parts(rank) for rank in range(2)]
    packed = pack_for_inference(whole)
    with torch.inference_mode():
        positions = torch.arange(len(TOKENS))
        expected = packed(TOKENS, positions, CausalAttend(), masked=masked)
        plain = packed(TOKENS, positions, CausalAttend())
    forward = torch.inference_mode()(lambda rank: models[rank](TOKENS, positions, CausalAttend(), None, masked))
    found = torch.cat(ranks.run(forward), dim=1)
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * expected.abs().max())
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_rows_of_an_adapter_go_to_the_rank_that_has_them(tmp_path):
    config = open_checkpoint(saved(tmp_path, "llama")).config
    with torch.device("meta"):
        meta = Transformer(config)
    rows = Rows((1, 90, 50), torch.arange(3.0)[:, None].expand(3, config.hidden_size))
    adapter = Adapter({}, {"lm_head.weight": rows}, {})
    parts = [_shard_of(adapter, Shard(config, rank, 2), meta).rows["lm_head.weight"] for rank in range(2)]
    first = Shard(config, 1, 2).vocabulary.start
    assert parts[0].ids == (1,)
    assert parts[1].ids == (90 - first, 50 - first)
    assert parts[1].values[:, 0].tolist() == [1.0, 2.0]
