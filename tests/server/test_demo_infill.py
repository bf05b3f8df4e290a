# SPDX-License-Identifier: Apache-2.0
"""The page of gaps in a real browser: what is filled, in which order, and what the server refuses."""

import re

import pytest
from playwright.sync_api import Page, expect

from tests.server.browsing import fresh


@pytest.fixture
def gap_page(browser, server):
    yield from fresh(browser, server.url + "/infill.html")


def fill(page: Page, prefix: str, suffix: str, length: int, threshold: str = "1") -> None:
    expect(page.locator("#status-text")).to_have_text("tiny")
    page.get_by_label("Before the gap").fill(prefix)
    page.get_by_label("After the gap").fill(suffix)
    page.get_by_label("Positions of the gap").fill(str(length))
    page.get_by_label("Entropy threshold").fill(threshold)
    page.get_by_role("button", name="Fill the gap").click()


def test_a_gap_is_filled_and_can_be_read_forward_by_forward(gap_page, server):
    fill(gap_page, "The quick", " fox jumps", 12)
    expect(gap_page.locator("#announce")).to_contain_text("The gap is filled in")
    body = {"prompt": "The quick", "suffix": " fox jumps", "max_tokens": 12, "wedlm_entropy_threshold": 1.0}
    text = server.text(**body, decoding="streaming")
    cells = gap_page.locator(".cell:not(.closed)")
    read = cells.evaluate_all("all => all.map(e => e.firstChild.textContent)")
    assert "".join(read) == text
    shown = gap_page.locator("#whole").inner_text()
    assert shown.startswith("The quick")
    assert shown.endswith(" fox jumps")
    steps = [int(step) for step in cells.evaluate_all("all => all.map(e => e.dataset.step)")]
    colours = cells.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(steps)) > 1
    by_step = dict(zip(steps, colours, strict=True))
    assert [by_step[step] for step in steps] == colours
    assert len(set(by_step.values())) == min(6, len(by_step))
    assert steps != sorted(steps), "positions are filled in an order of their own"
    slider = gap_page.get_by_role("slider", name="Forward", exact=True)
    slider.focus()
    gap_page.keyboard.press("Home")
    for step in range(max(steps) + 1):
        expect(gap_page.locator("#forward-text")).to_have_text(
            re.compile(rf"^{step}: filled {steps.count(step)}, final")
        )
        seen = gap_page.locator(".cell[data-step]").evaluate_all("all => all.map(e => Number(e.dataset.step))")
        assert sorted(seen) == sorted(one for one in steps if one <= step)
        gap_page.keyboard.press("ArrowRight")


@pytest.mark.long
def test_stop_and_the_servers_sentences(gap_page, server, slow):
    fill(gap_page, "a", "b", 48, threshold="0")
    expect(gap_page.locator(".cell[data-step]").nth(1)).to_be_visible()
    gap_page.get_by_role("button", name="Stop").click()
    expect(gap_page.get_by_role("button", name="Fill the gap")).to_be_visible()
    server.settled()
    assert gap_page.locator(".cell.masked").count() > 0
    fill(gap_page, "a" * 100, "b" * 20, 48)
    sentence = "max_tokens is 48, the length of a gap between 100 and 20 tokens; expected at most 8"
    expect(gap_page.get_by_role("alert")).to_contain_text(re.compile(re.escape(sentence), re.IGNORECASE))
    fill(gap_page, "a", "", 4)
    expect(gap_page.get_by_role("alert")).to_contain_text("There is nothing after the gap; expected some text.")


def test_what_a_model_writes_is_text(gap_page):
    attack = "<img src=x onerror='window.hurt=1'>"
    chunk = '{"choices":[{"index":0,"text":"x"}],"wedlm":{"step":0,"token_ids":[1],"tokens":["' + attack + '"]}}'
    gap_page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=f"data: {chunk}\n\ndata: [DONE]\n\n", content_type="text/event-stream"),
    )
    fill(gap_page, attack, attack, 1)
    expect(gap_page.locator(".cell[data-step]")).to_contain_text(attack)
    expect(gap_page.locator("#whole")).to_contain_text(attack)
    assert gap_page.locator("main img").count() == 0
    assert gap_page.evaluate("window.hurt") is None


@pytest.mark.long
def test_the_pages_know_of_each_other(gap_page):
    gap_page.get_by_role("link", name="Conversation").click()
    expect(gap_page.get_by_label("Your message")).to_be_visible()
    gap_page.get_by_role("link", name="Fill a gap").click()
    expect(gap_page.get_by_label("Before the gap")).to_be_visible()
    expect(gap_page.locator("#status-text")).to_have_text("tiny")
    gap_page.get_by_role("button", name="A line of code").click()
    expect(gap_page.get_by_label("After the gap")).to_have_value(re.compile("return total"))
