"""The notebooks of examples/: both halves of each pair agree, and each runs with small settings."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import TINY, TINY_PRIOR, clean_environment
from tests.helpers.configs import ROOT
from tests.helpers.forks import ForkedRun

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

SMALL = [word for word in TINY if not word.startswith("data.")]
SMALL_DATA = ["data.image_size=16", "data.n_val=16", "data.batch_size=8"]

# What replaces the settings of the cell with the tag "parameters".
PARAMETERS = {
    "quick_start": {
        "num_shapes": 64,
        "data_settings": SMALL_DATA,
        "tokenizer_settings": ["loss=vqvae", *SMALL],
        "prior_settings": TINY_PRIOR,
    },
    "codebook": {"settings": ["loss=vqvae", *TINY], "num_images": 16},
    "own_quantizer": {"settings": shlex.join(["loss=vqvae", *TINY]), "seeds": "0,1"},
}


def read_cells(file: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(file.read_text())["cells"]
    return cells


def test_every_example_is_a_pair_and_runs_in_a_test() -> None:
    names = {file.stem for file in NOTEBOOKS}
    assert names == {file.stem for file in (ROOT / "examples").glob("*.py")}
    assert names == PARAMETERS.keys()
    readme = (ROOT / "examples" / "README.md").read_text()
    assert all(f"({name}.ipynb)" in readme for name in names)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_has_one_cell_that_installs_and_no_outputs(file: Path) -> None:
    cells = read_cells(file)
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    assert sorted(tags) == ["install", "parameters"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_both_halves_of_a_pair_agree(file: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(file.with_suffix(".py"))
    notebook = jupytext.read(file)

    def content(cells: list[Any]) -> list[tuple[str, str, list[str]]]:
        return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in cells]

    assert content(script.cells) == content(notebook.cells)


def shrink(notebook: Any, settings: dict[str, Any]) -> None:
    """Leave out the cell that installs, and give the settings of `parameters` other values."""
    notebook.cells = [c for c in notebook.cells if "install" not in c.metadata.get("tags", [])]
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for name, value in settings.items():
        assert f"\n{name} =" in f"\n{cell.source}", name
        cell.source += f"\n{name} = {value!r}"


KERNEL = """
import sys
import matplotlib
from ipykernel.kernelapp import launch_new_instance

sys.path.insert(0, "")
matplotlib.use("module://matplotlib_inline.backend_inline")
launch_new_instance()
"""


@pytest.fixture
def forked_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of Jupyter are forks of a process that has the imports."""
    pytest.importorskip("ipykernel")
    program = tmp_path / "kernel.py"
    program.write_text(KERNEL)

    def launch(command: list[str], env: dict[str, str], cwd: str, **_: Any) -> ForkedRun:
        words = command[command.index("-f") :]
        environment = {name: value for name, value in env.items() if name != "JPY_PARENT_PID"}
        return ForkedRun(tuple(words), Path(cwd), environment, tmp_path, program)

    provisioner = pytest.importorskip("jupyter_client.provisioning.local_provisioner")
    monkeypatch.setattr(provisioner, "launch_kernel", launch)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_an_example_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    command = tmp_path / "bin" / "codegrid"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/train.py "$@"\n')
    command.chmod(0o755)
    for name, value in clean_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(command.parent), os.environ["PATH"]]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    folder = tmp_path / "work"
    folder.mkdir()
    notebook = nbformat.read(file, as_version=4)
    shrink(notebook, PARAMETERS[file.stem])
    nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


def run_cell(client: Any, code: str, interrupt: Callable[[], None] | None = None) -> list[Any]:
    """The messages of a cell; `interrupt` is called when it first prints how far a training is."""
    cell = client.execute(code)
    messages = []
    while True:
        message = client.get_iopub_msg(timeout=120)
        kind, content = message["msg_type"], message["content"]
        if message["parent_header"].get("msg_id") != cell:
            continue
        if kind == "status" and content["execution_state"] == "idle":
            return messages
        messages.append(content)
        if interrupt is not None and ", step " in content.get("text", ""):
            interrupt()
            interrupt = None


@pytest.mark.slow
@pytest.mark.usefixtures("forked_kernels")
def test_interrupting_the_kernel_saves_the_run_and_the_next_cell_resumes_it(tmp_path: Path) -> None:
    manager = pytest.importorskip("jupyter_client.manager")
    environment = clean_environment(PYTHONPATH=str(ROOT), IPYTHONDIR=str(tmp_path / "ipython"))
    kernel, client = manager.start_new_kernel(cwd=str(tmp_path), env=environment)
    words = ["stage=vqgan", "loss=vqvae", *TINY, "trainer.max_steps=200", "trainer.val_every=200"]
    try:
        run_cell(client, "from vqgan import train")
        *printed, error = run_cell(client, f"train(*{words})", kernel.interrupt_kernel)
        bar = "".join(content.get("text", "") for content in printed)
        resumed = run_cell(
            client, 'train("stage=vqgan", "resume=runs/vqgan/shapes").metrics["steps"]'
        )
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert error["ename"] == "KeyboardInterrupt"
    assert error["evalue"].endswith(
        "saved; resume with: train('stage=vqgan', 'resume=runs/vqgan/shapes')"
    )
    assert "\r" in bar, "the bar is drawn in place"
    [steps] = [content["data"]["text/plain"] for content in resumed if "data" in content]
    assert steps == "200"
