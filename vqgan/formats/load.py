"""From the file of another program to a tokenizer: which format it has, and every weight in its place, once."""

import pkgutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import isabstract
from typing import Any

import torch
from torch import Tensor

import vqgan.formats
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import SizeSetting, check_size, to_setting
from vqgan.channels import describe_new_layers, fold_image_layers
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.refused import refuse_known
from vqgan.load import build_tokenizer
from vqgan.quantizers.ibq import CODE_SCORES
from vqgan.quantizers.scales import check_scales
from vqgan.tokenizer import PIXEL_RANGES, Tokenizer

MAX_NAMED = 10  # names of weights in a sentence


@dataclass(frozen=True)
class Imported:
    """A public tokenizer as one of this program's, in eval mode, with the title of its format and how it was read."""

    title: str
    tokenizer: Tokenizer
    plan: Plan


def make_choices(
    image_size: SizeSetting,
    channels: int | None,
    pixels: Any,
    cosine: Any,
    score: Any,
    scales: Any = None,
    head_width: Any = None,
) -> Choices:
    """The choices of a command. Raises InputError for a value that is none."""
    if pixels is not None:
        is_pair = isinstance(pixels, Sequence) and not isinstance(pixels, str)
        if not is_pair or tuple(pixels) not in PIXEL_RANGES:
            raise InputError(f"pixels={pixels} must be [-1,1] or [0,1]")
        pixels = (int(pixels[0]), int(pixels[1]))
    if cosine not in (None, True, False):
        raise InputError(f"quantizer.cosine={cosine} must be true or false")
    if score not in (None, *CODE_SCORES):
        raise InputError(f"quantizer.score={score} must be one of {', '.join(CODE_SCORES)}")
    if head_width is not None:
        check_int("head_width", head_width, 1, "channel")
    return Choices(
        check_size("data.image_size", image_size, "pixel"),
        channels,
        pixels,
        cosine,
        score,
        None if scales is None else tuple(map(to_setting, check_scales(scales))),
        head_width,
    )


def load_public(file: PublicFile, choices: Choices) -> Imported:
    """Build the tokenizer that a public file holds, with all of its weights; its first and last layer are new for images of
    another number of channels.

    Raises InputError unless exactly one format recognises the file, and unless every weight has one place.
    """
    public = choose_format(file)
    plan = public.plan(file, choices)
    check_followed(file, public.title, plan, choices)
    check_names(file, public.title, plan)
    tokenizer = build_tokenizer(plan.model, plan.quantizer, file.source)
    copy_weights(tokenizer, file, public.title, plan)
    if choices.channels not in (None, tokenizer.encoder.channels):
        tokenizer, plan = change_channels(tokenizer, file.source, plan, choices.channels)
    return Imported(public.title, tokenizer.eval(), plan)


def change_channels(
    tokenizer: Tokenizer, source: str, plan: Plan, channels: int
) -> tuple[Tokenizer, Plan]:
    """A tokenizer and its plan for images of another number of channels, with a remark.

    Raises InputError if its networks have no such setting.
    """
    before, model = tokenizer.encoder.channels, deepcopy(plan.model)
    for part in ("encoder", "decoder"):
        if "channels" not in model[part]:
            raise InputError(
                f"data.channels={channels}, and {source} is for images of {before}, which its {part} can't change; "
                f"use data.channels={before}"
            )
        model[part]["channels"] = channels
    changed = build_tokenizer(model, plan.quantizer, source)
    changed.load_state_dict(fold_image_layers(tokenizer, changed))
    remark = (
        f"{describe_new_layers(source, before, channels)}; data.channels={before} keeps its own"
    )
    return changed, replace(plan, model=model, remarks=(*plan.remarks, remark))


def list_formats() -> list[Format]:
    """One of each Format in the files of this package, in the order of their titles."""
    kinds: set[type[Format]] = set()
    for module in pkgutil.iter_modules(vqgan.formats.__path__, f"{vqgan.formats.__name__}."):
        members = vars(import_module(module.name)).values()
        kinds |= {kind for kind in members if isinstance(kind, type) and issubclass(kind, Format)}
    return sorted(
        (kind() for kind in kinds if not isabstract(kind)), key=lambda public: public.title
    )


def choose_format(file: PublicFile) -> Format:
    """The one format that recognises a file. Raises InputError if there is none, or more than one."""
    refuse_known(file)
    formats = list_formats()
    fitting = [public for public in formats if public.recognises(file)]
    if not fitting:
        raise InputError(
            f"{file.source} is no tokenizer of a known format: its {len(file.tensors):,} weights are called "
            f"{list_some(file.tensors)}; known are {', '.join(public.title for public in formats)}"
        )
    if len(fitting) > 1:
        titles = " and as ".join(public.title for public in fitting)
        raise InputError(
            f"{file.source} reads as {titles}; name the config file that it was trained with: config=<file>"
        )
    return fitting[0]


