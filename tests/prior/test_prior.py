"""`from prior import Prior`: samples, completions and likelihoods in a script, the same as those of the commands."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.samples import ArraySamples
from codegrid.engine.defaults import read_defaults
from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast
from prior import Prior
from prior.decoding.sampling import Sampler, make_sampler
from prior.judging import measure_nats
from prior.prior import COMPLETED, SamplingSettings
from tests.helpers.commands import Command, lightning_warnings
from tests.helpers.priors import likelihoods
from tests.helpers.runs import save_prior_run, save_tokenizer_run

pytestmark = lightning_warnings

RQ = ["prior=rq", "prior.width=16", "prior.depth=1", "prior.heads=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of priors: `plain` without classes, `classes` with three, `masked` of maskgit."""
    folder = tmp_path_factory.mktemp("runs")
    save_prior_run(folder / "plain")
    save_prior_run(folder / "classes", classes=3)
    small = ["prior.width=16", "prior.depth=1", "prior.heads=2"]
    save_prior_run(folder / "masked", "prior=maskgit", *small)
    return folder


@pytest.fixture(scope="module")
def plain(runs: Path) -> Prior:
    return Prior.from_pretrained(runs / "plain")


@pytest.fixture(scope="module")
def classed(runs: Path) -> Prior:
    return Prior.from_pretrained(runs / "classes")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


def test_a_run_folder_gives_a_prior_and_its_tokenizer(runs: Path) -> None:
    trained = Prior.from_pretrained(str(runs / "classes"))
    assert (trained.K, trained.grid, trained.device.type) == (16, (4, 4), "cpu")
    assert trained.classes.names == ["0", "1", "2"]
    assert not trained.model.training
    assert not trained.tokenizer.training
    assert trained.to("cpu") is trained
    assert (
        repr(trained)
        == "Prior(classes: GPT, 3,328 weights, 4x4 codes out of 16, 3 classes, on cpu)"
    )
    with pytest.raises(InputError, match="ckpt=nowhere does not exist"):
        Prior.from_pretrained("nowhere")


