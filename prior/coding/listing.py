"""Which files a command names, and the names of those that are made of them."""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from codegrid.data.folder import list_files
from codegrid.engine.errors import InputError


def list_inputs(
    files: str | Sequence[str] | None, suffixes: Collection[str], what: str
) -> dict[str, Path]:
    """The files with these endings that the setting `files` names: folders, files, or a list of both.

    Each has a name: its path below its folder, without the ending, or with it where two differ in nothing else. Raises InputError
    for what is not there or holds none of `what`, and for two files of one name.
    """
    if not files:
        raise InputError(f"files names the {what} to work on; add files=<a folder of {what}>")
    places: list[tuple[Path, Path]] = []  # below its folder, and as it is
    for each in [files] if isinstance(files, str) else files:
        path = Path(each)
        if path.is_dir():
            places += [(file.relative_to(path), file) for file in list_files(path, suffixes)[0]]
        elif path.is_file():
            places.append((Path(path.name), path))
        else:
            raise InputError(
                f"files={each} is not there; give a folder of {what}, a file, or a list"
            )
    if not places:
        raise InputError(
            f"files={files} holds no {what} ({', '.join(suffixes)}); give a folder that does"
        )
    stems = Counter(place.with_suffix("") for place, _ in places)
    named: dict[str, Path] = {}
    for place, path in places:
        stem = place.with_suffix("")
        name = (stem if stems[stem] == 1 else place).as_posix()
        if name in named:
            raise InputError(
                f"files has {named[name]} and {path}, whose results would both be called {name}; give the folder above "
                "both, or two commands"
            )
        named[name] = path
    return named


def place_result(folder: Path, name: str, suffix: str) -> Path:
    """Where the result of an input of this name goes, in a subfolder that is made if it is missing."""
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def refuse_failed(failed: dict[str, str], n: int, folder: Path) -> None:
    """Raise InputError about the files that failed, name -> reason, after all n others are done; nothing if none did."""
    if not failed:
        return
    name, reason = next(iter(failed.items()))
    others = f", and {len(failed) - 1:,} more that metrics.json names" if len(failed) > 1 else ""
    raise InputError(
        f"{name}: {reason}{others}; the results of the other {n - len(failed):,} files are in {folder}"
    )
