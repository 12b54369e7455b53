"""Building blocks that the networks share."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vqgan.networks.blocks import GroupNorm, normalise_groups


def test_group_norm_is_that_of_torch_on_a_cpu() -> None:
    ours, torchs = GroupNorm(4, 32), nn.GroupNorm(4, 32)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 32, 5, 7)
    assert torch.equal(ours(x), torchs(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.bfloat16()), torchs(x.bfloat16()))
        assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_group_norm_of_bfloat16_images_has_float32_means_and_variances() -> None:
    """A mean of 100 and a spread of 1 leave nothing of images whose squares were summed in bfloat16."""
    x = (torch.randn(2, 32, 16, 16) + 100).bfloat16()
    error = normalise_groups(x, 4) - F.group_norm(x.float(), 4)
    assert error.abs().max() < 0.02


def test_group_norm_on_a_gpu_gets_weights_of_the_type_of_its_images() -> None:
    """Its kernel refuses others; fake tensors stand for a GPU's."""
    with FakeTensorMode(), torch.device("cuda"):
        norm = GroupNorm(4, 32)
        x = torch.randn(2, 32, 5, 7, device="cuda", dtype=torch.bfloat16)
        assert norm(x).dtype == torch.bfloat16
        assert norm(x).device.type == "cuda"
        assert normalise_groups(x, 4).dtype == torch.bfloat16
