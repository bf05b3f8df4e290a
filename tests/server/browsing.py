# SPDX-License-Identifier: Apache-2.0
"""The demo page in a browser: pages that must not fail, and what tests do on them."""

import json
import os
import time
from collections.abc import Iterator
from shutil import which
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, expect

expect.set_options(timeout=20_000)  # the machine may be busy with other work
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")


def chromium_options() -> list[str]:
    """Chromium has no sandbox for root."""
    return ["--no-sandbox"] if os.geteuid() == 0 else []


class SlowRunner:
    """Stands in for an engine's runner whose steps take ``seconds`` longer."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.seconds = runner, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, plan: Any) -> Any:
        time.sleep(self.seconds)
        return self.runner.run(plan)


def fresh(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page at ``url`` in a browser of its own, until the generator goes on. It must not fail: an exception in it,
    or a breach of its policy, fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(10_000)
    tab = context.new_page()
    failures: list[str] = []

    def note_breach(message: ConsoleMessage) -> None:
        if "Security Policy" in message.text:
            failures.append(message.text)

    def note_error(error: Error) -> None:
        failures.append(str(error))

    tab.on("pageerror", note_error)
    tab.on("console", note_breach)
    tab.goto(url)
    yield tab
    context.close()
    assert not failures


def plain(page: Page) -> None:
    """Show answers as they were written, character for character."""
    page.get_by_label("Show Markdown formatted").uncheck()


def at_once(page: Page) -> None:
    """Race both sides at the same time."""
    page.get_by_label("Start").select_option("At the same time")


def stream_of(*texts: str) -> dict[str, str]:
    """An answer of our server in these pieces, a forward each, for ``Route.fulfill``."""
    lines = [
        json.dumps(
            {
                "choices": [{"index": 0, "delta": {"content": text}}],
                "wedlm": {"step": step, "token_ids": [step], "tokens": [text]},
            }
        )
        for step, text in enumerate(texts)
    ]
    body = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
    return {"content_type": "text/event-stream", "body": body}


def ask(page: Page, text: str = "Hello") -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send").click()


def sides(page: Page) -> tuple[Locator, Locator]:
    """The two answers of the last turn."""
    answers = page.locator(".turn").last.locator(".answer")
    expect(answers).to_have_count(2)
    return answers.nth(0), answers.nth(1)


def tokens(answer: Locator) -> list[dict[str, str]]:
    """Text, forward, title and colour of each token that is shown."""
    return answer.locator(".token").evaluate_all(
        "all => all.map(e => ({text: e.textContent, step: e.dataset.step, title: e.title,"
        " colour: getComputedStyle(e).backgroundColor}))"
    )


def requests(page: Page) -> list[dict[str, Any]]:
    """The bodies of the requests for answers from now on; the list grows."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    return bodies
