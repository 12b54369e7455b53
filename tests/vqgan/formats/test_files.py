"""One tokenizer's weights and settings out of whatever people have on disk, and nothing else of it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from codegrid.engine.checkpoint import make_header
from codegrid.engine.errors import InputError
from tests.helpers.configs import ROOT
from vqgan.formats.files import Contents, open_public

PUBLIC = Path(__file__).parents[2] / "fixtures" / "public"


def open_fixture(name: str, ema: bool | None = None) -> Contents:
    return open_public(str(PUBLIC / name), None, ema)


def read_weights(name: str) -> dict[str, Tensor]:
    """The tensors of a fixture that torch reads without help."""
    weights: dict[str, Tensor] = torch.load(PUBLIC / name, weights_only=True)
    return weights


WHOLE = {  # fixture -> tensors of its tokenizer, class in its config, what else is in it
    "taming_vq/last.ckpt": (
        301, "taming.models.vqgan.VQModel",
        {"discriminator": 16, "perceptual loss": 7, "callbacks": 2, "optimizer": 2},
    ),
    "taming_vq/transformer.ckpt": (
        179, "taming.models.vqgan.VQModel", {"transformer": 3, "callbacks": 2, "optimizer": 2},
    ),
    "taming_gumbel/last.ckpt": (
        181, "taming.models.vqgan.GumbelVQ",
        {"discriminator": 16, "perceptual loss": 7, "callbacks": 2, "optimizer": 2},
    ),
    "ldm_vq/full.ckpt": (
        129, "ldm.models.autoencoder.VQModelInterface",
        {"U-Net": 1, "averages of other parts": 3, "conditioning model": 1, "noise schedule": 2, "callbacks": 2, "optimizer": 2},
    ),
    "ibq/tiny.ckpt": (
        151, "src.IBQ.models.ibqgan.IBQ",
        {"last weights": 151, "averages of other parts": 4, "discriminator": 2, "perceptual loss": 2},
    ),
    "open_magvit2": (
        82, "src.Open_MAGVIT2.models.lfqgan.VQModel",
        {"last weights": 82, "averages of other parts": 4, "discriminator": 2, "perceptual loss": 2},
    ),
    "llamagen/training.pt": (151, None, {"last weights": 151, "discriminator": 1}),
    "llamagen/vq_tiny.pt": (184, None, {}),
    "maskgit_vqgan": (66, "MaskGitVQGAN", {}),
    "movqgan": (219, "movqgan.models.vqgan.MOVQ", {}),
    "diffusers_vq": (155, "VQModel", {}),
    "diffusers_vq_bin": (187, "VQModel", {}),
    "diffusers_movq": (215, "VQModel", {}),
    "diffusers_amused": (105, "VQModel", {}),
    "titok": (75, None, {}),
    "titok_legacy": (110, None, {}),
    "var_vqvae": (168, None, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_becomes_one_tokenizer_and_the_rest_is_counted(name: str) -> None:
    contents = open_fixture(name)
    count, target, ignored = WHOLE[name]
    assert len(contents.file.tensors) == count
    assert contents.file.target == target
    assert contents.ignored == ignored
    assert contents.licence == "unknown"
    file = Path(contents.origin)
    assert contents.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_and_settings_are_the_files_own() -> None:
    contents = open_fixture("diffusers_vq")
    expected = load_file(PUBLIC / "diffusers_vq" / "diffusion_pytorch_model.safetensors")
    assert contents.file.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == torch.float16
        assert torch.equal(contents.file.tensors[name], value.float())
    described = json.loads((PUBLIC / "diffusers_vq" / "config.json").read_text())
    assert contents.file.settings == described


def test_averaged_weights_are_those_of_the_names_without_dots() -> None:
    state = read_weights("ibq/tiny.ckpt")["state_dict"]
    averaged, last = open_fixture("ibq", ema=True), open_fixture("ibq", ema=False)
    assert averaged.remarks == last.remarks == ()
    assert open_fixture("ibq").remarks == (
        "its averaged weights are taken; ema=false takes the last ones",
    )
    for name in averaged.file.tensors:
        assert torch.equal(averaged.file.tensors[name], state[f"model_ema.{name.replace('.', '')}"])
        assert torch.equal(last.file.tensors[name], state[name])
    assert averaged.file.averaged == last.file.averaged == averaged.file.tensors.keys()
    assert last.ignored["averaged weights"] == 151


def test_averaged_weights_beside_the_model_are_taken() -> None:
    content = read_content(PUBLIC / "llamagen" / "training.pt")
    for ema, key in ((None, "ema"), (True, "ema"), (False, "model")):
        tensors = open_fixture("llamagen/training.pt", ema).file.tensors
        assert all(torch.equal(tensors[name], value) for name, value in content[key].items())
    pairs = zip(content["model"].values(), content["ema"].values(), strict=True)
    assert not all(torch.equal(last, averaged) for last, averaged in pairs)


def read_content(file: Path) -> Any:
    class Namespace:
        """Stands for argparse's."""

    with torch.serialization.safe_globals([(Namespace, "argparse.Namespace")]):
        return torch.load(file, weights_only=True)


