"""Which channels of an image the losses see whose networks read three colours."""

from collections.abc import Iterator, Sequence

from torch import nn

from codegrid.data.shown import choose_shown
from vqgan.backbones import ColourReader


def show_colours(module: nn.Module, channels: int, show: Sequence[int] | None) -> str | None:
    """Let the readers of three colours among a module's parts see the channels that pictures show, in place.

    A sentence about it if images of this many channels have others, which these parts do not see; else None.
    """
    readers = dict(find_colour_readers(module))
    for reader in readers.values():
        reader.shown = show
    shown = choose_shown(channels, show)
    if not readers or len(set(shown)) == channels:
        return None
    *others, last = map(str, shown)
    numbers = f"channels {', '.join(others)} and {last}" if others else f"channel {last}"
    verbs = ("read", "see") if len(readers) > 1 else ("reads", "sees")
    return (
        f"{' and '.join(readers)} {verbs[0]} three colours and {verbs[1]} {numbers} alone of the {channels} that images have; "
        "data.show chooses which"
    )


def find_colour_readers(module: nn.Module) -> Iterator[tuple[str, ColourReader]]:
    """The parts of a module that read three colours, and those inside its parts, by the names of the parts."""
    for name, part in module.named_children():
        inner = getattr(part, "backbone", None)
        for reader in (part, inner):
            if isinstance(reader, ColourReader):
                yield f"loss.{name}", reader
