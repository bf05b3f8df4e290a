# SPDX-License-Identifier: Apache-2.0
"""The demo page's controls: a phone, a keyboard, settings, keys, another server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from playwright.sync_api import expect

from tests.engine.tiny_llm import save_tiny
from tests.server.browsing import ask, fresh, plain, requests, sides, tokens
from tests.server.running import serving, wait_until
from wedlm import LLM

KEY = "page-key"


@pytest.mark.long
def test_a_phone_has_no_sideways_scroll(browser, server):
    for page in fresh(browser, server.url, viewport={"width": 360, "height": 740}, has_touch=True):
        ask(page, "a_very_long_word_" * 3)
        expect(page.locator(".verdict")).to_be_visible()
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) <= 360
        left, right = sides(page)
        assert right.bounding_box()["y"] > left.bounding_box()["y"]  # one below the other
        page.get_by_label("Opponent").select_option("Another server")
        assert page.evaluate(wide) <= 360
        page.get_by_label("Base URL").fill("nowhere")
        ask(page)  # while the end of a long page is in view
        banner = page.get_by_role("alert").bounding_box()
        assert banner["y"] >= 0
        assert banner["y"] + banner["height"] < 740
        send = page.get_by_role("button", name="Send").bounding_box()
        assert send["x"] + send["width"] <= 360


@pytest.mark.long
def test_a_small_laptop_shows_answers_beside_the_plot(browser, server):
    for page in fresh(browser, server.url, viewport={"width": 1024, "height": 640}):
        ask(page, "word " * 600)  # too long for the model; its answers, which are none, must be in view all the same
        expect(page.get_by_role("alert")).to_be_visible()
        left, _ = sides(page)
        expect(left.locator(".text")).to_be_in_viewport()
        page.get_by_label("Your message").fill("")
        page.get_by_label("Max tokens").fill("64")
        ask(page)
        expect(page.locator(".verdict")).to_be_visible()
        left, _ = sides(page)
        expect(left.locator(".text")).to_be_in_viewport()


@pytest.mark.long
def test_auto_and_a_window_that_is_too_wide(browser, tmp_path):
    """Auto is asked for with verified's fields; the server's warning stands below the answer that it is about."""
    llm = LLM(save_tiny(tmp_path, block_size=8), device="cpu", max_num_seqs=16)
    with serving(llm) as running:
        for page in fresh(browser, running.url):
            bodies = requests(page)
            page.get_by_label("Max tokens").fill("16")
            page.get_by_text("Auto", exact=True).click()
            ask(page)
            expect(page.locator(".verdict")).to_contain_text("Both texts are the same.")
            assert bodies[0]["decoding"] == "auto"
            assert {"wedlm_window_size", "wedlm_draft_entropy"} <= set(bodies[0])
            expect(page.locator(".note:visible")).to_have_count(0)
            page.get_by_text("Streaming", exact=True).click()
            ask(page)
            left, right = sides(page)
            expect(left.locator(".note")).to_contain_text("the window of 16 is wider than the noise block of 8")
            expect(page.locator(".verdict")).to_have_count(2)
            expect(right.locator(".note")).to_be_hidden()


def test_the_keyboard_is_enough(page, server):
    """Tab, arrows, Enter and Escape: a mode, a message, the answer, and a new conversation."""
    focused = "document.activeElement.id || document.activeElement.value || document.activeElement.textContent"
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "verified"
    for name in ("Auto", "Streaming"):
        page.keyboard.press("ArrowRight")
        assert page.get_by_label(name, exact=True).is_checked()
    ring = "getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert page.evaluate(ring) == "solid"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".verdict")).to_contain_text("tok/s")
    expect(page.locator(".turn .prompt")).to_have_text("one\ntwo")
    expect(page.get_by_label("Your message")).to_be_focused()
    server.model.llm.engine.runner.seconds = 0.05
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.model.llm.engine.runner.seconds = 0.0
    wait_until(lambda: not server.model.engine.num_open)
    page.get_by_role("button", name="New conversation").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Your message")).to_be_focused()


def test_the_conversation_goes_on_and_can_be_reset(page):
    bodies = requests(page)
    plain(page)
    page.get_by_label("Max tokens").fill("16")
    for text in ("one", "two"):
        ask(page, text)
        expect(page.locator(".verdict")).to_have_count(len(page.locator(".turn").all()))
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert [body["decoding"] for body in bodies] == ["verified", "autoregressive"] * 2
    first = page.locator(".turn").first.locator(".text").first.text_content()
    for body in bodies[2:]:
        assert [message["content"] for message in body["messages"]] == ["one", first, "two"]
    page.get_by_role("button", name="New conversation").click()
    ask(page, "three")
    expect(page.locator(".verdict")).to_be_visible()
    assert [message["content"] for message in bodies[-1]["messages"]] == ["three"]


def test_controls_reach_the_request(page):
    bodies = requests(page)
    page.get_by_text("Block", exact=True).click()
    for label, value in {
        "Entropy threshold": "1.5",
        "Distance penalty": "0.1",
        "Block size": "8",
        "Temperature": "0.5",
        "Max tokens": "16",
    }.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Record the window").uncheck()
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    left, right = bodies
    wanted = {"decoding": "block", "wedlm_entropy_threshold": 1.5, "wedlm_pos_penalty_factor": 0.1}
    wanted |= {"wedlm_window_size": 8, "temperature": 0.5, "max_tokens": 16}
    assert {name: left[name] for name in wanted} == wanted
    assert "wedlm_trace" not in left
    assert right["seed"] == left["seed"]
    expect(page.locator("#timeline")).to_be_hidden()


@pytest.mark.long
def test_the_models_threshold_counts_until_another_is_chosen(page):
    bodies = requests(page)
    page.get_by_text("Streaming", exact=True).click()
    expect(page.locator("output[for=threshold]")).to_have_text("the model's")
    page.get_by_label("Max tokens").fill("4")
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    assert bodies[0]["wedlm_entropy_threshold"] == "auto"
    page.get_by_label("Entropy threshold").fill("1")
    expect(page.locator("output[for=threshold]")).to_have_text("1")


@pytest.mark.long
def test_a_server_with_keys(browser, directory):
    llm = LLM(directory, device="cpu", max_num_seqs=16)
    with serving(llm, api_keys=(KEY,)) as running:
        for page in fresh(browser, running.url):
            expect(page.get_by_role("alert")).to_contain_text("the API key is missing or unknown")
            expect(page.locator("#key")).to_be_focused()
            page.keyboard.type(KEY)
            page.keyboard.press("Tab")
            expect(page.locator("#status-text")).to_have_text("tiny")
            expect(page.get_by_role("alert")).to_be_hidden()
            ask(page)
            expect(page.locator(".verdict")).to_be_visible()
            page.reload()
            expect(page.locator(".verdict")).to_be_visible()
            expect(page.locator("#key")).to_have_value("")
            stored = page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])")
            assert "Hello" in stored
            assert KEY not in stored


def other_model(directory: Path) -> Path:
    """One that writes other texts."""
    return save_tiny(directory, rope_theta=100.0)


class Foreign(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that is not ours, reduced to what vLLM sends: nothing about forwards, the role in
    a chunk of its own, several tokens in a chunk, figures at the end."""

    WORDS: ClassVar = ["Once", " upon a", " time"]
    asked: ClassVar[list[dict]] = []

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_OPTIONS(self) -> None:
        self._answer("text/plain", b"")

    def do_GET(self) -> None:
        models = {"object": "list", "data": [{"id": "org/foreign-model", "object": "model", "owned_by": "vllm"}]}
        self._answer("application/json", json.dumps(models).encode())

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "org/foreign-model"}
        deltas: list[dict] = [{"role": "assistant", "content": ""}, *({"content": word} for word in self.WORDS), {}]
        chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks[-1]["choices"][0]["finish_reason"] = "stop"
        usage = {"prompt_tokens": 9, "total_tokens": 13, "completion_tokens": 4}
        lines = [json.dumps(chunk) for chunk in (*chunks, {**head, "choices": [], "usage": usage})]
        self._answer("text/event-stream", "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.long
def test_a_server_that_is_not_ours(page):
    plain(page)
    page.get_by_label("Opponent").select_option("Another server")
    with ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        threading.Thread(target=foreign.serve_forever).start()
        try:
            page.get_by_label("Base URL").fill(f"http://127.0.0.1:{foreign.server_port}/v1")
            ask(page)
            left, right = sides(page)
            expect(right.locator("[data-figure=tokens]")).to_have_text("4")
            expect(left.locator("[data-figure=pCache]")).not_to_have_text("–")
        finally:
            foreign.shutdown()
    assert [token["text"] for token in tokens(right)] == Foreign.WORDS
    assert len({token["colour"] for token in tokens(right)}) == 3
    expect(right.locator("[data-figure=forwards]")).to_have_text("–")
    expect(page.get_by_role("alert")).to_be_hidden()
    (body,) = Foreign.asked
    assert body["model"] == "org/foreign-model"
    assert not [name for name in body if name.startswith("wedlm") or name == "decoding"], "it would refuse them"


@pytest.mark.long
def test_another_server_as_the_opponent(page, server, tmp_path):
    """One that allows this page's origin answers; one that does not, or is none, gives a sentence."""
    llm = LLM(other_model(tmp_path), device="cpu", max_num_seqs=16)
    plain(page)
    page.get_by_label("Opponent").select_option("Another server")
    url = page.get_by_label("Base URL")
    url.fill("nowhere")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text('The base URL is "nowhere"')
    with serving(llm, name="rival", cors_origins=(server.url,), api_keys=(KEY,)) as rival:
        url.fill(f"{rival.url}/v1/")
        page.get_by_label("API key, if it has one").fill(KEY)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".verdict")).to_be_visible()
        expect(page.locator(".answer .name").last).to_have_text(f"127.0.0.1:{rival.port}")
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 128}
        answer = rival.post("/v1/chat/completions", {**body, "model": "rival"}, Authorization=f"Bearer {KEY}").json()
        own, shown = sides(page)
        text = answer["choices"][0]["message"]["content"]
        assert shown.locator(".text").text_content() == text != own.locator(".text").text_content()
    url.fill(f"http://127.0.0.1:{rival.port}/v1")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("does not let pages of")
    left, _ = sides(page)
    expect(left.locator("[data-figure=pCache]")).not_to_have_text("–")