def test_averages_that_are_not_there_are_a_sentence() -> None:
    with pytest.raises(
        InputError, match=r"ema=true, and .* has no averaged weights of its tokenizer"
    ):
        open_fixture("ldm_vq/full.ckpt", ema=True)  # whose averages are of another part


def test_a_choice_of_averages_that_is_none_is_a_sentence() -> None:
    with pytest.raises(InputError, match="ema=maybe must be true, false or null"):
        open_fixture("ibq", ema="maybe")  # type: ignore[arg-type]


def save_state(folder: Path, state: dict[str, Any], name: str = "model.pt") -> str:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name)
    return str(folder / name)


def maskgit() -> dict[str, Tensor]:
    return read_weights("maskgit_vqgan/pytorch_model.bin")


def test_a_half_averaged_tokenizer_is_refused_unless_the_last_weights_are_asked_for(
    tmp_path: Path,
) -> None:
    state = maskgit()
    ema = {f"model_ema.{name.replace('.', '')}": value for name, value in state.items()}
    del ema["model_ema.encoderconv_inweight"]
    source = save_state(tmp_path, {**state, **ema})
    for choice in (None, True):
        with pytest.raises(
            InputError, match=r"missing among them \(encoder\.conv_in\.weight\); use ema=false"
        ):
            open_public(source, None, choice)
    assert len(open_public(source, None, False).file.tensors) == 66


def test_movqgans_averages_of_each_part_are_read(tmp_path: Path) -> None:
    state = maskgit()
    averaged = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        averaged[f"ema_{part}.{rest.replace('.', '')}"] = value + 1
    counters = {f"ema_{part}.num_updates": torch.tensor(3) for part in ("encoder", "decoder")}
    contents = open_public(save_state(tmp_path, {**state, **averaged, **counters}), None, None)
    assert torch.equal(
        contents.file.tensors["encoder.mid.0.norm1.bias"], state["encoder.mid.0.norm1.bias"] + 1
    )
    assert contents.ignored == {"last weights": 66, "averages of other parts": 2}


PREFIXES = [
    "", "module.", "first_stage_model.", "vq_model.", "module.first_stage_model.", "model.vqvae.", "_orig_mod.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", ["", "state_dict", "model", "net"])
def test_a_tokenizer_is_recognised_under_any_prefix(tmp_path: Path, prefix: str, key: str) -> None:
    expected = maskgit()
    state: dict[str, Any] = {prefix + name: value for name, value in expected.items()}
    state[f"{prefix}loss.discriminator.main.0.weight"] = torch.ones(1)
    contents = open_public(save_state(tmp_path, {key: state} if key else state), None, None)
    assert contents.file.tensors.keys() == expected.keys()
    assert contents.ignored == {"discriminator": 1}


