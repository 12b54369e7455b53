"""The page in a real browser."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import make_sweep
from codegrid.evaluation.report.figure import report_style
from codegrid.evaluation.report.page import render_page
from codegrid.evaluation.report.read import find_runs
from codegrid.evaluation.report.story import Story
from tests.helpers.browser import open_browser, read_requests

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_sweep(folder / "sweep", grids=[4, 8], Ks=[64, 256, 1024], dims=[64], seeds=2)
    with report_style():
        text = render_page(
            Story(find_runs([str(folder / "sweep")])), "sweep", datetime(2026, 11, 26)
        )
    (folder / "report.html").write_text(text)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as driven:
        yield driven


@pytest.fixture
def opened(browser: Any, report: Path) -> Any:
    browser.get_log("performance")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(report.as_uri())
    return browser


def column(browser: Any, table: str, head: str) -> list[str]:
    """The texts of a table's column, from top to bottom."""
    return browser.execute_script(  # type: ignore[no-any-return]
        """const table = document.querySelector(`#${arguments[0]} table`);
        const i = [...table.tHead.rows[0].cells].findIndex((cell) => cell.querySelector("b").textContent === arguments[1]);
        return [...table.tBodies].map((body) => body.rows[0].cells[i].textContent);""",
        table, head,
    )  # fmt: skip


def button(browser: Any, table: str, head: str) -> Any:
    return browser.find_element("xpath", f"//*[@id='{table}']//th/button[b='{head}']")


def test_it_opens_without_errors_and_requests_nothing_but_itself(opened: Any, report: Path) -> None:
    assert opened.title == "sweep: report"
    assert opened.get_log("browser") == []
    urls = read_requests(opened, report.as_uri())
    assert {url for url in urls if not url.startswith("data:")} == {report.as_uri()}


def test_a_click_on_a_head_sorts_by_number_both_ways(opened: Any) -> None:
    for turn, way in enumerate(("ascending", "descending")):
        head = button(opened, "runs-tokenizers", "K")
        head.click()
        values = [int(text) for text in column(opened, "runs-tokenizers", "K")]
        assert values == sorted(values, reverse=bool(turn))
        assert head.find_element("xpath", "..").get_attribute("aria-sort") == way
    assert values[0] == 1024  # as a word it would come between 256 and 64


def test_another_head_takes_over_the_order(opened: Any) -> None:
    button(opened, "runs-tokenizers", "K").click()
    button(opened, "runs-tokenizers", "PSNR").click()
    values = [float(text) for text in column(opened, "runs-tokenizers", "PSNR")]
    assert values == sorted(values)
    sorts = [
        cell.get_attribute("aria-sort")
        for cell in opened.find_elements("css selector", "#runs-tokenizers th")
    ]
    assert sorted(set(sorts)) == ["ascending", "none"]
    assert sorts.count("ascending") == 1


def test_the_keyboard_sorts_and_opens_rows(opened: Any) -> None:
    button(opened, "runs-tokenizers", "Seed").send_keys("\ue007")  # enter
    values = [int(text) for text in column(opened, "runs-tokenizers", "Seed")]
    assert values == sorted(values)
    first = opened.find_element("css selector", "#runs-tokenizers tbody .open")
    first.send_keys(" ")
    assert first.get_attribute("aria-expanded") == "true"
    shown = opened.find_element("css selector", "#runs-tokenizers tbody .detail .run-commands")
    assert "python train.py stage=vqgan model.grid=" in shown.text
    first.send_keys("\ue007")
    assert not shown.is_displayed()


def test_rows_stay_with_their_commands_when_they_are_sorted(opened: Any) -> None:
    first = opened.find_element("css selector", "#runs-tokenizers tbody")
    first.find_element("css selector", ".open").click()
    button(opened, "runs-tokenizers", "PSNR").click()
    button(opened, "runs-tokenizers", "PSNR").click()
    assert first.find_element("css selector", ".detail").is_displayed()
    assert "seed=0" in first.find_element("css selector", "code").text


def test_a_click_on_a_point_shows_its_details_and_commands(opened: Any) -> None:
    opened.execute_script(
        "document.querySelector('.point').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    details = opened.find_element("id", "point-details")
    assert "4×4, K=64" in details.text
    assert "2 seeds" in details.text
    assert "python train.py stage=vqgan model.grid=4" in details.text
    opened.find_element("css selector", "body").send_keys("\ue00c")  # escape
    assert not details.is_displayed()


def test_a_command_is_copied(opened: Any) -> None:
    opened.find_element("css selector", "#runs-tokenizers tbody .open").click()
    copy = opened.find_element("css selector", "#runs-tokenizers .copy")
    command = copy.find_element("xpath", "../code").text
    opened.execute_script(
        "window.copied = []; Object.defineProperty(navigator, 'clipboard', "
        "{configurable: true, value: {writeText: (text) => { window.copied.push(text); return Promise.resolve(); }}})"
    )
    copy.click()
    assert opened.execute_script("return window.copied") == [command]
    assert copy.text == "Copied"


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_never_scrolls_sideways(opened: Any, width: int) -> None:
    sizes = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    for opening in ("#runs-tokenizers .open", "#configurations-priors .open"):
        opened.execute_script("document.querySelector(arguments[0]).click()", opening)
    content, window = opened.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert content == window
    assert width - 20 <= window <= width  # a desktop's scroll bar takes some


def test_text_in_charts_is_legible_in_dark_mode(opened: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colours.append(
            opened.execute_script(
                "return [getComputedStyle(document.querySelector('figure svg text')).fill, "
                "getComputedStyle(document.body).backgroundColor]"
            )
        )
    brightness = [[sum(map(int, colour[4:-1].split(","))) for colour in pair] for pair in colours]
    assert brightness[0][0] < brightness[0][1] - 300
    assert brightness[1][0] > brightness[1][1] + 300
