"""The page as one HTML file that needs no other files."""

import base64
import gzip
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegrid.engine.errors import InputError
from codegrid.engine.templates import render_template
from prior.exploring.scripts import join_scripts

PAGE_FOLDER = Path(__file__).with_name("page")
EXPLORER_TEMPLATE = PAGE_FOLDER / "page.html.j2"
MIN_GAIN = 0.99  # parts that gzip makes no smaller than this share stay as they are: pictures


def build_page(manifest: Mapping[str, Any], parts: Mapping[str, bytes]) -> str:
    """The whole file: `manifest` as manifest.py describes it, and the bytes of the parts that it names."""
    return render_template(
        EXPLORER_TEMPLATE,
        escape=True,
        title=manifest["title"],
        css=(PAGE_FOLDER / "page.css").read_text(),
        manifest=to_inline_json(manifest),
        parts={name: encode_part(content) for name, content in parts.items()},
        worker=check_inline(join_scripts(PAGE_FOLDER, "worker.js")),
        script=check_inline(join_scripts(PAGE_FOLDER, "main.js")),
    )


def to_inline_json(value: Any) -> str:
    """JSON that can't end the element that it lies in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def check_inline(script: str) -> str:
    """A script that can lie in an element."""
    for ending in ("</script", "<!--"):
        if ending in script.lower():
            raise ValueError(f"a script of the page has {ending}, which ends its element")
    return script


def encode_part(content: bytes) -> tuple[str, bool]:
    """The base64 of a part, compressed where that makes it smaller, and whether it is."""
    packed = gzip.compress(content, 9, mtime=0)
    is_packed = len(packed) < MIN_GAIN * len(content)
    return base64.b64encode(packed if is_packed else content).decode(), is_packed


def check_written_size(page: bytes, most: int) -> None:
    """Raise InputError if a page has more than so many megabytes, of which its pictures may be the most."""
    megabytes = math.ceil(len(page) / 1e6)
    if megabytes > most:
        raise InputError(
            f"the page has {megabytes:,} megabytes, and max_megabytes={most} are allowed; use fewer pictures= and shown=, add "
            "serve=true, or raise max_megabytes"
        )


def write_page(file: Path, page: bytes) -> None:
    """Write the file whole or not at all. Raises InputError if the disk refuses."""
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_bytes(page)
        os.replace(part, file)
    except OSError as error:
        raise InputError(
            f"can't write {file} ({error.strerror or error}); free some space or name another folder with run_dir=..."
        ) from error
    finally:
        part.unlink(missing_ok=True)
