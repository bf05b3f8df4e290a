# SPDX-License-Identifier: Apache-2.0
"""Adapters of a server by name: chosen by ``model``, listed, loaded and unloaded by who has the key."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.adapter_files import KINDS, write_adapter
from tests.engine.tiny_llm import save_tiny
from tests.server.asking import CHAT, TEXT
from tests.server.running import MODEL, Running, figures, serving, wait_until
from wedlm import LLM, SamplingParams
from wedlm.model.formats.checkpoint import read_config

KEY = {"Authorization": "Bearer secret"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SAY = {"prompt": "Hello", "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The checkpoint "base", and beside it the folder "adapters" with one of each kind."""
    folder = tmp_path_factory.mktemp("served")
    config = read_config(save_tiny(folder / "base", max_position_embeddings=512))
    for seed, kind in enumerate(KINDS):
        write_adapter(folder / "adapters" / kind, config, kind, seed)
    write_adapter(folder / "elsewhere", config, "lora", 7)
    os.symlink(folder / "elsewhere", folder / "adapters" / "link")
    return folder


def new_llm(folder: Path, *kinds: str) -> LLM:
    adapters = {kind: folder / "adapters" / kind for kind in kinds}
    return LLM(folder / "base", device="cpu", max_num_seqs=8, kv_cache_bytes=2**22, adapters=adapters, max_adapters=3)


@pytest.fixture(scope="module")
def running(folder) -> Iterator[Running]:
    with serving(new_llm(folder, "lora"), api_keys=("secret",), adapter_folder=str(folder / "adapters")) as one:
        one.http.headers.update(KEY)
        yield one
        one.settled()


@pytest.fixture(scope="module")
def texts(folder) -> dict[str, str]:
    """What each name says to SAY."""
    llm, params = new_llm(folder, *KINDS), SamplingParams(temperature=0, max_tokens=12)
    return {kind or MODEL: llm.generate("Hello", params, adapter=kind)[0].text for kind in (None, *KINDS)}


def said(running: Running, name: str) -> str:
    answer = running.post(TEXT, {**SAY, "model": name})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return answer.json()["choices"][0]["text"]


def admin(running: Running, address: str, body: dict[str, str], **headers: str) -> httpx2.Response:
    return running.http.post(address, json=body, headers=headers)


def check_refused(answer, status: int, message: str) -> None:
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_model_names_an_adapter(running, texts):
    assert said(running, "lora") == texts["lora"] != texts[MODEL]
    assert said(running, MODEL) == texts[MODEL]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}
    answers = [running.post(CHAT, {**chat, "model": name}).json() for name in (MODEL, "lora")]
    assert answers[0]["choices"][0] != answers[1]["choices"][0]
    ollama = running.post("/api/generate", {"model": "lora:latest", "prompt": "Hi", "stream": False})
    assert ollama.status_code == 200, ollama.text
    assert running.post("/tokenize", {"model": "lora", "prompt": "Hi"}).json()["count"] == 2
    assert figures(running)['wedlm_generated_tokens_total{model_name="lora"}'] >= 12


def test_log_probabilities_of_a_prompt_are_the_adapters(running):
    asked = {"prompt": "Hello there", "max_tokens": 0, "echo": True, "logprobs": 1}
    parts = [running.post(TEXT, {**asked, "model": name}).json()["choices"][0]["logprobs"] for name in (MODEL, "lora")]
    assert parts[0]["tokens"] == parts[1]["tokens"]
    assert parts[0]["token_logprobs"] != parts[1]["token_logprobs"]


def test_the_lists_name_the_parent(running):
    listed = running.http.get("/v1/models").json()["data"]
    assert [(one["id"], one.get("parent")) for one in listed] == [(MODEL, None), ("lora", MODEL)]
    assert running.http.get("/v1/models/lora").json()["parent"] == MODEL
    assert "parent" not in running.http.get(f"/v1/models/{MODEL}").json()
    tags = running.http.get("/api/tags").json()["models"]
    assert [(one["name"], one["details"]["parent_model"]) for one in tags] == [(MODEL, ""), ("lora", MODEL)]


@pytest.mark.parametrize("address", [CHAT, TEXT, "/tokenize", "/v1/messages/count_tokens"])
def test_an_unknown_name_is_a_404_that_names_all(running, address):
    body = {"prompt": "Hi"} if address == TEXT else {"messages": [{"role": "user", "content": "Hi"}]}
    answer = running.post(address, {**body, "model": "loro"})
    assert answer.status_code == 404
    assert f"model is 'loro'; expected {MODEL} or lora" in answer.text


