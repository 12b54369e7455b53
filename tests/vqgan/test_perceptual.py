import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from vqgan.backbones import (
    IMAGENET_MEAN_STD,
    FrozenNetwork,
    Timm,
    Torchvision,
    find_last_layers,
    load_torchvision,
    to_network_input,
)
from vqgan.losses.perceptual import LPIPS, Backbone

CONF = Path(__file__).parents[2] / "conf"
SQUEEZE = "squeezenet1_1"


def images(*shape: int) -> Tensor:
    return torch.rand(shape) * 2 - 1


@pytest.fixture(scope="module")
def backbone() -> Torchvision:
    return make(Torchvision, SQUEEZE, pretrained=False)


@pytest.fixture(scope="module")
def resnet() -> Torchvision:
    return make(Torchvision, "resnet18", pretrained=False)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


# Images as a network wants them.


def test_large_coloured_images_pass_as_they_are() -> None:
    x = images(2, 3, 64, 80)
    assert torch.equal(to_network_input(x), x)


def test_grey_images_are_repeated_and_small_ones_enlarged_in_their_shape() -> None:
    x = images(2, 1, 16, 32)
    prepared = to_network_input(x)
    assert prepared.shape == (2, 3, 64, 128)
    assert torch.equal(prepared[:, 0], prepared[:, 2])
    torch.testing.assert_close(prepared[:, :1], F.interpolate(x, size=(64, 128), mode="bilinear"))


@pytest.mark.parametrize("side", range(1, 65))
def test_enlarged_images_have_exactly_64_pixels(side: int) -> None:
    assert to_network_input(torch.zeros(1, 3, side, side)).shape == (1, 3, 64, 64)


# Backbones.


def test_maps_are_those_of_the_plain_network_on_normalised_images(resnet: Torchvision) -> None:
    network: Any = load_torchvision("resnet18", pretrained=False).eval()
    x = images(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET_MEAN_STD)
    h = network.relu(network.bn1(network.conv1(((x + 1) / 2 - mean) / std)))
    expected = [h]
    h = network.maxpool(h)
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        h = layer(h)
        expected.append(h)
    torch.testing.assert_close(resnet.features(x), expected, atol=1e-4, rtol=1e-4)


def test_channels_are_those_of_the_maps(resnet: Torchvision, backbone: Torchvision) -> None:
    assert resnet.layers == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert resnet.channels == [64, 64, 128, 256, 512]
    assert [m.shape[1] for m in backbone.features(images(1, 3, 64, 64))] == backbone.channels


def test_the_default_layers_of_a_vgg_are_those_of_lpips() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    network = nn.Sequential()
    network.add_module("features", make_layers(cfgs["D"]))
    assert find_last_layers(network) == [f"features.{i}" for i in (3, 8, 15, 22, 29)]


def test_layers_come_in_the_order_that_they_are_asked_for() -> None:
    back = make(Torchvision, SQUEEZE, ["features.4", "features.1"], pretrained=False)
    assert back.channels == [128, 64]
    assert [m.shape[1] for m in back.features(images(1, 3, 64, 64))] == [128, 64]


def test_a_map_is_not_written_over_by_the_layer_after_it() -> None:
    x = images(1, 3, 64, 64)
    linear, rectified = make(
        Torchvision, SQUEEZE, ["features.0", "features.1"], pretrained=False
    ).features(x)
    assert (linear < 0).any()
    assert torch.equal(rectified, linear.relu())


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5"]
)
def test_other_families_have_default_layers_too(name: str) -> None:
    back = make(Torchvision, name, pretrained=False)
    sizes = [m.shape[-1] for m in back.features(images(1, 3, 64, 64))]
    assert len(sizes) >= 4
    assert sizes == sorted(set(sizes), reverse=True)


def test_the_weights_never_train_and_the_image_gets_its_gradient(backbone: Torchvision) -> None:
    x = images(1, 1, 16, 16).requires_grad_()
    torch.stack([m.square().mean() for m in backbone.features(x)]).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in backbone.network.parameters())


def test_maps_are_float32_under_autocast(backbone: Torchvision) -> None:
    x = images(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone.features(x)
    for m, expected in zip(features, backbone.features(x), strict=True):
        assert m.dtype == torch.float32
        assert torch.equal(m, expected)


def test_a_module_that_holds_a_backbone_does_not_own_its_weights(resnet: Torchvision) -> None:
    parent = nn.Sequential(Backbone(resnet)).train()
    assert list(parent.parameters()) == []
    assert parent.state_dict() == {}
    before = copy.deepcopy(resnet.network.state_dict())
    parent[0](images(4, 3, 64, 64), images(4, 3, 64, 64))
    assert not [m for m in resnet.network.modules() if m.training]
    assert all(
        torch.equal(value, before[key]) for key, value in resnet.network.state_dict().items()
    )


def test_a_copy_of_a_backbone_sees_the_same(backbone: Torchvision) -> None:
    x = images(1, 3, 64, 64)
    copied = copy.deepcopy(backbone)
    copied.network.train()
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.features(x), copied.features(x), strict=True)
    )
    assert not [m for m in copied.network.modules() if m.training]


