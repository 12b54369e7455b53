"""A logit of each code: the loss tile by tile is the plain one, and takes little memory."""

import pytest
import torch
from torch import Tensor

from codegrid.engine.step_trace import StepTrace
from prior.decoding.sampling import Sampler
from prior.heads import softmax, tiles
from prior.heads.base import judge_logits
from prior.heads.softmax import Softmax, plain_softmax
from tests.helpers.looks import HostLooks
from tests.helpers.parts import make

WIDTH, K, N = 6, 37, 11
WAYS = [(smoothing, share) for smoothing in (0.0, 0.1) for share in (0.0, 0.3)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 rows and 5 codes, neither of which divides what there is."""
    monkeypatch.setattr(softmax, "MAX_LOGITS", 20)
    monkeypatch.setattr(tiles, "TILE_ROWS", 4)
    monkeypatch.setattr(tiles, "MAX_TILE", 20)


def make_head(share: float = 0.0) -> Softmax:
    torch.manual_seed(0)
    head = make(Softmax, WIDTH, torch.randn(K, 3), group_share=share, group_size=4)
    torch.nn.init.normal_(head.weight)
    return head


def make_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(1, N, WIDTH, requires_grad=True), torch.randint(K, (1, N))


def slow_losses(head: Softmax, x: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The definition in float64, target by target."""
    losses = []
    for row, target in zip(x[0].double(), targets[0].tolist(), strict=True):
        p = (head.weight.double() @ row).exp()
        p = p / p.sum()
        own = -(1 - smoothing) * p[target].log() - smoothing * p.log().mean()
        if head.group_share:
            near = [k for k in range(K) if head.groups[k] == head.groups[target]]
            own = (1 - head.group_share) * own - head.group_share * p[near].sum().log()
        losses.append(own)
    return torch.stack(losses)[None]


def gradients(loss: Tensor, x: Tensor, head: Softmax) -> tuple[Tensor, ...]:
    slopes = torch.linspace(-1, 2, N)  # each target's own, so that none can stand for another
    return torch.autograd.grad((loss * slopes.to(loss.dtype)).sum(), [x, head.weight])


def agrees(head: Softmax, smoothing: float) -> bool:
    """Whether losses, nats and gradients are those of the definition."""
    x, targets = make_batch()
    loss, nats = head.losses(x, targets, smoothing)
    expected = slow_losses(head, x, targets, smoothing)
    pairs = [
        (loss, expected),
        *zip(gradients(loss, x, head), gradients(expected, x, head), strict=True),
    ]
    share, head.group_share = head.group_share, 0.0
    pairs.append((nats, slow_losses(head, x, targets, 0.0)))
    head.group_share = share
    assert not nats.requires_grad
    return all(torch.allclose(a, b.float(), rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(("smoothing", "share"), WAYS)
def test_losses_nats_and_gradients_are_those_of_the_definition(
    smoothing: float, share: float
) -> None:
    assert agrees(make_head(share), smoothing)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("smoothing", "share"), WAYS)
def test_they_are_so_tile_by_tile(smoothing: float, share: float) -> None:
    assert agrees(make_head(share), smoothing)


@pytest.mark.usefixtures("few")
def test_a_target_in_the_wrong_tile_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def misplace(targets: Tensor, codes: slice) -> tuple[Tensor, Tensor]:
        return tiles_locate(targets, slice(codes.start + 1, codes.stop))

    tiles_locate = tiles.locate
    monkeypatch.setattr(tiles, "locate", misplace)
    assert not agrees(make_head(), 0.0)


@pytest.mark.usefixtures("few")
def test_what_counts_nothing_gets_no_gradient_and_frozen_parts_need_none() -> None:
    head = make_head()
    x, targets = make_batch()
    loss, _ = head.losses(x, targets)
    (loss * (torch.arange(N) < 4)).sum().backward()
    assert x.grad is not None
    assert not x.grad[0, 4:].any()
    assert x.grad[0, :4].any()
    head.weight.requires_grad_(False)
    loss, _ = head.losses(x, targets)
    loss.sum().backward()


@pytest.mark.usefixtures("few")
def test_tiles_in_bfloat16_are_as_near_as_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head()
    exact = slow_losses(head, *make_batch(), 0.0)
    errors = []
    for most in (20, 10**6):
        monkeypatch.setattr(softmax, "MAX_LOGITS", most)
        x, targets = make_batch()
        with torch.autocast("cpu", torch.bfloat16):
            loss, nats = head.losses(x, targets)
        assert loss.dtype == nats.dtype == torch.float32
        assert gradients(loss, x, head)[1].dtype == torch.float32
        errors.append((loss - exact).abs().max())
    assert errors[0] < 1.5 * errors[1] + 1e-6
    assert errors[1] > 1e-4  # which float32 would not have


@pytest.mark.usefixtures("few")
def test_a_validation_in_parts_is_that_of_all_logits() -> None:
    head = make_head()
    x, targets = make_batch()
    judged, whole = head.judge(x, targets), judge_logits(head.logits(x), targets)
    torch.testing.assert_close(judged.nats, whole.nats)
    assert torch.equal(judged.above, whole.above)
    assert torch.equal(judged.tied, whole.tied)
    assert whole.above.max() > 5


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tiles_look_at_no_value(device: str) -> None:
    head = make_head(0.3).to(device)
    x = torch.randn(1, N, WIDTH, device=device, requires_grad=True)
    targets = torch.zeros(1, N, dtype=torch.int64, device=device)
    with HostLooks(device):
        loss, _ = head.losses(x, targets, 0.1)
        loss.sum().backward()


def peak_bytes(K: int, T: int, batch: int, width: int) -> int:
    """Bytes that are alive at most in a loss and its gradients beside features and weights, counted without computing them."""
    with torch.device("meta"):
        head = make(Softmax, width, torch.ones(K, 2))
        x = torch.randn(batch, T, width, requires_grad=True)
        targets = torch.zeros(batch, T, dtype=torch.int64)
    trace = StepTrace("meta", {})
    with trace.follow():
        loss, _ = head.losses(x, targets)
        loss.mean().backward()
    return trace.peak


def test_the_loss_of_262144_codes_takes_less_than_a_gibibyte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert peak_bytes(262_144, 256, 64, 256) < 2**30
    monkeypatch.setattr(softmax, "MAX_LOGITS", 2**62)
    assert peak_bytes(262_144, 256, 64, 256) > 30 * 2**30  # all logits, and as many probabilities


def test_codes_drawn_directly_are_those_drawn_from_the_logits() -> None:
    head = plain_softmax(6, torch.randn(5, 3))
    torch.nn.init.normal_(head.weight)
    x, uniform = torch.randn(200, 6), torch.rand(200)
    drawn = head.draw(x, uniform)
    assert torch.equal(drawn, Sampler.unmodified().draw(head.logits(x), uniform))
    assert len(drawn.unique()) == 5
