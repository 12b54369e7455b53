"""What a training step computes and holds: floating-point operations, and bytes of tensors that are alive at once."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class StepTrace(TorchDispatchMode):
    """Follows every operation inside it, on real tensors or on fake ones, which have shapes but no memory.

    `live` and `peak` are the bytes of all storages on a kind of device, now and at most since `restart`; `flops` are those of
    matrix products, convolutions and attention. Of the `parts`, name -> modules, it counts what their forward passes compute
    and what they leave for the backward pass. What a kernel allocates for itself is not counted.

    FlopCounterMode is not used: it follows modules by hooks on their inputs, which fail where a loss goes backward to an
    input alone.
    """

    def __init__(self, kind: str, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__()
        self.kind = kind
        self.parts = parts
        self.live = 0
        self.restart()
        self._storages: dict[int, tuple[int, weakref.ref[Any]]] = {}  # address -> number
        self._numbers = count()
        self._current: list[str] = []  # the parts whose forward pass is running, outermost first
        self._saved: dict[str, dict[int, int]] = {}

    def restart(self) -> None:
        """Begin a new count; what is alive stays counted."""
        self.peak = self.live
        self.flops = 0
        self.part_flops: Counter[str] = Counter()
        self._saved = {}

    @property
    def part_bytes(self) -> dict[str, int]:
        """What the forward pass of each part has left for the backward pass, each storage once."""
        return {name: sum(saved.values()) for name, saved in self._saved.items()}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if formula := flop_registry.get(function._overloadpacket):
            flops = formula(*args, **kwargs, out_val=out)
            self.flops += flops
            if self._current and not is_backward():
                self.part_flops[self._current[0]] += flops
        self.watch(x for x in tree_leaves(out) if isinstance(x, Tensor))
        return out

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors for as long as they are alive."""
        for x in tensors:
            if x.device.type != self.kind:
                continue
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._storages:
                continue
            reference = weakref.ref(storage, self._forget(key, size))
            self._storages[key] = next(self._numbers), reference
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> Any:
        def forget(_: Any) -> None:
            if self._storages.pop(key, None) is not None:
                self.live -= size

        return forget

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Inside, operations are counted."""
        modules = [module for part in self.parts.values() for module in part]
        weights = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        with ExitStack() as stack:
            for name, part in self.parts.items():
                for module in part:
                    for handle in self._hook(name, module):
                        stack.callback(handle.remove)
            stack.enter_context(self)
            stack.enter_context(saved_tensors_hooks(self._save, lambda x: x))
            yield

    def _hook(self, name: str, module: nn.Module) -> list[Any]:
        def enter(*_: Any) -> None:
            self._current.append(name)

        def leave(*_: Any) -> None:
            self._current.pop()

        return [
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _save(self, x: Tensor) -> Tensor:
        # Without the graph: the output of an operation that keeps it for itself would never be freed.
        x = x.detach()
        storage = x.untyped_storage()
        if self._current and not is_backward() and storage._cdata not in self._weights:
            number, _ = self._storages.get(storage._cdata, (-1, None))
            self._saved.setdefault(self._current[0], {})[number] = storage.nbytes()
        return x


def is_backward() -> bool:
    """Whether a backward pass is running, which computes parts again where their activations are not kept."""
    return torch._C._current_graph_task_id() != -1
