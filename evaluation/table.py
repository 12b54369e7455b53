"""An evaluation as a table for the terminal."""

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import InputError
from evaluation.scores import MEANING, EvaluationResult, score_difference


def format_table(
    result: EvaluationResult, names: list[str], other: Mapping[str, Any] | None = None
) -> str:
    """What was judged on what; one aligned line a score: its value, and beside another evaluation that one's and the
    difference; in whose features, and what is absent and why."""
    size = next((told["size"] for told in result["provenance"].values()), None)
    pixels = f", {size[1]}x{size[2]} pixels" if size else ""
    codes = f"K {result['K']:,}, grid" if result.get("K") else "grid"
    lines = [f"{'judged':24}{result['ckpt']}, {codes} {'x'.join(map(str, result['grid']))}"]
    lines.append(f"{'images':24}{result['n']:,} of {result['split']}{pixels}")
    if result.get("samples"):
        lines.append(f"{'samples':24}{result['samples']:,}")
    if other is not None:
        lines.append(f"{'':24}{'this':>10} {'that':>10} {'change':>10}")
    seen: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for name in names:
        if result[name] is None:
            absent.setdefault(result["absent"][name], []).append(name)
            continue
        if by := result["provenance"][name].get("extractor"):
            seen.setdefault(by, []).append(name)
        said = next(
            (text for key, text in MEANING.items() if name == key or name.startswith(f"{key}_")), ""
        )
        if other is not None:
            try:
                change = score_difference(name, result, other)
                said = f"{format_number(other[name]):>9} {change:>+10.3g}  {said}"
            except InputError as error:
                said = f"not compared: {error}"
        lines.append(f"{name:24}{format_number(result[name]):>10}  {said}".rstrip())
    lines += [f"{'features':24}{', '.join(scores)}: {by}" for by, scores in seen.items()]
    lines += [f"{'absent':24}{', '.join(scores)}: {reason}" for reason, scores in absent.items()]
    return "\n".join(lines)


def format_number(value: float) -> str:
    """A figure for a person to read: all of a whole number, else at least four digits that count."""
    if not math.isfinite(value) or value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def nearest_codecs(
    codecs: list[dict[str, Any]], bits: float | None
) -> list[tuple[str, dict[str, Any]]]:
    """Of the codecs, each with its name for a person to read, those of as many bits as the tokenizer, and JPEG with the next
    fewer and the next more; all of them beside a tokenizer without bits."""
    named = []
    for codec in codecs:
        settings = codec["settings"]
        of_jpeg = f"JPEG, quality {settings.get('quality')}"
        named.append((of_jpeg if codec["codec"] == "JPEG" else codec["codec"], codec))
    if bits is None:
        return named
    below = [
        pair for pair in named if pair[1]["codec"] == "JPEG" and pair[1]["bits_per_image"] <= bits
    ]
    above = [
        pair for pair in named if pair[1]["codec"] == "JPEG" and pair[1]["bits_per_image"] > bits
    ]
    return [*(pair for pair in named if pair[1]["codec"] != "JPEG"), *below[-1:], *above[:1]]
