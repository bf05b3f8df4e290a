# SPDX-License-Identifier: Apache-2.0
"""The demo model in eight bits: made once, kept by its content, and small in memory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.native_model import needs_native
from tests.engine.tiny_llm import save_tiny
from wedlm.model.formats.checkpoint import Checkpoint, load_torch, open_checkpoint
from wedlm.model.formats.int8_rows import round_rows
from wedlm.model.packed_demo import packed_demo

# Peak memory of an answer by the embedded model, beside that of the imports alone, in bytes.
_MEASURE = """
import resource, sys
import torch, numpy, tokenizers, safetensors, gguf
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from wedlm import LLM, SamplingParams
llm = LLM("demo", device="cpu")
answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(max_tokens=64))[0]
assert "weights: int8;" in llm.describe() and answer.stats.num_tokens > 1
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Checkpoint:
    """A stand-in with a change of its own, and a cache that is not there yet."""
    monkeypatch.setenv("WEDLM_CACHE", str(tmp_path / "new" / "cache"))
    (tmp_path / "change").write_bytes(b"one")
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model"))
    return dataclasses.replace(checkpoint, deltas=(tmp_path / "change",))


def test_made_once_and_kept_by_content(demo, tmp_path):
    wide = load_torch(demo, torch.float32).state_dict()
    packed = packed_demo(demo)
    (path,) = packed.files
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else stays"
    assert packed.config == demo.config
    for name, tensor in load_torch(packed, torch.float32).state_dict().items():
        assert torch.equal(tensor, round_rows(wide[name]).widened() if tensor.ndim == 2 else wide[name])
    stamp = path.stat().st_mtime_ns
    assert packed_demo(demo).files == (path,)
    assert path.stat().st_mtime_ns == stamp
    demo.deltas[0].write_bytes(b"two")
    assert packed_demo(demo).files != (path,)


def test_what_is_damaged_is_made_again(demo, capsys):
    (path,) = packed_demo(demo).files
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    packed_demo(demo)
    assert path.read_bytes() == whole
    assert "corrupt or truncated" in " ".join(capsys.readouterr().err.split())


def test_where_nothing_can_be_written_each_start_makes_it(demo, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WEDLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"could not be kept in .*: each start makes it again"):
        assert packed_demo(demo) is demo


@pytest.mark.long
@pytest.mark.demo_model
@needs_native
def test_memory_of_the_demo(tmp_path, monkeypatch, record_property):
    """At most 0.45 GB above Python's and torch's own, at the first start and at the next."""
    from wedlm.model.demo import DEMO_FILE, demo_model_path

    (tmp_path / DEMO_FILE).symlink_to(Path(demo_model_path()).absolute())
    monkeypatch.setenv("WEDLM_CACHE", str(tmp_path))
    for start in ("first", "second"):
        ran = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
        num_bytes = int(ran.stdout)
        record_property(f"{start} start, GB", f"{num_bytes / 1e9:.3f}")
        assert num_bytes <= 0.45e9
