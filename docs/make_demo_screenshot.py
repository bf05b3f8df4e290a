# SPDX-License-Identifier: Apache-2.0
"""Pictures of the demo page with the embedded model: ``python docs/make_demo_screenshot.py docs/demo_page.png``, and of
the page that fills gaps: ``--gap`` with docs/gap_page.png.

Needs Playwright for Python and a Chromium, as tests/server/test_demo_page.py does.
"""

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

from playwright.sync_api import Browser, sync_playwright

from wedlm import LLM
from wedlm.server.app import create_app
from wedlm.server.config import ServerConfig
from wedlm.server.run import Server

PROMPT = "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many does she sell in all?"
SIZES = {"desk": (1360, 900), "phone": (390, 844)}


@contextmanager
def serving(model: str) -> Iterator[str]:
    """The address of a server in a thread of this process. In eight bits verified text is AR's text."""
    server = Server(create_app({model: LLM(model)}, ServerConfig(port=0)))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def picture(browser: Browser, url: str, options: argparse.Namespace) -> None:
    """Ask once, wait for both answers, and save what the page shows."""
    width, height = SIZES[options.size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=options.scheme)
    page.goto(url)
    page.locator("#status[data-kind=ok]").wait_for()
    if options.prompt:
        page.get_by_label(options.mode, exact=True).check(force=True)
        page.get_by_label("Your message").fill(options.prompt)
        page.get_by_role("button", name="Send").click()
        page.locator(".verdict").wait_for(timeout=120_000)
        page.locator("#forward").evaluate("slider => { slider.value = slider.max / 2 }")
        page.locator("#forward").dispatch_event("input")
    page.wait_for_timeout(300)
    page.screenshot(path=options.out, full_page=options.size == "phone")


def picture_of_gap(browser: Browser, url: str, options: argparse.Namespace) -> None:
    """Fill the page's first example and save what it shows of a forward in the middle."""
    width, height = SIZES[options.size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=options.scheme)
    page.goto(f"{url}/infill.html")
    page.locator("#status[data-kind=ok]").wait_for()
    page.get_by_label("Positions of the gap").fill("16")
    page.get_by_label("Entropy threshold").fill("1")
    page.get_by_role("button", name="Fill the gap").click()
    page.locator("#announce", has_text="The gap is filled").wait_for(state="attached", timeout=120_000)
    page.locator("#forward").evaluate("slider => { slider.value = Math.round(slider.max * 0.6) }")
    page.locator("#forward").dispatch_event("input")
    page.wait_for_timeout(300)
    page.screenshot(path=options.out, full_page=options.size == "phone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--mode", default="Auto")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--size", choices=tuple(SIZES), default="desk")
    parser.add_argument("--gap", action="store_true")
    options = parser.parse_args()
    with serving(options.model) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        (picture_of_gap if options.gap else picture)(browser, url, options)
        browser.close()


if __name__ == "__main__":
    main()
