"""Chromium without a window, for pages as users open them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,900",
]  # fmt: skip


def programs() -> tuple[str, str]:
    """Chromium and its driver; skips the test without them, but fails in CI."""
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        assert "CI" not in os.environ, "CI needs chromium and chromedriver"
        pytest.skip("needs chromium and chromedriver on the PATH")
    return chromium, driver


@contextmanager
def open_browser(profile: Path) -> Iterator[Any]:
    """A selenium driver that keeps its profile in a folder, and logs the console and all requests."""
    chromium, driver = programs()
    webdriver = (
        pytest.importorskip("selenium.webdriver")
        if "CI" not in os.environ
        else __import__("selenium.webdriver").webdriver
    )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driven = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield driven
    finally:
        driven.quit()


def read_requests(browser: Any, page: str) -> set[str]:
    """The addresses that documents of `page` have requested since the log was last read; the browser has pages of its own."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {each["request"]["url"] for each in requests if each["documentURL"].startswith(page)}
