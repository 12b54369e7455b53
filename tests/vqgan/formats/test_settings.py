"""The config beside public weights is chosen by what it says of their sizes, whatever its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codegrid.engine.errors import InputError
from vqgan.formats.base import PublicFile
from vqgan.formats.files import open_public

PUBLIC = Path(__file__).parents[2] / "fixtures" / "public"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A taming checkpoint alone in its folder: 64 codes of 16 numbers, width 32, three levels of two blocks."""
    return Path(shutil.copy(PUBLIC / "taming_vq" / "last.ckpt", tmp_path / "model.ckpt"))


def describe(**changes: Any) -> dict[str, Any]:
    """Taming's config of these weights, with changes of its parameters or of its network's sizes."""
    config: dict[str, Any] = yaml.safe_load((PUBLIC / "taming_vq" / "last.yaml").read_text())
    params = config["model"]["params"]
    for name, value in changes.items():
        (params if name in params else params["ddconfig"])[name] = value
    return config


def write(weights: Path, name: str, config: Any) -> Path:
    file = weights.parent / name
    file.write_text(json.dumps(config) if name.endswith(".json") else yaml.safe_dump(config))
    return file


def open_file(weights: Path, config: Path | None = None) -> tuple[PublicFile, tuple[str, ...]]:
    contents = open_public(str(weights), str(config) if config else None, None)
    return contents.file, contents.remarks


@pytest.mark.parametrize("name", ["a.yaml", "b.yml", "c.json"])
def test_a_config_of_any_name_is_read(weights: Path, name: str) -> None:
    write(weights, name, describe())
    file, remarks = open_file(weights)
    assert file.target == "taming.models.vqgan.VQModel"
    assert file.settings["ddconfig"]["attn_resolutions"] == [8, 16]
    assert remarks == ()


def test_without_a_config_there_are_no_settings(weights: Path) -> None:
    file, remarks = open_file(weights)
    assert (file.target, file.settings, remarks) == (None, {}, ())


@pytest.mark.parametrize(
    "change",
    [
        {"n_embed": 32},
        {"embed_dim": 8},
        {"z_channels": 64},
        {"ch": 64},
        {"ch_mult": [1, 2]},
        {"num_res_blocks": 1},
    ],
    ids=str,
)
def test_a_config_of_other_sizes_is_not_used_beside_and_refused_by_name(
    weights: Path, change: dict[str, Any]
) -> None:
    other = write(weights, "other.yaml", describe(**change))
    file, (remark,) = open_file(weights)
    assert file.settings == {}
    word = next(iter(change))
    assert remark.startswith(f"{other} is not used, for it is of other weights: ")
    assert word in remark
    with pytest.raises(InputError, match=rf"config={other} is not of {weights}: .*{word}"):
        open_file(weights, other)
    write(weights, "right.yaml", describe())
    file, remarks = open_file(weights)
    assert file.target == "taming.models.vqgan.VQModel"
    assert remarks == ()


def test_two_configs_that_fit_are_a_sentence_that_names_the_setting(weights: Path) -> None:
    one = write(weights, "one.yaml", describe())
    two = write(weights, "two.yaml", describe(attn_resolutions=[]))
    with pytest.raises(InputError, match=rf"{one} and {two} fit .*: config=<file>"):
        open_file(weights)
    assert open_file(weights, two)[0].settings["ddconfig"]["attn_resolutions"] == []
    write(weights, "two.yaml", describe())
    assert open_file(weights)[0].settings["ddconfig"]["attn_resolutions"] == [8, 16]


def test_files_of_something_else_beside_the_weights_do_no_harm(weights: Path) -> None:
    write(weights, "metrics.json", {"psnr": 20.0})
    write(weights, "tokens.json", [{"class_id": 1, "tokens": [1, 2]}])
    write(
        weights,
        "prior.yaml",
        {"model": {"target": "a.GPT", "params": {"vocab_size": 64, "n_layer": 2}}},
    )
    (weights.parent / "broken.yaml").write_text("a: [")
    (weights.parent / "tagged.yaml").write_text("!!python/object/apply:os.system ['true']")
    (weights.parent / "image.json").write_bytes(b"\xff\xfe\x00")
    (weights.parent / "large.json").write_text(json.dumps(describe()) + " " * 1_000_000)
    write(weights, "right.yaml", describe())
    assert open_file(weights)[0].target == "taming.models.vqgan.VQModel"


