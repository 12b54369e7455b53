"""format=pt2: programs of torch.export for any number and size of images."""

from pathlib import Path

import pytest
import torch
from torch import nn

from codegrid.engine.errors import InputError
from tests.helpers.exports import PYRAMID, make_trained, write_format
from vqgan.export.base import make_examples
from vqgan.export.graphs import prepare_for_tracing
from vqgan.export.pt2 import PT2Exporter


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["quantizer=ema", "quantizer.entropy.weight=0.1", "quantizer.cosine=true"],
        ["quantizer=residual", "quantizer@quantizer.inner=gumbel", "data.channels=1"],
        ["quantizer=bsq", *PYRAMID, "+model.pixels=[0,1]"],
        ["quantizer=ema", "data.channels=5", "data.image_size=[24,16]", "model.grid=[6,4]"],
        ["quantizer=ema", "data.channels=2", "data.image_size=[20,16]", "model.grid=[5,4]"],
    ],
    ids=" ".join,
)
def test_both_programs_are_the_tokenizer_at_any_size(words: list[str], tmp_path: Path) -> None:
    tokenizer = make_trained(*words)
    folder = write_format(PT2Exporter(), tokenizer, tmp_path)
    figures = PT2Exporter().verify(tokenizer, folder, make_examples(tokenizer))
    assert figures["equal_codes"] == 1
    assert figures["largest_difference"] < 1e-5
    encode = torch.export.load(folder / "encoder.pt2").module()
    decode = torch.export.load(folder / "decoder.pt2").module()
    f, channels = tokenizer.f, tokenizer.encoder.channels
    for batch, rows, columns in ((1, 2, 2), (3, 5, 2)):
        images = torch.rand(batch, channels, rows * f, columns * f) * 2 - 1
        indices = encode(images)
        assert torch.equal(indices, tokenizer.indices(images))
        assert decode(indices).shape == images.shape


@pytest.mark.slow
def test_networks_of_one_size_keep_it(tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=fsq")
    tokenizer.encoder.layers.append(nn.LayerNorm([8, 4, 4]))  # type: ignore[operator]
    folder = write_format(PT2Exporter(), tokenizer, tmp_path)
    examples = make_examples(tokenizer)
    assert len(examples) == 1
    assert PT2Exporter().verify(tokenizer, folder, examples)["equal_codes"] == 1


@pytest.mark.slow
def test_a_grid_of_one_code_keeps_its_size(tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=gumbel", "model.grid=1")
    folder = write_format(PT2Exporter(), tokenizer, tmp_path)
    assert PT2Exporter().verify(tokenizer, folder, make_examples(tokenizer))["equal_codes"] == 1


@pytest.mark.slow
def test_a_program_of_other_weights_is_a_sentence(tmp_path: Path) -> None:
    tokenizer = make_trained("quantizer=fsq")
    folder = write_format(PT2Exporter(), tokenizer, tmp_path)
    with torch.no_grad():
        tokenizer.decoder.last.bias += 0.01  # type: ignore[operator]
    with pytest.raises(InputError, match="format=pt2 was written and read back, and its pictures"):
        PT2Exporter().verify(tokenizer, folder, make_examples(tokenizer))


@torch.no_grad()
@pytest.mark.parametrize("quantizer", ["gumbel", "lfq", "vq"])
def test_the_traced_copy_encodes_alike_and_leaves_the_tokenizer_alone(quantizer: str) -> None:
    tokenizer = make_trained(f"quantizer={quantizer}")
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    still, x = prepare_for_tracing(tokenizer), torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(still.indices(x), tokenizer.indices(x))
    assert all(p.requires_grad for p in tokenizer.parameters())
    assert all(torch.equal(before[name], v) for name, v in tokenizer.state_dict().items())
    if quantizer != "gumbel":
        assert tokenizer.quantizer.entropy is not None
