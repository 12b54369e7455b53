"""The features of ADM's evaluator."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from codegrid.evaluation.adm.network import AdmNetwork
from codegrid.evaluation.features import INCEPTION, Inception


class Places(nn.Module):
    """A branch whose value at channel c, row y and column x is c + y / 100 + x / 10,000."""

    def forward(self, images: Tensor) -> Tensor:
        c, y, x = (torch.arange(float(n)) for n in (192, 17, 17))
        maps = c[:, None, None] + y[:, None] / 100 + x / 10_000
        return maps.expand(len(images), -1, -1, -1)


class Stub(nn.Module):
    """An Inception whose branch says where it is."""

    name, hash, resize, package = "stub", "0", "none", "torch"

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Module()
        self.network.Mixed_6d = nn.Module()
        self.network.Mixed_6d.branch1x1 = Places()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.network.Mixed_6d.branch1x1(images)  # type: ignore[operator, union-attr]
        return torch.zeros(len(images), 2048), torch.zeros(len(images), 1008)


def test_the_2023_spatial_features_are_rows_of_columns_of_the_first_seven_channels() -> None:
    """As TensorFlow's axes are (rows, columns, channels); statistics of a reference have this order."""
    stub: Any = Stub()
    features = AdmNetwork(stub)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    expected = [c + y / 100 + x / 10_000 for y in range(17) for x in range(17) for c in range(7)]
    assert features.spatial.shape == (2, AdmNetwork.spatial_size) == (2, 2023)
    torch.testing.assert_close(features.spatial[1], torch.tensor(expected))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    """torch-fidelity's Inception with random weights, as if they were the real ones."""
    code = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    folder = tmp_path_factory.mktemp("weights")
    kind: Callable[..., nn.Module] = code.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda *_, **__: None)
        network = kind("x", ["2048"])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # or features would fade from layer to layer
            module.weight.fill_(2.45)  # of ReLUs after weights from U(-1, 1) / sqrt(fan_in)
            module.bias.uniform_(-0.1, 0.1)
    torch.save(network.state_dict(), folder / INCEPTION)
    return Inception(fetch=False, folder=str(folder))


def resize_as_tensorflow_1(image: NDArray[Any], side: int = 299) -> NDArray[Any]:
    """(c, h, w) -> (c, side, side): pixel i of the result lies at i * h / side, its neighbours weighed by their distance."""
    c, h, w = image.shape
    result = np.zeros((c, side, side), np.float32)
    for i in range(side):
        y = i * h / side
        top = int(y)
        bottom = min(top + 1, h - 1)
        row = image[:, top] * (1 - y + top) + image[:, bottom] * (y - top)
        x = np.arange(side) * w / side
        left = x.astype(int)
        right = np.minimum(left + 1, w - 1)
        result[:, i] = row[:, left] * (1 - x + left) + row[:, right] * (x - left)
    return result


def run_by_hand(inception: Inception, images: Tensor) -> SimpleNamespace:
    """The features, layer by layer, by what the evaluator's description says."""
    net: Any = inception.network
    resized = np.stack([resize_as_tensorflow_1(image.float().numpy()) for image in images])
    x = (torch.from_numpy(resized) - 128) / 128
    for name in (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c",
    ):  # fmt: skip
        x = getattr(net, name)(x)
    branch = net.Mixed_6d.branch1x1
    norm = branch.bn
    settings = norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    maps = F.batch_norm(F.conv2d(x, branch.conv.weight), *settings).relu()
    for name in ("Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"):
        x = getattr(net, name)(x)
    pool = x.mean((2, 3))
    spatial = maps.numpy().transpose(0, 2, 3, 1)[..., :7].reshape(len(images), -1)
    return SimpleNamespace(pool=pool, spatial=spatial, logits=pool @ net.fc.weight.t())


def test_features_are_those_of_torch_fidelitys_layers_one_by_one(inception: Inception) -> None:
    network = AdmNetwork(inception)
    images = torch.randint(256, (2, 3, 20, 28), dtype=torch.uint8)
    images[1] = images[1] // 8 + 100
    features, expected = network(images), run_by_hand(inception, images)
    assert features.spatial.shape == (2, 2023)
    assert float(features.spatial.std()) > 0.01
    for name in ("pool", "spatial", "logits"):
        theirs = torch.as_tensor(getattr(expected, name))
        scale = float(theirs.abs().max())
        assert float((getattr(features, name) - theirs).abs().max()) < 1e-4 * scale, name

    one = [network(image[None]) for image in images]
    grey = network(images[:1, :1])
    coloured = network(images[:1, :1].expand(-1, 3, -1, -1))
    for name in ("pool", "spatial", "logits"):
        alone = torch.cat([getattr(each, name) for each in one])
        torch.testing.assert_close(alone, getattr(features, name), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(getattr(grey, name), getattr(coloured, name))

    # A resize that centres pixels is another one: this is what makes ports differ.
    centred = F.interpolate(images.float(), 299, mode="bilinear").round().to(torch.uint8)
    other = network(centred)
    for name in ("pool", "spatial"):
        ours, theirs = getattr(features, name), getattr(other, name)
        assert float((ours - theirs).norm() / ours.norm()) > 0.01, name
