# SPDX-License-Identifier: Apache-2.0
"""Answers as Markdown on the demo page: what is formatted, what a hostile model cannot do, copies, and a reload."""

import re

import pytest
from playwright.sync_api import Page, Route, expect

from tests.server.browsing import ask, fresh, plain, requests, sides, stream_of, tokens
from tests.server.running import wait_until

TEXT = """# Title

Some **bold** and `code`, \\*not so\\*, &amp; a [link](https://example.org/page):

```python
print("a < b")
    # four spaces
```

1. one
   - inner
2. two

| a | b |
| --- | ---: |
| x | y |
"""
HOSTILE = {
    "script": "<script>window.hurt=1</script>",
    "image": "<img src=x onerror=window.hurt=1>",
    "svg": "<svg onload=window.hurt=1><script>window.hurt=1</script></svg>",
    "frame": "<iframe srcdoc='<script>parent.hurt=1</script>'></iframe>",
    "form": "<form action=javascript:window.hurt=1><button>Go</button></form><style>* { display: none }</style>",
    "link": "[press](javascript:window.hurt=1) <javascript:window.hurt=1> [a]: javascript:window.hurt=1",
    "hidden link": "[press](java&#115;cript:window.hurt=1) [press](\x01javascript:window.hurt=1) [a](JaVaScRiPt:hurt)",
    "data": "[press](data:text/html;base64,PHNjcmlwdD4=) [press](vbscript:x) [press](file:///etc/passwd)",
    "remote image": "![seen](https://example.org/pixel.png) ![][r]\n\n[r]: https://example.org/pixel.png",
    "attribute": '[press](https://example.org/"onmouseover="window.hurt=1) `" onmouseover="window.hurt=1`',
    "fence": '```"><img/src=x/onerror=window.hurt=1>\nx\n```\n\n```turn winner\nx\n```',
    "title": "[press](https://example.org 'x\" onclick=\"window.hurt=1')",
    "mixed": "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=hurt=1&gt;'>",
}
# Up to 20,000 characters are formatted.
LARGE = {
    "lists in lists": "".join(f"{'  ' * depth}- item\n" for depth in range(100)),
    "quotes in quotes": "> " * 9_000 + "deep",
    "numbers in numbers": "1. " * 6_000,
    "brackets": "[" * 19_000,
    "links": "[a](" * 4_900,
    "stars": "*a_" * 6_600,
    "ticks": "".join("`" * n + " " for n in range(190)),
    "cells": "|a" * 4_900 + "\n" + "|-" * 4_900 + "\n",
    "references": "[a]: b\n" * 2_800,
    "entities": "&amp; " * 3_300,
    "blocks": "```\n" * 4_900,
    "words": "word " * 100_000,
}


@pytest.fixture(scope="module")
def crowded(browser, server):
    """(a page for many conversations, the addresses that it asks for)"""
    asked: list[str] = []
    for page in fresh(browser, server.url):
        page.on("request", lambda request: asked.append(request.url))
        yield page, asked


