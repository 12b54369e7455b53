"""Time from an edit of a code to its picture in the page of stage=explore, in headless Chromium.

    python -m benchmarks.exploring                              untrained models: 64x64 of the demo, and 256x256 with f=16
    python -m benchmarks.exploring --ckpt runs/vqgan/shapes     a run of stage=vqgan or prior
    python -m benchmarks.exploring --page explore.html          a page that is there already
    python -m benchmarks.exploring --page explore.html --picture docs/pictures/explore.png      and its picture, for README.md

Prints a row for each page, and a JSON line at the end: median and 90% quantile of the time, the CPU time of all of Chromium for an
edit (which holds on a busy machine, too), seconds until the models are ready, and the size of the page. Needs chromium,
chromedriver and the group dev.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from selenium import webdriver

from benchmarks.configs import compose_config
from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.environment import processor_name
from codegrid.engine.folder import LAST
from prior.stages.explore import PAGE, explore_model
from vqgan.load import build_tokenizer

EDITS = 60
TARGETS = {64: 50, 256: 300}  # ms, by the side of the pictures
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--window-size=1280,900",
]  # fmt: skip
READY = """const done = arguments[arguments.length - 1];
const wait = () => {
  if (globalThis.codegrid?.settled && codegrid.priorReady) done(performance.now());
  else setTimeout(wait, 20);
};
wait();"""
MEASURE = """const [count] = arguments, done = arguments[arguments.length - 1];
const { K } = codegrid.manifest.codes, L = codegrid.assets.L;
(async () => {
  const times = [];
  for (let i = 0; i < count; i++) {
    const shown = new Promise((resolve) => codegrid.addEventListener("pixels", resolve, { once: true }));
    const begun = performance.now();
    const { grid } = codegrid.editor;
    const t = (i * 37) % L;
    codegrid.editor.edit(grid.with([t], (grid.codes[t] + 1 + (i % (K - 1))) % K), "Paint");
    await shown;
    times.push(performance.now() - begun);
    await new Promise((resolve) => requestAnimationFrame(resolve));
  }
  return times;
})().then(done);"""
# A grid whose lower half the prior has drawn, and new pictures below it.
SHOW = """const done = arguments[arguments.length - 1];
const click = (id) => document.getElementById(id).click();
const idle = async () => {
  while (!document.getElementById("stop").hidden || !codegrid.settled) await new Promise((resolve) => setTimeout(resolve, 20));
};
(async () => {
  if (codegrid.manifest.prior) {
    click("draw");
    await idle();
    click("erase-half");
    click("fill");
    await idle();
  }
  codegrid.setHover({ row: Math.floor(codegrid.layer.rows / 2), column: Math.floor(codegrid.layer.columns / 2) });
  document.getElementById("status").textContent = "";
  document.documentElement.style.overflow = "hidden"; // no scroll bar
  await new Promise((resolve) => setTimeout(resolve, 300));
})().then(() => done(null), (error) => done(String(error)));"""
UNTRAINED = {
    "64x64, f=8, model=conv (make demo)": ["data=shapes", "data.image_size=64", "model.grid=8", "quantizer.K=512"],
    "256x256, f=16, model=conv_f16": ["data=shapes", "data.image_size=256", "model=conv_f16", "quantizer.K=1024"],
}  # fmt: skip


def write_untrained(folder: Path, *words: str) -> Path:
    """A run folder of stage=vqgan with the weights that training starts from: they are decoded as fast as trained ones."""
    torch.manual_seed(0)
    few = ["data.n_train=64", "data.n_val=32", "quantizer.dim=64"]
    config: Any = OmegaConf.to_container(compose_config("stage=vqgan", *words, *few), resolve=True)
    tokenizer = build_tokenizer(config["model"], config["quantizer"]).eval()
    encoder = tokenizer.encoder
    tokenizer.initialise(torch.randn(32, encoder.channels, *encoder.image_size))
    state = {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    save_atomically({"codegrid": make_header("vqgan", config), "state_dict": state}, folder / LAST)
    return folder


def write_page(ckpt: Path, folder: Path, cache_dir: str, words: list[str]) -> Path:
    few = ["pictures=4", "counted=32", "shown=8", "accelerator=cpu", f"cache_dir={cache_dir}"]
    explore_model(
        compose_config("stage=explore", f"ckpt={ckpt}", f"run_dir={folder}", *few, *words)
    )
    return folder / PAGE


@contextmanager
def open_page(page: Path) -> Iterator[Any]:
    """A page that is ready, in headless Chromium."""
    options = webdriver.ChromeOptions()
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is not None:
        options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        browser = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
        )
        try:
            browser.set_script_timeout(240)
            browser.get(page.resolve().as_uri())
            browser.execute_async_script(READY)
            yield browser
        finally:
            browser.quit()


def save_picture(page: Path, file: Path) -> None:
    """The page as a visitor finds it after a few clicks, 1280 pixels wide."""
    with open_page(page) as browser:
        if (problem := browser.execute_async_script(SHOW)) is not None:
            raise RuntimeError(problem)
        height = browser.execute_script("return document.querySelector('footer').offsetTop")
        clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
        sizes = {"width": 1280, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 300))")
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
    with Image.open(BytesIO(b64decode(shot["data"]))) as image:
        image.convert("RGB").save(file, optimize=True)


def read_cpu_seconds(root: int) -> float:
    """What a process and all below it have computed, by /proc: it counts no time in which other programs ran."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            seconds[int(stat.parent.name)] = int(fields[11]) + int(fields[12])

    def is_below(pid: int | None) -> bool:
        return pid is not None and (pid == root or is_below(parents.get(pid)))

    return sum(ticks for pid, ticks in seconds.items() if is_below(pid)) / os.sysconf("SC_CLK_TCK")


