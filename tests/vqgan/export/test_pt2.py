"""format=pt2: programs of torch.export for networks that take one size. Those for any size are in test_graphs.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.exports import make_trained, write_format
from vqgan.export.base import make_examples
from vqgan.export.graphs import prepare_for_tracing
from vqgan.export.pt2 import PT2Exporter


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
