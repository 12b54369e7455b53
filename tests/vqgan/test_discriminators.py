import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from tests.helpers.pages import load_example
from tests.helpers.parts import make
from vqgan.backbones import Torchvision
from vqgan.discriminators.base import Judgement, stack_logits
from vqgan.discriminators.frozen import FrozenFeatures
from vqgan.discriminators.grain import Grain
from vqgan.discriminators.multiscale import MultiScale
from vqgan.discriminators.patch import PatchGAN, least_size
from vqgan.discriminators.style import Style, StyleBlock, append_deviation, blur

CONF = Path(__file__).parents[2] / "conf"
SHALLOW = ["features.1", "features.4"]  # of squeezenet1_1: 64 and 128 channels


def squeeze() -> Torchvision:
    return make(Torchvision, "squeezenet1_1", SHALLOW, pretrained=False)


EXAMPLE = (
    "docs/extending/discriminator.md"  # its code blocks are a discriminator, which must pass too
)

# A line for each file in conf/loss/discriminator, named by the last word: settings that make it small.
VARIANTS: dict[str, dict[str, Any]] = {
    "patch": {"width": 8},
    "spectral patch": {"width": 8, "spectral": True},
    "fine": {"width": 8},
    "spectral fine": {"width": 8, "spectral": True},
    "grain": {"width": 8},
    "multiscale": {"width": 8, "depth": 1},
    "style": {"width": 8, "max_width_mult": 2},
    "frozen": {
        "width": 8,
        "backbone": {"name": "squeezenet1_1", "layers": SHALLOW, "pretrained": False},
    },
    EXAMPLE: {"width": 8},
}


def build(name: str, size: int, channels: int) -> Any:
    option = name.split()[-1]
    if name == EXAMPLE:
        settings = OmegaConf.create(load_example(EXAMPLE))
    else:
        settings = OmegaConf.load(CONF / "loss" / "discriminator" / f"{option}.yaml")
    merged = OmegaConf.merge(settings, VARIANTS[name])
    data = {"image_size": size, "channels": channels}
    return instantiate(OmegaConf.create({"data": data, "discriminator": merged}).discriminator)


def test_every_discriminator_of_conf_is_under_the_contract() -> None:
    files = {file.stem for file in (CONF / "loss" / "discriminator").glob("*.yaml")}
    assert {name.split()[-1] for name in VARIANTS if name != EXAMPLE} == files


NAMES = list(VARIANTS)
LOCAL = [name for name in NAMES if name != "style"]
SCALES = {"multiscale": 2, "frozen": 2}