def test_random_weights_are_the_same_in_every_run_and_leave_the_generator_alone() -> None:
    one = make(Torchvision, SQUEEZE, pretrained=False).features(torch.ones(1, 3, 64, 64))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    two = make(Torchvision, SQUEEZE, pretrained=False).features(torch.ones(1, 3, 64, 64))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["resnet19", "vit_b_16", "fcn_resnet50"])
def test_an_unknown_network_is_refused_with_the_closest(name: str) -> None:
    with pytest.raises(
        InputError,
        match=rf"backbone.name={name} is no convolutional network of torchvision; the closest are ",
    ):
        make(Torchvision, name)


def test_an_unknown_layer_is_refused_with_the_closest() -> None:
    with pytest.raises(
        InputError, match=r"has layer5, which is no layer of resnet18; the closest are layer4, "
    ):
        make(Torchvision, "resnet18", ["layer5"], pretrained=False)


def test_a_layer_without_a_map_is_refused() -> None:
    with pytest.raises(InputError, match=r"a layer of resnet18 gives no map \(B, C, h, w\)"):
        make(Torchvision, "resnet18", ["layer1", "fc"], pretrained=False)


def test_weights_that_cannot_be_fetched_are_named_with_their_place(offline: Path) -> None:
    with pytest.raises(InputError) as error:
        make(Torchvision, "resnet18")
    assert (
        f"put the file at {offline / 'resnet18-f37072fd.pth'}, or use loss/perceptual=features"
        in str(error.value)
    )
    assert "no network" in str(error.value)


def test_a_file_of_weights_that_is_cut_off_is_named(offline: Path) -> None:
    offline.mkdir(parents=True)
    torch.save({"a": torch.zeros(999)}, offline / "resnet18-f37072fd.pth")
    file = offline / "resnet18-f37072fd.pth"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="resnet18-f37072fd.pth can't be fetched"):
        make(Torchvision, "resnet18")


def test_weights_in_the_hub_folder_are_used_without_a_network(offline: Path) -> None:
    import torchvision

    offline.mkdir(parents=True)
    network = torchvision.models.squeezenet1_1()
    file = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/", 1)[1]
    torch.save(network.state_dict(), offline / file)
    state = make(Torchvision, SQUEEZE, ["features.0"]).network.state_dict()
    assert torch.equal(state["network.network.features.0.weight"], network.features[0].weight)


# timm, which need not be installed.