def answer(page: Page, *texts: str) -> None:
    """Let each side answer so, in these pieces; ask, and wait."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream_of(*texts)))
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()


def test_markdown_becomes_elements(page):
    """In pieces of three characters, whatever they cut."""
    answer(page, *re.findall("(?s).{1,3}", TEXT))
    text = sides(page)[0].locator(".text")
    expect(text.locator("h1")).to_have_text("Title")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("ol > li")).to_have_count(2)
    expect(text.locator("ol ul li")).to_have_text("inner")
    expect(text.locator("td")).to_have_text(["x", "y"])
    expect(text.locator("p").first).to_have_text("Some bold and code, *not so*, & a link:")
    assert text.locator("pre code").text_content() == 'print("a < b")\n    # four spaces\n'
    link = text.locator("a")
    expect(link).to_have_attribute("href", "https://example.org/page")
    expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
    expect(link).to_have_attribute("target", "_blank")


def test_colours_follow_the_forwards_in_markdown(page):
    """Each character that is shown has the forward of its place in the source."""
    pieces = re.findall("(?s).{1,3}", TEXT)
    answer(page, *pieces)
    left, _ = sides(page)
    shown = tokens(left)
    assert len({one["colour"] for one in shown}) == 6
    for one in shown:
        assert one["text"] in pieces[int(one["step"])]
    steps = [int(one["step"]) for one in shown]
    assert steps == sorted(steps)
    bare = left.locator(".text").evaluate(
        "e => { const c = e.cloneNode(true); c.querySelectorAll('.token, button').forEach(t => t.remove());"
        " return c.textContent }"
    )
    assert bare.split() == ["so*,"], "only what is spelt otherwise in the source, 'so\\*,', has no colour"
    plain(page)
    assert [one["text"] for one in tokens(left)] == pieces
    page.get_by_label("Show Markdown formatted").check()
    assert tokens(left) == shown


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_markdown_does_nothing(crowded, server, text):
    page, asked = crowded
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    answer(page, text)
    left, _ = sides(page)
    assert left.locator(".text :is(script, img, svg, iframe, form, style, input, math, object)").count() == 0
    for link in left.locator(".text a").all():
        assert re.match("https://example.org|None", str(link.get_attribute("href")))
    attributes = left.locator(".text").evaluate(
        "e => [...new Set([...e.querySelectorAll('*')].flatMap(one => one.getAttributeNames()))]"
    )
    known = {"class", "data-step", "title", "href", "rel", "target", "type", "aria-label", "start"}
    assert set(attributes) <= known
    assert left.locator(".text .winner, .text .turn").count() == 0
    left.locator(".text").hover()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hurt") is None
    assert all(url.startswith(server.url) for url in asked)


@pytest.mark.long
@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_large_markdown_does_not_hold_the_page_up(browser, server, text):
    for page in fresh(browser, server.url):
        page.evaluate(
            "window.longest = 0; let last = performance.now(); setInterval(() => {"
            " const now = performance.now(); longest = Math.max(longest, now - last); last = now }, 10)"
        )
        answer(page, text)
        words = set(re.findall(r"\w+", text))
        shown = sides(page)[0].locator(".text").text_content()
        assert words - {"a"} <= set(re.findall(r"\w+", shown)) | {"1", "amp"}, "nothing may be left out"
        assert page.evaluate("longest") < 5000


@pytest.mark.long
def test_copies(browser, server):
    """The answer as it was written, and a block of code; also where the browser has no clipboard for scripts."""
    for modern in (True, False):
        for page in fresh(browser, server.url, permissions=["clipboard-read", "clipboard-write"]):
            if not modern:
                page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
            answer(page, TEXT)
            left, _ = sides(page)
            for button, text in (
                (left.get_by_role("button", name="Copy the answer of Verified"), TEXT),
                (left.get_by_role("button", name="Copy the code"), 'print("a < b")\n    # four spaces\n'),
            ):
                button.click()
                expect(button).to_have_text("Copied")
                page.get_by_label("Your message").fill("")
                page.get_by_label("Your message").focus()
                page.keyboard.press("Control+V")
                expect(page.get_by_label("Your message")).to_have_value(text)


@pytest.mark.long
def test_a_reload_keeps_the_conversation(page):
    page.get_by_label("Max tokens").fill("16")
    for count, text in enumerate(("one", "two"), 1):
        ask(page, text)
        expect(page.locator(".verdict")).to_have_count(count)
    looks = "[...document.querySelectorAll('.turn')].map(turn => turn.outerHTML)"
    before = page.evaluate(looks)
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert page.evaluate(looks) == before
    expect(page.locator("#welcome")).to_be_hidden()
    bodies = requests(page)
    ask(page, "three")
    expect(page.locator(".verdict")).to_have_count(3)
    assert [message["role"] for message in bodies[0]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert [message["content"] for message in bodies[0]["messages"]][::2] == ["one", "two", "three"]
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    expect(page.locator("#status-text")).to_have_text("tiny")
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.long
def test_a_reload_in_the_middle_of_an_answer(page, server, slow):
    ask(page)
    expect(sides(page)[0].locator(".token").nth(1)).to_be_visible()
    page.reload()
    expect(page.locator(".lap .rate").first).to_contain_text("stopped")
    expect(page.locator(".lap .rate").last).to_contain_text("stopped")
    expect(sides(page)[0].locator(".token").nth(1)).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    server.settled()


@pytest.mark.long
def test_a_conversation_too_long_to_be_kept_says_so(page):
    page.evaluate("sessionStorage.setItem('filler', 'x'.repeat(5_100_000))")
    answer(page, "y " * 40_000)
    expect(page.get_by_role("alert")).to_contain_text("Only the last 0 turns will be here after a reload.")


@pytest.mark.long
def test_what_cannot_be_read_back_is_forgotten(page):
    page.evaluate("sessionStorage.setItem('wedlm-conversation-1', 'no JSON')")
    page.reload()
    expect(page.locator("#status-text")).to_have_text("tiny")
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.long
def test_no_winner_where_texts_differ(page):
    replies = iter([stream_of(*"abcdef"), stream_of(*"abcdeg")])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**next(replies)))
    ask(page)
    expect(page.locator(".verdict")).to_contain_text("The texts differ, so there is no winner: ")
    expect(page.locator(".verdict")).to_contain_text("Where two tokens are nearly tied")
    assert page.locator(".winner, .badge:visible").count() == 0


@pytest.mark.long
def test_sides_take_turns_unless_told_otherwise(page, server):
    """The right side is asked once the left one has ended; at the same time the verdict has tokens a forward, too."""
    seen: list[tuple[str, int]] = []

    def note(route: Route) -> None:
        seen.append((route.request.post_data_json["decoding"], server.model.engine.num_open))
        route.continue_()

    page.route("**/v1/chat/completions", note)
    page.get_by_label("Max tokens").fill("64")
    ask(page)
    expect(page.locator(".verdict")).to_be_visible()
    assert seen == [("verified", 0), ("autoregressive", 0)]
    page.unroute_all()
    page.get_by_label("Start").select_option("At the same time")
    expect(page.locator("#order-hint")).to_contain_text("each slows the other")
    server.model.llm.engine.runner.seconds = 0.05
    ask(page)
    wait_until(lambda: server.model.engine.num_open == 2)
    server.model.llm.engine.runner.seconds = 0.0
    expect(page.locator(".verdict")).to_have_count(2)
    expect(page.locator(".verdict").last).to_have_text(
        re.compile(r"in shared forwards, \d.* against 1\.00 tokens a forward")
    )