def test_a_tokenizer_is_no_prior(tmp_path: Path) -> None:
    save_tokenizer_run(tmp_path / "model")
    with pytest.raises(InputError, match="stage=prior"):
        Prior.from_pretrained(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "words", "settings"),
    [
        ("plain", [], {}),
        ("plain", ["seed=3", "sampler.top_k=5", "sampler.temperature=0.8"], {"seed": 3, "top_k": 5, "temperature": 0.8}),
        ("plain", ["sampler.grid=5x7", "sampler.top_p=0.9"], {"grid": (5, 7), "top_p": 0.9}),
        ("classes", ["label=[2,-1,0]", "sampler.guidance=2"], {"label": [2, -1, 0], "guidance": 2}),
        ("classes", [], {}),
        ("masked", ["sampler.steps=3"], {"steps": 3}),
        ("masked", ["sampler.order=halton", "sampler.remask=0.3"], {"order": "halton", "remask": 0.3}),
    ],
    ids=str,
)  # fmt: skip
def test_samples_are_those_of_the_command_to_the_bit(
    runs: Path,
    command: Command,
    tmp_path: Path,
    run: str,
    words: list[str],
    settings: dict[str, Any],
) -> None:
    line = ["stage=sample", f"ckpt={runs / run}", "n=7", "batch_size=3", "accelerator=cpu"]
    assert command(*line, "save=[npz]", "run_dir=out", *words) == 0
    trained = Prior.from_pretrained(runs / run)
    codes = trained.sample(7, output="codes", **settings)
    assert torch.equal(codes, torch.load(tmp_path / "out/codes.pt")["codes"].long())
    saved = np.load(tmp_path / "out/samples.npz")["arr_0"]
    pictures = trained.sample(7, batch_size=3, **settings)
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), saved)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_any_machine_has_the_samples_of_its_command(
    precision: str,
    runs: Path,
    plain: Prior,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("codegrid.engine.precision.best_precision", lambda: precision)
    line = ["stage=sample", f"ckpt={runs / 'plain'}", "n=5", "accelerator=cpu", "save=[npz]"]
    assert command(*line, "run_dir=out") == 0
    codes = plain.sample(5, output="codes")
    assert torch.equal(codes, torch.load(tmp_path / "out/codes.pt")["codes"].long())
    pictures = np.stack([np.asarray(picture) for picture in plain.sample(5)])
    assert np.array_equal(pictures, np.load(tmp_path / "out/samples.npz")["arr_0"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "settings"),
    [("sampler.rows=2", {"rows": 2}), ("sampler.region=[0,1,3,4]", {"region": (0, 1, 3, 4)})],
)
def test_completions_are_those_of_the_command_to_the_bit(
    runs: Path,
    plain: Prior,
    photos: Path,
    command: Command,
    tmp_path: Path,
    words: str,
    settings: dict[str, Any],
) -> None:
    image = photos / "cats" / "3.png"
    line = ["stage=sample", f"ckpt={runs / 'plain'}", "n=4", "save=[npz]", "run_dir=out"]
    line += ["accelerator=cpu", f"sampler.init_image={image}"]
    assert command(*line, words) == 0
    saved = torch.load(tmp_path / "out/codes.pt")["codes"].long()
    for picture in (image, str(image), Image.open(image), np.asarray(Image.open(image))):
        assert torch.equal(plain.complete(picture, n=4, output="codes", **settings), saved)


def test_a_sample_depends_on_its_seed_and_number_alone(plain: Prior) -> None:
    codes = plain.sample(5, seed=1, output="codes")
    assert codes.shape == (5, 4, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(plain.sample(3, seed=1, batch_size=2, output="codes"), codes[:3])
    assert not torch.equal(plain.sample(5, seed=2, output="codes"), codes)
    assert torch.equal(plain.sample(5, output="codes"), plain.sample(5, seed=0, output="codes"))


def test_codes_tensors_and_pictures_are_of_the_same_samples(plain: Prior) -> None:
    codes = plain.sample(3, output="codes")
    x = plain.sample(3, output="tensor")
    assert x.dtype == torch.float32
    with autocast(torch.device("cpu")):
        assert torch.equal(x, plain.tokenizer.decode_codes(codes, output="tensor"))
    levels = ((x + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    for picture, expected in zip(plain.sample(3), levels, strict=True):
        assert np.array_equal(np.asarray(picture), expected)


def test_grids_are_tuples_or_texts(plain: Prior) -> None:
    codes = plain.sample(2, grid=(5, 6), output="codes")
    assert codes.shape == (2, 5, 6)
    assert torch.equal(codes, plain.sample(2, grid="5x6", output="codes"))


def test_labels_are_numbers_names_and_arrays_of_them(classed: Prior) -> None:
    expected = classed.sample(4, label=[2, 0], output="codes")
    for label in (
        ["2", "0"],
        (2, 0),
        list(np.array([2, 0])),
        np.array([2, 0]),
        torch.tensor([2, 0]),
    ):
        assert torch.equal(classed.sample(4, label=label, output="codes"), expected)
    assert torch.equal(
        classed.sample(2, label=np.int64(1), output="codes"),  # type: ignore[arg-type]
        classed.sample(2, label=1, output="codes"),
    )


def test_several_images_are_completed_n_times_each(
    plain: Prior, pixels: np.ndarray[Any, Any]
) -> None:
    kept_codes = plain.tokenizer.encode_images(pixels)
    codes = plain.complete(pixels, rows=2, n=2, output="codes")
    assert torch.equal(codes[:, :2], kept_codes[:, :2].repeat_interleave(2, 0))
    assert not torch.equal(codes[0], codes[1])
    assert torch.equal(codes[:2], plain.complete(pixels[0], rows=2, n=2, output="codes"))
    assert len(plain.complete(list(pixels), region=[1, 1, 3, 3])) == 3


@torch.no_grad()
def test_nats_are_those_of_the_codes(plain: Prior, pixels: np.ndarray[Any, Any]) -> None:
    codes = plain.tokenizer.encode_images(pixels)
    expected = -likelihoods(plain.model, codes.flatten(1)).log()
    nats = plain.nats(pixels)
    assert nats.shape == (3,)
    assert torch.allclose(nats, expected, atol=1e-4)
    per_code = plain.nats(list(pixels), per_position=True, batch_size=2)
    assert per_code.shape == (3, 4, 4)
    assert torch.allclose(per_code.double().sum((1, 2)), nats)
    assert torch.equal(plain.nats_of_codes(codes), nats)
    assert plain.nats([]).shape == (0,)


def test_nats_are_those_of_an_evaluation(classed: Prior) -> None:
    codes = classed.sample(5, output="codes")
    labels = np.array([0, 1, 2, 0, 1])
    expected = measure_nats(classed.model, ArraySamples(codes.numpy().astype(np.uint16), labels), 2)
    nats = classed.nats_of_codes(codes, label=labels, per_position=True, batch_size=2)
    assert torch.equal(nats, expected[..., 0])


def test_nats_of_all_codes_of_a_position_sum_to_one(plain: Prior) -> None:
    """The first code's probabilities, by 16 grids that differ in it."""
    codes = torch.zeros(16, 4, 4, dtype=torch.int64)
    codes[:, 0, 0] = torch.arange(16)
    nats = plain.nats_of_codes(codes, per_position=True)[:, 0, 0]
    assert float(nats.neg().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_a_class_changes_the_nats(classed: Prior, pixels: np.ndarray[Any, Any]) -> None:
    of_each = classed.nats(pixels, label=[0, 1, -1])
    for i, label in enumerate((0, 1, -1)):
        assert torch.allclose(classed.nats(pixels[i], label=label), of_each[i : i + 1])
    assert not torch.allclose(classed.nats(pixels, label="2"), of_each)


def test_a_prior_of_several_codebooks_has_nats_of_each(tmp_path: Path) -> None:
    save_prior_run(
        tmp_path / "rq", *RQ, tokenizer_words=["quantizer=residual", "quantizer.num_codebooks=2"]
    )
    trained = Prior.from_pretrained(tmp_path / "rq")
    codes = trained.sample(2, output="codes")
    assert codes.shape == (2, 4, 4, 2)
    assert trained.nats_of_codes(codes, per_position=True).shape == codes.shape
    assert len(trained.sample(2)) == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": 0}, "sampler.temperature=0 must be above 0; sampler.top_k=1 takes"),
        ({"temperature": math.nan}, "sampler.temperature=nan must be a number"),
        ({"top_k": "5"}, "sampler.top_k=5 must be a whole number"),
        ({"top_p": 1.5}, "sampler.top_p=1.5 must be above 0 and at most 1"),
        ({"temprature": 1}, "temprature=1 is no setting of sampling, did you mean temperature"),
        ({"rows": 2}, r"rows=2 is of complete\(image, rows=4\)"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1 image"),
        ({"output": "jpeg"}, "output=jpeg must be one of pil, tensor, array, codes"),
        ({"label": 1}, "label=1 needs a prior of classes"),
        ({"guidance": 2.0}, "sampler.guidance=2.0 needs a prior of classes"),
        ({"grid": (2, 2)}, "sampler.grid=2x2 must be at least 4x4"),
        ({"grid": 3}, "sampler.grid=3 must be at least 4x4"),
        ({"grid": (5, 0)}, "sampler.grid=5x0 must be rows x columns of codes"),
        ({"steps": 4}, "sampler.steps=4 is for priors that draw many codes in one step"),
        (
            {"order": "random"},
            "sampler.order=random is for priors that fill in masked codes, prior=maskgit and diffusion, and GPT",
        ),
        ({"corrector": 1}, "sampler.corrector=1 is for priors that fill in masked codes"),
        ({"remask": 0.2}, "sampler.remask=0.2 is for priors that fill in masked codes"),
        ({"order": "holton"}, "sampler.order=holton must be confidence, random or halton, or null"),
    ],
    ids=str,
)
def test_wrong_settings_get_the_sentences_of_the_command(
    plain: Prior, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        plain.sample(2, **settings)


def test_wrong_images_labels_and_codes_are_sentences(
    plain: Prior, classed: Prior, pixels: np.ndarray[Any, Any]
) -> None:
    def refuse(sentence: str) -> Any:
        return pytest.raises(InputError, match=sentence)

    with refuse("n=0 must be a whole number of at least 1"):
        plain.sample(0)
    with refuse(r"sampler.init_image=ndarray needs sampler.rows=4"):
        plain.complete(pixels[0])
    with refuse("sampler.rows=4 must be less than the 4 rows"):
        plain.complete(pixels[0], rows=4)
    with refuse("sampler.init_image=gone.png is not there"):
        plain.complete("gone.png", rows=2)
    with refuse("complete needs an image"):
        plain.complete([], rows=2)
    with refuse("label=<class> for all images"):
        classed.nats(pixels)
    with refuse("label has 2 classes for 3 images"):
        classed.nats(pixels, label=[0, 1])
    with refuse("label=5 is no class"):
        classed.nats(pixels, label=5)
    with refuse("label=0.5 is no class"):
        classed.nats(pixels, label=0.5)  # type: ignore[arg-type]
    with refuse("must be of the grid that the prior learned, 4x4"):
        plain.nats_of_codes(torch.zeros(1, 5, 4, dtype=torch.int64))
    with refuse(r"codes of shape \[\] must be \(B, h, w\)"):
        plain.nats_of_codes(torch.tensor(3))
    with refuse("codes from 0 to 16 must be 0 to 15"):
        plain.nats_of_codes(torch.full((1, 4, 4), 16) * torch.eye(4, dtype=torch.int64))


def test_every_setting_of_the_sampler_is_offered_with_the_default_of_conf() -> None:
    names = {field.name for field in fields(Sampler)}
    offered = get_type_hints(SamplingSettings).keys() - {"seed", "label", "condition", "batch_size"}
    assert offered == names - {*COMPLETED, "grid"}
    assert read_defaults("sampler/default").keys() - {"_target_"} == names
    assert make_sampler() == Sampler.unmodified()
