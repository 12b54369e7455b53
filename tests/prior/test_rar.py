import pytest
import torch

from codegrid.engine.errors import InputError
from prior.models.rar import RAR
from prior.module import negative_log_likelihood, weighted_mean
from prior.orders import raster, shuffled
from tests.helpers.parts import make
from tests.helpers.priors import DIM, make_prior

K = 5
CODES = torch.tensor([[3, 1, 4, 1, 0, 2]])
ORDERS = torch.tensor(
    [[[4, 0, 5, 2, 1, 3]], [[4, 0, 2, 5, 1, 3]]]
)  # they differ from the third step on


def rar(grid: tuple[int, int] = (2, 3), **settings: float) -> RAR:
    model = make_prior("rar", grid=grid, **settings)
    assert isinstance(model, RAR)
    return model


@torch.no_grad()
def only(part: str) -> RAR:
    """A prior that knows positions by this part only."""
    model = rar()
    for name in {"place", "angles", "origin"} - {part}:
        getattr(model, name).zero_()
    return model


def test_randomness_is_1_at_first_then_falls_evenly_to_0() -> None:
    model = rar()
    assert [model.randomness(progress) for progress in (0, 0.5, 0.625, 0.75, 1)] == [
        1,
        1,
        0.5,
        0,
        0,
    ]
    early = rar(random_until=0.0, raster_from=1.0)
    assert [early.randomness(progress) for progress in (0, 0.25, 1)] == [1, 0.75, 0]


@pytest.mark.parametrize("shares", [(-0.1, 0.5), (0.5, 0.5), (0.8, 0.7), (0.5, 1.1)])
def test_impossible_shares_of_the_run_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(
        InputError,
        match=rf"prior\.random_until={shares[0]} and prior\.raster_from={shares[1]} must be",
    ):
        rar(random_until=shares[0], raster_from=shares[1])


def test_at_the_end_it_learns_what_it_is_judged_by() -> None:
    model = rar()
    codes = torch.randint(K, (8, 6))
    learned, judged = model.learn(codes, None, progress=1.0), model.judge(codes, None)
    assert torch.equal(learned.targets, codes)
    torch.testing.assert_close(learned.logits, judged.logits)


def test_at_first_it_learns_each_grid_in_a_random_order() -> None:
    model = rar((4, 4))
    codes = torch.arange(16).remainder(K).expand(30, 16)
    shown = model.learn(codes, None, progress=0.0).targets
    assert torch.equal(shown.sort(1).values, codes.sort(1).values)
    assert len(shown.unique(dim=0)) == 30


def test_raster_is_one_order_of_many() -> None:
    model = rar()
    codes = torch.randint(K, (4, 6))
    torch.testing.assert_close(model(codes, order=raster(4, 6)), model(codes))


def test_each_grid_is_gone_through_in_its_own_order() -> None:
    model = rar()
    codes, order = torch.randint(K, (5, 6)), shuffled(5, 6)
    together = model(codes, order=order)
    for i in range(5):
        torch.testing.assert_close(together[i], model(codes[i, None], order=order[i, None])[0])


def test_in_any_order_a_code_changes_no_logits_at_or_before_it_and_all_behind() -> None:
    model = rar()
    codes, order = CODES, ORDERS[0]
    before = model(codes, order=order)
    for t in range(6):
        changed = codes.clone()
        changed[0, t] = (codes[0, t] + 1) % K
        differs = (model(changed, order=order) != before).any(-1)[0].tolist()
        assert differs == [False] * (t + 1) + [True] * (5 - t)


def test_a_step_knows_the_place_that_comes_next() -> None:
    """Figure 3 of the paper."""
    model = rar()
    one, other = (model(CODES, order=order) for order in ORDERS)
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2])


@pytest.mark.parametrize("part", ["place", "angles"])
def test_the_place_that_comes_next_is_known_by_its_vector_and_its_angles(part: str) -> None:
    model = only(part)
    one, other = (model(CODES, order=order) for order in ORDERS)
    torch.testing.assert_close(one[:, :2], other[:, :2])
    assert not torch.allclose(one[:, 2], other[:, 2], rtol=1e-6, atol=0)


def test_the_place_of_the_code_that_is_read_is_known_by_its_origin() -> None:
    model = only("origin")
    one, other = (model(CODES, order=order) for order in ORDERS)
    torch.testing.assert_close(
        one[:, :3], other[:, :3]
    )  # the third step goes elsewhere, but has read the same
    assert not torch.allclose(one[:, 3], other[:, 3])


def test_the_target_aware_embedding_pays() -> None:
    """Each place has a code of its own, so knowing the place that comes next is knowing the code."""

    def learned(target_aware: bool) -> float:
        torch.manual_seed(0)
        model = make(RAR, torch.randn(1, 6, DIM), (2, 3), width=16, depth=1, heads=2)
        if not target_aware:
            for tensor in (model.place, model.angles):
                tensor.requires_grad_(False).zero_()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
        codes = torch.arange(6).expand(32, 6)
        for _ in range(60):
            prediction = model.learn(codes, None, progress=0.0)
            loss = weighted_mean(negative_log_likelihood(prediction), prediction)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert learned(target_aware=True) < 0.1
    assert learned(target_aware=False) > 0.9  # the mean of log 6, log 5 ... log 1 is 1.1
