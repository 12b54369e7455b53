"""A public file's config against its weights and against the command: where they contradict each other, nothing is assumed."""

from collections.abc import Mapping
from typing import Any

from engine.errors import InputError
from vqgan.formats.base import Choices, PublicFile


def check_agreement(
    file: PublicFile, settings: Mapping[str, Any], sizes: Mapping[str, Any]
) -> None:
    """Raise InputError if one of these settings, where it is there and not null, differs from the size that the weights have."""
    for name, size in sizes.items():
        setting = settings.get(name)
        if setting is None:
            continue
        if (list(setting) if isinstance(setting, list | tuple) else setting) != size:
            raise InputError(
                f"{file.source}: its config says {name}={setting}, and its weights have {size}, so the config is of "
                f"another tokenizer; name the right one with config=<file>"
            )


def choose_cosine(file: PublicFile, choices: Choices, setting: str) -> tuple[bool, tuple[str, ...]]:
    """Whether outputs and codes are scaled to length 1, by this setting of its config and the command's quantizer.cosine; and
    what was assumed where neither says it: that they are.

    Raises InputError if both say it and differ.
    """
    own = file.settings.get(setting)
    if own is None and choices.cosine is None:
        return True, (
            f"No config says {setting}: outputs and codes are scaled to length 1, as its training script has it; "
            f"quantizer.cosine=false is the other reading",
        )
    if own is not None and choices.cosine not in (None, bool(own)):
        raise InputError(
            f"quantizer.cosine={str(choices.cosine).lower()} contradicts {setting}={str(own).lower()} in the config of "
            f"{file.source}; leave out quantizer.cosine"
        )
    return bool(own if choices.cosine is None else choices.cosine), ()


def refuse_cosine(file: PublicFile, choices: Choices, title: str) -> None:
    """Raise InputError if the command asks for codes of length 1 of a format that compares them as they are."""
    if choices.cosine:
        raise InputError(
            f"quantizer.cosine=true does not fit {file.source}: {title} compares outputs and codes as they are; "
            f"leave out quantizer.cosine"
        )
