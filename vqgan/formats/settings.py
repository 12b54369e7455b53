"""The config of a public tokenizer: the one among several that is of these weights, by what it says of their sizes."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from codegrid.engine.errors import InputError, summarize_error
from vqgan.formats.pickles import Inert
from vqgan.formats.weights import Weight

CONFIG_ENDINGS = (".yaml", ".yml", ".json")
MAX_CONFIG = 1_000_000  # bytes; codes and tables of words are .json too

# Words for the same size in the configs of the different programs.
SIZE_WORDS = {
    "codes": ("n_embed", "num_vq_embeddings", "codebook_size", "num_embeddings", "vocab_size"),
    "width of codes": (
        "embed_dim", "vq_embed_dim", "codebook_embed_dim", "quantized_embed_dim", "token_size",
    ),
    "latent channels": ("z_channels", "latent_channels"),
    "first width": ("ch", "hidden_channels", "block_out_channels"),
    "levels": ("ch_mult", "channel_mult", "encoder_ch_mult", "block_out_channels"),
    "blocks a level": ("num_res_blocks", "layers_per_block"),
}  # fmt: skip
CODEBOOKS = ("quantize.embedding.weight", "quantize.embed.weight", "quantize.embedding")
LEVEL = re.compile(r"encoder\.(?:down|down_blocks|conv_blocks)\.(\d+)\.")
BLOCK = re.compile(LEVEL.pattern + r"(?:block|resnets|res)\.(\d+)\.")
CLASS_KEYS = (("target", "params"), ("class_path", "init_args"))  # taming's; Lightning's
# Under these keys are other models, or parts of the tokenizer: VQ-Diffusion's names the class of each of its networks.
OTHER_MODELS = (
    "cond_stage_config",
    "decoder_config",
    "encoder_config",
    "lossconfig",
    "transformer_config",
    "unet_config",
)
OWN_SETTINGS = (
    "hyper_parameters",
    "hparams",
    "args",
    "config",
)  # where a checkpoint keeps those of its run


@dataclass(frozen=True)
class Description:
    """What a config says of one model.

    source          the file, for messages
    target          the class that it names; None if it names none
    settings        that class's settings, plain containers
    agreements      how many sizes of the weights it has right
    contradictions  those that it has wrong, in words
    """

    source: str
    target: str | None
    settings: dict[str, Any]
    agreements: int = 0
    contradictions: tuple[str, ...] = field(default=(), compare=False)

    @property
    def fits(self) -> bool:
        """Whether it is of these weights; a prior's config agrees in one size."""
        return not self.contradictions and self.agreements >= 2


def choose_config(
    weights: Mapping[str, Weight],
    beside: Iterable[Path],
    content: Any,
    config: str | None,
    file: str,
) -> tuple[Description | None, str | None]:
    """What the config says that is of these weights, and a remark if those beside them aren't used.

    `config` is the user's choice, and without it one of the files `beside` the weights, or what the checkpoint itself holds.
    Raises InputError if the chosen one doesn't fit, or if several do.
    """
    sizes = measure(weights)
    if config is not None:
        return choose_described(
            read_config(Path(str(config)).expanduser(), f"config={config}"), sizes, config, file
        ), None
    described = [
        compare_sizes(description, sizes)
        for path in beside
        for description in list_models(read_quietly(path), str(path))
    ]
    own = [compare_sizes(description, sizes) for description in list_own(content, file)]
    for group in (described, own):
        fitting = distinct([description for description in group if description.fits])
        if len(fitting) > 1:
            raise InputError(explain_several(fitting, file))
        if fitting:
            return fitting[0], None
    unknown = [description for description in described if description.target]
    if len(unknown) == 1 and not unknown[0].contradictions:  # it has no size that is known here
        return unknown[0], None
    wrong = [description for description in described if description.contradictions]
    if not wrong:
        return None, None
    nearest = max(wrong, key=lambda description: description.agreements)
    return (
        None,
        f"{nearest.source} is not used, for it is of other weights: {nearest.contradictions[0]}",
    )


def explain_several(fitting: Sequence[Description], file: str) -> str:
    """The sentence for descriptions that fit the same weights."""
    sources = list(dict.fromkeys(description.source for description in fitting))
    if len(sources) == 1:
        classes = ", ".join(str(description.target) for description in fitting[:10])
        return (
            f"{sources[0]} describes {len(fitting)} models that fit {file} ({classes}); copy the part of its tokenizer into "
            "another file and name that: config=<file>"
        )
    names = " and ".join(sources[:10])
    return f"{names} fit {file} and differ; name the one that it was trained with: config=<file>"


def choose_described(
    content: Any, sizes: Mapping[str, set[int]], config: str, file: str
) -> Description:
    """The model in a config that the user names. Raises InputError if it is of other weights."""
    described = [compare_sizes(each, sizes) for each in list_models(content, config)]
    if not described:
        raise InputError(f"config={config} describes no model; leave config out if {file} has none")
    sound = [description for description in described if not description.contradictions]
    if not sound:
        nearest = max(described, key=lambda description: description.agreements)
        raise InputError(f"config={config} is not of {file}: {nearest.contradictions[0]}")
    best = max(description.agreements for description in sound)
    chosen = distinct([description for description in sound if description.agreements == best])
    if len(chosen) > 1:
        raise InputError(explain_several(chosen, file))
    return chosen[0]


