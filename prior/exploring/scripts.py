"""The page's ES modules as one script: a page at file:// can't import the files beside it."""

import re
from pathlib import Path

IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.-]+)";\n', re.MULTILINE)
ANY_IMPORT = re.compile(r"^import\b.*", re.MULTILINE)
EXPORT = re.compile(r"^export (?=(async function|function|class|const|let)\b)", re.MULTILINE)
ANY_EXPORT = re.compile(r"^export\b.*", re.MULTILINE)
DECLARED = re.compile(
    r"^(?:export )?(?:async function\*?|function\*?|class|const|let) (\w+)", re.MULTILINE
)


def join_scripts(folder: Path, entry: str) -> str:
    """The module `entry` with all that it imports, each once and before what imports it, without imports and exports.

    Modules import names as they are, `import { a, b } from "./file.js";`, and export declarations. All of them share one
    scope, so a name is declared at the top of one module only. Raises ValueError for modules that break these rules.
    """
    texts: dict[str, str] = {}

    def add(name: str, importers: tuple[str, ...]) -> None:
        if name in importers:
            raise ValueError(f"{' imports '.join((*importers, name))}")
        if name in texts:
            return
        text = (folder / name).read_text()
        for imported in IMPORT.findall(text):
            add(imported, (*importers, name))
        text = EXPORT.sub("", IMPORT.sub("", text))
        if (odd := ANY_IMPORT.search(text) or ANY_EXPORT.search(text)) is not None:
            raise ValueError(f"{name} has a line that can't be joined: {odd[0]}")
        texts[name] = text

    add(entry, ())
    declared: dict[str, str] = {}
    for file, text in texts.items():
        for name in DECLARED.findall(text):
            if name in declared:
                raise ValueError(f"{name} is declared in {declared[name]} and in {file}")
            declared[name] = file
    return "\n".join(f"// {name}\n{text}" for name, text in texts.items())
