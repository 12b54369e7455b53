"""The digits of a code one after the other: an exact distribution over all codes, drawn as it is judged."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.decoding.sampling import Sampler
from prior.heads import bits
from prior.heads.base import LOGITS, judge_logits
from prior.heads.bits import Bits, MaskedBits
from tests.helpers.looks import HostLooks
from tests.helpers.parts import make

WIDTH = 6


def lattice(*levels: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(n).float() for n in levels))


def codes_without_order(K: int) -> Tensor:
    return torch.randn(K, 3, generator=torch.Generator().manual_seed(K))


VECTORS = {
    "bits of a lattice": lattice(2, 2, 2),
    "levels of a lattice": lattice(4, 2, 3),
    "a tree": codes_without_order(16),
    "a tree with empty leaves": codes_without_order(11),
    "a tree of two": codes_without_order(2),
}


def make_head(vectors: Tensor, kind: type[Bits] = Bits, **settings: Any) -> Bits:
    torch.manual_seed(0)
    head = make(kind, WIDTH, vectors, **{"hidden": 12, "group_size": 4, **settings})
    for p in (head.place, head.weight):
        torch.nn.init.normal_(p)
    return head


def make_batch(head: Bits, n: int = 9) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, WIDTH, requires_grad=True), torch.randint(head.K, (n,))


def spell(head: Bits, code: int) -> list[int]:
    """The digits of a code."""
    rank, digits = int(head.ranks[code]), []
    for level in reversed(head.levels):
        digits.insert(0, rank % level)
        rank //= level
    return digits


def slow_digit(head: Bits, x: Tensor, known: dict[int, int], before: list[int], j: int) -> Tensor:
    """log p of the values of digit j, written out: the known digits by their places, and those before, which count the codes."""
    hidden = head.input.weight.double() @ x.double() + head.place[j].double()
    for i, digit in known.items():
        hidden = hidden + head.digits[i, digit].double()
    hidden = hidden / (1 + (-hidden).exp())
    logits = head.weight[j].double() @ hidden
    spelled = [spell(head, code) for code in range(head.K)]
    counts = [
        sum(word[: j + 1] == [*before, value] for word in spelled) for value in range(len(logits))
    ]
    return (logits + torch.tensor(counts).double().log()).log_softmax(0)


def slow_logp(head: Bits, x: Tensor, code: int) -> list[Tensor]:
    """log p of each digit of a code."""
    digits = spell(head, code)
    return [
        slow_digit(head, x, dict(enumerate(digits[:j])), digits[:j], j)[digit]
        for j, digit in enumerate(digits)
    ]


@pytest.mark.parametrize("kind", [Bits, MaskedBits])
@pytest.mark.parametrize("name", VECTORS)
def test_log_p_is_the_sum_over_the_digits_and_all_codes_together_have_1(
    name: str, kind: type[Bits]
) -> None:
    head = make_head(VECTORS[name], kind)
    x, _ = make_batch(head, 3)
    logp = head.logits(x)
    expected = torch.stack(
        [
            torch.stack([torch.stack(slow_logp(head, row, code)).sum() for code in range(head.K)])
            for row in x
        ]
    )
    torch.testing.assert_close(logp.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logp.logsumexp(1), torch.zeros(3), rtol=0, atol=1e-5)
    for code in range(head.K):
        nats = head.nats(x, torch.full((3,), code))
        torch.testing.assert_close(nats, -logp[:, code], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VECTORS)
def test_an_untrained_head_has_the_same_p_of_every_code(name: str) -> None:
    head = make(Bits, WIDTH, VECTORS[name], hidden=12)
    x, targets = make_batch(head)
    log_K = torch.tensor(float(head.K)).log()
    torch.testing.assert_close(head.nats(x, targets), log_K.expand(9))
    torch.testing.assert_close(head.logits(x), -log_K.expand(9, head.K))


@pytest.mark.parametrize("name", VECTORS)
def test_codes_are_drawn_as_often_as_they_are_likely_with_and_without_their_logits(
    name: str,
) -> None:
    head, n = make_head(VECTORS[name]), 40_000
    x = make_batch(head, 1)[0].detach().expand(n, -1)
    uniform = torch.rand(n, dtype=torch.float64)
    drawn = head.draw(x, uniform)
    expected = n * head.logits(x[:1])[0].exp()
    many = expected > 5
    counts = drawn.bincount(minlength=head.K)
    chi_square = ((counts - expected).square() / expected)[many].sum()
    assert chi_square < many.sum() + 4 * (2 * many.sum()) ** 0.5
    assert counts[~many].sum() < 5 * (~many).sum() + 20
    from_logits = head.draw_from_logits(
        head.logits(x[:1]).expand(n, -1), uniform, Sampler.unmodified()
    )
    assert (drawn != from_logits).float().mean() < 1e-3  # where rounding decides


@pytest.mark.parametrize(
    ("settings", "is_plain"),
    [
        ({}, True),
        ({"temperature": 0.7}, False),
        ({"top_k": 3}, False),
        ({"top_p": 0.8}, False),
        ({"min_p": 0.2}, False),
    ],
    ids=str,
)
def test_every_setting_of_the_sampler_is_exact(settings: dict[str, Any], is_plain: bool) -> None:
    head, n = make_head(VECTORS["levels of a lattice"]), 40_000
    sampler = make(Sampler, **settings)
    assert head.draws_directly(sampler) == is_plain
    logits = head.logits(make_batch(head, 1)[0].detach())
    uniform = torch.rand(n, dtype=torch.float64)
    counts = head.draw_from_logits(logits.expand(n, -1), uniform, sampler).bincount(minlength=24)
    expected = sampler.draw(logits.expand(n, -1), uniform).bincount(minlength=24)
    assert torch.equal(counts > 0, expected > 0)
    assert ((counts - expected).abs() < 5 * (expected + 1).sqrt()).all()


def test_the_likeliest_codes_are_those_of_all_logits_where_the_search_keeps_every_prefix() -> None:
    for name, vectors in VECTORS.items():
        head = make_head(vectors)
        x, targets = make_batch(head)
        judged, whole = head.judge(x, targets), judge_logits(head.logits(x), targets)
        torch.testing.assert_close(judged.nats, whole.nats, rtol=1e-4, atol=1e-5)
        assert torch.equal(judged.above.clamp(max=5), whole.above.clamp(max=5)), name
        assert torch.equal(judged.tied, whole.tied), name


def test_a_search_among_many_codes_finds_nearly_all_of_the_five_likeliest() -> None:
    head = make_head(codes_without_order(2000), hidden=32)
    x = make_batch(head, 100)[0].detach()
    logp = head.logits(x)
    for rank in range(5):
        targets = logp.argsort(1, descending=True)[:, rank]
        assert (head.judge(x, targets).above == rank).float().mean() > 0.9


@pytest.mark.parametrize("kind", [Bits, MaskedBits])
def test_in_parts_losses_gradients_and_logits_are_those_of_the_whole(
    kind: type[Bits], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(codes_without_order(11), kind, group_share=0.3)
    outcomes = []
    for most in (10**6, 2 * 4 * 12):
        monkeypatch.setattr(bits, "MAX_HIDDEN", most)
        x, targets = make_batch(head)
        torch.manual_seed(2)  # which digits are masked
        loss, nats = head.losses(x, targets, 0.1)
        slopes = torch.linspace(-1, 2, len(x))
        grads = torch.autograd.grad((loss * slopes).sum(), [x, *head.parameters()])
        judged = head.judge(x, targets)
        outcomes.append([loss, nats, head.logits(x), judged.nats, judged.above, *grads])
    for whole, parts in zip(*outcomes, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_the_loss_of_masked_digits_is_the_mean_over_all_orders() -> None:
    """Over sets of all sizes, and all sets of a size, as often as each other (Uria et al. 2014, eq. 13)."""
    head = make_head(lattice(4, 2, 3), MaskedBits)
    x, targets = make_batch(head, 4)
    orders = list(permutations(range(3)))
    visible = torch.tensor(
        [[[i in order[:k] for i in range(3)] for order in orders] for k in range(3)]
    ).flatten(0, 1)
    for row, target in zip(x, targets.tolist(), strict=True):
        n = len(visible)
        loss = head.by_parts(row.expand(n, -1), torch.full((n,), target), visible, 0.0, 0.0).mean()
        digits = spell(head, target)
        expected = [
            -slow_digit(head, row, {i: digits[i] for i in order[:k]}, digits[: order[k]], order[k])[
                digits[order[k]]
            ]
            for order in orders
            for k in range(3)
        ]
        torch.testing.assert_close(
            loss.double(), 3 * torch.stack(expected).mean(), rtol=1e-4, atol=1e-5
        )


def test_sets_of_known_digits_have_every_size_as_often() -> None:
    head, n = make_head(codes_without_order(16), MaskedBits), 8000
    known: list[Tensor] = []
    by_parts = head.by_parts

    def record(x: Tensor, targets: Tensor, visible: Tensor | None, *more: Any) -> Tensor:
        known.extend([] if visible is None else [visible])
        return by_parts(x, targets, visible, *more)

    head.by_parts = record  # type: ignore[method-assign]
    x, targets = make_batch(head, n)
    _, nats = head.losses(x, targets)
    [visible] = known
    sizes = visible.sum(1).bincount()
    assert len(sizes) == 4
    assert ((sizes - n / 4).abs() < 4 * (n / 4) ** 0.5).all()
    assert (visible.float().mean(0) - 3 / 8).abs().max() < 0.03
    torch.testing.assert_close(nats, head.nats(x, targets))


def test_a_group_shares_all_digits_but_the_last() -> None:
    vectors = lattice(3, 2, 2)
    head = make_head(vectors, group_share=1.0)  # groups of 4: the last two digits
    x, targets = make_batch(head)
    loss, nats = head.losses(x, targets)
    p = head.logits(x).exp().view(-1, 3, 4).sum(2)
    expected = -p.gather(1, targets[:, None] // 4)[:, 0].log()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(nats, head.nats(x, targets))
    half = make_head(vectors, group_share=0.5)
    torch.testing.assert_close(
        half.losses(x, targets)[0], (expected + nats) / 2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", VECTORS)
def test_label_smoothing_spreads_over_the_values_of_each_digit(name: str) -> None:
    head = make_head(VECTORS[name])
    x, targets = make_batch(head, 4)
    loss, _ = head.losses(x, targets, 0.1)
    for row, target, value in zip(x, targets.tolist(), loss, strict=True):
        digits, expected = spell(head, target), torch.zeros((), dtype=torch.float64)
        for j, digit in enumerate(digits):
            logp = slow_digit(head, row, dict(enumerate(digits[:j])), digits[:j], j)
            expected -= 0.9 * logp[digit] + 0.1 * logp[logp > -torch.inf].mean()
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Bits, MaskedBits])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_losses_look_at_no_value(device: str, kind: type[Bits]) -> None:
    head = make_head(codes_without_order(11), kind, group_share=0.3).to(device)
    x = torch.randn(9, WIDTH, device=device, requires_grad=True)
    with HostLooks(device):
        loss, _ = head.losses(x, torch.zeros(9, dtype=torch.int64, device=device), 0.1)
        loss.sum().backward()


@pytest.mark.parametrize("kind", [Bits, MaskedBits])
def test_every_weight_learns(kind: type[Bits]) -> None:
    head = make_head(codes_without_order(11), kind)
    x, targets = make_batch(head, 60)
    head.losses(x, targets)[0].sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_in_bfloat16_log_p_is_float32_and_sums_to_1() -> None:
    head = make_head(codes_without_order(11))
    x, targets = make_batch(head)
    with torch.autocast("cpu", torch.bfloat16):
        logits, nats = head.logits(x), head.nats(x, targets)
        drawn = head.draw(x, torch.rand(9))
    assert logits.dtype == nats.dtype == torch.float32
    torch.testing.assert_close(logits.logsumexp(1), torch.zeros(9), rtol=0, atol=1e-5)
    torch.testing.assert_close(LOGITS.nats(logits, targets), nats, rtol=0.05, atol=0.05)
    assert drawn.max() < 11


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden": 0}, r"prior\.head\.hidden=0 must be a whole number of at least 1"),
        ({"group_share": 2}, r"prior\.head\.group_share=2 must be a number from 0 to 1"),
        (
            {"group_size": 1},
            r"prior\.head\.group_size=1 must be a whole number of at least 2 codes",
        ),
    ],
    ids=str,
)
def test_impossible_settings_are_sentences(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_head(lattice(2, 2), **settings)


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (
            lattice(8, 8),
            r"group_size=4 is less than the 8 values of the last .* use .*group_size=8",
        ),
        (codes_without_order(2), r"group_share=0\.3 needs codes of several digits"),
    ],
)
def test_groups_that_codes_can_not_form_are_refused(vectors: Tensor, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_head(vectors, group_share=0.3)
    make_head(vectors)
