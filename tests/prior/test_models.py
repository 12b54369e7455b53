import math

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.models.gpt import GPT
from prior.models.transformer import rotary, rotary_directions, rotate_pairs
from tests.helpers.parts import make
from tests.helpers.priors import make_prior, randomised

K, DIM, GRID = 5, 3, (2, 3)


def test_codes_are_read_as_the_tokenizers_vectors() -> None:
    model = randomised(
        make(GPT, torch.zeros(1, K, DIM), GRID, width=16, depth=1, heads=2)
    )  # vectors that are all alike
    assert torch.equal(model(torch.zeros(1, 6, dtype=torch.int64)), model(torch.full((1, 6), 3)))


def test_the_codebook_is_no_parameter() -> None:
    assert "read.vectors" not in dict(make_prior("gpt").named_parameters())


def test_rotary_scores_depend_on_the_distance_between_places_alone() -> None:
    directions = rotary_directions(rotary((4, 4), 8))
    q, k = torch.randn(2, 1, 1, 1, 8).expand(-1, 16, -1, -1, -1)  # the same vectors at every place
    scores = (
        rotate_pairs(q, directions).flatten(1) @ rotate_pairs(k, directions).flatten(1).mT
    ).view(4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3])
    torch.testing.assert_close(scores[1, 2, 0, 0], scores[3, 3, 2, 1])
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])  # rows are not columns


def test_rotary_keeps_lengths_and_leaves_the_first_place_alone() -> None:
    x = torch.randn(3, 6, 2, 5, 8)
    turned = rotate_pairs(x, rotary_directions(rotary((2, 3), 8)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_rotary_turns_each_pair_by_its_angle() -> None:
    turned = rotate_pairs(
        torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]]), rotary_directions(torch.tensor([[[[0.5, 2.0]]]]))
    )[0, 0, 0]
    torch.testing.assert_close(
        turned, torch.tensor([math.cos(0.5), math.sin(0.5), -math.sin(2.0), math.cos(2.0)])
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"inputs": "pixels"}, "prior.inputs=pixels"), ({"heads": 3}, "prior.width=16 must be")],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(GPT, torch.randn(1, K, DIM), GRID, **{"width": 16, "depth": 6, "heads": 2, **settings})