def test_the_tokenizers_part_of_a_larger_config_is_taken(weights: Path) -> None:
    tokenizer = describe()["model"]
    node = {"target": tokenizer["target"], "params": tokenizer["params"]}
    other = {"target": "other.VQModel", "params": tokenizer["params"]}
    whole = {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "first_stage_config": node,
                "cond_stage_config": other,
                "unet_config": {"target": "a.UNet", "params": {"num_res_blocks": 5}},
            },
        }
    }
    write(weights, "ldm.yaml", whole)
    file, _ = open_file(weights)
    assert file.target == tokenizer["target"]
    assert file.settings == tokenizer["params"]


def test_lightnings_way_of_naming_a_class_is_read(weights: Path) -> None:
    params = describe()["model"]["params"]
    write(
        weights, "c.yaml", {"model": {"class_path": "src.IBQ", "init_args": params}, "trainer": {}}
    )
    assert open_file(weights)[0].target == "src.IBQ"


def test_two_models_in_one_config_are_a_sentence(weights: Path) -> None:
    params = describe()["model"]["params"]
    models = [{"target": name, "params": params} for name in ("a.VQModel", "b.VQModel")]
    config = write(weights, "two.yaml", {"models": models})
    for choice in (None, config):
        with pytest.raises(
            InputError, match=r"describes 2 models that fit .* \(a\.VQModel, b\.VQModel\)"
        ):
            open_file(weights, choice)


def test_settings_without_a_class_need_two_sizes_that_agree(weights: Path) -> None:
    write(weights, "a.json", {"vocab_size": 64})
    assert open_file(weights)[0].settings == {}
    config = {"codebook_size": 64, "codebook_embed_dim": 16}
    write(weights, "b.json", config)
    assert open_file(weights)[0].settings == config


def test_a_config_with_words_that_nobody_knows_is_used_if_it_is_the_only_one(weights: Path) -> None:
    """So that a new format is one file."""
    write(weights, "a.yaml", {"model": {"target": "new.Tokenizer", "params": {"colours": 7}}})
    assert open_file(weights)[0].settings == {"colours": 7}
    write(weights, "b.yaml", {"model": {"target": "new.Other", "params": {"colours": 8}}})
    assert open_file(weights)[0].settings == {}


def test_the_checkpoints_own_settings_are_used_without_a_file(tmp_path: Path) -> None:
    source = shutil.copy(PUBLIC / "llamagen" / "training.pt", tmp_path)
    file = open_public(source, None, None).file
    assert file.settings["codebook_l2_norm"] is True
    assert file.settings["vq_model"] == "VQ-16"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("none.yaml", None, r"none\.yaml can't be read as a config"),
        ("broken.yaml", "a: [", r"broken\.yaml can't be read as a config"),
        ("broken.json", "{", r"broken\.json can't be read as a config"),
        (
            "code.yaml",
            "!!python/object/apply:os.system ['true']",
            r"code\.yaml can't be read as a config",
        ),
        ("empty.yaml", "", r"empty\.yaml describes no model"),
        ("list.json", "[1]", r"list\.json describes no model"),
    ],
)
def test_a_config_that_can_not_be_read_is_a_sentence(
    weights: Path, name: str, text: str | None, sentence: str
) -> None:
    config = weights.parent / name
    if text is not None:
        config.write_text(text)
    with pytest.raises(InputError, match=sentence) as refusal:
        open_file(weights, config)
    assert "\n" not in str(refusal.value)


def test_a_config_that_repeats_itself_without_end_is_read_once(weights: Path) -> None:
    lines = ["a0: &a0 [1, 2]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    (weights.parent / "bomb.yaml").write_text("\n".join(lines))
    assert open_file(weights)[0].settings == {}


def test_a_code_of_signs_is_measured_by_the_decoders_input(tmp_path: Path) -> None:
    state = {
        "encoder.conv_out.weight": torch.ones(6, 4, 1, 1),
        "decoder.conv_in.weight": torch.ones(4, 6, 3, 3),
    }
    torch.save(state, tmp_path / "a.pt")
    for codes, settings in ((64, {"n_embed": 64, "embed_dim": 6}), (32, {})):
        (tmp_path / "a.json").write_text(json.dumps({"n_embed": codes, "embed_dim": 6}))
        assert open_public(str(tmp_path), None, None).file.settings == settings
