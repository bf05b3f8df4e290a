# SPDX-License-Identifier: Apache-2.0
"""Several models of one server."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.tiny_llm import save_tiny
from tests.server.asking import CHAT, TEXT, check_error
from tests.server.running import Running, figures, serving, wait_until
from wedlm import LLM, SamplingParams

NAMES = ("one", "org/other")
OPTIONS = {"device": "cpu", "max_num_seqs": 8, "kv_cache_bytes": 2**22}
SAY = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "one": save_tiny(folder / "one", max_position_embeddings=512),
        "org/other": save_tiny(folder / "other", max_position_embeddings=512, rope_theta=100.0),
    }


@pytest.fixture(scope="module")
def two(paths) -> Iterator[Running]:
    with serving(LLM.together(paths, **OPTIONS)) as one:
        yield one
        one.settled()


@pytest.fixture(scope="module")
def alone(paths) -> dict[str, LLM]:
    return {name: LLM(path, **OPTIONS) for name, path in paths.items()}


def test_each_name_gives_its_models_text(two, alone):
    texts = {}
    for name in NAMES:
        answer = two.post(CHAT, {**SAY, "model": name}).json()
        assert answer["model"] == name
        texts[name] = answer["choices"][0]["message"]["content"]
        params = SamplingParams(temperature=0, max_tokens=12)
        assert texts[name] == alone[name].chat(SAY["messages"], params)[0].text
    assert texts["one"] != texts["org/other"]


def test_every_api_finds_the_model(two):
    """By name: both texts of each address differ as the models do."""
    asked = {
        TEXT: {"prompt": "Hello", "temperature": 0, "max_tokens": 12},
        "/v1/responses": {"input": "Hello", "temperature": 0, "max_output_tokens": 12},
        "/v1/messages": {"messages": SAY["messages"], "temperature": 0, "max_tokens": 12},
        "/api/chat": {"messages": SAY["messages"], "stream": False, "options": {"temperature": 0, "num_predict": 12}},
        "/api/generate": {"prompt": "Hello", "stream": False, "options": {"temperature": 0, "num_predict": 12}},
    }
    for address, body in asked.items():
        answers = [two.post(address, {**body, "model": name}) for name in NAMES]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert [answer.json()["model"] for answer in answers] == list(NAMES)
        parts = [str({k: v for k, v in answer.json().items() if k in _TEXTS}) for answer in answers]
        assert parts[0] != parts[1], address
    assert two.post("/api/chat", {**asked["/api/chat"], "model": "one:latest"}).status_code == 200


_TEXTS = ("choices", "output", "content", "message", "response")


def test_the_list_has_all(two):
    assert [one["id"] for one in two.http.get("/v1/models").json()["data"]] == list(NAMES)
    assert [one["name"] for one in two.http.get("/api/tags").json()["models"]] == list(NAMES)
    assert two.http.get("/v1/models/org/other").json()["id"] == "org/other"


@pytest.mark.parametrize("address", [CHAT, "/v1/messages", "/api/chat", "/tokenize", "/v1/messages/count_tokens"])
def test_an_unknown_name_is_one_clear_404(two, address):
    body = {"messages": SAY["messages"], "model": "x" * 200}
    if address == "/v1/messages":
        body["max_tokens"] = 4
    answer = two.post(address, body)
    assert answer.status_code == 404
    assert f"model is '{'x' * 80}...'; expected one or org/other" in answer.text
    assert two.http.get("/v1/models/nothing").json()["error"]["code"] == "model_not_found"


def test_a_name_is_needed_where_it_could_be_left_out(two, running):
    body = {"prompt": "abc"}
    with_two = two.http.post("/tokenize", json=body)
    assert check_error(with_two, 400)["message"] == "model is missing; expected one of one, org/other"
    assert running.http.post("/tokenize", json=body).json()["count"] == 3


def test_the_budget_is_shared(paths, two):
    """Two caches of one budget are as large as one; one page each is the least."""
    (pages,) = {model.llm.engine.pool.num_pages for model in two.service.models.values()}
    whole = LLM(paths["one"], **OPTIONS).engine.pool.num_pages
    assert pages == whole // 2
    default = LLM(paths["one"], device="cpu").engine.pool.num_pages
    assert LLM.together({"one": paths["one"]}, device="cpu")["one"].engine.pool.num_pages == default
    with pytest.raises(ValueError, match=r"expected at least \d+, one page for each model"):
        LLM.together(paths, **{**OPTIONS, "kv_cache_bytes": 5000})


@pytest.mark.long
def test_both_at_once(two, alone):
    """Random requests of both models at the same time: every text is the one that the model gives alone."""
    generator = random.Random(0)
    asked = []
    for seed in range(24):
        body = {"prompt": f"{generator.random()} {seed}", "max_tokens": generator.randint(1, 40), "seed": seed}
        body["temperature"] = generator.choice((0, 0.8))
        body |= {"decoding": generator.choice(("auto", "verified", "streaming", "autoregressive"))}
        asked.append((generator.choice(NAMES), body))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: two.post(TEXT, {**one[1], "model": one[0]}).json(), asked))
    for (model, body), answer in zip(asked, answers, strict=True):
        params = SamplingParams(**{name: value for name, value in body.items() if name != "prompt"})
        assert answer["choices"][0]["text"] == alone[model].generate(body["prompt"], params)[0].text
    two.settled()


def test_metrics_by_model(two):
    before = figures(two)
    two.post(TEXT, {"prompt": "abc", "max_tokens": 7, "ignore_eos": True, "model": "org/other"})
    after = figures(two)
    grown = {name: after[name] - before[name] for name in after if name.startswith("wedlm_generated_tokens_total")}
    assert grown == {f'wedlm_generated_tokens_total{{model_name="{name}"}}': 7 * (name != "one") for name in NAMES}


def test_a_fault_of_one_leaves_the_other_alone(paths):
    with serving(LLM.together(paths, **OPTIONS)) as both:
        models = both.service.models
        broken = models["one"].llm.engine

        def fail() -> None:
            raise RuntimeError("as a GPU would")

        broken.step = fail
        assert check_error(both.post(TEXT, {"prompt": "abc", "model": "one"}), 500)["code"] == "engine_fault"
        answer = both.post(TEXT, {"prompt": "abc", "max_tokens": 4, "model": "org/other"})
        assert answer.status_code == 200
        wait_until(lambda: models["one"].engine.state == "running")
        assert both.post(TEXT, {"prompt": "abc", "max_tokens": 4, "model": "one"}).status_code == 200
        assert (models["one"].engine.num_faults, models["org/other"].engine.num_faults) == (1, 0)
