"""Weights, gradients and optimizer state sharded over ranks: FSDP2 (Zhao et al. 2023), after ZeRO's third stage
(Rajbhandari et al. 2020)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from codegrid.engine.collectives import is_main

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with two differences: of several micro-batches only the last exchanges gradients, and
    checkpoints are those of one process, so a run resumes with any number of ranks, sharded or not.

    Lightning numbers an optimizer's state in the order of the model's parameters. An optimizer with parameter groups, by
    weight decay, would get the moments of other parameters; here they are numbered in the optimizer's order.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )

    def shard(self, model: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Leave each rank its shard of every parameter, along the first dimension.

        The parameters of a part are gathered while it runs, the others while the model does. A model without parameters,
        or one that is sharded already, stays as it is.
        """
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
        return False  # at the same moment as all other strategies

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Memory-mapped, not read: each rank takes its shards from the disk."""
        checkpoint: dict[str, Any] = torch.load(
            checkpoint_path, map_location="cpu", mmap=True, weights_only=True
        )
        return checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return get_model_state_dict(self.lightning_module, options=FULL)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """A plain optimizer.state_dict() with whole tensors for shards on the main rank, and None for them on the others.

        get_optimizer_state_dict would turn tuples such as betas into lists, and set_optimizer_state_dict can't load
        parameters or optimizers without state, such as those of SGD.
        """
        state = optimizer.state_dict()
        tensors = {number: full_state(values) for number, values in state["state"].items()}
        return {**state, "state": tensors}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            by_number = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {
                    name: shard_like(value, by_number[number]) for name, value in values.items()
                }
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module that are sharded one by one; none if every rank holds the whole module."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def unshard(model: nn.Module) -> None:
    """Give every rank all of the model's weights until `reshard`: it then runs without the other ranks, as often as needed."""
    for part in sharded_parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def reshard(model: nn.Module) -> None:
    """Leave every rank its shards alone, as before `unshard`."""
    for part in sharded_parts(model):
        is_inner = part is not model  # the backward pass begins with what the model itself holds
        part.set_reshard_after_forward(is_inner, recurse=False)
        part.reshard()


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Tensors by name with whole tensors for shards: on the main rank's CPU, None on the others. All ranks must call it.

    What is not sharded, a tensor or a number, stays as it is.
    """
    gathered: dict[str, Tensor | None] = {}
    for name, value in state.items():  # no more than one whole tensor at a time
        if isinstance(value, DTensor):
            whole = value.full_tensor()
            gathered[name] = whole.cpu() if is_main() else None
        else:
            gathered[name] = value
    return gathered


def shard_like(value: Any, like: Tensor) -> Any:
    """This rank's shard of a whole tensor, placed as `like`.

    Returns the value itself if `like` is not sharded, or if the value has another shape, such as an optimizer's step.
    """
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # Without src_data_rank=None the ranks would exchange it.
    shard = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return shard.clone()  # or it would keep the whole tensor in memory


def full_tensor(x: Tensor) -> Tensor:
    """The whole of x from all ranks' shards; all must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_shard(x: Tensor) -> Tensor:
    """This rank's shard of x, in the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x
