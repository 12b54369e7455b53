"""An evaluation as a table for the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from codegrid.engine.errors import InputError
from codegrid.evaluation.scores import (
    CURVE_SCORES,
    EvaluationResult,
    find_score,
    name_channels,
    refer_to,
    score_difference,
)


def format_table(
    result: EvaluationResult, names: list[str], other: Mapping[str, Any] | None = None
) -> str:
    """What was evaluated on what, one aligned line per score, and which scores are absent and why.

    A line has the score's value and its meaning; compared to an `other` evaluation, also that one's value and the change.
    """
    lines = describe_subject(result)
    if other is not None:
        lines.append(f"{'':24}{'this':>10} {'that':>10} {'change':>10}")
    by_extractor: dict[str, list[str]] = {}
    by_reason: dict[str, list[str]] = {}
    for name in names:
        if result[name] is None:
            by_reason.setdefault(result["absent"][name], []).append(name)
            continue
        about = result["provenance"][name]
        if "extractor" in about:
            by_extractor.setdefault(describe_extractor(about), []).append(name)
        score = find_score(name)
        remark = refer_to(score, about).summary if score else ""
        if ends := result.get("intervals", {}).get(name):
            remark = f"95% in {format_number(ends[0])} to {format_number(ends[1])}; {remark}"
        if other is not None:
            remark = compare_score(name, result, other, remark)
        lines.append(f"{name:24}{format_number(result[name]):>10}  {remark}".rstrip())
    lines += [f"{'features':24}{', '.join(by_extractor[key])}: {key}" for key in by_extractor]
    lines += [f"{'absent':24}{', '.join(by_reason[key])}: {key}" for key in by_reason]
    return "\n".join(lines)


def describe_extractor(about: Mapping[str, Any]) -> str:
    """The network of a provenance, and which channels of the images it sees, if these are not all."""
    channels = about.get("channels")
    return about["extractor"] + (f", of {name_channels(channels)}" if channels else "")


def describe_subject(result: EvaluationResult) -> list[str]:
    """The lines on the model, the images and the samples."""
    if result.get("of_stage") == "samples":
        return describe_file(result)
    size = next((about["size"] for about in result["provenance"].values()), None)
    pixels = f", {size[1]}x{size[2]} pixels" if size else ""
    if size and size[0] not in (1, 3):
        pixels += f" of {size[0]} channels"
    codes = f"K {result['K']:,}, grid" if result.get("K") else "grid"
    lines = [f"{'evaluated':24}{result['ckpt']}, {codes} {'x'.join(map(str, result['grid']))}"]
    lines.append(f"{'images':24}{result['n']:,} of {result['split']}{pixels}")
    if result.get("samples"):
        lines.append(f"{'samples':24}{result['samples']:,}")
    if result.get("reference"):
        lines.append(f"{'reference':24}{result['reference']}")
    return lines


def describe_file(result: EvaluationResult) -> list[str]:
    """The lines on samples in a file, and on what they are compared with."""
    size = "x".join(map(str, result["size"][1:]))
    lines = [f"{'evaluated':24}{result['file']}, {result['samples']:,} images of {size} pixels"]
    if result.get("ckpt"):
        lines.append(f"{'images':24}{result['split']} of {result['ckpt']}")
    if result.get("reference"):
        lines.append(f"{'reference':24}{result['reference']}")
    return lines


def compare_score(name: str, result: EvaluationResult, other: EvaluationResult, remark: str) -> str:
    """The other evaluation's value, the change and the remark; or why the two can't be compared."""
    try:
        change = score_difference(name, result, other)
    except InputError as error:
        return f"not compared: {error}"
    return f"{format_number(other[name]):>9} {change:>+10.3g}  {remark}"


def format_number(value: float) -> str:
    """Whole numbers in full, others with at least four significant digits."""
    if not math.isfinite(value) or value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def nearest_codecs(
    codecs: list[dict[str, Any]], bits: float | None
) -> list[tuple[str, dict[str, Any]]]:
    """The codecs to compare a tokenizer of `bits` bits per image to, each with its name for the terminal.

    These are all but JPEG, which have as many bits as the tokenizer, and the JPEG qualities with the next fewer and the next
    more bits. Without `bits` (a continuous tokenizer) all codecs are returned.
    """
    named: list[tuple[str, dict[str, Any]]] = []
    jpegs: list[tuple[str, dict[str, Any]]] = []
    for codec in codecs:
        is_jpeg = codec["codec"] == "JPEG"
        name = f"JPEG, quality {codec['settings'].get('quality')}" if is_jpeg else codec["codec"]
        (jpegs if is_jpeg and bits is not None else named).append((name, codec))
    if bits is None:
        return named
    below = [pair for pair in jpegs if pair[1]["bits_per_image"] <= bits]
    above = [pair for pair in jpegs if pair[1]["bits_per_image"] > bits]
    return [*named, *below[-1:], *above[:1]]


def format_codecs(
    codecs: list[dict[str, Any]], bits: float | None, absent: Mapping[str, str]
) -> str:
    """A line for each of the nearest codecs, its PSNR and its bits, and one for each that is absent."""
    lines = [
        f"{name:24}{format_number(codec['psnr']):>10}  dB with {format_number(codec['bits_per_image'])} bits"
        for name, codec in nearest_codecs(codecs, bits)
    ]
    return "\n".join([*lines, *(f"{'absent':24}{name}: {why}" for name, why in absent.items())])


def format_rates(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rate-distortion curve of a run, a line for each rate below a line of heads; empty without a curve."""
    if not rows:
        return ""
    names = ["bits_per_image", *(name for name in rows[-1] if name in CURVE_SCORES)]
    lines = [f"{'first codes of':24}" + " ".join(f"{name:>14}" for name in names)]
    for row in rows:
        values = [format_number(row[name]) if name in row else "-" for name in names]
        codes = f"{row['codes']:,} of {rows[-1]['codes']:,}"
        lines.append(f"{codes:24}" + " ".join(f"{value:>14}" for value in values))
    return "\n".join(lines)
