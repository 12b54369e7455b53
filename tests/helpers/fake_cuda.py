"""Models on a GPU that need not be there: tensors of the right device, type and shape, without values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.looks import HostLooks
from vqgan.quantizers.base import Quantizer


@contextmanager
def fake_cuda(raises: bool = True) -> Iterator[HostLooks]:
    """Inside, tensors have no values and device="cuda" works without a GPU. Tensors of different devices must not meet, and with
    `raises`, no value may be looked at."""
    looks = HostLooks("cuda", raises)
    with FakeTensorMode(allow_non_fake_inputs=False), looks:
        yield looks


def move_to_fake_cuda(module: nn.Module) -> nn.Module:
    """Replace all parameters and buffers of a module by ones of a GPU, in place; inside of `fake_cuda`."""
    moved: dict[int, Tensor] = {}

    def move(x: Tensor) -> Tensor:
        if id(x) not in moved:
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            is_parameter = isinstance(x, nn.Parameter)
            moved[id(x)] = nn.Parameter(like, x.requires_grad) if is_parameter else like
        return moved[id(x)]

    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = move(p)  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = move(buffer)
        if isinstance(part, Quantizer):
            part._remember_updates(0)  # a new buffer has no value to read
    module.to = lambda *_, **__: module  # type: ignore[method-assign]  # it is there; torch could not swap fake weights
    return module
