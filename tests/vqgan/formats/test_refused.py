"""Files that are recognised and can't come in: each has its sentence, and no other file has one."""

import gzip
import json

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.public import PUBLIC, empty_file, published_shapes
from vqgan.formats.base import PublicFile
from vqgan.formats.load import choose_format
from vqgan.formats.refused import refuse_known

with gzip.open(PUBLIC / "published-names.json.gz") as stream:
    PUBLISHED = list(json.load(stream))


def file_of(**shapes: tuple[int, ...]) -> PublicFile:
    """A public file with weights of these shapes; __ stands for a point."""
    return empty_file({name.replace("__", "."): torch.Size(s) for name, s in shapes.items()})


@pytest.mark.parametrize("model", PUBLISHED)
def test_no_published_model_with_codes_is_refused(model: str) -> None:
    refuse_known(empty_file(published_shapes(model)))


# (encoder's end, decoder's beginning): kl-f8 of latent diffusion, and one without the convolutions beside the latents
@pytest.mark.parametrize("latents", [4, 16])
def test_an_autoencoder_without_codes_is_refused(latents: int) -> None:
    shapes = {
        "encoder__conv_out__weight": (2 * latents, 64, 3, 3),
        "decoder__conv_in__weight": (64, latents, 3, 3),
    }
    with pytest.raises(InputError, match="published is a continuous autoencoder such as"):
        choose_format(file_of(**shapes))


@pytest.mark.parametrize(
    "name",
    [
        "layers__0__attention__wqkv__weight",  # LlamaGen's
        "transformer__blocks__3__attn__key__weight",  # taming's
        "transformer_layers__0__attention__query__weight",  # open-muse's
        "blocks__11__attn__mat_qkv__weight",  # VAR's
        "down_blocks__0__attentions__0__transformer_blocks__0__attn1__to_q__weight",  # a U-Net
        "encoder__layers__0__self_attn__k_proj__weight",  # of a text
    ],
)
def test_a_generator_without_its_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no tokenizer beside it; name the file of the tokenizer"):
        choose_format(file_of(**{name: (8, 8), "head__weight": (8, 8)}))


def test_other_networks_have_no_sentence_of_their_own() -> None:
    with pytest.raises(InputError, match="no tokenizer of a known format") as caught:
        choose_format(file_of(features__0__weight=(8, 3, 3, 3)))
    assert "is a TiTok" not in str(caught.value)