def judged(name: str, x: Tensor) -> Judgement:
    judgement = build(name, x.shape[2], x.shape[1])(x)
    assert isinstance(judgement, Judgement)
    return judgement


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 16), (2, 3, 16, 16), (2, 1, 64, 64), (1, 3, 64, 64)], ids=str
)
def test_every_discriminator_judges_grey_and_coloured_images_of_any_batch(
    name: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    logits, features = judged(name, x)
    assert logits.shape[:2] == (shape[0], SCALES.get(name, 1))
    assert logits.dim() == 4
    assert all(f.dim() == 4 and len(f) == shape[0] for f in features)
    logits.mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_discriminator_runs_in_16_bits_and_says_nearly_the_same(
    name: str, dtype: torch.dtype
) -> None:
    discriminator, x = build(name, 16, 3).eval(), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=dtype):
        half = discriminator(x).logits
    torch.testing.assert_close(half.float(), discriminator(x).logits, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("name", LOCAL)
def test_a_judgement_does_not_depend_on_the_other_images_of_the_batch(name: str) -> None:
    discriminator, x = build(name, 16, 3).eval(), torch.randn(4, 3, 16, 16)
    together = discriminator(x).logits
    for i in range(4):
        torch.testing.assert_close(
            together[i : i + 1], discriminator(x[i : i + 1]).logits, atol=1e-4, rtol=1e-4
        )


def test_styles_judgement_depends_on_its_own_group_alone() -> None:
    discriminator, x = make(Style, 16, 3, width=8, max_width_mult=2), torch.randn(8, 3, 16, 16)
    before = discriminator(x).logits
    x[7] *= 3
    after = discriminator(x).logits
    torch.testing.assert_close(after[:4], before[:4])
    assert (after[4:] != before[4:]).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_judgement_in_eval_mode_leaves_every_buffer_as_it_was(name: str) -> None:
    discriminator = build(name, 16, 3).eval()
    before = copy.deepcopy(discriminator.state_dict())
    discriminator(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_no_discriminator_has_batch_norm(name: str) -> None:
    kinds = {type(m).__name__ for m in build(name, 16, 3).modules()}
    assert not [kind for kind in kinds if "BatchNorm" in kind]


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_gradient_exists_for_r1(name: str) -> None:
    discriminator, x = build(name, 16, 3), torch.randn(2, 3, 16, 16, requires_grad=True)
    [slope] = torch.autograd.grad(discriminator(x).logits.sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in discriminator.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_tell_light_from_dark(name: str) -> None:
    """Which a network of dead units, or one whose gradient stops somewhere, would not."""
    discriminator = build(name, 16, 3)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    x, x_hat = 0.5 + 0.1 * torch.randn(2, 4, 3, 16, 16), -0.5 + 0.1 * torch.randn(2, 4, 3, 16, 16)
    for _ in range(15):
        real, fake = discriminator(x[0]).logits, discriminator(x_hat[0]).logits
        optimizer.zero_grad()
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()
        optimizer.step()
    assert discriminator(x[1]).logits.mean() > discriminator(x_hat[1]).logits.mean()


@pytest.mark.parametrize("name", ["spectral patch", "spectral fine", "frozen"])
def test_spectral_norm_makes_every_convolutions_largest_singular_value_1(name: str) -> None:
    discriminator = build(name, 16, 3)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(7)  # which the norm undoes
        for _ in range(20):
            discriminator(torch.randn(1, 3, 16, 16))  # each a step of the estimate
    convs = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) >= 4
    for conv in convs:
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(
            1, rel=0.05
        )


@pytest.mark.parametrize("name", ["spectral patch", "spectral fine"])
def test_spectral_norm_replaces_group_norm(name: str) -> None:
    assert not [m for m in build(name, 16, 3).modules() if isinstance(m, nn.GroupNorm)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_least_size_of_a_patchgan_leaves_one_logit(depth: int) -> None:
    size = least_size(depth)
    assert make(PatchGAN, 3, 8, depth, image_size=size)(
        torch.randn(1, 3, size, size)
    ).logits.shape == (
        1,
        1,
        1,
        1,
    )
    with pytest.raises(
        InputError,
        match=rf"data.image_size={size - 1} is too small for loss.discriminator.depth={depth}",
    ):
        make(PatchGAN, 3, 8, depth, image_size=size - 1)


@pytest.mark.parametrize("setting", [{"width": 0}, {"depth": 0}, {"depth": 1.5}])
def test_a_patchgan_without_width_or_depth_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"loss.discriminator\.\w+=.* must be a whole number of at least 1"
    ):
        make(PatchGAN, 3, **setting)


def test_each_scale_is_a_patchgan_of_the_averaged_image() -> None:
    discriminator, x = (
        make(MultiScale, 64, 3, scales=3, width=8, depth=1),
        torch.randn(2, 3, 64, 64),
    )
    logits, features = discriminator(x)
    smaller = x.view(2, 3, 32, 2, 32, 2).mean((3, 5))
    fine, coarse = discriminator.scales[0](x), discriminator.scales[1](smaller)
    torch.testing.assert_close(logits[:, :1], fine.logits)
    assert logits.shape[1] == 3
    torch.testing.assert_close(logits[:, 1].unique(), coarse.logits.unique())
    assert len(features) == 3 * len(fine.features)


def test_coarser_logits_are_repeated_to_the_finest_size() -> None:
    stacked = stack_logits(
        [torch.zeros(1, 1, 2, 2), torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[[[5.0]]]])]
    )
    assert stacked.shape == (1, 3, 4, 4)
    assert torch.equal(stacked[0, 1], torch.arange(16.0).view(4, 4))
    assert (stacked[0, 2] == 5).all()


def test_every_scale_counts_equally() -> None:
    fine, coarse = torch.randn(2, 1, 12, 12), torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(
        stack_logits([fine, coarse]).mean(), (fine.mean() + coarse.mean()) / 2
    )


def test_an_image_too_small_for_the_coarsest_scale_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"data.image_size=16 leaves 8 pixels at scale 2 .* where depth=2 needs 12; use fewer",
    ):
        make(MultiScale, 16, 3, scales=2, depth=2)


@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (1, 2)])
def test_the_blur_is_the_filter_1_3_3_1_over_8(padding: int, stride: int) -> None:
    row = torch.tensor([1.0, 3, 3, 1]) / 8
    x = torch.randn(2, 3, 8, 8)
    expected = F.conv2d(
        x.view(6, 1, 8, 8), torch.outer(row, row)[None, None], stride=stride, padding=padding
    )
    torch.testing.assert_close(blur(x, padding, stride).reshape(expected.shape), expected)


def test_the_minibatch_deviation_is_that_of_consecutive_images() -> None:
    for n, size in ((8, 4), (6, 2), (3, 1)):
        x = torch.randn(n, 5, 2, 2)
        extended = append_deviation(x)
        assert torch.equal(extended[:, :5], x)
        for start in range(0, n, size):
            group = x[start : start + size]
            total = sum(
                math.sqrt(group[:, c, i, j].var(unbiased=False) + 1e-8)
                for c in range(5)
                for i in range(2)
                for j in range(2)
            )
            torch.testing.assert_close(
                extended[start : start + size, 5], torch.full((size, 2, 2), total / 20)
            )


