"""Which tensors of a file are the tokenizer's, under whatever prefix, and what the others are."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codegrid.engine.errors import InputError
from vqgan.formats.weights import SafeStored, Stored, Weight

AVERAGED = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)")  # model_ema, ema, state_dict_ema
AVERAGES = "averages of other parts"

# What a name beside the tokenizer's belongs to, by how it begins; the first that fits.
PART_KINDS = {
    "discriminator": r"(loss\.)?(discriminator|disc)\d*\.",
    "perceptual loss": r"(loss\.)?(perceptual_loss|lpips|percep_loss|vgg)\.",
    "loss": r"loss\.|lossfn\.|loss_fn\.",
    AVERAGES: r"(model_)?ema(_\w+)?\.|n_averaged$",
    "conditioning model": r"cond_stage_model\.",
    "U-Net": r"model\.diffusion_model\.|unet\.",
    "transformer": r"transformer\.|permuter\.",
    "noise schedule": (
        r"((log_)?(one_minus_|sqrt_|recip_|recipm1_)*(alphas|betas)\w*|posterior_\w+|log_one_minus\w*|lvlb_weights|logvar|scale_factor)$"
    ),
}
TOP_KINDS = {
    "optimizer": r"optim|opt_|opt$",
    "discriminator": r"disc",
    "learning rate": r"sched",
    AVERAGES: AVERAGED.pattern,
}


@dataclass
class Parts:
    """The weights of a tokenizer by the names of its own code, the averages of them by the same names, and what else there
    is: kind -> number of tensors.

    Without an encoder and a decoder, `weights` are those of whatever the file holds.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    averaged: dict[str, Weight] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def is_autoencoder(self) -> bool:
        return bool(find_roots(self.weights) or find_roots(self.averaged))


def split_content(content: Any, file: Path) -> Parts:
    """The parts of what a file holds: a state dict, or a trainer's checkpoint with one.

    Raises InputError if it holds no tensors, or more than one tokenizer.
    """
    states = list_states(content)
    if not states:
        raise InputError(f"{file} holds no weights: no dictionary of names and tensors")
    if "current_model_state" in states:  # Lightning's WeightAveraging has put the averages first
        states = {
            "state_dict_ema": states["state_dict"],
            "state_dict": states["current_model_state"],
        } | {
            key: state
            for key, state in states.items()
            if key not in ("state_dict", "current_model_state")
        }
    last = [key for key in states if find_roots(states[key]) and not AVERAGED.search(key)]
    averaged = [key for key in states if find_roots(states[key]) and AVERAGED.search(key)]
    if len(last) > 1 or len(averaged) > 1:
        keys = last if len(last) > 1 else averaged
        raise InputError(
            f"{file} holds {len(keys)} sets of weights ({', '.join(keys[:10])}); save the one you want alone in another file"
        )
    if not last and not averaged:
        last = [min(states, key=lambda key: (key not in ("", "state_dict", "model"), key))]
    parts = split_state(states[last[0]], file) if last else Parts()
    if averaged:
        average = split_state(states[averaged[0]], file)
        parts.averaged = average.weights or average.averaged
        parts.others += average.others
    for key, state in states.items():
        if key not in (*last, *averaged):
            parts.others[name_kind(key, TOP_KINDS) or key] += len(state)
    if isinstance(content, Mapping) and "" not in states:
        for key, value in content.items():
            if key not in states and (count := count_tensors(value)):
                parts.others[name_kind(str(key), TOP_KINDS) or str(key)] += count
    return parts


def list_states(content: Any) -> dict[str, dict[str, Weight]]:
    """The dictionaries of tensors in a file by the key that each has there, "" for the file's own."""
    if not isinstance(content, Mapping):
        return {}
    states = {key: take_weights(value) for key, value in content.items() if isinstance(key, str)}
    states[""] = take_weights(content)
    return {key: state for key, state in states.items() if state}


