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
    if has_packed_products(weight):
        try:
            multiply = torch.ops.mkldnn._linear_pointwise.default
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            multiply(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
            return lambda x: multiply(x, packed, None, "none", [], "")
        except (AttributeError, RuntimeError):
            pass
    return lambda x: F.linear(x, weight)


def pack_swiglu(gate: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from x (n, in) to silu(x @ gate.T) * (x @ up.T) (n, out) (Shazeer 2020, eq. 6); otherwise as `pack_linear`.

    oneDNN applies both to the sums that a product has in its registers, so no operation is left but the two products.
    """
    gate, up = gate.detach(), up.detach()
    if has_packed_products(gate):
        try:
            multiply = torch.ops.mkldnn._linear_pointwise.default
            multiply_by = torch.ops.mkldnn._linear_pointwise.binary
            gates, ups = (torch.ops.mkldnn._reorder_linear_weight(w) for w in (gate, up))

            def activate(x: Tensor) -> Tensor:
                gated = multiply(x, gates, None, "swish", [], "")
                y: Tensor = multiply_by(x, gated, ups, None, "mul")
                return y

            activate(gate.new_zeros(1, gate.shape[1]))
            return activate
        except (AttributeError, RuntimeError):
            pass
    both = torch.cat([gate, up])

    def activate_in_steps(x: Tensor) -> Tensor:
        gated, y = F.linear(x, both).chunk(2, -1)
        return F.silu(gated).mul_(y)

    return activate_in_steps


def has_packed_products(weight: Tensor) -> bool:
    """Whether oneDNN may have a layout of its own for a weight of this type, on this device."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