def test_equal_images_have_no_deviation_and_a_finite_gradient() -> None:
    x = torch.ones(4, 2, 2, 2, requires_grad=True)
    extended = append_deviation(x)[:, 2]
    assert (extended < 2e-4).all()
    extended.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_residual_block_halves_the_resolution_and_keeps_the_variance() -> None:
    # Of constant channels, that the blur leaves as they are.
    x = torch.randn(16, 32, 1, 1).expand(-1, -1, 16, 16)
    halved = StyleBlock(32, 64)(x)
    assert halved.shape == (16, 64, 8, 8)
    assert halved[:, :, 2:-2, 2:-2].square().mean().item() == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize(("size", "blocks"), [(4, 0), (16, 2), (64, 4)])
def test_styles_blocks_go_down_to_four_pixels(size: int, blocks: int) -> None:
    logits, features = make(Style, size, 1, width=4, max_width_mult=4)(
        torch.randn(2, 1, size, size)
    )
    assert logits.shape == (2, 1, 1, 1)
    assert len(features) == blocks + 1
    assert features[-1].shape[2:] == (4, 4)


def test_equalised_weights_have_variance_1_and_outputs_too() -> None:
    discriminator = make(Style, 16, 3, width=64, max_width_mult=2)
    conv = discriminator.blocks[0].conv1
    assert conv.weight.std().item() == pytest.approx(1, rel=0.05)
    assert conv(torch.randn(4, 64, 16, 16))[:, :, 1:-1, 1:-1].std().item() == pytest.approx(
        1, rel=0.1
    )


@pytest.mark.parametrize(("size", "near"), [(24, 16), (2, 4), (100, 64)])
def test_a_size_that_is_no_power_of_two_is_refused_by_style(size: int, near: int) -> None:
    with pytest.raises(
        InputError,
        match=rf"data.image_size={size} is no power of two from 4 on.*use data.image_size={near} or",
    ):
        make(Style, size, 3)


def test_only_the_heads_of_a_frozen_discriminator_train_and_are_saved() -> None:
    discriminator = make(FrozenFeatures, squeeze(), width=8)
    weights = copy.deepcopy(discriminator.backbone.network.state_dict())
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.1)
    discriminator(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    optimizer.step()
    assert all(key.startswith("heads.") for key in discriminator.state_dict())
    assert all(p.grad is None for p in discriminator.backbone.network.parameters())
    for key, value in discriminator.backbone.network.state_dict().items():
        assert torch.equal(value, weights[key])


def test_a_frozen_discriminator_trains_with_its_backbone_in_eval_mode() -> None:
    discriminator = make(
        FrozenFeatures, make(Torchvision, "resnet18", ["layer1"], pretrained=False), width=8
    ).train()
    before = copy.deepcopy(discriminator.backbone.network.state_dict())
    discriminator(torch.randn(2, 3, 16, 16))
    assert not [m for m in discriminator.backbone.network.modules() if m.training]
    assert all(
        torch.equal(value, before[key])
        for key, value in discriminator.backbone.network.state_dict().items()
    )


def test_a_frozen_discriminator_does_not_care_for_the_scale_of_a_layer() -> None:
    discriminator, x = make(FrozenFeatures, squeeze(), width=8).eval(), torch.randn(1, 64, 5, 5)
    torch.testing.assert_close(
        discriminator.heads[0](100 * x), discriminator.heads[0](x), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    "option", sorted(p.stem for p in (CONF / "loss" / "discriminator").glob("*.yaml"))
)
def test_every_discriminators_config_builds_one_that_judges(option: str) -> None:
    small = [
        "loss.discriminator.width=8",
        *(["loss.discriminator.backbone.pretrained=false"] if option == "frozen" else []),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "config",
            [
                "stage=vqgan",
                "loss=vqgan",
                f"loss/discriminator={option}",
                "data.image_size=32",
                *small,
            ],
        )
    judgement = instantiate(config.loss.discriminator)(torch.randn(2, config.data.channels, 32, 32))
    assert judgement.logits.isfinite().all()


@pytest.mark.parametrize("patch", [6, 10, 14])
def test_grain_sees_a_patch_of_so_many_pixels_and_nothing_beyond(patch: int) -> None:
    x = torch.randn(1, 3, 48, 48, requires_grad=True)
    make(Grain, 48, 3, width=8, patch=patch)(x).logits[0, 0, 12, 12].backward()
    assert x.grad is not None
    rows, columns = (x.grad[0].abs().sum((0, axis)).nonzero().flatten().tolist() for axis in (2, 1))
    assert rows == columns == list(range(25 - patch // 2, 25 + patch // 2))


@pytest.mark.parametrize("patch", [0, 5, 8, 10.0])
def test_grain_refuses_a_patch_that_convolutions_can_not_see(patch: int) -> None:
    with pytest.raises(
        InputError, match=f"loss.discriminator.patch={patch} must be 6, 10, 14 or 4 more"
    ):
        make(Grain, 16, 3, patch=patch)


def test_grain_refuses_images_of_an_odd_size() -> None:
    with pytest.raises(InputError, match="data.image_size=15 is odd"):
        make(Grain, 15, 3)
