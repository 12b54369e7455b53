"""Tokenizers for images of another number of channels: their first and their last layers are new."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vqgan.tokenizer import Tokenizer


def fold_channels(weight: Tensor, shape: torch.Size, before: int, after: int) -> Tensor:
    """A weight of a network's first or last layer for images of another number of channels; any other weight as it is.

    A layer that reads the image gets the sum over the old channels, divided by the number of the new ones, and a layer that
    writes it the mean over the old ones. So an image whose channels are all equal has the codes of its old form.
    """
    if before == after or weight.dim() != len(shape) or weight.shape == shape:
        return weight
    dim = 0 if weight.shape[0] != shape[0] else 1
    if weight.shape[dim] * after != shape[dim] * before:
        return weight
    parts = weight.unflatten(dim, (before, weight.shape[dim] // before))
    total = parts.sum(dim, keepdim=True) / (before if dim == 0 else after)
    sizes = [after if i == dim else -1 for i in range(total.dim())]
    return total.expand(sizes).flatten(dim, dim + 1)


def fold_image_layers(source: Tokenizer, target: Tokenizer) -> dict[str, Tensor]:
    """The weights of a tokenizer, with the first and the last layers for the images of another."""
    channels = source.encoder.channels, target.encoder.channels
    shapes: Mapping[str, Tensor] = target.state_dict()
    return {
        name: fold_channels(value, shapes[name].shape, *channels)
        for name, value in source.state_dict().items()
    }


def describe_new_layers(source: str, before: int, after: int) -> str:
    """What is new in the tokenizer `source` of so many channels once it serves images of others, as a sentence."""
    return (
        f"{source} has {before} channel{'s' * (before > 1)} and the images {after}: the first and the last layer are new, and "
        "start with the sums and the means over the old channels"
    )
