"""Products with weights that stay as they are: laid out once for the processor."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes x (n, in) to x @ weight.T (n, out), in the type of both and without gradients; weight (out, in).

    On a CPU oneDNN wants weights in a layout of its own. torch's public products bring them there at every call, or in
    float32 leave oneDNN out; those that torch.compile uses keep the layout, and a row comes out the same to the bit however
    many are beside it. They are not public: where they are missing or refuse, the public ones remain.
    """
    weight = weight.detach()
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
        try:
            multiply, laid_out = (
                torch.ops.mkldnn._linear_pointwise,
                torch.ops.mkldnn._reorder_linear_weight(weight),
            )
            multiply(weight.new_zeros(1, weight.shape[1]), laid_out, None, "none", [], "")
            return lambda x: multiply(x, laid_out, None, "none", [], "")
        except (AttributeError, RuntimeError):
            pass
    return lambda x: F.linear(x, weight)
