"""Weights, gradients and the optimizer's state in shares, one a rank: FSDP2 (Zhao et al. 2023), after ZeRO's third stage
(Rajbhandari et al. 2020)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from engine.distributed import is_main


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, but for micro-batches, of which only the last shares gradients here, and for checkpoints,
    which are those of one process: a run goes on with any number of ranks, sharded or not.

    Lightning's own numbers an optimizer's state as the model has its parameters. An optimizer that has them in groups, by
    weight decay, would get the moments of others.
    """

    def __init__(self, world: int) -> None:
        super().__init__(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def shard(self, model: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Leave each rank its share of every parameter, along the first dimension. The parameters of a part are whole while it
        runs, the others while the model does. A model without any, or one that is sharded already, stays as it is."""
        if isinstance(model, FSDPModule) or next(model.parameters(), None) is None:
            return
        for part in (*parts, model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        assert self.lightning_module is not None
        for part in sharded_parts(self.lightning_module):
            part.set_requires_gradient_sync(False, recurse=False)
        yield
        for part in sharded_parts(self.lightning_module):
            part.set_requires_gradient_sync(True, recurse=False)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # at the moment at which all other strategies do

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Mapped, not read: each rank takes its share from the disk."""
        checkpoint: dict[str, Any] = torch.load(
            checkpoint_path, map_location="cpu", mmap=True, weights_only=True
        )
        return checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return full_state(self.lightning_module.state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        shares = {
            name: shard_like(value, own[name]) if name in own else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(shares, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return full_state(optimizer.state_dict())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, told in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in told["param_groups"] for number in group["params"]]
            own = dict(
                zip(
                    numbers,
                    (p for group in optimizer.param_groups for p in group["params"]),
                    strict=True,
                )
            )
            state = {
                number: {name: shard_like(value, own[number]) for name, value in values.items()}
                for number, values in told["state"].items()
            }
            optimizer.load_state_dict({**told, "state": state})


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module that are sharded one by one; none of one that every rank has whole."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def unshard(model: nn.Module) -> None:
    """Give every rank all of the model's weights until `reshard`: then it runs without the other ranks, as often as it may."""
    for part in sharded_parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def reshard(model: nn.Module) -> None:
    """Leave every rank its share alone, as before `unshard`."""
    for part in sharded_parts(model):
        part.set_reshard_after_forward(
            part is not model, recurse=False
        )  # backward begins with what the model itself has
        part.reshard()


def full_state(state: Any) -> Any:
    """The same containers with whole tensors for shares, on the CPU of the first rank; on the others None, and no more than one
    whole tensor at a time. All ranks must ask."""
    if isinstance(state, dict):
        return {name: full_state(value) for name, value in state.items()}
    if isinstance(state, list):
        return [full_state(value) for value in state]
    if isinstance(state, DTensor):
        whole = full_tensor(state)
        return whole.cpu() if is_main() else None
    return state


def shard_like(value: Any, like: Tensor) -> Any:
    """Of a whole tensor the share that this rank has of `like`, on its device; what is not shared is the value itself."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    part = distribute_tensor(
        value, like.device_mesh, like.placements, src_data_rank=None
    )  # without asking other ranks
    return part.clone()  # or it would keep the whole in memory


def full_tensor(x: Tensor) -> Tensor:
    """What all ranks have of x together; all must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_shard(x: Tensor) -> Tensor:
    """What this rank has of x, in the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x
