"""format=var: the layout of VAR's code, read back to the bit."""

import json
from pathlib import Path

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.exports import make_trained, write_format
from tests.helpers.public import PUBLIC, read_plain_weights
from vqgan.export.base import make_examples
from vqgan.export.safetensors import SafetensorsExporter
from vqgan.export.var import VAR_CONFIG, VAR_WEIGHTS, VARExporter, find_var_misfit
from vqgan.formats.base import Choices
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.formats.var import HITS
from vqgan.tokenizer import Tokenizer

FIXTURE = PUBLIC / "var_vqvae/vae_tiny.pth"
SCALES = ["quantizer=multiscale", "quantizer.dim=8"]
OURS = [
    "model=var_f16", "model.width=32", "model.z_channels=8", "model.mults=[1,2,1]", "model.grid=4", "model.attention=[4]",
    "model.depth=1",
]  # fmt: skip


def load_fixture() -> Tokenizer:
    return load_public(open_public(str(FIXTURE), None, None).file, Choices((32, 32), 3)).tokenizer


def check_round_trip(tokenizer: Tokenizer, folder: Path) -> None:
    exporter = VARExporter()
    exporter.check(tokenizer)
    write_format(exporter, tokenizer, folder)
    figures = exporter.verify(tokenizer, folder, make_examples(tokenizer))
    assert figures == {"imported_again": "the same to the bit"}


def test_vars_own_file_comes_back_tensor_for_tensor(tmp_path: Path) -> None:
    check_round_trip(load_fixture(), tmp_path)
    written, published = (read_plain_weights(file) for file in (tmp_path / VAR_WEIGHTS, FIXTURE))
    assert written.keys() == published.keys()
    different = [name for name in written if not torch.equal(written[name], published[name])]
    assert different in ([], [HITS])  # a statistic of its training
    settings = json.loads((tmp_path / VAR_CONFIG).read_text())
    assert settings == json.loads(FIXTURE.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    "words",
    [[], ["quantizer@quantizer.inner=vq", "quantizer.convolutions=1"], ["quantizer.convolutions=0"],
     ["quantizer.convolutions=2", "quantizer.strength=0.25"]],
    ids=" ".join,
)  # fmt: skip
def test_a_tokenizer_trained_here_goes_into_vars_layout(words: list[str], tmp_path: Path) -> None:
    check_round_trip(make_trained(*OURS, *SCALES, *words), tmp_path)


@pytest.mark.parametrize(
    ("words", "clause"),
    [
        (["quantizer=ema", "quantizer.dim=8"], "codes of several scales"),
        ([*SCALES, "quantizer.shared=false"], "share one codebook"),
        ([*SCALES, "model.start=patches"], "no linear map of patches"),
        ([*SCALES, "model.encoder.exit_kernel=1"], "are 3x3"),
        ([*SCALES, "model.attention=[]"], "attention at the grid's resolution"),
        ([*SCALES, "+model.pixels=[0,1]"], "its images are in"),
    ],
)
def test_what_has_no_place_in_vars_layout_is_named(words: list[str], clause: str) -> None:
    tokenizer = make_trained(*OURS, *words)
    misfit = find_var_misfit(tokenizer)
    assert misfit is not None
    assert clause in misfit
    with pytest.raises(InputError, match="leave var out of format"):
        VARExporter().check(tokenizer)


def test_the_decoder_of_safetensors_adds_up_the_scales(tmp_path: Path) -> None:
    exporter = SafetensorsExporter()
    for i, words in enumerate(([], ["quantizer.shared=false", "quantizer.convolutions=0"])):
        tokenizer = make_trained(*OURS, *SCALES, *words)
        exporter.check(tokenizer)
        folder = tmp_path / str(i)
        folder.mkdir()
        write_format(exporter, tokenizer, folder)
        figures = exporter.verify(tokenizer, folder, make_examples(tokenizer))
        assert figures["largest_difference"] < 1e-5
