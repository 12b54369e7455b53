"""Stage 2: priors over the code grids of a tokenizer, and sampling from them.

from prior import Prior

prior = Prior.from_pretrained("runs/prior/photos")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prior.prior import Prior as Prior


def __getattr__(name: str) -> Any:
    """Imports torch when the prior is asked for, not with every file of this package."""
    if name == "Prior":
        from prior.prior import Prior

        return Prior
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
