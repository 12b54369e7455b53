"""What an import leaves in its run folder: a checkpoint as of stage=vqgan, and where the weights come from."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.console import log_line
from codegrid.engine.folder import LAST
from codegrid.engine.program import PROGRAM
from codegrid.engine.sizes import write_size
from codegrid.engine.words import format_word
from vqgan.formats.files import Contents
from vqgan.formats.load import Imported
from vqgan.formats.preview import Preview
from vqgan.tokenizer import Tokenizer


def save_imported(tokenizer: Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Write the checkpoint of a run: to later stages it is one of stage=vqgan."""
    header = make_header("vqgan", config)
    state = {f"tokenizer.{name}": value.cpu() for name, value in tokenizer.state_dict().items()}
    save_atomically({"codegrid": header, "state_dict": state}, folder / LAST)


def describe_import(contents: Contents, imported: Imported, preview: Preview) -> dict[str, Any]:
    """What metrics.json and the card say of an import. The scores of a few images are named apart from those of a split."""
    tokenizer, quantizer = imported.tokenizer, imported.tokenizer.quantizer
    h, w = tokenizer.grid
    size = tokenizer.encoder.image_size
    codes = f"{h}x{w} for images of {write_size(size)} pixels, {quantizer.bits:.4g} bits each"
    if quantizer.lengths:
        number = f"{sum(quantizer.lengths)} in {len(quantizer.lengths)} scales up to {h}x{w}"
        codes = f"{number} for images of {write_size(size)} pixels, {math.log2(quantizer.K or 1):.4g} bits each"
    ignored = [f"{what} ({n:,} tensors)" for what, n in contents.ignored.items()]
    return {
        "format": imported.title,
        "origin": contents.origin,
        "sha256": contents.sha256,
        "licence": contents.licence,
        "code_grid": codes,
        "left_out": ", ".join(ignored),
        "remarks": [*contents.remarks, *imported.plan.remarks, *preview.remarks],
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "K": tokenizer.K,
        "grid": [h, w],
        **{f"shown_{name}": value for name, value in preview.scores.items()},
    }


def report_import(about: Mapping[str, Any], folder: Path) -> None:
    """Print what was imported, what was left out and assumed, and the commands that come next."""
    lines = [f"{about['format']}: {about['parameters']:,} weights; codes: {about['code_grid']}"]
    if about["left_out"]:
        lines.append(f"left out: {about['left_out']}")
    lines += [f"licence of the weights: {about['licence']}", *about["remarks"]]
    if "shown_psnr" in about:
        lines.append(f"PSNR of the images in its picture: {about['shown_psnr']:.2f} dB")
    ckpt = format_word("ckpt", folder)
    lines.append(f"next: {PROGRAM} stage=evaluate {ckpt}, or stage=prior {ckpt}")
    for line in lines:
        log_line(line)
