"""Low-rank updates of convolutions and linear layers, all that learns of a network then (LoRA, Hu et al. 2022)."""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from codegrid.engine.errors import InputError
from codegrid.engine.precision import without_autocast

UPDATED = "weight"  # the parameter of a layer that gets an update; its bias stays as it is
UPDATED_PLACE = f"parametrizations.{UPDATED}"  # torch's name of where the parts of that weight are
UPDATED_PARTS = (f"{UPDATED_PLACE}.original", f"{UPDATED_PLACE}.0.up", f"{UPDATED_PLACE}.0.down")


class LowRank(nn.Module):
    """weight + up @ down, of which only the factors learn: `up` (out, rank), zero at first, and `down` (rank, fan_in).

    The rank of a layer with fewer outputs or inputs than that is their number. There is no factor alpha / rank, which would
    be a second learning rate.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows = weight.detach().flatten(1)
        rank = min(rank, *rows.shape)
        self.up = nn.Parameter(rows.new_zeros(len(rows), rank))
        self.down = nn.Parameter(rows.new_empty(rank, rows.shape[1]))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The frozen weight (out, ...) -> the one that the layer uses, float32 under any precision."""
        with without_autocast(weight.device):
            return add_update(weight, self.up, self.down)


def add_update(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight (out, ...) + up (out, rank) @ down (rank, fan_in)."""
    return weight + (up @ down).view(weight.shape)


def add_low_rank(networks: Iterable[nn.Module], rank: int) -> None:
    """Give each convolution and linear layer of the networks an update of this rank, in place; all else of them is frozen.

    Until the first step they compute what they did before, to the bit. A layer whose weight is already computed from others
    stays as it is. Raises InputError if there is no layer to update.
    """
    everything = nn.ModuleList(networks)
    layers = [layer for layer in everything.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    layers = [layer for layer in layers if not parametrize.is_parametrized(layer, UPDATED)]
    if not layers:
        classes = ", ".join(type(network).__name__ for network in everything)
        raise InputError(
            f"lora={rank} updates convolutions and linear layers, and what learns ({classes}) has none; use lora=null"
        )
    everything.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, UPDATED, LowRank(layer.weight, rank))


def count_plain(network: nn.Module) -> int:
    """The number of a network's parameters when its updates are merged."""
    updates = [part for part in network.modules() if isinstance(part, LowRank)]
    return sum(p.numel() for p in network.parameters()) - sum(
        p.numel() for update in updates for p in update.parameters()
    )


def merge_low_rank(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with all updates added to their weights, under the names that these have without updates.

    Names without an update, or with a part of one, stay as they are.
    """
    merged = dict(weights)
    for name in weights:
        if not name.endswith(UPDATED_PARTS[0]):
            continue
        layer = name.removesuffix(UPDATED_PARTS[0])
        names = [layer + part for part in UPDATED_PARTS]
        if all(part in merged for part in names):
            merged[layer + UPDATED] = add_update(*(merged.pop(part) for part in names))
    return merged


def learning_weight(layer: nn.Module) -> Tensor:
    """The weights of a layer that learn, at which losses are compared: `up` of its update, or the weight itself."""
    return layer.get_parameter(
        UPDATED_PARTS[1] if parametrize.is_parametrized(layer, UPDATED) else UPDATED
    )
