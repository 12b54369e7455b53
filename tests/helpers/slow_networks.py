"""Public networks once more, by names and by hand, and random weights for them."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_groups(x: Tensor) -> Tensor:
    """Each of 32 groups of channels to mean 0 and variance 1."""
    h = x.reshape(len(x), 32, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return h.view(x.shape)


def norm_swish(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Normalisation with scale and shift, then h * sigmoid(h)."""
    h = norm_groups(x) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
    return h * torch.sigmoid(h)


def convolve(w: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution padded on all sides."""
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, w.get(f"{name}.bias"), stride, kernel.shape[-1] // 2)


class Draw:
    """Random float64 weights, by names."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, *shape: int, bias: bool = True) -> None:
        """A weight that keeps the scale of its input, and a bias."""
        scale = max(1, torch.Size(shape[1:]).numel()) ** -0.5
        self.weights[f"{name}.weight"] = torch.randn(shape, dtype=torch.float64) * scale
        if bias:
            self.weights[f"{name}.bias"] = torch.randn(shape[:1], dtype=torch.float64)

    def add_blocks(self, name: str, into: int, out: int, depth: int, shortcut: int) -> None:
        """`depth` residual blocks without biases; the shortcut of the first, if widths differ, takes `shortcut` channels."""
        for i in range(depth):
            self.add(f"{name}.{i}.norm1", into)
            self.add(f"{name}.{i}.conv1", out, into, 3, 3, bias=False)
            self.add(f"{name}.{i}.norm2", out)
            self.add(f"{name}.{i}.conv2", out, out, 3, 3, bias=False)
            if into != out:
                self.add(f"{name}.{i}.nin_shortcut", out, shortcut, 1, 1, bias=False)
            into = out
