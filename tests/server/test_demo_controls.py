# SPDX-License-Identifier: Apache-2.0
"""The demo page's controls: a phone, a keyboard, settings, keys, another server."""

from playwright.sync_api import expect

from tests.server.browsing import ask, fresh, requests, sides
from tests.server.running import serving, wait_until
from wedlm import LLM

KEY = "page-key"


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
        send = page.get_by_role("button", name="Send").bounding_box()
        assert send["x"] + send["width"] <= 360


def test_the_keyboard_is_enough(page, server):
    """Tab, arrows, Enter and Escape: a mode, a message, the answer, and a new conversation."""
    focused = "document.activeElement.id || document.activeElement.value || document.activeElement.textContent"
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "verified"
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("Streaming").is_checked()
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
    server.service.llm.engine.runner.seconds = 0.05
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.service.llm.engine.runner.seconds = 0.0
    wait_until(lambda: not server.service.engine.num_open)
    page.get_by_role("button", name="New conversation").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Your message")).to_be_focused()


def test_the_conversation_goes_on_and_can_be_reset(page):
    bodies = requests(page)
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
            assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_another_server_as_the_opponent(page, server, directory):
    """One that allows this page's origin answers; one that does not, or is none, gives a sentence."""
    llm = LLM(directory, device="cpu", max_num_seqs=16)
    page.get_by_label("Opponent").select_option("Another server")
    url = page.get_by_label("Base URL")
    url.fill("nowhere")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text('The base URL is "nowhere"')
    with serving(llm, model_name="rival", cors_origins=(server.url,), api_keys=(KEY,)) as rival:
        url.fill(f"{rival.url}/v1/")
        page.get_by_label("API key, if it has one").fill(KEY)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".verdict")).to_be_visible()
        expect(page.locator(".answer .name").last).to_have_text(f"127.0.0.1:{rival.port}")
    url.fill(f"http://127.0.0.1:{rival.port}/v1")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("does not let pages of")
    left, _ = sides(page)
    expect(left.locator("[data-figure=pCache]")).not_to_have_text("–")
