"""What is computed in fewer than 32 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOW = (torch.bfloat16, torch.float16)
MOVES = {  # operations that compute nothing: views, copies and casts
    "_to_copy", "alias", "as_strided", "cat", "clone", "copy_", "detach", "detach_", "empty_like", "expand", "index", "lift_fresh",
    "permute", "select", "slice", "split", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
    "zeros_like", "new_zeros", "_reshape_alias", "select_backward", "slice_backward", "split_with_sizes", "reshape",
}  # fmt: skip


class LowPrecision(TorchDispatchMode):
    """Collects, in `operations`, what computes a floating-point number of fewer than 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name not in MOVES and any(x.dtype in LOW for x in outputs):
            self.operations.add(name)
        return result


def computed_low(function: Callable[..., Any], *args: Any) -> set[str]:
    """The operations of a call under bfloat16 autocast that compute in fewer than 32 bits."""
    with torch.autocast("cpu", torch.bfloat16), LowPrecision() as low:
        function(*args)
    return low.operations
