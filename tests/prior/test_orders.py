import pytest
import torch

from prior.orders import raster, shuffled


def test_every_order_visits_every_place_once() -> None:
    assert all(
        sorted(order.tolist()) == list(range(7)) for order in (*raster(3, 7), *shuffled(50, 7))
    )


def test_random_orders_are_all_as_likely() -> None:
    counts = (shuffled(24_000, 4) @ 10 ** torch.arange(4)).unique(return_counts=True)[1]
    assert len(counts) == 24
    assert (
        (counts - 1000).square() / 1000
    ).sum() < 50  # 23 degrees of freedom: 99.9% of fair draws stay below


def test_each_sample_has_an_order_of_its_own_random_as_often_as_asked() -> None:
    share = (shuffled(4000, 9, share=0.3) != raster(4000, 9)).any(1).float().mean()
    assert share == pytest.approx(0.3, abs=0.03)
    assert torch.equal(shuffled(50, 9, share=0.0), raster(50, 9))
    assert (shuffled(50, 9, share=1.0) != raster(50, 9)).any(1).all()