def take_weights(value: Any) -> dict[str, Weight]:
    """The tensors with names in a dictionary; none in anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {
        name: weight
        for name, weight in value.items()
        if isinstance(name, str) and isinstance(weight, Stored | SafeStored)
    }


def find_roots(names: Iterable[str]) -> list[str]:
    """The prefixes under which there is an encoder and a decoder, "" or such as first_stage_model."""
    sides: dict[str, set[str]] = {"encoder": set(), "decoder": set()}
    for name in names:
        path = name.split(".")[:-1]
        for i, word in enumerate(path):
            if word in sides:
                sides[word].add("".join(f"{outer}." for outer in path[:i]))
    shared = sides["encoder"] & sides["decoder"]
    inner = {
        root
        for root in shared
        if name_kind(root, PART_KINDS) not in (None, AVERAGES)
        or any(root.startswith((f"{outer}encoder.", f"{outer}decoder.")) for outer in shared)
    }
    return sorted(shared - inner)


def split_state(state: Mapping[str, Weight], file: Path) -> Parts:
    """The parts of one state dict."""
    roots = find_roots(state)
    last = [root for root in roots if not AVERAGED.search(root)]
    averaged = [root for root in roots if AVERAGED.search(root)]
    if any("first_stage_model." in root for root in last):  # beside another inside the condition's
        last = [root for root in last if "first_stage_model." in root]
    if len(last) > 1 or len(averaged) > 1:
        prefixes = ", ".join(root or "none" for root in (last if len(last) > 1 else averaged)[:10])
        raise InputError(
            f"{file} holds several tokenizers, with the prefixes {prefixes}; save the one you want alone in another file"
        )
    if not roots:
        return Parts(dict(state))
    inside, outside = divide(state, last[0]) if last else ({}, dict(state))
    parts = Parts({name: w for name, w in inside.items() if name_kind(name, PART_KINDS) is None})
    if averaged:
        own, outside = divide(outside, averaged[0])
        parts.averaged = {name: w for name, w in own.items() if name_kind(name, PART_KINDS) is None}
    else:
        aliases = {name: find_average(name, inside) for name in parts.weights}
        parts.averaged = {name: inside[alias] for name, alias in aliases.items() if alias}
        inside = {name: w for name, w in inside.items() if name not in set(aliases.values())}
    for name in [*(inside.keys() - parts.weights.keys()), *outside]:
        parts.others[name_kind(name, PART_KINDS) or name.split(".")[0]] += 1
    return parts


def divide(state: Mapping[str, Weight], root: str) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """The weights under a prefix, without it, and the others."""
    inside = {name.removeprefix(root): w for name, w in state.items() if name.startswith(root)}
    return inside, {name: w for name, w in state.items() if not name.startswith(root)}


def find_average(name: str, state: Mapping[str, Weight]) -> str | None:
    """The name that the average of a weight has beside it.

    Latent diffusion's LitEma removes all dots (model_ema.encoderconv_inweight); MoVQGAN has one of them for each part
    (ema_encoder.conv_inweight).
    """
    part, _, rest = name.partition(".")
    aliases = (f"model_ema.{name.replace('.', '')}", f"ema_{part}.{rest.replace('.', '')}")
    return next((alias for alias in aliases if alias in state), None)


def name_kind(name: str, kinds: Mapping[str, str]) -> str | None:
    """What a name belongs to, by how it begins; None if nothing fits."""
    return next((kind for kind, pattern in kinds.items() if re.match(pattern, name)), None)


def count_tensors(value: Any) -> int:
    """How many tensors lie in containers in containers."""
    pending, visited, count = [value], set(), 0
    while pending:
        current = pending.pop()
        if isinstance(current, Stored | SafeStored):
            count += 1
        elif (
            isinstance(current, Mapping | list | tuple | set | frozenset)
            and id(current) not in visited
        ):
            visited.add(id(current))
            pending += [*current.values()] if isinstance(current, Mapping) else [*current]
    return count


def choose_average(
    parts: Parts, ema: bool | None, file: Path
) -> tuple[dict[str, Weight], str | None]:
    """The weights to take, the averaged ones or the last, and a remark where `ema` leaves that open; counts those that aren't
    taken among the others.

    Raises InputError for averages that are asked for and missing, and for those of half a tokenizer.
    """
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    missing = [
        name
        for name in parts.weights.keys() - parts.averaged.keys()
        if name.startswith(("encoder.", "decoder.")) and not name.endswith(buffers)
    ]
    if not parts.averaged:
        if ema:
            raise InputError(
                f"ema=true, and {file} has no averaged weights of its tokenizer; leave ema out"
            )
        return parts.weights, None
    if ema is False:
        if not parts.weights:
            raise InputError(f"ema=false, and {file} has only averaged weights; leave ema out")
        parts.others["averaged weights"] += len(parts.averaged)
        return parts.weights, None
    if missing:
        names = ", ".join(sorted(missing)[:10])
        raise InputError(
            f"{file} has averaged weights, but {len(missing)} of the tokenizer are missing among them ({names}); use ema=false"
        )
    if not parts.weights:
        return parts.averaged, "it has averaged weights only"
    parts.others["last weights"] += len(parts.averaged)
    remark = "its averaged weights are taken; ema=false takes the last ones"
    return {**parts.weights, **parts.averaged}, None if ema else remark
