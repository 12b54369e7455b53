from pathlib import Path
from typing import Any

import pytest
import torch

from data.datamodule import prepare
from prior.extract import extract
from tests.vqgan.test_module import Noise
from tests.vqgan.test_tokenizer import tokenizer
from vqgan.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Noise:
    return Noise(16, 3, 5, True, 0, 0, str(tmp_path))


def codes(t: Tokenizer, data: Noise, flip: bool = False, described: Any = "noise") -> torch.Tensor:
    return torch.from_numpy(extract(t.eval(), data, described, "train", flip, CPU).values.astype("int64"))


def images(data: Noise) -> torch.Tensor:
    return prepare(torch.from_numpy(data.split("train").values))


def test_the_cache_holds_the_tokenizers_codes_in_the_images_order(data: Noise) -> None:
    t = tokenizer()
    assert torch.equal(codes(t, data), t.indices(images(data)))


def test_mirrored_images_follow_with_their_own_codes(data: Noise) -> None:
    t = tokenizer()
    assert torch.equal(codes(t, data, flip=True)[24:], t.indices(images(data).flip(3)))


def test_images_are_encoded_once(data: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tokenizer()
    first = codes(t, data)
    monkeypatch.setattr(t, "indices", None)
    assert torch.equal(codes(t, data), first)


def test_another_tokenizer_or_other_data_are_encoded_anew(data: Noise) -> None:
    t = tokenizer()
    first = codes(t, data)
    t.quantizer.codebook += torch.randn_like(t.quantizer.codebook)  # type: ignore[operator]
    assert not torch.equal(codes(t, data), first)
    codes(t, data, described="other")
    assert len(list(Path(data.cache_dir).iterdir())) == 3
