"""The web page in headless Chromium: plan, render, watch, zoom, cancel. HIRES_TEST_SCREENSHOTS=FOLDER keeps the screens."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.server import Live

sync_api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `dev`)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.chromium, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
]


@pytest.fixture
def page(server: Live) -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--disable-component-update"])
        opened = browser.new_page(viewport={"width": 1200, "height": 820})
        errors: list[str] = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("requestfailed", lambda request: errors.append(request.url) if "/zoom/" in request.url else None)
        opened.goto(server.url)
        opened.wait_for_selector("#model option", state="attached")
        yield opened
        browser.close()
        assert errors == []


def shot(page: Any, name: str) -> np.ndarray[Any, Any]:
    content = page.screenshot()
    folder = os.environ.get("HIRES_TEST_SCREENSHOTS")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(content)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def until(page: Any, condition: str, seconds: float = 60) -> None:
    """Wait for a condition; the page's own policy forbids Playwright's way, which evaluates strings in it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def test_plan_render_watch_and_zoom_to_one_pixel_for_one(page: Any, server: Live) -> None:
    page.fill("#prompt", "a sun on the right over green mountains and a lake at dusk")
    page.fill("#width", "1400")
    page.fill("#height", "900")
    page.fill("#steps", "4")
    page.fill("#seed", "7")
    page.click("#plan")
    page.wait_for_selector("#planned:not([hidden])")
    assert "1400x900" in page.text_content("#explained")
    assert page.evaluate("document.getElementById('drawing').complete")
    shot(page, "plan")

    page.click("#render")
    page.wait_for_selector("#preview:not([hidden])", timeout=60_000)
    assert 0 <= float(page.get_attribute("#bar", "value") or 0) < 1
    until(page, "document.getElementById('bar').value > 0.05")
    until(page, "document.getElementById('status').textContent.includes('step')")
    shot(page, "watch")

    page.wait_for_selector("#finished:not([hidden])", timeout=120_000)
    until(page, "!!shown.viewer && shown.viewer.world.getItemCount() === 1")
    until(page, "shown.viewer.world.getItemAt(0).getFullyLoaded()")
    page.wait_for_timeout(1500)
    shot(page, "fit")
    page.click("#whole")
    page.wait_for_timeout(1500)
    until(page, "shown.viewer.world.getItemAt(0).getFullyLoaded()")
    screen = shot(page, "one-to-one")
    box = page.evaluate("document.getElementById('viewer').getBoundingClientRect().toJSON()")
    zoom = page.evaluate("shown.viewer.viewport.viewportToImageZoom(shown.viewer.viewport.getZoom(true))")
    assert abs(zoom - 1) < 1e-6
    job = httpx.get(f"{server.url}/jobs").json()[0]
    whole = np.asarray(Image.open(io.BytesIO(httpx.get(server.url + job["results"][0]["url"]).content)))
    corner = page.evaluate("shown.viewer.viewport.viewerElementToImageCoordinates(new OpenSeadragon.Point(0, 0))")
    left, top = corner["x"], corner["y"]
    x, y = int(box["x"]) + 60, int(box["y"]) + 200  # away from the navigator
    seen = screen[y : y + 120, x : x + 160].astype(float)
    best = min(
        float(np.abs(seen - whole[row : row + 120, column : column + 160]).mean())
        for row in range(round(top) + 198, round(top) + 203)
        for column in range(round(left) + 58, round(left) + 63)
    )
    assert best < 4, "the screen shows the file's own pixels"
    with page.expect_download() as download:
        page.click("#download")
    assert Image.open(download.value.path()).size == (1400, 900)


def test_the_page_of_all_requests_needs_nothing_from_elsewhere(page: Any, server: Live) -> None:
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:")) else refused.append(request.url))
    page.goto(f"{server.url}/docs")
    page.wait_for_selector(".opblock", timeout=30_000)
    assert "/sdapi/v1/txt2img" in page.text_content("#swagger-ui") and refused == []
    shot(page, "docs")


def test_cancel_and_errors(page: Any) -> None:
    page.fill("#width", "1024")
    page.fill("#height", "1024")
    page.fill("#steps", "300")
    page.click("#render")
    until(page, "document.getElementById('bar').value > 0")
    page.click("#cancel")
    until(page, "document.getElementById('empty').textContent === 'Cancelled.'", seconds=5)
    page.fill("#vram", "1MB")
    page.click("#plan")
    until(page, "document.getElementById('error').textContent.length > 10")
    assert (
        "1 MB" in page.text_content("#error") or "1MB" in page.text_content("#error") or "budget" in page.text_content("#error")
    )
    shot(page, "error")
