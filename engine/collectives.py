"""What the processes of a run exchange. Without several processes each function returns at once."""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from codegrid.engine.errors import InputError

Value = TypeVar("Value")


def all_reduce(x: Tensor) -> Tensor:
    """The sum over all ranks, in place; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of all ranks' x, element by element; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        return all_reduce(x.detach().clone()) / dist.get_world_size()
    return x.detach()


def broadcast(x: Tensor) -> Tensor:
    """The main rank's x on every rank, in place; on one device x as it is."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(x, 0)
    return x


def is_main() -> bool:
    """Whether this process is the one that writes, logs and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run_on_main(make: Callable[[], Value]) -> Value:
    """Call `make` on the main rank and return its value on every rank. Its InputError ends all ranks and is printed once."""
    if not dist.is_initialized():
        return make()
    outcome: list[Any] = [None, None]  # the value, or the error
    if is_main():
        try:
            outcome[0] = make()
        except InputError as refusal:
            outcome[1] = refusal
    dist.broadcast_object_list(outcome)
    value: Value = outcome[0]
    if outcome[1] is not None:
        raise outcome[1] if is_main() else SystemExit(2)
    return value


def all_gather(value: Value) -> list[Value]:
    """Each rank's value, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_entry(values: list[Value], default: Value) -> Value:
    """This rank's entry of what `all_gather` returned, perhaps in an earlier run of fewer ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return values[rank] if rank < len(values) else default


def share_seed(device: torch.device) -> int | None:
    """The seed of the main rank, on every rank; None on one device. Each rank waits for its device to read it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    seed = torch.full((), torch.initial_seed() % 2**63, dtype=torch.int64, device=device)
    return int(broadcast(seed))


def seeded_generator(*numbers: int) -> torch.Generator:
    """Random numbers on the CPU, other ones for each sequence of numbers."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def separate_random_streams() -> None:
    """Seed each further rank differently: crops, flips, dropout and dropped labels differ, the model does not."""
    if not is_main():
        # A multiple of a prime, so that runs with neighbouring seeds share no rank's stream.
        torch.manual_seed(torch.initial_seed() + 7919 * dist.get_rank())