def measure(page: Path, edits: int) -> dict[str, Any]:
    """Opens a page, and changes `edits` codes one after the other."""
    with open_page(page) as browser:
        ready = browser.execute_script("return performance.now()")
        chromium = browser.service.process.pid
        before = read_cpu_seconds(chromium)
        times = browser.execute_async_script(MEASURE, edits)
        cpu = read_cpu_seconds(chromium) - before
        image = browser.execute_script("return codegrid.manifest.image")
    times = times[5:]  # the first ones compile
    return {
        "height": image["height"],
        "width": image["width"],
        "f": image["f"],
        "median_ms": round(statistics.median(times), 1),
        "p90_ms": round(sorted(times)[int(0.9 * len(times))], 1),
        "cpu_ms": round(1000 * cpu / edits, 1),
        "ready_ms": round(ready),
        "megabytes": round(page.stat().st_size / 1e6, 2),
    }


def print_row(name: str, figures: dict[str, Any]) -> None:
    target = TARGETS.get(figures["height"])
    within = f"target {target} ms" if target else ""
    print(
        f"{name:<40}{figures['median_ms']:>8.1f} ms{figures['p90_ms']:>8.1f} ms (90%){figures['cpu_ms']:>8.1f} ms CPU"
        f"{figures['ready_ms'] / 1000:>8.1f} s until ready{figures['megabytes']:>8.2f} MB   {within}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", help="a run of stage=vqgan or prior; default: untrained models of two sizes"
    )
    parser.add_argument("--page", help="a page that stage=explore has written")
    parser.add_argument("--picture", type=Path, help="with --page: a PNG file to write")
    parser.add_argument("--edits", type=int, default=EDITS)
    parser.add_argument("--cache-dir", default="cache", help="where the runtime is kept")
    arguments, words = parser.parse_known_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.page:
            pages = {arguments.page: lambda: Path(arguments.page)}
        elif arguments.ckpt:
            pages = {
                arguments.ckpt: lambda: write_page(
                    Path(arguments.ckpt), folder / "page", arguments.cache_dir, words
                )
            }
        else:
            pages = {
                name: partial(
                    write_untrained_page, folder / str(i), arguments.cache_dir, model, words
                )
                for i, (name, model) in enumerate(UNTRAINED.items())
            }
        for name, make in pages.items():
            rows[name] = measure(make(), arguments.edits)
            print_row(name, rows[name])
    if arguments.page and arguments.picture:
        save_picture(Path(arguments.page), arguments.picture)
    print(json.dumps({"machine": processor_name(), "cores": os.cpu_count(), "rows": rows}))


def write_untrained_page(folder: Path, cache_dir: str, model: list[str], words: list[str]) -> Path:
    return write_page(write_untrained(folder / "run", *model), folder / "page", cache_dir, words)


if __name__ == "__main__":
    main()
