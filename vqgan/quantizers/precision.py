"""Float32 under any precision setting."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def float32(function: Function) -> Function:
    """Decorator that disables autocast inside the function. In bf16, 3-6% of the nearest codes differ."""
    for device_type in ("cpu", "cuda"):
        function = torch.autocast(device_type, enabled=False)(function)
    return function
