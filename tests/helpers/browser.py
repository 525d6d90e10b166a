"""The system's Chromium, headless, for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Fails the test where there is none: a page that no browser has opened is not tested."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(
            "no chromium on this machine: infra/setup.sh --browser installs Debian's", pytrace=False
        )
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses a sandbox to root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=root)
        yield browser
        browser.close()


@dataclass
class Watch:
    """What a page says and asks for while it is open."""

    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def over(self, page: Page) -> None:
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", self._note)

    def _note(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.asked.append(request.url)


def violations(page: Page) -> list[str]:
    """What axe finds wrong, one line each."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:160]} ({node['failureSummary'][:300]})"
        for each in found
        for node in each["nodes"]
    ]


def on_the_first_screen(page: Page, size: tuple[int, int], *parts: str) -> bool:
    """Whether each selector has matches, and all of them lie within a window of this size."""
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.evaluate("() => window.scrollTo(0, 0)")
    bottoms = (
        "parts => [...document.querySelectorAll(parts)].map(each => {"
        " const box = each.getBoundingClientRect(); return box.height ? box.bottom : Infinity })"
    )
    found = [page.evaluate(bottoms, part) for part in parts]
    return all(each and max(each) <= size[1] for each in found)
