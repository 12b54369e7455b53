"""The architecture that a run takes from the tokenizer it starts with, for other images and with what its command may change."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, round_to_multiples, write_size
from codegrid.engine.sweep import ADOPTED_GROUPS
from vqgan.networks.base import ImageDecoder, ImageEncoder, scale_settings
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.multi_codebook import MultiCodebook
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.quantizers.scales import resize_scales
from vqgan.tokenizer import Tokenizer

ABSENT = object()


@dataclass(frozen=True)
class Adoption:
    """What a command wants of the tokenizer that its run starts with.

    init          its run folder or checkpoint, for messages
    image_size    pixels of the rows and columns of the new images
    channels      of the new images
    grow          whether it may get more codes
    keys          the settings and groups below model and quantizer that the command names
    config        the command's own `model` and `quantizer`, plain containers
    """

    init: str
    image_size: Size
    channels: int
    grow: bool
    keys: Sequence[str]
    config: Mapping[str, Any]


def adopt_architecture(
    tokenizer: Tokenizer, described: Mapping[str, Any], wanted: Adoption
) -> dict[str, Any]:
    """The groups `model` and `quantizer` of a run that starts with a tokenizer, whose run's config is `described`.

    Raises InputError if the tokenizer can't serve such images, and if the command asks for another architecture.
    """
    groups: dict[str, Any] = deepcopy({name: described[name] for name in ADOPTED_GROUPS})
    if "from" in groups["quantizer"]:
        groups["quantizer"]["from"] = 0  # its codes are in use
    fit_model(groups["model"], tokenizer, wanted)
    if wanted.image_size != tokenizer.encoder.image_size:
        f = tokenizer.encoder.f
        grid = wanted.image_size[0] // f, wanted.image_size[1] // f
        resize_scales(groups["quantizer"], grid, tokenizer.grid)
    if wanted.grow:
        grow_codebook(groups["quantizer"], tokenizer.quantizer, wanted)
    asked = [
        (key, name, value)
        for key in wanted.keys
        for name, value in list_leaves(select_key(wanted.config, key), key)
    ]
    for key, name, value in asked:
        current = select_key(groups, name)
        if differs(name, value, current) and not is_of_training(tokenizer, name):
            raise refuse_setting(tokenizer.quantizer, wanted, key, name, value, current)
    for _, name, value in asked:
        if is_of_training(tokenizer, name):
            set_key(groups, name, value)
    return groups


def fit_model(model: dict[str, Any], tokenizer: Tokenizer, wanted: Adoption) -> None:
    """Change the sizes and channels in a `model` group to those of the new images, in place."""
    before = tokenizer.encoder.image_size
    networks: dict[str, ImageEncoder | ImageDecoder] = {
        "encoder": tokenizer.encoder,
        "decoder": tokenizer.decoder,
    }
    if wanted.image_size != before:
        for part, network in networks.items():
            check_new_size(network, tokenizer.encoder.f, before, wanted)
            scale_settings(model[part], network.sized_settings, wanted.image_size, before)
        names = {name for network in networks.values() for name in network.sized_settings}
        scale_settings(model, sorted(names), wanted.image_size, before)
    if wanted.channels != tokenizer.encoder.channels:
        for part, network in networks.items():
            if "channels" not in model[part]:
                raise InputError(
                    f"data.channels={wanted.channels}, and init={wanted.init} has {tokenizer.encoder.channels}, which "
                    f"its {type(network).__name__} can't change; use data.channels={tokenizer.encoder.channels}"
                )
            model[part]["channels"] = wanted.channels


def check_new_size(
    network: ImageEncoder | ImageDecoder, f: int, before: Size, wanted: Adoption
) -> None:
    """Raise InputError unless a network can serve images of the new size."""
    size = wanted.image_size
    if not network.sized_settings:
        raise InputError(
            f"data.image_size={write_size(size)}, and the {type(network).__name__} of init={wanted.init} serves "
            f"{write_size(before)} pixels alone; use data.image_size={write_size(before)}"
        )
    if size[0] % f or size[1] % f:
        sizes = [write_size(n) for n in round_to_multiples(size, f)]
        raise InputError(
            f"data.image_size={write_size(size)} is not divisible by the f={f} of init={wanted.init}; "
            f"use data.image_size={' or '.join(sizes)}"
        )


def grow_codebook(quantizer: dict[str, Any], built: Quantizer, wanted: Adoption) -> None:
    """Set the number of codes in a `quantizer` group to what the command asks for, in place.

    Raises InputError unless it asks for one, and if the codebook can't grow to it.
    """
    asked = select_key(wanted.config, "quantizer.K")
    if "quantizer.K" not in wanted.keys:
        raise InputError(
            f"grow=true needs the number of codes to grow to, above the {built.K} of init={wanted.init}; "
            "add quantizer.K=..., or leave grow out"
        )
    if not built.grows:
        raise InputError(
            f"grow=true, and the codebook of a {type(built).__name__} as in init={wanted.init} can't grow; leave grow out"
        )
    if not isinstance(asked, int) or asked < (built.K or 0):
        raise InputError(
            f"quantizer.K={asked} and grow=true: a codebook only grows, and that of init={wanted.init} has {built.K} "
            "codes; use a larger number, or leave both out"
        )
    quantizer["K"] = asked
    if isinstance(quantizer.get("inner"), dict):
        quantizer["inner"]["K"] = asked


def refuse_setting(
    quantizer: Quantizer, wanted: Adoption, key: str, name: str, value: Any, current: Any
) -> InputError:
    """The error for a setting of the command that is not that of the tokenizer; `key` is what the command names."""
    theirs = "has no such setting" if current is ABSENT else f"has {name}={current}"
    remedy = f"leave {key}=... out"
    may_grow = quantizer.grows and not wanted.grow and isinstance(value, int)
    if name == "quantizer.K" and may_grow and value > (quantizer.K or 0):
        remedy += ", or add grow=true"
    size = (
        f" at data.image_size={write_size(wanted.image_size)}" if name.startswith("model.") else ""
    )
    of = "" if key == name else f" by {key}=..."
    return InputError(
        f"this command has {name}={value}{of}, and init={wanted.init} {theirs}{size}; a run keeps the architecture "
        f"that it starts with, so {remedy}"
    )


def differs(name: str, value: Any, current: Any) -> bool:
    """Whether a setting of the command asks for something else than the tokenizer has. Null asks for nothing where an earlier
    version had no such setting, and where the choice follows from the others."""
    if value is None and (current is ABSENT or name in ("model.start", "quantizer.scales")):
        return False
    return bool(current != value)


def is_of_training(tokenizer: Tokenizer, name: str) -> bool:
    """Whether a setting below `model` or `quantizer` says how the tokenizer learns instead of what it is."""
    group, *words = name.split(".")
    if group == "model":
        return len(words) == 1 and words[0] in tokenizer.training_settings
    quantizer = tokenizer.quantizer
    while (
        words and words[0] == "inner" and isinstance(quantizer, MultiCodebook | MultiScaleResidual)
    ):
        quantizer, words = quantizer.inner_quantizers[0], words[1:]
    return group == "quantizer" and bool(words) and words[0] in quantizer.training_settings


def list_leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The dotted keys and the values below a node; lists are values."""
    if not isinstance(node, Mapping):
        yield key, node
        return
    for name, value in node.items():
        yield from list_leaves(value, f"{key}.{name}")


def select_key(node: Any, key: str) -> Any:
    """The value at a dotted key; ABSENT if there is none."""
    for word in key.split("."):
        if not isinstance(node, Mapping) or word not in node:
            return ABSENT
        node = node[word]
    return node


def set_key(node: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, in place, with the mappings that lead to it."""
    *parents, name = key.split(".")
    for word in parents:
        if not isinstance(node.get(word), dict):
            node[word] = {}
        node = node[word]
    node[name] = value
