"""Operations and live bytes of a step."""

import pytest
import torch
from torch import nn

from codegrid.engine.step_trace import StepTrace


def test_bytes_are_counted_while_a_tensor_is_alive() -> None:
    trace = StepTrace("cpu", {})
    with trace.follow():
        a = torch.zeros(1000)
        b = a + 1
        assert trace.live == 8000
        del a
        assert trace.live == 4000
        del b
    assert trace.live == 0
    assert trace.peak == 8000


def test_a_view_is_not_counted_again() -> None:
    trace = StepTrace("cpu", {})
    with trace.follow():
        a = torch.zeros(10, 10)
        _views = a.t(), a[2:], a.view(-1)
    assert trace.peak == 400


def test_a_new_count_begins_with_what_is_alive() -> None:
    trace = StepTrace("cpu", {})
    with trace.follow():
        a = torch.zeros(1000)
        _sum = torch.zeros(5000).sum()
        trace.restart()
        assert trace.peak == trace.live == a.nbytes + 4


def test_another_device_is_not_counted() -> None:
    trace = StepTrace("cpu", {})
    with trace.follow():
        _elsewhere = torch.zeros(1000, device="meta")
    assert trace.peak == 0


def test_operations_are_those_of_the_products_forward_and_backward() -> None:
    layer = nn.Linear(16, 32, bias=False)
    trace = StepTrace("cpu", {"layer": [layer]})
    with trace.follow():
        layer(torch.randn(8, 16)).sum().backward()
    product = 2 * 8 * 16 * 32
    assert trace.part_flops["layer"] == product
    assert trace.flops == 2 * product  # the input needs no gradient


def test_a_part_leaves_what_its_backward_pass_needs_without_its_weights() -> None:
    part = nn.Sequential(nn.Linear(16, 32), nn.Sigmoid())
    trace = StepTrace("cpu", {"part": [part]})
    x = torch.randn(8, 16, requires_grad=True) * 1
    with trace.follow():
        part(x).sum().backward()
    assert trace.part_bytes["part"] == 4 * (8 * 16 + 8 * 32)  # the input, and what sigmoid returned


def test_what_is_computed_again_in_the_backward_pass_is_not_left_by_the_forward_pass() -> None:
    from torch.utils.checkpoint import checkpoint

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 64), nn.Sigmoid(), nn.Linear(64, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return result

    def measure(part: nn.Module) -> tuple[int, int]:
        trace = StepTrace("cpu", {"part": [part]})
        with trace.follow():
            part(torch.randn(8, 16)).sum().backward()
        return trace.part_bytes.get("part", 0), trace.part_flops["part"]

    part = Recomputed()
    saved, flops = measure(part)
    plain, plain_flops = measure(part.inner)
    assert saved < plain
    assert flops == plain_flops


def test_a_tensor_that_an_operation_keeps_of_its_own_result_is_freed() -> None:
    """A saved result with its graph would hold itself."""
    trace = StepTrace("cpu", {})
    with trace.follow():
        x = torch.randn(1000, requires_grad=True)
        y = x.sigmoid()
        del y
        assert trace.live == pytest.approx(x.nbytes)
