"""Values that change over the course of training."""

from vqgan.quantizers.anneal import Anneal


def test_a_value_is_annealed_geometrically_or_linearly_from_and_to_zero() -> None:
    ratios, steps = Anneal(1.0, 0.25, 10), Anneal(0.0, 1.0, 10)
    assert [ratios(n) for n in (0, 5, 10, 99)] == [1.0, 0.5, 0.25, 0.25]
    assert [steps(n) for n in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert Anneal(3.0, 2.0, 0)(0) == 2.0
