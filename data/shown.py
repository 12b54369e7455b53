"""The channels of an image that pictures show, and that networks of three colours see."""

from collections.abc import Sequence

from torch import Tensor


def choose_shown(channels: int, show: Sequence[int] | None = None) -> tuple[int, ...]:
    """The shown ones of this many channels, counted from 1: `show`, or the first three, or the first of fewer than three."""
    if show is not None:
        return tuple(show)
    return (1, 2, 3) if channels >= 3 else (1,)


def pick_shown(x: Tensor, show: Sequence[int] | None = None) -> Tensor:
    """Images (B, C, H, W) of any type -> (B, 3 or 1, H, W); x itself if all of its channels are shown in their order."""
    shown = choose_shown(x.shape[1], show)
    if shown == tuple(range(1, x.shape[1] + 1)):
        return x
    return x[:, [number - 1 for number in shown]]
