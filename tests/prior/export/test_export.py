"""stage=export of a prior: one folder for both stages, and back."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from prior import Prior
from prior.export.joined import join_prior, read_prior_origin
from prior.export.safetensors import PRIOR_FACTS, PRIOR_WEIGHTS
from prior.load import load_prior
from tests.helpers.commands import Command, read_mistake
from tests.helpers.configs import ROOT
from tests.helpers.exports import needs_onnx
from tests.helpers.runs import SMALL_PRIOR, save_prior_run
from vqgan import Tokenizer
from vqgan.export.discover import choose_exporters, list_exporters

FIXTURE = ROOT / "tests" / "fixtures" / "run_of_0_1" / "prior"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [SMALL_PRIOR, ["prior=maskgit", *SMALL_PRIOR], ["prior=bigram"]],
    ids=["gpt", "maskgit", "bigram"],
)
def test_an_exported_prior_draws_the_samples_of_its_run(
    words: list[str], command: Command, tmp_path: Path
) -> None:
    save_prior_run(tmp_path / "run", *words, classes=0 if "prior=bigram" in words else 3)
    assert command("stage=export", "ckpt=run", "run_dir=out") == 0
    again, trained = Prior.from_pretrained("out"), Prior.from_pretrained("run")
    assert again.classes == trained.classes
    assert torch.equal(again.sample(4, output="tensor"), trained.sample(4, output="tensor"))
    codes = trained.sample(4, output="codes")
    label = 1 if trained.classes.names else None
    assert torch.equal(
        again.nats_of_codes(codes, label=label), trained.nats_of_codes(codes, label=label)
    )
    tokenizer = Tokenizer.from_pretrained("out")
    assert torch.equal(
        tokenizer.decode_codes(codes, output="tensor"),
        trained.tokenizer.decode_codes(codes, output="tensor"),
    )
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "Prior.from_pretrained" in readme
    assert "image-generation" in readme
    names = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert PRIOR_WEIGHTS in names
    assert PRIOR_FACTS in names


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_example_in_the_card_draws_pictures_with_onnxruntime_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    save_prior_run(tmp_path / "run", classes=3)
    assert command("stage=export", "ckpt=run", "format=onnx", "run_dir=out") == 0
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    [loop] = [block for block in blocks if "prior.onnx" in block]
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, np.ndarray] = {}
    np.random.seed(0)  # the example draws by it
    exec(compile(loop, "README.md", "exec"), names)
    indices = names["indices"]
    assert (indices.shape, indices.dtype) == ((16, 4, 4), np.int64)
    assert len(np.unique(indices)) > 4
    decoder = onnxruntime.InferenceSession("decoder.onnx")
    [pictures] = decoder.run(None, {"indices": indices})
    assert pictures.shape == (16, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["format=diffusers"], "format=diffusers is of tokenizers alone, and a prior can be"),
        (["ckpt=bigram", "format=onnx"], "format=onnx: Bigram has no network"),
    ],
)
def test_what_has_no_place_for_a_prior_is_a_sentence(
    words: list[str],
    sentence: str,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_prior_run(tmp_path / "run")
    save_prior_run(tmp_path / "bigram", "prior=bigram")
    assert command("stage=export", "ckpt=run", *words, "run_dir=out") == 2
    assert sentence in read_mistake(capsys)
    assert not (tmp_path / "out").exists()


def test_a_card_has_the_figures_of_the_prior_and_the_settings_of_its_tokenizer() -> None:
    trained = load_prior(FIXTURE)
    origin = read_prior_origin(FIXTURE, trained)
    assert origin.stage == "prior"
    assert origin.config["id"] == trained.config["id"]
    assert {"model", "quantizer", "data"} <= origin.config.keys()
    assert "nats_per_token" in origin.figures
    assert "samples" in origin.pictures
    assert "weights) draws codes of new images" in origin.summary


def test_joined_formats_have_the_names_of_the_tokenizers_and_are_not_formats_themselves() -> None:
    trained = load_prior(FIXTURE)
    joined = join_prior(choose_exporters(["safetensors", "onnx"]), trained)
    assert [each.name for each in joined] == ["safetensors", "onnx"]
    of_tokenizers = {"safetensors", "onnx", "pt2", "diffusers", "titok", "var"}
    assert set(list_exporters()) == of_tokenizers