def check_followed(file: PublicFile, title: str, plan: Plan, choices: Choices) -> None:
    """Raise InputError if a plan has no place for one of the command's choices, which would have no effect."""
    quantizer = plan.quantizer
    is_plain = quantizer["_target_"].endswith(".VQ")  # it knows one rule alone, the nearest code
    outcomes = {
        "quantizer.cosine": (choices.cosine, bool(quantizer.get("cosine", False))),
        "quantizer.score": (choices.score, quantizer.get("score", "nearest" if is_plain else None)),
        "pixels": (choices.pixels, tuple(plan.model.get("pixels", (-1, 1)))),
        "quantizer.scales": (choices.scales, tuple(quantizer.get("scales") or ())),
        "head_width": (choices.head_width, plan.model.get("head_width")),
    }
    for setting, (choice, outcome) in outcomes.items():
        if choice not in (None, outcome):
            word = format_range(choice) if setting == "pixels" else str(choice)
            word = word.lower() if isinstance(choice, bool) else word
            raise InputError(
                f"{setting}={word} does not fit {file.source}, {title}, which has no such choice; leave it out"
            )


def format_range(pixels: Any) -> str:
    """A range as a command has it: [0,1]."""
    return f"[{pixels[0]:g},{pixels[1]:g}]"


def check_names(file: PublicFile, title: str, plan: Plan) -> None:
    """Raise InputError unless the names in a file are those that its plan takes, and those that it leaves out."""
    public_names = list(plan.names.values())
    taken = set(public_names)
    whole = {public for own, public in plan.names.items() if own not in plan.transforms}
    repeated = {public for public, n in Counter(public_names).items() if n > 1}
    assert not repeated & whole, "a plan takes each weight once"
    stray = file.tensors.keys() - taken - plan.statistics
    missing = taken - file.tensors.keys()
    raise_faults(file, title, {"lacks": missing, "has besides": stray})


@torch.no_grad()
def copy_weights(tokenizer: Tokenizer, file: PublicFile, title: str, plan: Plan) -> None:
    """Copy every weight of a file to its place in a new tokenizer, one at a time.

    Raises InputError for weights of another shape, and for those that are no finite numbers.
    """
    places = tokenizer.state_dict()  # shares memory with the tokenizer
    unnamed = {name for name, _ in tokenizer.named_parameters()} - plan.names.keys()
    assert not unnamed, f"the plan of {title} leaves out {list_some(unnamed)}"
    misfits: list[str] = []
    broken: list[str] = []
    for name, public_name in plan.names.items():
        value, place = file.tensors[public_name], places[name]
        try:
            value = plan.transforms.get(name, pass_through)(value)
        except (RuntimeError, IndexError):  # torch's, of a shape that the transform can't take
            misfits.append(f"{public_name} {list(value.shape)}")
            continue
        if squeeze_shape(value) != squeeze_shape(place):
            misfits.append(f"{public_name} {list(value.shape)} for {list(place.shape)}")
        elif not value.is_floating_point():
            misfits.append(f"{public_name} of {str(value.dtype).removeprefix('torch.')}")
        elif not value.isfinite().all():
            broken.append(public_name)
        else:
            place.copy_(value.reshape(place.shape))
    raise_faults(
        file, title, {"has weights of other shapes": misfits, "has NaN or infinity in": broken}
    )


def pass_through(value: Tensor) -> Tensor:
    """The transform of a weight that needs none."""
    return value


def squeeze_shape(value: Tensor) -> list[int]:
    """The shape without axes of length 1: a linear layer's weights are those of a 1x1 convolution."""
    return [length for length in value.shape if length != 1]


def raise_faults(file: PublicFile, title: str, faults: Mapping[str, Iterable[str]]) -> None:
    """Raise InputError with a few names of each kind of fault, if there are any."""
    listed = {what: sorted(names) for what, names in faults.items() if names}
    if not listed:
        return
    each = MAX_NAMED // len(listed)
    texts = [f"{what} {list_some(names, each)}" for what, names in listed.items()]
    raise InputError(
        f"{file.source} looks like {title}, but {' and '.join(texts)}; nothing is imported"
    )


def list_some(names: Iterable[str], most: int = MAX_NAMED) -> str:
    """At most so many of these names, in their order, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return f"{', '.join(listed[:most])}{more}"
