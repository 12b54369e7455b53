"""Sharding changes nothing with one process. tests/prior/test_sharding.py has two processes."""

from typing import Any

import torch
from torch import nn

from codegrid.engine.fsdp import (
    full_state,
    full_tensor,
    local_shard,
    reshard,
    shard_like,
    sharded_parts,
    unshard,
)


def test_the_full_state_of_one_process_is_its_state() -> None:
    state: dict[str, Any] = {"exp_avg": torch.randn(2, 3), "step": torch.tensor(3.0), "rate": 0.5}
    gathered = full_state(state)
    assert gathered.keys() == state.keys()
    assert all(gathered[name] is value for name, value in state.items())


def test_a_tensor_that_is_not_sharded_is_its_own_shard_and_its_own_whole() -> None:
    x = torch.randn(3)
    assert shard_like(x, torch.randn(3)) is local_shard(x) is full_tensor(x) is x
    assert shard_like(0.5, x) == 0.5


def test_a_model_that_is_not_sharded_has_no_sharded_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weight = model[0].weight
    unshard(model)
    reshard(model)
    assert sharded_parts(model) == []
    assert model[0].weight is weight
