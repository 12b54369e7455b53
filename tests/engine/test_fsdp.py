"""What is not sharded is not touched by what shares and gathers; what is, in tests/prior/test_sharding.py."""

import torch
from torch import nn

from engine.fsdp import (
    full_state,
    full_tensor,
    local_shard,
    reshard,
    shard_like,
    sharded_parts,
    unshard,
)


def test_the_state_of_one_process_is_gathered_as_it_is() -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    found = full_state(state)
    assert found == state
    assert found["state"][0]["exp_avg"] is state["state"][0]["exp_avg"]


def test_of_a_whole_tensor_the_share_and_the_whole_are_itself() -> None:
    x = torch.randn(3)
    assert shard_like(x, torch.randn(3)) is local_shard(x) is full_tensor(x) is x
    assert shard_like(0.5, x) == 0.5


def test_a_model_that_every_rank_has_whole_has_no_parts_to_put_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weight = model[0].weight
    unshard(model)
    reshard(model)
    assert sharded_parts(model) == []
    assert model[0].weight is weight