def distinct(descriptions: Iterable[Description]) -> list[Description]:
    """Those that say different things."""
    chosen: list[Description] = []
    for description in descriptions:
        content = description.target, description.settings
        if content not in [(each.target, each.settings) for each in chosen]:
            chosen.append(description)
    return chosen


def read_config(file: Path, name: str) -> Any:
    """The content of a .yaml or .json file. Raises InputError, with this beginning, if it is none."""
    try:
        text = file.read_text()
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{name} can't be read as a config ({summarize_error(error)})") from error


def read_quietly(file: Path) -> Any:
    """The content of a config that lies beside the weights; None for what is no config."""
    if file.stat().st_size > MAX_CONFIG:
        return None
    try:
        return read_config(file, str(file))
    except InputError:  # a file of something else, which nobody asked for
        return None


def list_models(content: Any, source: str) -> list[Description]:
    """What a config says of each model that it names the class of, at any depth; or all of it, without a class."""
    named = [
        Description(source, target, dict(settings))
        for node in list_nodes(content)
        for target, settings in find_classes(node)
    ]
    if not named and isinstance(content, Mapping) and content:
        return [Description(source, None, dict(content))]
    return named


def find_classes(node: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The class that a dictionary names, and its settings."""
    for name, settings in CLASS_KEYS:
        if isinstance(node.get(name), str) and isinstance(node.get(settings), Mapping):
            yield node[name], node[settings]
    if isinstance(node.get("_class_name"), str):  # diffusers
        yield node["_class_name"], node


def list_nodes(content: Any, skipped: Iterable[str] = OTHER_MODELS) -> Iterator[Mapping[Any, Any]]:
    """The dictionaries in nested containers, outer ones first, without those under the skipped keys."""
    pending, visited = [content], set()
    while pending:
        node = pending.pop(0)
        if id(node) in visited:
            continue
        visited.add(id(node))  # YAML's aliases can repeat a node without end
        if isinstance(node, Mapping):
            yield node
            pending += [value for key, value in node.items() if key not in skipped]
        elif isinstance(node, list | tuple):
            pending += node


def list_own(content: Any, file: str) -> Iterator[Description]:
    """What a checkpoint says of its own run, where that is plain."""
    if isinstance(content, Mapping):
        for key in OWN_SETTINGS:
            value = content.get(key)
            plain = take_plain(value.state if isinstance(value, Inert) else value)
            if isinstance(plain, dict) and plain:
                yield from list_models(plain, f"{key} in {file}")


def take_plain(value: Any, depth: int = 8) -> Any:
    """Plain containers, strings and numbers as they are; None for everything else, and for what is nested deeper."""
    if isinstance(value, Inert) or depth == 0:
        return None
    if isinstance(value, Mapping):
        return {
            key: take_plain(each, depth - 1) for key, each in value.items() if isinstance(key, str)
        }
    if type(value) in (list, tuple):
        return [take_plain(each, depth - 1) for each in value]
    return value if isinstance(value, str | int | float | bool) else None


def measure(weights: Mapping[str, Weight]) -> dict[str, set[int]]:
    """The sizes that can be read off the weights, each with the numbers that a config may give for it."""
    sizes: dict[str, set[int]] = {}
    shapes = {name: weight.shape for name, weight in weights.items()}
    codebook = next((shapes[name] for name in CODEBOOKS if len(shapes.get(name, ())) == 2), None)
    latents = shapes.get("decoder.conv_in.weight", ())
    if codebook:
        sizes["codes"], sizes["width of codes"] = {codebook[0]}, {codebook[1]}
    elif len(latents) == 4 and latents[1] < 32:  # a code is made of signs
        sizes["codes"], sizes["width of codes"] = {2 ** latents[1]}, {latents[1]}
    if shape := shapes.get("encoder.conv_out.weight"):
        sizes["latent channels"] = {shape[0]} | ({shape[0] // 2} if shape[0] % 2 == 0 else set())
    if shape := shapes.get("encoder.conv_in.weight"):
        sizes["first width"] = {shape[0]}
    for word, pattern in (("levels", LEVEL), ("blocks a level", BLOCK)):
        numbers = [
            int(match[match.lastindex or 0]) for name in weights if (match := pattern.match(name))
        ]
        if numbers:
            sizes[word] = {max(numbers) + 1}
    return sizes


def compare_sizes(description: Description, sizes: Mapping[str, set[int]]) -> Description:
    """A description with how it agrees with these sizes."""
    words: dict[str, Any] = {}
    inner = (*OTHER_MODELS, "first_stage_config")
    for node in list_nodes(description.settings, inner):
        words |= {key: value for key, value in node.items() if key not in words}
    agreements, contradictions = 0, []
    for what, numbers in sizes.items():
        for word in SIZE_WORDS[what]:
            value = words.get(word)
            if isinstance(value, list | tuple) and what in ("first width", "levels"):
                value = (value[0] if value else None) if what == "first width" else len(value)
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            if value in numbers:
                agreements += 1
            else:
                has = " or ".join(str(number) for number in sorted(numbers, reverse=True))
                contradictions.append(f"{what}: {value} there ({word}), {has} in the weights")
    return Description(
        description.source,
        description.target,
        description.settings,
        agreements,
        tuple(contradictions),
    )
