"""The formats of a tokenizer, each with its prior in the same one, and the run that both come from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from codegrid.engine.checkpoint import find_checkpoint, read_checkpoint
from codegrid.engine.errors import InputError
from prior.export.base import PriorFormat
from prior.export.programs import ONNXPrior, PT2Prior
from prior.export.safetensors import SafetensorsPrior
from prior.load import TOKENIZER_COPY
from prior.prior import Prior
from vqgan.export.base import Example, Exporter
from vqgan.export.origin import Origin
from vqgan.tokenizer import Tokenizer

PRIOR_FORMATS = {part.name: part for part in (SafetensorsPrior(), ONNXPrior(), PT2Prior())}


class WithPrior(Exporter):
    """A tokenizer's format, and its prior in the same one."""

    def __init__(self, exporter: Exporter, part: PriorFormat, trained: Prior) -> None:
        self.name, self.is_read_back = exporter.name, exporter.is_read_back
        self.usage = f"{exporter.usage}\n\n{part.describe_use(trained)}"
        self.exporter, self.part, self.trained = exporter, part, trained

    def check(self, tokenizer: Tokenizer) -> None:
        self.exporter.check(tokenizer)

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        return {
            **self.exporter.encode_files(tokenizer),
            **self.part.encode_files(self.trained),
        }

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        return self.exporter.describe(tokenizer)

    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        figures = self.exporter.verify(tokenizer, folder, examples)
        of_prior = self.part.verify(self.trained, folder)
        return figures | {f"prior_{name}": value for name, value in of_prior.items()}


def join_prior(exporters: Sequence[Exporter], trained: Prior) -> list[Exporter]:
    """Exporters of a tokenizer and its prior. Raises InputError for a format that doesn't have this prior."""
    if trained.condition is not None and not trained.condition.is_exportable:
        raise InputError(
            f"a prior that reads {trained.condition.summarize()} needs the tokenizer of these images too, and an export has one; "
            "use the run folder, which has copies of both"
        )
    for exporter in exporters:
        if exporter.name not in PRIOR_FORMATS:
            raise InputError(
                f"format={exporter.name} is of tokenizers alone, and a prior can be {', '.join(PRIOR_FORMATS)}; give one of "
                "these, or export the tokenizer's own run"
            )
        PRIOR_FORMATS[exporter.name].check(trained)
    return [WithPrior(exporter, PRIOR_FORMATS[exporter.name], trained) for exporter in exporters]


def read_prior_origin(ckpt: str | Path, trained: Prior) -> Origin:
    """The run of a prior, with the settings of its tokenizer."""
    copied = find_checkpoint(ckpt).parent.parent / TOKENIZER_COPY
    of_tokenizer = read_checkpoint(copied, "vqgan")["codegrid"]["config"]
    model = trained.model
    weights = sum(p.numel() for p in model.parameters())
    classes = f" of {len(trained.classes)} classes" if trained.classes.names else ""
    return replace(
        Origin.read(ckpt, trained.config),
        config={**of_tokenizer, "id": trained.config.get("id")},
        stage="prior",
        summary=f"A prior ({type(model).__name__}, {weights:,} weights) draws codes of new images{classes}.",
    )