class FakeTimm:
    """As much of the package as is used: a network of two maps, the second with the channels last."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails = fails
        self.asked: dict[str, Any] = {}

    def list_models(self) -> list[str]:
        return ["tiny", "tinier", "large"]

    def is_model(self, name: str) -> bool:
        return name in self.list_models()

    def create_model(self, name: str, **asked: Any) -> nn.Module:
        if self.fails is not None:
            raise self.fails
        self.asked = asked

        class Network(nn.Module):
            feature_info = SimpleNamespace(channels=lambda: [4, 6])

            def __init__(self) -> None:
                super().__init__()
                self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
                self.one, self.two = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 4, 4)

            def forward(self, x: Tensor) -> list[Tensor]:
                h = self.one(x)
                return [h, self.two(h).movedim(1, -1)]

        return Network()


def test_without_timm_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        InputError,
        match="needs the package timm: pip install timm, or use vqgan.backbones.Torchvision",
    ):
        Timm("resnet18")


def test_timms_maps_have_the_channels_first_and_images_its_own_normalisation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", fake)
    back, x = Timm("tiny", [0, 2], pretrained=False, dynamic_img_size=True), images(2, 3, 64, 64)
    assert fake.asked == {
        "features_only": True,
        "pretrained": False,
        "out_indices": [0, 2],
        "dynamic_img_size": True,
    }
    one, two = back.features(x)
    assert back.channels == [4, 6]
    assert two.shape == (2, 6, 4, 4)
    network: Any = back.network.network.network
    torch.testing.assert_close(one, network.one(x))  # 0.5 and 0.5 leave [-1, 1] as it is
    torch.testing.assert_close(two, network.two(one))


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("tinny", None, r"backbone.name=tinny is no network of timm; the closest are tiny, "),
        (
            "tiny",
            IndexError("list index out of range"),
            r"backbone.layers=\[9\] are not all indices of maps that tiny has",
        ),
        ("tiny", OSError("no network"), r"timm's weights tiny can't be fetched \(no network\)"),
    ],
)
def test_what_timm_cannot_do_is_said_in_one_sentence(
    name: str, error: Exception | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeTimm(error))
    with pytest.raises(InputError, match=sentence):
        Timm(name, [9])


# The perceptual loss on them.


class Plain(FrozenNetwork):
    """A backbone whose only map is what a function makes of the image."""

    def __init__(self, make: Any) -> None:
        self.make, self.channels = make, [3]

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.make(x)]


def test_equal_images_have_no_distance_and_a_finite_gradient(backbone: Torchvision) -> None:
    x_hat = images(2, 3, 64, 64).requires_grad_()
    loss = Backbone(backbone)(x_hat.detach(), x_hat)
    loss.backward()
    assert loss == 0
    assert x_hat.grad is not None
    assert torch.equal(x_hat.grad, torch.zeros_like(x_hat))


def test_opposite_features_have_distance_4_a_layer_and_orthogonal_ones_2() -> None:
    one, other = (
        torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1),
        torch.tensor([0, 5.0, 0]).view(1, 3, 1, 1),
    )
    loss = Backbone(Plain(lambda x: x))
    torch.testing.assert_close(loss(one, -7 * one), torch.tensor(4.0))
    torch.testing.assert_close(loss(one, other), torch.tensor(2.0))
    torch.testing.assert_close(loss(one, 9 * one), torch.tensor(0.0))


def test_a_silent_layer_has_a_finite_gradient() -> None:
    x_hat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    Backbone(Plain(lambda x: x))(torch.randn(1, 3, 4, 4), x_hat).backward()
    assert x_hat.grad is not None
    assert x_hat.grad.isfinite().all()


def test_only_the_reconstruction_gets_a_gradient(backbone: Torchvision) -> None:
    x, x_hat = images(1, 3, 64, 64).requires_grad_(), images(1, 3, 64, 64).requires_grad_()
    Backbone(backbone)(x, x_hat).backward()
    assert x.grad is None
    assert x_hat.grad is not None


@pytest.mark.parametrize("channels", [1, 3])
def test_small_grey_and_half_precision_images_are_handled(
    backbone: Torchvision, channels: int
) -> None:
    x, x_hat = images(2, channels, 16, 16), images(2, channels, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = Backbone(backbone)(x, x_hat.bfloat16())
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, Backbone(backbone)(x, x_hat.bfloat16().float()))
    assert distance > 0


@pytest.mark.filterwarnings("ignore")  # the packages' own, at import
def test_it_equals_the_package_lpips_without_its_learned_heads() -> None:
    import lpips

    theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, lpips=False, verbose=False).eval()
    # Their slices end at these layers.
    layers = [f"features.{i}" for i in (1, 4, 7, 9, 10, 11, 12)]
    ours = Backbone(make(Torchvision, SQUEEZE, layers, pretrained=False))
    mine = dict(ours.backbone.network.named_parameters())
    with torch.no_grad():
        for (
            name,
            p,
        ) in (
            theirs.net.named_parameters()
        ):  # slice1.0.weight: the number counts on from slice to slice
            p.copy_(mine[f"network.network.features.{name.split('.', 1)[1]}"])
    x, x_hat = images(2, 3, 64, 64), images(2, 3, 64, 64)
    torch.testing.assert_close(ours(x, x_hat), theirs(x, x_hat).mean(), atol=0, rtol=1e-4)


def test_the_backbones_config_builds_without_weights() -> None:
    config = OmegaConf.load(CONF / "loss" / "perceptual" / "backbone.yaml")
    assert config.backbone.pretrained
    config.backbone.update(name=SQUEEZE, pretrained=False)
    assert instantiate(config)(images(1, 3, 16, 16), images(1, 3, 16, 16)) > 0


# LPIPS.


@pytest.mark.filterwarnings("ignore")
def test_lpips_stays_in_eval_mode_in_a_training_parent_and_is_no_part_of_it() -> None:
    loss = LPIPS("squeeze", pretrained=False)
    parent = nn.ModuleList([loss]).train()
    x, x_hat = images(1, 1, 16, 16), images(1, 1, 16, 16)
    assert torch.equal(loss(x, x_hat), loss(x, x_hat))  # its heads have dropout
    assert parent.state_dict() == {}
    assert not [m for m in loss._network[0].modules() if m.training]


@pytest.mark.filterwarnings("ignore")
def test_lpips_is_computed_in_float32_and_moves_the_reconstruction() -> None:
    loss = LPIPS("squeeze", pretrained=False)
    x, x_hat = images(1, 3, 16, 16), images(1, 3, 16, 16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = loss(x, x_hat)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, loss(x, x_hat))
    distance.backward()
    assert x_hat.grad is not None
    assert x_hat.grad.isfinite().all()


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_names_the_weights_that_cannot_be_fetched(offline: Path, net: str) -> None:
    with pytest.raises(
        InputError, match=rf"{net}[\w-]+\.pth can't be fetched .*use loss/perceptual=features"
    ):
        make(LPIPS, net)