def test_loaded_used_and_unloaded(running, folder, texts):
    for path in ("masked", str(folder / "adapters" / "masked")):  # below the folder, or whole
        answer = admin(running, LOAD, {"lora_name": "new", "lora_path": path})
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
        assert said(running, "new") == texts["masked"]
        answer = admin(running, UNLOAD, {"lora_name": "new"})
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
        check_refused(running.post(TEXT, {**SAY, "model": "new"}), 404, f"model is 'new'; expected {MODEL} or lora")
    assert admin(running, LOAD, {"lora_name": "new", "lora_path": "both"}).status_code == 200
    assert said(running, "new") == texts["both"]  # and not what another one of that name said
    assert admin(running, UNLOAD, {"lora_name": "new"}).status_code == 200


def test_refused_loads(running, folder):
    outside = "expected a directory below the server's --adapter-folder"
    for path in ("../elsewhere", "/etc", "link", ".", "no-such", "lora/adapter_config.json", "a\0b", "x" * 4000):
        check_refused(admin(running, LOAD, {"lora_name": "new", "lora_path": path}), 400, outside)
    (folder / "adapters" / "empty").mkdir(exist_ok=True)
    answer = admin(running, LOAD, {"lora_name": "new", "lora_path": "empty"})
    check_refused(answer, 400, "empty: there is no adapter_config.json")
    assert str(folder) not in answer.text
    for name in ("lora", MODEL):
        answer = admin(running, LOAD, {"lora_name": name, "lora_path": "both"})
        check_refused(answer, 400, f"lora_name is '{name}', which is served already")
    answer = admin(running, LOAD, {"lora_name": "new", "lora_path": "both", "base_model_name": "other"})
    check_refused(answer, 404, f"base_model_name is 'other'; expected {MODEL}")
    check_refused(admin(running, LOAD, {"lora_name": "new"}), 400, "lora_path is missing")
    check_refused(admin(running, LOAD, {"lora_name": "", "lora_path": "both"}), 400, "lora_name is")
    check_refused(admin(running, UNLOAD, {"lora_name": "new"}), 404, "lora_name is 'new'; expected lora")
    check_refused(admin(running, UNLOAD, {"lora_name": MODEL}), 404, "expected lora")
    for name in ("second", "third"):
        assert admin(running, LOAD, {"lora_name": name, "lora_path": "both"}).status_code == 200
    answer = admin(running, LOAD, {"lora_name": "fourth", "lora_path": "both"})
    check_refused(answer, 400, "3 adapters are loaded; expected fewer than 3 (max_adapters)")
    for name in ("second", "third"):
        assert admin(running, UNLOAD, {"lora_name": name}).status_code == 200


def test_without_a_key_or_a_folder(folder):
    body = {"lora_name": "new", "lora_path": "lora"}
    with serving(new_llm(folder, "lora"), adapter_folder=str(folder / "adapters")) as one:
        for address in (LOAD, UNLOAD):
            check_refused(admin(one, address, body), 403, "this server has no API key")
        assert one.model.llm.adapters == ["lora"]
    with serving(new_llm(folder, "lora"), api_keys=("secret",)) as one:
        check_refused(admin(one, LOAD, body), 401, "the API key is missing or unknown")
        check_refused(admin(one, UNLOAD, {"lora_name": "lora"}), 401, "the API key is missing or unknown")
        check_refused(admin(one, LOAD, body, **KEY), 403, "no folder of adapters was named")
        assert admin(one, UNLOAD, {"lora_name": "lora"}, **KEY).status_code == 200


def test_unloaded_under_traffic(running, texts):
    """A stream that has begun goes on to its end; whoever comes later gets a 404; the rest see nothing of it."""
    assert admin(running, LOAD, {"lora_name": "new", "lora_path": "both"}).status_code == 200
    body = {**SAY, "model": "new", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with (
        ThreadPoolExecutor(3) as pool,
        running.http.stream("POST", TEXT, json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        others = [pool.submit(said, running, name) for name in (MODEL, "lora", MODEL)]
        assert admin(running, UNLOAD, {"lora_name": "new"}).status_code == 200
        assert running.post(TEXT, {**SAY, "model": "new"}).status_code == 404
        assert admin(running, LOAD, {"lora_name": "new", "lora_path": "masked"}).status_code == 200
        assert [one.result() for one in others] == [texts[MODEL], texts["lora"], texts[MODEL]]
        assert said(running, "new") == texts["masked"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert admin(running, UNLOAD, {"lora_name": "new"}).status_code == 200
    adapters = running.model.llm.engine.adapters
    wait_until(lambda: not adapters.any_unloaded)
    adapters.check_integrity(())


def test_names_must_differ(folder):
    with (
        pytest.raises(ValueError, match="models and adapters are called lora, lora; expected a name for each"),
        serving(new_llm(folder, "lora"), name="lora"),
    ):
        pass
