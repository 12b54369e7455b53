"""Code blocks of documentation pages, so that tests run what the pages show."""

import re
import sys
from types import ModuleType
from typing import Any

import yaml

from tests.helpers.configs import ROOT


def read_blocks(page: str, language: str) -> list[str]:
    """The contents of all ```language blocks of a page, such as docs/extending/quantizer.md."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def load_example(page: str) -> dict[str, Any]:
    """The page's only YAML block, after importing its only Python block as the module that the YAML's first `_target_` names."""
    [source] = read_blocks(page, "python")
    [settings] = read_blocks(page, "yaml")
    config: dict[str, Any] = yaml.safe_load(settings)
    [target, *_] = re.findall(r"_target_: (\S+)", settings)
    name = target.rpartition(".")[0]
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, page, "exec"), module.__dict__)
    return config
