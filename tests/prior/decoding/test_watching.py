"""StepCache.watch: codes as priors draw them."""

import pytest
import torch
from torch import Tensor

from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, make_sampler
from tests.helpers.priors import PRIORS, make_prior


@pytest.mark.parametrize("name", PRIORS)
def test_what_is_watched_is_what_is_drawn(name: str) -> None:
    torch.manual_seed(0)
    model = make_prior(name)
    codes = torch.randint(model.K, (2, model.L))
    known = torch.arange(model.L) % 3 == 0
    watched = codes.clone()
    reported = known.clone()

    def watch(places: Tensor, drawn: Tensor) -> None:
        assert drawn.shape[0] == 2
        watched.scatter_(1, places.expand(2, -1), drawn)
        assert not known[places].any()
        reported[places] = True

    sampler = make_sampler(steps=2, corrector=1, remask=0.5) if model.any_order else make_sampler()
    drawn = model.fill(codes, known, Numbers(0, range(2)), sampler, None, StepCache(False, watch))
    plain = model.fill(codes, known, Numbers(0, range(2)), sampler, None)
    assert drawn.equal(plain)
    assert watched.equal(drawn)
    assert reported.all()


def test_what_the_watcher_raises_ends_the_drawing() -> None:
    model = make_prior("gpt")
    places: list[int] = []

    def watch(place: Tensor, _: Tensor) -> None:
        places.append(int(place))
        if len(places) == 2:
            raise KeyError

    cache = StepCache(False, watch)
    with pytest.raises(KeyError):
        model.fill(
            torch.zeros(1, model.L, dtype=torch.int64),
            torch.zeros(model.L, dtype=torch.bool),
            Numbers(0, [0]),
            make_sampler(),
            None,
            cache,
        )
    assert places == [0, 1]