def test_weights_that_nobody_knows_stay_with_the_tokenizer(tmp_path: Path) -> None:
    """A weight left over is an error, which the format has to see."""
    state = {**maskgit(), "surprise.weight": torch.ones(1)}
    assert "surprise.weight" in open_public(save_state(tmp_path, state), None, None).file.tensors


def test_the_condition_of_a_transformer_is_not_its_tokenizer(tmp_path: Path) -> None:
    expected = maskgit()
    state = {f"cond_stage_model.{name}": value + 1 for name, value in expected.items()}
    state |= {f"first_stage_model.{name}": value for name, value in expected.items()}
    contents = open_public(save_state(tmp_path, state), None, None)
    assert torch.equal(
        contents.file.tensors["encoder.conv_out.bias"], expected["encoder.conv_out.bias"]
    )
    assert contents.ignored == {"conditioning model": 66}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "holds no weights: no dictionary of names and tensors"),
        ([torch.ones(1)], "holds no weights"),
        ({"epoch": 3, "state_dict": {}}, "holds no weights"),
    ],
)
def test_a_file_without_weights_is_a_sentence(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        open_public(save_state(tmp_path, content), None, None)


def test_two_tokenizers_in_a_file_are_a_sentence(tmp_path: Path) -> None:
    state = maskgit()
    with pytest.raises(InputError, match=r"holds 2 sets of weights \(a, b\)"):
        open_public(save_state(tmp_path, {"a": state, "b": state}), None, None)
    twice = {f"{prefix}.{name}": value for prefix in ("a", "b") for name, value in state.items()}
    with pytest.raises(InputError, match=r"several tokenizers, with the prefixes a\., b\."):
        open_public(save_state(tmp_path, twice), None, None)


def test_what_has_no_encoder_and_decoder_comes_whole_for_a_format_to_name(tmp_path: Path) -> None:
    state = {"transformer.tok_emb.weight": torch.ones(2), "head.bias": torch.ones(1)}
    assert (
        open_public(save_state(tmp_path, {"state_dict": state}), None, None).file.tensors.keys()
        == state.keys()
    )


def test_lightnings_own_averages_are_told_from_the_last_weights(tmp_path: Path) -> None:
    last = maskgit()
    averaged = {name: value + 1 for name, value in last.items()}
    source = save_state(tmp_path, {"state_dict": averaged, "current_model_state": last})
    for ema, expected in ((None, averaged), (False, last)):
        value = open_public(source, None, ema).file.tensors["encoder.conv_out.bias"]
        assert torch.equal(value, expected["encoder.conv_out.bias"])


def test_a_run_of_this_program_is_not_imported(tmp_path: Path) -> None:
    source = save_state(tmp_path, {"codegrid": make_header("vqgan", {}), "state_dict": maskgit()})
    with pytest.raises(InputError, match="is a checkpoint of Codegrid already"):
        open_public(source, None, None)


def test_parts_of_a_safetensors_file_are_read_together(tmp_path: Path) -> None:
    state = maskgit()
    names = sorted(state)
    parts = {
        "model-00001-of-00002.safetensors": names[:30],
        "model-00002-of-00002.safetensors": names[30:],
    }
    for part, chosen in parts.items():
        save_file({name: state[name].clone() for name in chosen}, tmp_path / part)
    index = {"weight_map": {name: part for part, chosen in parts.items() for name in chosen}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = b"".join((tmp_path / part).read_bytes() for part in sorted(parts))
    for source in (
        tmp_path,
        tmp_path / "model.safetensors.index.json",
        tmp_path / sorted(parts)[0],
    ):
        contents = open_public(str(source), None, None)
        assert contents.file.tensors.keys() == state.keys()
        assert all(torch.equal(contents.file.tensors[name], state[name]) for name in names)
        assert contents.sha256 == hashlib.sha256(whole).hexdigest()
    (tmp_path / sorted(parts)[1]).unlink()
    with pytest.raises(InputError, match="lists 1 parts that are not there, model-00002-of-00002"):
        open_public(str(tmp_path), None, None)


def test_a_damaged_safetensors_file_is_a_sentence(tmp_path: Path) -> None:
    source = PUBLIC / "diffusers_vq" / "diffusion_pytorch_model.safetensors"
    file = tmp_path / "model.safetensors"
    data = source.read_bytes()
    for length in (0, 5, 9, 1000, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(InputError, match="model.safetensors is damaged"):
            open_public(str(file), None, None)


def test_a_wrong_checksum_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({name: torch.full((99,), 7.0) for name in ("encoder.a", "decoder.a")}, file)
    data = bytearray(file.read_bytes())
    data[data.index(torch.full((9,), 7.0).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        InputError, match="is damaged: the checksum of model/data/0 is wrong; fetch it again"
    ):
        open_public(str(file), None, None)


CARD = "---\nlicense: {}\ntags:\n- vq\n---\n# A model\n"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD.format("mit"), "mit"),
        (CARD.format("[mit, apache-2.0]"), "mit, apache-2.0"),
        (CARD.format("other\nlicense_name: openrail++"), "openrail++"),
        ("# A model\n---\nlicense: no\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\ntags: vq\n---\n", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_model_card(tmp_path: Path, card: str, licence: str) -> None:
    source = save_state(tmp_path, maskgit())
    (tmp_path / "README.md").write_text(card)
    assert open_public(source, None, None).licence == licence


def test_a_licence_in_the_file_comes_first(tmp_path: Path) -> None:
    save_file(
        {"encoder.a": torch.ones(1), "decoder.a": torch.ones(1)},
        tmp_path / "a.safetensors",
        {"license": "mit"},
    )
    (tmp_path / "README.md").write_text(CARD.format("apache-2.0"))
    assert open_public(str(tmp_path), None, None).licence == "mit"


MEASURE = """
import sys
import torch
from vqgan.formats.files import open_public

def resident(which):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(which)) * 1024

torch.ones(9).clone().sum()
open_public(sys.argv[1], None, None)
for file in sys.argv[2:]:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = resident("VmRSS")
    contents = open_public(file, None, None)
    copies = {name: torch.empty(contents.file.tensors[name].shape) for name in contents.file.tensors}
    for name in contents.file.tensors:
        copies[name].copy_(contents.file.tensors[name])
    print(sum(value.nbytes for value in copies.values()), resident("VmHWM") - before)
    del copies
"""


@pytest.mark.slow
def test_reading_takes_little_more_memory_than_the_tokenizer(tmp_path: Path) -> None:
    """Of files of 180 MB, in which a tokenizer of 50 MB lies beside what an optimizer or another network has."""
    big = {f"{side}.{i}": torch.rand(1 << 19) for side in ("encoder", "decoder") for i in range(12)}
    more = {f"model.diffusion_model.{i}": torch.rand(1 << 19) for i in range(64)}
    content = {"state_dict": big, "optimizer_states": [{"state": more}]}
    torch.save(content, tmp_path / "new.ckpt")
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    prefixed = {f"first_stage_model.{name}": value for name, value in big.items()}
    save_file(prefixed | more, tmp_path / "whole.safetensors")
    files = [str(tmp_path / name) for name in ("new.ckpt", "old.ckpt", "whole.safetensors")]
    small = save_state(tmp_path / "small", {"encoder.a": torch.ones(1), "decoder.a": torch.ones(1)})
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, small, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for line, file in zip(process.stdout.splitlines(), files, strict=True):
        size, grown = map(int, line.split())
        assert size == sum(value.nbytes for value in big.values())
        assert grown < 1.3 * size, f"{file}: {grown / size:.2f} times the tokenizer"
