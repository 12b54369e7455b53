"""Public networks of timm in whose features sets of images are compared."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.evaluation.judging import make_feature_sets
from codegrid.evaluation.networks import (
    TimmNetwork,
    UnavailableNetwork,
    check_networks,
    find_network_weights,
)
from prior.pipeline import check_evaluation
from tests.helpers.bands import Bands
from tests.helpers.configs import compose_config, list_options
from tests.helpers.evaluation import choose_settings

VIT, CONVNEXT = "test_vit.r160_in1k", "test_convnext.r160_in1k"  # the smallest of timm

Kit = tuple[Any, Path]


def test_without_timm_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UnavailableNetwork, match=r"timm is missing: pip install codegrid\[features\]"
    ):
        TimmNetwork(VIT, 64, head=False, fetch=False)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """timm, and a folder of random weights of two networks."""
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("weights")
    for name in (VIT, CONVNEXT):
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False)
        start = network.state_dict()  # whose norms give features of about 1
        state = {key: value + torch.randn_like(value) * 0.05 for key, value in start.items()}
        save_file(state, folder / f"{name}.safetensors")
    return timm, folder


def pictures(n: int = 3, side: int = 90) -> Tensor:
    random = np.random.default_rng(0)
    waves = random.random((n, 3, side, 1)) * random.random((n, 3, 1, side))
    return torch.from_numpy((waves * 255).astype(np.uint8))


def resize_by_pillow(images: Tensor, side: int, how: Image.Resampling) -> Tensor:
    """In [0, 1]."""
    sheets = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    resized = [np.array(sheet.resize((side, side), how)) for sheet in sheets]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("name", [VIT, CONVNEXT])
@pytest.mark.parametrize("head", [False, True])
def test_features_are_those_that_timm_computes_of_images_as_the_network_wants_them(
    kit: Kit, name: str, head: bool
) -> None:
    timm, folder = kit
    extractor = TimmNetwork(name, 160, head, fetch=False, folder=str(folder))
    network = timm.create_model(name, pretrained=False).eval()
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    known = network.pretrained_cfg
    mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))

    @torch.no_grad()
    def expect(how: Image.Resampling, std: Tensor) -> Tensor:
        maps = network.forward_features((resize_by_pillow(pictures(), 160, how) - mean) / std)
        outputs: Tensor = network.forward_head(maps, pre_logits=not head)
        return outputs

    features, logits = extractor(pictures())
    assert logits is None
    # Pillow rounds to whole levels after each direction.
    near = {"atol": 0.03, "rtol": 0.03}
    expected = expect(Image.Resampling.BICUBIC, std)
    assert expected.std() > 0.3
    torch.testing.assert_close(features, expected, **near)
    for wrong in (expect(Image.Resampling.NEAREST, std), expect(Image.Resampling.BICUBIC, std / 2)):
        assert not torch.allclose(features, wrong, **near)
    assert extractor.name == (f"{name}, with its head" if head else name)
    digest = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    assert (extractor.hash, extractor.resize) == (digest[:12], "bicubic, antialiased, to 160")


def test_a_transformer_of_another_size_has_its_embeddings_of_places_interpolated(kit: Kit) -> None:
    _, folder = kit
    small = TimmNetwork(VIT, 64, head=False, fetch=False, folder=str(folder))
    assert small(pictures(side=64))[0].shape == small(pictures(side=30))[0].shape
    grey = torch.full((2, 1, 64, 64), 7, dtype=torch.uint8)
    assert torch.equal(small(grey)[0], small(grey.expand(-1, 3, -1, -1))[0])


def test_batches_do_not_change_features(kit: Kit) -> None:
    _, folder = kit
    network = TimmNetwork(VIT, 64, head=False, fetch=False, folder=str(folder))
    images = pictures(6)
    parts = torch.cat([network(part)[0] for part in images.split(2)])
    torch.testing.assert_close(network(images)[0], parts, atol=1e-5, rtol=1e-4)
    shifted = network(images.clamp(max=254) + 1)[0]
    assert not torch.allclose(shifted, parts, atol=1e-5)  # one grey level is seen


def test_a_file_that_lacks_a_weight_is_refused_whatever_the_head_is(
    kit: Kit, tmp_path: Path
) -> None:
    """timm itself loads the rest, and leaves this one random, if the head is left out."""
    state = load_file(kit[1] / f"{VIT}.safetensors")
    state.pop("blocks.1.mlp.fc1.weight")
    save_file(state, tmp_path / f"{VIT}.safetensors")
    with pytest.raises(InputError, match=rf"{VIT}.safetensors does not hold the weights of {VIT}"):
        TimmNetwork(VIT, 160, head=False, fetch=False, folder=str(tmp_path))
    (tmp_path / f"{VIT}.safetensors").write_bytes(b"text")
    with pytest.raises(InputError, match="does not hold the weights"):
        TimmNetwork(VIT, 160, head=False, fetch=False, folder=str(tmp_path))


def test_missing_weights_are_not_fetched_against_the_users_will_and_the_place_is_named(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UnavailableNetwork) as refused:
        TimmNetwork(VIT, 160, head=False, fetch=False, folder=str(tmp_path))
    assert str(refused.value) == (
        f"the weights of {VIT} are not at hand, and fetch=false; put model.safetensors of timm/{VIT} on the Hugging Face Hub into "
        f"{tmp_path} as {VIT}.safetensors"
    )


def test_a_download_that_fails_is_a_reason(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, file: str) -> str:
        raise OSError(f"no route to {repository}/{file}")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(UnavailableNetwork, match=r"can't be fetched \(.*no route to timm/test_vit"):
        TimmNetwork(VIT, 160, head=False, fetch=True)


def test_weights_that_the_hub_has_given_before_are_read_from_its_cache(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(kit[1] / f"{VIT}.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: file)
    assert TimmNetwork(VIT, 160, head=False, fetch=False).network is not None


def test_weights_that_are_not_on_the_hub_are_named_with_their_place(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        UnavailableNetwork, match=r"not on the Hugging Face Hub; put them into .* as gcvit_tiny"
    ):
        find_network_weights("gcvit_tiny.in1k", None, fetch=True, folder=str(tmp_path))


@pytest.mark.parametrize("key", ["real", "ratio", "proxy", "ratio_mine"])
def test_a_key_that_would_give_scores_the_names_of_others_is_refused(key: str) -> None:
    with pytest.raises(
        InputError, match=f"networks.{key} would give its scores the names of others"
    ):
        check_networks({key: {"name": VIT, "size": 64, "head": False}})


def test_a_network_that_lacks_a_setting_is_refused() -> None:
    with pytest.raises(InputError, match="networks.mine has name, and needs name, size and head"):
        check_networks({"mine": {"name": VIT}})


def test_a_name_that_timm_does_not_have_is_refused_with_the_closest(kit: Kit) -> None:
    with pytest.raises(InputError, match=r"no weights of the name test_vit.r160; .* test_vit.r160"):
        TimmNetwork("test_vit.r160", 160, head=False, fetch=False)


def test_impossible_networks_are_refused_before_any_work(kit: Kit) -> None:
    wrong = {"mine": {"name": "test_vit.r160", "size": 64, "head": False}}
    with pytest.raises(InputError, match="no weights of the name test_vit.r160"):
        check_networks(wrong)
    with pytest.raises(InputError, match="networks.mine.size=0"):
        check_networks({"mine": {**wrong["mine"], "size": 0}})
    with pytest.raises(InputError, match=rf"{VIT} takes no images of size=50 .*another size"):
        TimmNetwork(VIT, 50, head=False, fetch=False, folder=str(kit[1]))


@pytest.mark.parametrize("option", list_options("networks"))
def test_every_network_in_conf_is_one_of_timm_with_weights_on_the_hub(
    kit: Kit, option: str
) -> None:
    from omegaconf import OmegaConf

    from tests.helpers.configs import ROOT

    about = OmegaConf.load(ROOT / "conf" / "networks" / f"{option}.yaml")[option]
    assert set(about) == {"name", "size", "head"}
    known = kit[0].get_pretrained_cfg(about.name)
    assert known.hf_hub_id.startswith("timm/")
    assert bool(known.num_classes) or not about.head


def test_networks_are_chosen_as_a_list_and_changed_by_their_key() -> None:
    words = ("networks=[dinov2,clip]", "networks.dinov2.size=336")
    networks = compose_config("stage=evaluate", *words).networks
    assert list(networks) == ["dinov2", "clip"]
    assert (networks.dinov2.size, networks.clip.size, networks.clip.head) == (336, 224, True)
    check_networks(networks)
    of_pipeline = compose_config("stage=pipeline", "networks@evaluate.networks=[mae]")
    assert list(of_pipeline.evaluate.networks) == ["mae"]


def test_impossible_networks_are_refused_before_a_pipeline_trains() -> None:
    evaluate = compose_config("stage=pipeline").evaluate
    check_evaluation(evaluate)
    for networks, message in {
        None: r"networks=None is no mapping .*networks@evaluate.networks=\[dinov2\]",
        "real": "networks.real would give its scores the names of others",
    }.items():
        evaluate.networks = networks and {networks: {"name": VIT, "size": 64, "head": False}}
        with pytest.raises(InputError, match=message):
            check_evaluation(evaluate)


def test_each_network_has_its_scores_or_the_reason_why_not(kit: Kit, tmp_path: Path) -> None:
    networks = {
        "mine": {"name": VIT, "size": 64, "head": False},
        "absent": {"name": "vit_tiny_patch16_224.augreg_in21k", "size": 224, "head": False},
    }
    settings = choose_settings(networks=networks, features_dir=str(kit[1]))
    sets = make_feature_sets(settings, Bands(tmp_path), None)
    assert [each.suffix for each in sets] == ["", "_proxy", "_mine", "_absent"]
    sets[2].add("judged", torch.zeros(2, 5, 24, 40, dtype=torch.int32))  # of its three colours
    assert sets[2].features["judged"][0].shape[0] == 2
    assert "vit_tiny_patch16_224.augreg_in21k.safetensors" in sets[3].reason  # type: ignore[attr-defined]
