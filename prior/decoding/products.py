"""Products with weights that do not change: packed once for the processor."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from x (n, in) to x @ weight.T (n, out), without gradients; weight (out, in) of the same type as x.

    On a CPU, oneDNN needs weights in a layout of its own. torch's public products convert them at every call, or in float32
    do not use oneDNN at all; the private operations that torch.compile generates keep the layout, and with them a row's
    result is the same to the bit whatever the other rows. If they are missing or refuse a trial call, F.linear is used.
    """
    weight = weight.detach()
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
        try:
            multiply = torch.ops.mkldnn._linear_pointwise.default
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            multiply(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
            return lambda x: multiply(x, packed, None, "none", [], "")
        except (AttributeError, RuntimeError):
            pass
    return lambda x: F.linear(x, weight)
