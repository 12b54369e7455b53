"""An installed program, in a folder whose owner has files of the same names as ours."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.commands import TINY, TINY_PRIOR
from tests.helpers.configs import ROOT

pytestmark = pytest.mark.slow

OF_THE_USER = ["data", "engine", "evaluation", "conf", "train", "benchmarks", "tests"]

FROM_PYTHON = """
import data, engine, evaluation, conf, train         # the user's own
for module in (data, engine, evaluation, conf, train):
    assert module.OWNER == "user", module

from vqgan import Tokenizer

tokenizer = Tokenizer.from_pretrained("runs/vqgan/shapes")
codes = tokenizer.encode_images(["photo.png"])
picture, = tokenizer.decode_codes(codes)
print(tuple(codes.shape), picture.size)
assert sys.modules["data"].OWNER == "user"
"""


COMMANDS = """
import atexit, json, os, sys, threading
from codegrid.engine.command import main
import prior.stages.train, vqgan.stages.train

codes = []
for n, line in enumerate(json.loads(sys.argv[1])):
    if child := os.fork():
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(sys.argv[2], f"{n}.{name}"), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [os.path.join(os.path.dirname(sys.argv[0]), "codegrid"), *line]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # without freeing all modules
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The build leaves files beside its sources, so it gets a copy of what git knows.
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, files):
        file, copy = ROOT / name, source / name
        if name.startswith(("tests/fixtures/", "docs/pictures/")) or not os.path.lexists(file):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            copy.symlink_to(file.readlink())
        else:
            copy.write_bytes(file.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
        check=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs' folder of an environment with this wheel, and the libraries of the tests' own environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps", wheel],
        check=True,
    )  # fmt: skip
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "bin" / "commands.py").write_text(
        COMMANDS
    )  # beside the command, so it imports what that imports
    return folder / "bin"


@pytest.fixture
def project(tmp_path: Path, photos: Path) -> Path:
    """A user's folder with packages and files named as ours are in the repository."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in OF_THE_USER:
        if name in ("data", "conf"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text("OWNER = 'user'\n")
        else:
            (folder / f"{name}.py").write_text("OWNER = 'user'\n")
    (folder / "photo.png").write_bytes((photos / "cats" / "0.png").read_bytes())
    return folder


def start(project: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= variables
    return subprocess.run(
        words, cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def start_all(
    installed: Path, project: Path, *lines: list[str], **variables: str
) -> list[subprocess.CompletedProcess[str]]:
    """Several `codegrid <words>`, one after the other, as forks of one process that has the imports."""
    logs = Path(tempfile.mkdtemp(prefix="codegrid-test-"))
    words = [installed / "python", installed / "commands.py", json.dumps(lines), logs]
    done = start(project, *words, OMP_NUM_THREADS="1", **variables)
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(
            lines[n], code, *((logs / f"{n}.{name}").read_text() for name in ("out", "err"))
        )
        for n, code in enumerate(json.loads(done.stdout))
    ]


def test_a_wheel_has_no_name_at_its_top_that_a_user_may_have(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"codegrid", "vqgan", "prior"}
    assert "codegrid/conf/stage/vqgan.yaml" in names
    assert "codegrid/data/decode.py" in names
    page = [name for name in names if name.startswith("prior/exploring/page/")]
    assert {Path(name).name for name in page} == {
        file.name for file in (ROOT / "prior" / "exploring" / "page").iterdir() if file.is_file()
    }
    assert "prior/exploring/mit.txt" in names


def test_the_installed_command_works_in_a_folder_with_files_of_the_same_names(
    installed: Path, project: Path
) -> None:
    done = start(project, installed / "codegrid", "stage=vqgan", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "_target_: codegrid.data.shapes.Shapes" in done.stdout
    assert "codegrid stage=vqgan" in start(project, installed / "codegrid", "--help").stdout
    before = sorted(project.rglob("*"))
    mistaken = start(project, installed / "codegrid", "stage=vqgan", "model.grid=7")
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith(
        "error: data.image_size=64 is not model.grid=7 times one whole number"
    )
    assert sorted(project.rglob("*")) == before


def test_both_stages_run_there_and_python_has_the_users_files_and_ours(
    installed: Path, project: Path
) -> None:
    trained, prior = start_all(
        installed, project,
        ["stage=vqgan", *TINY, "loss=vqvae"], ["stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR],
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    card = (project / "runs" / "vqgan" / "shapes" / "card.md").read_text()
    assert "codegrid stage=vqgan" in card
    assert prior.returncode == 0, prior.stderr
    script = project / "script.py"
    script.write_text(f"import sys\n{FROM_PYTHON}")
    done = start(project, installed / "python", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 4, 4) (16, 16)"


def test_a_class_in_a_package_data_of_the_users_own_trains_and_is_read_again(
    installed: Path, project: Path, photos: Path
) -> None:
    (project / "data" / "photos.py").write_text(
        "from codegrid.data.folder import Folder\n\n\nclass Photos(Folder):\n    pass\n"
    )
    images = [
        "data=folder",
        f"data.root={photos}",
        "data.n_val=4",
        "data._target_=data.photos.Photos",
    ]
    words = ["stage=vqgan", *(word for word in TINY if not word.startswith("data.n_"))]
    later = ["stage=extract", "ckpt=runs/vqgan/mine", "trust=[data.photos.Photos]"]
    trained, extracted = start_all(
        installed, project, [*words, *images, "loss=vqvae", "name=mine"], later, PYTHONPATH=str(project)
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "_target_: data.photos.Photos" in (project / "runs/vqgan/mine/config.yaml").read_text()
    assert extracted.returncode == 0, extracted.stderr
