"""The page of stage=explore in a real browser, opened as a file."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prior.decoding.generate import sample
from prior.decoding.sampling import make_sampler
from prior.load import load_prior
from prior.prior import Prior
from prior.stages.explore import PAGE
from tests.helpers.browser import open_browser, read_requests
from tests.helpers.explored import explore_run, require_runtime
from tests.helpers.runs import save_prior_run
from tests.helpers.shared import share_folder

pytestmark = pytest.mark.slow

WAIT = "const done = arguments[arguments.length - 1]; const wait = () => ({}) ? done() : setTimeout(wait, 10); wait();"
READY = "globalThis.codegrid?.priorReady && codegrid.settled"
CONTROL, SHIFT, ENTER, RIGHT, DOWN = "\ue009", "\ue008", "\ue007", "\ue014", "\ue015"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shallow = ["model.encoder.depth=1", "model.decoder.depth=1"]
    fill = partial(save_prior_run, tokenizer_words=shallow)
    return share_folder(tmp_path_factory, "explored run", fill)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_runtime()
    return share_folder(tmp_path_factory, "page", partial(explore_run, run)) / PAGE


@pytest.fixture(scope="module")
def trained(run: Path) -> Prior:
    return load_prior(str(run))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as driven:
        driven.set_script_timeout(30)
        yield driven


@pytest.fixture
def opened(browser: Any, page: Path, tmp_path: Path) -> Iterator[Any]:
    """The page, ready; its console is empty at the end of every test."""
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(page.as_uri())
    wait_for(browser, READY)
    yield browser
    assert browser.get_log("browser") == []


def read_codes(opened: Any) -> list[int]:
    return opened.execute_script("return Array.from(codegrid.editor.grid.codes)")  # type: ignore[no-any-return]


def read_pixels(opened: Any) -> np.ndarray:
    """The decoded picture (h, w, 3), once it is that of the grid."""
    wait_for(opened, "codegrid.settled")
    values = opened.execute_script(
        """const { width, height } = codegrid.decoded;
        return [height, width, Array.from(codegrid.decoded.getContext("2d").getImageData(0, 0, width, height).data)];"""
    )
    return np.array(values[2], np.uint8).reshape(values[0], values[1], 4)[..., :3]


def point_at(opened: Any, row: float, column: float, canvas: str = "codes") -> Any:
    """Actions that begin with the pointer on a place of the 4 x 4 grid."""
    from selenium.webdriver import ActionChains

    element = opened.find_element("id", canvas)
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    side = element.size["width"] / 4
    x, y = ((where + 0.5) * side - 2 * side for where in (column, row))
    return ActionChains(opened, duration=20).move_to_element_with_offset(element, int(x), int(y))


def choose_tool(opened: Any, name: str) -> None:
    opened.execute_script(f"document.querySelector('[name=tool][value={name}]').click()")


def open_file(opened: Any, file: Path) -> None:
    opened.find_element("id", "file").send_keys(str(file))


def wait_for(opened: Any, condition: str) -> None:
    """Until a condition in JavaScript is true."""
    opened.execute_async_script(WAIT.replace("{}", condition))


def read_notice(opened: Any) -> str:
    wait_for(opened, "!document.getElementById('notice').hidden")
    return str(opened.find_element("css selector", "#notice span").text)


def wait_for_file(folder: Path, pattern: str) -> Path:
    """A file that the browser saves there."""
    import time

    for _ in range(200):
        if saved := [file for file in folder.glob(pattern) if file.stat().st_size]:
            return saved[0]
        time.sleep(0.02)
    raise AssertionError(f"no {pattern} in {list(folder.iterdir())}")


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG file of this size, without its pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def test_it_opens_as_a_file_and_requests_nothing_from_any_host(opened: Any, page: Path) -> None:
    assert "each one of 16" in opened.find_element("id", "lead").text
    schemes = {url.split(":")[0] for url in read_requests(opened, "file:")}
    assert "file" in schemes
    assert schemes <= {"file", "data", "blob"}
    urls = {url.split("#")[0] for url in read_requests(opened, "file:") if url.startswith("file:")}
    assert urls <= {page.as_uri()}


def test_its_pixels_are_those_of_the_tokenizer(opened: Any, trained: Prior) -> None:
    for i in range(4):
        opened.execute_script(f"codegrid.openPicture(codegrid.assets.pictures[{i}])")
        codes = torch.tensor(read_codes(opened)).view(1, 4, 4)
        expected = trained.tokenizer.decode_indices(codes).clamp(-1, 1)[0].permute(1, 2, 0)
        exact = (expected + 1) * 127.5
        difference = np.abs(read_pixels(opened) - exact.detach().numpy())
        assert difference.max() <= 1
        assert exact.std() > 5  # a grey picture would be equal to any


def test_a_picture_that_is_opened_gets_the_codes_of_the_tokenizer(
    opened: Any, trained: Prior, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    own = trained.tokenizer.indices(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    equal = []
    for i in range(8):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
        open_file(opened, tmp_path / f"{i}.png")
        wait_for(opened, f"codegrid.editor.source.name === '{i}.png'")
        equal.append(np.array(read_codes(opened)) == own[i].flatten().numpy())
    assert np.mean(equal) > 0.99
    assert opened.find_elements("css selector", "#strip .thumb[aria-pressed='true']")


@pytest.mark.parametrize("event", ["new DragEvent('drop', {", "new ClipboardEvent('paste', {"])
def test_a_picture_is_dropped_or_pasted(opened: Any, event: str) -> None:
    opened.execute_script("codegrid.openPicture(codegrid.assets.pictures[1])")
    opened.execute_script(
        """codegrid.assets.pictures[0].image.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "mine.png", { type: "image/png" }));
          document.body.dispatchEvent(EVENT bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data }));
        });""".replace("EVENT", event)
    )
    wait_for(opened, "codegrid.editor.source.name === 'mine.png'")
    own = opened.execute_script("return Array.from(codegrid.assets.pictures[0].codes)")
    assert np.mean(np.array(read_codes(opened)) == own) >= 15 / 16  # but for a tie


def test_a_drag_paints_and_is_one_step_to_undo(opened: Any) -> None:
    before = read_codes(opened)
    opened.execute_script("codegrid.setBrush((codegrid.editor.grid.codes[5] + 1) % 16)")
    point_at(opened, 1, 0).click_and_hold().move_by_offset(3 * 80, 0).release().perform()
    code = opened.execute_script("return codegrid.code")
    painted = read_codes(opened)
    assert painted[4:8] == [code] * 4
    assert painted[:4] + painted[8:] == before[:4] + before[8:]
    opened.find_element("css selector", "body").send_keys(CONTROL + "z")
    assert read_codes(opened) == before
    assert not opened.find_element("id", "undo").is_enabled()
    opened.find_element("css selector", "body").send_keys(CONTROL + SHIFT + "z")
    assert read_codes(opened) == painted


def test_painting_on_the_picture_changes_it_there(opened: Any) -> None:
    before = read_pixels(opened)
    opened.execute_script("codegrid.setBrush((codegrid.editor.grid.codes[15] + 5) % 16)")
    point_at(opened, 3, 3, "picture").click().perform()
    change = np.abs(read_pixels(opened).astype(int) - before).sum(-1)
    assert change[12:, 12:].sum() > 0


def test_the_keyboard_moves_paints_and_selects(opened: Any) -> None:
    opened.execute_script("codegrid.setBrush(3)")
    board = opened.find_element("id", "codes")
    opened.execute_script("arguments[0].focus()", board)
    board.send_keys(DOWN, DOWN, RIGHT, ENTER)
    assert read_codes(opened)[5] == 3
    assert opened.find_element("id", "announcer").get_attribute("textContent") == (
        "Row 2, column 2: code 3"
    )
    board.send_keys(SHIFT + RIGHT + DOWN)
    selection = opened.execute_script("return codegrid.selection")
    assert selection == {"top": 1, "left": 1, "bottom": 3, "right": 3}


def test_a_region_is_copied_and_pasted(opened: Any) -> None:
    opened.execute_script(
        "codegrid.editor.edit(codegrid.editor.grid.with([0, 1, 4, 5], [1, 2, 3, 4]))"
    )
    choose_tool(opened, "select")
    point_at(opened, 0, 0).click_and_hold().move_by_offset(90, 90).release().perform()
    text = opened.execute_script(
        """const data = new DataTransfer();
        document.body.dispatchEvent(new ClipboardEvent("copy", { bubbles: true, cancelable: true, clipboardData: data }));
        return data.getData("text/plain");"""
    )
    assert text == "1 2\n3 4"
    opened.find_element("id", "paste").click()
    point_at(opened, 2, 2).click().perform()
    grid = np.array(read_codes(opened)).reshape(4, 4)
    assert grid[2:, 2:].tolist() == grid[:2, :2].tolist() == [[1, 2], [3, 4]]


def test_a_swap_exchanges_two_codes_everywhere(opened: Any) -> None:
    opened.execute_script(
        "codegrid.editor.edit(codegrid.editor.grid.with([...Array(16).keys()], [...Array(16).keys()].map((t) => t % 3)))"
    )
    opened.execute_script("codegrid.setBrush(1)")
    choose_tool(opened, "swap")
    point_at(opened, 0, 0).click().perform()
    assert read_codes(opened) == [{0: 1, 1: 0, 2: 2}[t % 3] for t in range(16)]


def test_the_prior_fills_what_is_erased_the_same_by_the_same_seed(
    opened: Any, trained: Prior
) -> None:
    before = read_codes(opened)
    fills = []
    for seed in (7, 7, 8, 9):
        opened.find_element("id", "erase-half").click()
        opened.execute_script(f"document.getElementById('seed').value = {seed}")
        assert "8 erased" in opened.find_element("id", "fill").text
        opened.find_element("id", "fill").click()
        wait_for(opened, "!codegrid.editor.grid.holes")
        wait_for(opened, "document.getElementById('stop').hidden")
        fills.append(read_codes(opened))
        assert fills[-1][:8] == before[:8]
    assert fills[0] == fills[1]
    assert fills[2] != fills[0] or fills[3] != fills[0]


def test_the_most_likely_codes_are_those_of_the_prior_in_python(
    opened: Any, trained: Prior
) -> None:
    expected = sample(trained.model, make_sampler(top_k=1), 1, seed=0)[0].flatten().tolist()
    codes = opened.execute_async_script(
        """const done = arguments[arguments.length - 1];
        const request = {codes: new Int32Array(16), n: 1, sampler: {top_k: 1}, seed: 3};
        codegrid.engine.complete(request).then((codes) => done(Array.from(codes)));"""
    )
    assert codes == expected


def test_new_pictures_appear_code_by_code_and_open_in_the_editor(opened: Any) -> None:
    opened.execute_script(
        """globalThis.holes = new Set();
        const original = CanvasRenderingContext2D.prototype.putImageData;
        codegrid.engine.complete = ((complete) => (request, progress, signal) =>
          complete(request, (step) => { holes.add(step.places.length); progress(step); }, signal)
        )(codegrid.engine.complete.bind(codegrid.engine));"""
    )
    opened.find_element("id", "draw").click()
    wait_for(
        opened,
        "document.getElementById('stop').hidden && document.querySelectorAll('#samples button').length === 8",
    )
    assert opened.execute_script("return [...holes]") == [1]
    opened.find_element("css selector", "#samples button").click()
    assert opened.execute_script("return codegrid.editor.source.name") == "seed 0, sample 1"
    opened.find_element("id", "undo").click()
    assert opened.execute_script("return codegrid.editor.source.index") == 0


def test_a_completion_that_is_stopped_does_not_claim_to_be_done(opened: Any) -> None:
    seed = "return document.getElementById('seed').value"
    opened.execute_script(
        "for (const id of ['erase-half', 'fill', 'stop']) document.getElementById(id).click()"
    )
    wait_for(opened, "document.getElementById('stop').hidden")
    assert opened.execute_script("return codegrid.editor.grid.holes") == 8
    assert "Filled" not in opened.find_element("id", "status").text
    assert opened.execute_script(seed) == "0"
    opened.find_element("id", "fill").click()
    wait_for(opened, "document.getElementById('stop').hidden && !codegrid.editor.grid.holes")
    assert "Filled with seed 0" in opened.find_element("id", "status").text
    assert opened.execute_script(seed) == "1"


def test_new_pictures_are_drawn_on_while_another_is_opened(opened: Any) -> None:
    opened.execute_script(
        "document.getElementById('draw').click(); document.querySelector('#strip button:last-child').click();"
    )
    wait_for(opened, "document.getElementById('stop').hidden")
    wait_for(opened, "document.getElementById('status').textContent.includes('Drawn with seed 0')")
    assert opened.execute_script("return codegrid.editor.source.index") == 3


def test_saved_codes_open_in_numpy_and_in_the_page(opened: Any, tmp_path: Path) -> None:
    codes = read_codes(opened)
    opened.find_element("css selector", "#save summary").click()
    opened.find_element("id", "save-codes").click()
    file = wait_for_file(tmp_path, "*.npz")
    with np.load(file) as saved:
        assert saved["indices"].dtype == np.int64
        assert saved["indices"].tolist() == np.array(codes).reshape(1, 4, 4).tolist()
        assert (int(saved["K"]), saved["grid"].tolist()) == (16, [4, 4])
    other = np.array(codes).reshape(1, 4, 4)[:, ::-1]
    np.savez_compressed(tmp_path / "other.npz", indices=other.astype(np.uint16))
    open_file(opened, tmp_path / "other.npz")
    wait_for(opened, "codegrid.editor.source.name === 'other.npz'")
    assert read_codes(opened) == other.flatten().tolist()


def test_the_saved_picture_is_the_one_that_is_shown(opened: Any, tmp_path: Path) -> None:
    opened.find_element("css selector", "#save summary").click()
    opened.find_element("id", "save-picture").click()
    file = wait_for_file(tmp_path, "*.png")
    assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), read_pixels(opened))


def test_a_link_holds_the_grid(opened: Any, page: Path) -> None:
    opened.execute_script(
        "codegrid.editor.edit(codegrid.editor.grid.with([0, 5], [15, 0]).with([2], null))"
    )
    codes = read_codes(opened)
    opened.find_element("id", "share").click()
    wait_for(opened, "location.hash.length > 1")
    link = opened.current_url
    opened.get("about:blank")
    opened.get(link)
    wait_for(opened, READY)
    linked = read_codes(opened)
    assert linked[:2] + linked[3:] == codes[:2] + codes[3:]
    assert opened.execute_script("return codegrid.editor.grid.erased[2]") == 1
    opened.execute_script("location.hash = location.hash.slice(0, -2)")
    assert "doesn't hold 16 codes below 16" in read_notice(opened)
    opened.execute_script(
        "globalThis.whole = location.hash; location.hash = whole.replace(/&c=.*/, '')"
    )
    wait_for(
        opened,
        "document.querySelector('#notice span').textContent.includes('holds no whole grid')",
    )
    opened.execute_script("location.hash = whole.replace(/m=[^&]*/, 'm=other')")
    wait_for(
        opened,
        "document.querySelector('#notice span').textContent.includes('another model, other')",
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"Not a picture.", r"“notes.txt” is no picture .* PNG, JPEG"),
        (
            "huge.png",
            png_header(10000, 5000),
            r"50 megapixels \(10000 × 5000\).* up to 40.* 16 × 16",
        ),
        ("empty.png", b"", "“empty.png” is empty"),
        ("broken.png", png_header(20, 20) + b"\0" * 64, "“broken.png” can't be decoded"),
        ("codes.npz", b"PK\3\4" + bytes(40), "no whole zip file"),
    ],
)
def test_what_it_can_not_read_gets_a_sentence(
    opened: Any, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    before = read_codes(opened)
    (tmp_path / name).write_bytes(content)
    if content:
        open_file(opened, tmp_path / name)
    else:
        opened.execute_script(f"codegrid.openFile(new File([], '{name}'))")
    assert re.search(reason, read_notice(opened))
    assert read_codes(opened) == before


def test_codes_of_another_model_are_refused(opened: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", indices=np.full((1, 4, 4), 16))
    open_file(opened, tmp_path / "a.npz")
    assert "has the code 16, and this model's codes are 0 to 15" in read_notice(opened)
    np.savez(tmp_path / "b.npz", indices=np.zeros((1, 8, 8), int))
    open_file(opened, tmp_path / "b.npz")
    wait_for(opened, "document.querySelector('#notice span').textContent.includes('1 × 8 × 8')")
    np.savez(tmp_path / "c.npz", indices=np.asfortranarray(np.arange(16).reshape(1, 4, 4)))
    open_file(opened, tmp_path / "c.npz")
    wait_for(opened, "document.querySelector('#notice span').textContent.includes('Fortran order')")


def test_a_folder_that_is_dropped_gets_a_sentence(opened: Any) -> None:
    opened.execute_script(
        """const folder = new File(["?"], "photos");
        folder.slice = () => ({ arrayBuffer: () => Promise.reject(new DOMException("not found", "NotFoundError")) });
        codegrid.openFile(folder);"""
    )
    assert "“photos” can't be read: it is a folder" in read_notice(opened)


def test_a_morph_that_plays_ends_where_the_user_paints(opened: Any) -> None:
    share = "document.getElementById('morph-share').value"
    opened.find_element("id", "morph-play").click()
    wait_for(opened, f"{share} > 30")  # some codes have changed
    opened.execute_script(
        "codegrid.editor.edit(codegrid.editor.grid.with([0, 1], [3, 3]), 'Paint')"
    )
    stopped_at = opened.execute_script(f"return {share}")
    opened.execute_async_script("setTimeout(arguments[0], 100)")
    assert opened.execute_script(f"return {share}") == stopped_at
    assert read_codes(opened)[:2] == [3, 3]
    steps = opened.execute_script("return codegrid.editor.done.map(({ label }) => label)")
    assert steps == ["Morph", "Paint"]


def test_a_morph_goes_from_one_grid_to_the_other(opened: Any) -> None:
    first, second = opened.execute_script(
        "return codegrid.assets.pictures.slice(0, 2).map(({codes}) => Array.from(codes))"
    )
    grids = []
    for share in (0, 50, 100):
        opened.execute_script(
            "const slider = document.getElementById('morph-share');"
            f"slider.value = {share}; slider.dispatchEvent(new Event('input'));"
        )
        grids.append(read_codes(opened))
    assert (grids[0], grids[2]) == (first, second)
    assert all(code in pair for code, *pair in zip(grids[1], first, second, strict=True))
    assert grids[1] not in (first, second)


def test_hovering_a_code_shows_its_use(opened: Any) -> None:
    code = read_codes(opened)[0]
    point_at(opened, 0, 0).perform()
    wait_for(
        opened,
        f"document.querySelector('#code-card .number').textContent.startsWith('Code {code}')",
    )
    text = opened.find_element("id", "code-card").text
    assert re.search(r"used (once|[\d,]+ times)", text)
    assert "validation images" in text
    nearest = opened.find_elements("css selector", "#code-card .swatches button")
    nearest[0].click()
    assert opened.execute_script("return codegrid.code") != code


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_never_scrolls_sideways_and_every_control_has_a_name(opened: Any, width: int) -> None:
    sizes = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    content, window = opened.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert content == window
    tree = opened.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "slider", "radio", "checkbox", "combobox", "spinbutton", "textbox", "img"}
    controls = [
        node for node in tree if node.get("role", {}).get("value") in roles and not node["ignored"]
    ]
    assert len(controls) > 20
    nameless = [node for node in controls if not node.get("name", {}).get("value")]
    assert nameless == [], json.dumps(nameless)[:500]


def test_text_is_legible_in_the_dark(opened: Any) -> None:
    brightness = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colours = opened.execute_script(
            "return [getComputedStyle(document.getElementById('lead')).color, getComputedStyle(document.body).backgroundColor]"
        )
        brightness.append([sum(map(int, colour[4:-1].split(","))) for colour in colours])
    assert brightness[0][0] < brightness[0][1] - 300
    assert brightness[1][0] > brightness[1][1] + 300
