"""Stage 1: the tokenizer, its quantizers and losses, and the module that trains it.

from vqgan import Tokenizer

tokenizer = Tokenizer.from_pretrained("runs/import/taming")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqgan.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    """Imports torch when the tokenizer is asked for, not with every file of this package."""
    if name == "Tokenizer":
        from vqgan.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
