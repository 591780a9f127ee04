"""One thread a process: the models of the tests are so small that threads would mostly wait for each other.

And a browser, for the tests that open a page in one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.system.files import write_text

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
Open = Callable[..., Any]

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium, or CHROMIUM=/path/to/it")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; it must come without errors, and ask the network for nothing: `page.wrong` is empty at the end."""
    wrong: list[str] = []
    opened = []

    def on_request(request: Any) -> None:
        if not request.url.startswith("file:"):
            wrong.append(request.url)

    def open_page(html: str, dark: bool = False) -> Any:
        write_text(tmp_path / "page.html", html)
        page = chromium.new_page(
            viewport={"width": 1280, "height": 800}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
        )
        opened.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", on_request)
        page.wrong = wrong
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield open_page
    for page in opened:
        page.close()
    assert wrong == []
