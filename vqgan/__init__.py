"""Stage 1: the tokenizer, its quantizers and losses, and the module that trains it.

from vqgan import Tokenizer, train

run = train("stage=vqgan", "quantizer.K=512")
tokenizer = Tokenizer.from_pretrained(run.folder)
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Tokenizer", "train"]

if TYPE_CHECKING:
    from codegrid.engine.calls import train as train
    from vqgan.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    """Imports torch when the tokenizer is asked for, and Hydra for a run, not with every file of this package."""
    if name == "Tokenizer":
        from vqgan.tokenizer import Tokenizer

        return Tokenizer
    if name == "train":
        from codegrid.engine.calls import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
