# SPDX-License-Identifier: Apache-2.0
"""The demo page in a real browser, against a real server with a tiny model: races, colours, errors."""

import hashlib
import json
import re
from itertools import pairwise

import pytest
from playwright.sync_api import expect

from tests.server.browsing import ask, at_once, plain, sides, tokens
from tests.server.running import wait_until
from wedlm.server.app import DEMO

FILES = sorted(path for path in DEMO.iterdir() if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_short_and_the_pages_own(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    assert "SPDX-License-Identifier: Apache-2.0" in "".join(text.splitlines(keepends=True)[:2])
    assert "innerHTML" not in text
    assert "insertAdjacentHTML" not in text
    hosts = set(re.findall(r"https?://([^/\s\"'`$]+)", text))
    assert hosts <= {"127.0.0.1:8001", "www.w3.org"}, "only the example of an address and SVG's name"
    if path.suffix == ".html":
        assert not re.findall(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", text)


def test_libraries_are_as_published():
    """Their digests and licences; nothing else lies beside them."""
    folder = DEMO / "vendor"
    listed = dict(re.findall(r"^\| `([^`]+)` .*`(\w{64})` \|$", (folder / "README.md").read_text(), re.MULTILINE))
    licences = {"markdown-it.min.js": "LICENSE.markdown-it", "purify.min.js": "LICENSE.dompurify"}
    assert {path.name for path in folder.iterdir()} == {"README.md", *licences, *licences.values()}
    for name in licences:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == listed[name]


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(dark):
    """Text 7:1 on every tint, 4.5:1 elsewhere; borders of controls 3:1 (WCAG)."""
    light_part, _, dark_part = (DEMO / "theme.css").read_text().partition("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", dark_part if dark else light_part))
    pairs = [("ink", f"tint-{i}", 7.0) for i in range(6)]
    pairs += [("ink", on, 7.0) for on in ("ground", "surface", "soft", "trail")]
    pairs += [("muted", on, 4.5) for on in ("ground", "surface")]
    pairs += [("on-accent", "accent", 4.5), ("bad", "bad-soft", 4.5), ("control", "surface", 3.0)]
    for text, on, least in pairs:
        low, high = sorted(luminance(colours[name]) for name in (text, on))
        assert (high + 0.05) / (low + 0.05) >= least, f"{text} on {on}"


def test_the_policy_allows_the_pages_own_files_alone(server):
    policy = server.http.get("/").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "require-trusted-types-for 'script'; trusted-types dompurify" in policy


def test_a_race_streams_and_ends_with_a_winner(page, server, slow):
    expect(page.locator("#status-text")).to_have_text("tiny")
    page.get_by_label("Max tokens").fill("64")
    at_once(page)
    plain(page)
    ask(page)
    left, right = sides(page)
    expect(left.locator(".token").nth(2)).to_be_visible()
    expect(right.locator(".token").nth(2)).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()  # both are still going
    expect(page.locator(".lap .rate").first).to_contain_text("tok/s")
    server.model.llm.engine.runner.seconds = 0.0
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text("Both texts are the same.")
    expect(verdict).to_contain_text(re.compile(r"(Verified|Autoregressive) is \d\.\d\d× as fast|A draw"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    texts = ["".join(one["text"] for one in tokens(side)) for side in (left, right)]
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 64}
    body["decoding"] = "verified"  # as the page asks: auto's rows follow the time that steps take
    answer = server.post("/v1/chat/completions", body).json()
    assert texts == [answer["choices"][0]["message"]["content"]] * 2
    assert left.locator("[data-figure=forwards]").inner_text() == str(answer["usage"]["forwards"])
    assert left.locator("[data-figure=pCache]").inner_text() == f"{answer['usage']['p_cache']:.3f}"
    assert right.locator("[data-figure=perForward]").inner_text() == "1.00"
    expect(page.locator("#announce")).to_contain_text(answer["choices"][0]["message"]["content"][:20])


def test_a_race_too_short_to_time(page):
    """Answers that come in one chunk."""
    chunk = {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    ask(page)
    verdict = page.locator(".verdict")
    expect(verdict).to_have_text("No winner: an answer came too quickly to be timed. Both texts are the same.")
    assert page.locator(".winner").count() == 0


def test_tokens_of_a_forward_share_a_colour(page):
    plain(page)
    page.get_by_text("Streaming", exact=True).click()
    page.get_by_label("Entropy threshold").fill("3")
    page.get_by_label("Max tokens").fill("64")
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    left, right = sides(page)
    shown = tokens(left)
    colours: dict[str, set[str]] = {}
    for one in shown:
        colours.setdefault(one["step"], set()).add(one["colour"])
        assert one["title"].startswith(f"forward {one['step']}, token ")
    assert len(colours) < len(shown), "some forward must have made several tokens"
    assert all(len(of_step) == 1 for of_step in colours.values())
    for one, other in pairwise(shown):
        assert (one["step"] == other["step"]) == (one["colour"] == other["colour"])
    assert len({one["step"] for one in tokens(right)}) == len(tokens(right))
    assert "rgba(0, 0, 0, 0)" not in {one["colour"] for one in shown}


def test_the_window_can_be_read_forward_by_forward(page, server):
    page.get_by_label("Max tokens").fill("32")
    plain(page)
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    left, _ = sides(page)
    slider = page.get_by_role("slider", name="Forward", exact=True)
    forwards = int(left.locator("[data-figure=forwards]").inner_text())
    expect(slider).to_have_attribute("max", str(forwards - 1))
    read = ""
    slider.focus()
    page.keyboard.press("Home")
    for number in range(forwards):
        expect(page.locator("#forward-text")).to_have_text(re.compile(rf"^{number}: \d+ committed, "))
        read += "".join(page.locator(".chip.now").all_inner_texts())
        if number == 0:
            assert page.locator(".chip.masked").count() > 0
        page.keyboard.press("ArrowRight")
    assert re.sub(r"\s|↵|∅", "", read) == re.sub(r"\s", "", left.locator(".text").text_content())
    inked = page.locator("#canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(value => value)"
    )
    assert inked


def test_stop_aborts_on_the_server(page, server, slow):
    page.get_by_label("Max tokens").fill("96")
    at_once(page)
    ask(page)
    left, right = sides(page)
    expect(left.locator(".token").nth(1)).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".lap .rate").nth(1)).to_contain_text("stopped")
    wait_until(lambda: not server.model.engine.num_open, seconds=2)  # 96 tokens would take 5 seconds
    server.settled()
    assert int(right.locator("[data-figure=tokens]").inner_text()) < 96
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.locator(".verdict").count() == 0


def test_the_banner_shows_the_servers_sentence(page, server):
    long = "x" * 200
    ask(page, long)
    body = {"messages": [{"role": "user", "content": long}]}
    sentence = server.post("/v1/chat/completions", body).json()["error"]["message"]
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.get_by_label("Your message")).to_have_value(long)  # to be changed and sent again
    page.get_by_role("button", name="Dismiss the error").click()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_error_in_the_middle_of_an_answer(page):
    """The engine's fault reaches the banner; what had come stays."""
    stream = (
        'data: {"choices":[{"delta":{"content":"so far"}}],"wedlm":{"step":0,"token_ids":[1],"tokens":["so far"]}}\n\n'
        'data: {"error":{"message":"the engine failed during a step; send the request again"}}\n\ndata: [DONE]\n\n'
    )
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("the engine failed during a step; send the request again")
    left, _ = sides(page)
    expect(left.locator(".text")).to_have_text("so far")
    expect(page.locator(".lap .rate").first).to_have_text("failed")


def test_what_a_model_writes_is_text(page):
    attack = "<img src=x onerror='window.hurt=1'><script>window.hurt=1</script>"
    piece = json.dumps({"choices": [{"delta": {"content": attack}}], "model": "m"})
    ours = {
        "step": 0,
        "token_ids": [1],
        "tokens": [attack],
        "window": {"start": 0, "token_ids": [1], "tokens": [attack]},
    }
    traced = json.dumps({"choices": [{"delta": {"content": attack}}], "wedlm": ours})
    replies = iter([traced, piece])
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body=f"data: {next(replies)}\n\ndata: [DONE]\n\n", content_type="text/event-stream"
        ),
    )
    ask(page, attack)
    left, right = sides(page)
    expect(left.locator(".text")).to_have_text(attack)
    expect(right.locator(".text")).to_have_text(attack)
    expect(page.locator(".turn .prompt")).to_have_text(attack)
    expect(page.locator(".chip").first).to_have_text(attack)
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hurt") is None
