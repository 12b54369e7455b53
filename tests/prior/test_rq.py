import pytest
import torch
import torch.nn.functional as F

from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.models.rq import RQ
from prior.models.transformer import rotary_directions
from tests.helpers.parts import make
from tests.helpers.priors import DIM, make_prior

K, GRID = 5, (2, 3)


def rq(num_codebooks: int = 3, **settings: object) -> RQ:
    """Small, with `num_codebooks` codebooks and no zeros."""
    torch.manual_seed(0)
    model = make(
        RQ,
        torch.randn(num_codebooks, K, DIM),
        GRID,
        width=16,
        depth=2,
        heads=2,
        **{"codebook_depth": 2, **settings},
    )
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
    return model.eval()


@torch.no_grad()
def test_logits_agree_with_the_equations_code_by_code() -> None:
    """Section 3.2, written out: position by position and book by book, each time from the beginning."""
    model = rq()
    grids = torch.randint(K, (2, 6, 3))
    e = [read.vectors @ read.read.weight.T + read.read.bias for read in model.read]  # type: ignore[union-attr, operator]
    logits = model(grids.flatten(1)).view(2, 6, 3, K)
    for b, S in enumerate(grids):
        for t in range(6):
            u = [model.begin.vectors[-1] + model.place[0]]
            u += [
                sum(e[d][S[s - 1, d]] for d in range(3)) + model.place[s] for s in range(1, t + 1)
            ]
            h = torch.stack(u)[None]
            for block in model.over_places:
                h = block(h, rotary_directions(model.angles[: t + 1]))
            for d in range(3):
                v = [h[0, t] + model.book[0]] + [
                    sum(e[i][S[t, i]] for i in range(j)) + model.book[j] for j in range(1, d + 1)
                ]
                x = torch.stack(v)[None]
                for block in model.over_books:
                    x = block(x, rotary_directions(model.book_angles[: d + 1]))
                expected = F.linear(model.norm(x[0, d]), model.head[d].weight)  # type: ignore[arg-type]
                torch.testing.assert_close(logits[b, t, d], expected, rtol=1e-4, atol=1e-4)


def test_codes_come_position_by_position_and_at_each_book_by_book() -> None:
    model = rq()
    codes = torch.randint(K, (1, 18))
    before = model(codes)
    for t in range(18):
        changed = codes.clone()
        changed[0, t] = (codes[0, t] + 1) % K
        differs = (model(changed) != before).any(-1)[0].tolist()
        assert differs == [False] * (t + 1) + [True] * (17 - t)


def test_a_position_is_read_by_the_sum_of_its_codes_alone() -> None:
    """Two positions with other codes and the same sum: what comes after them can't tell."""
    model = rq(num_codebooks=2)
    with torch.no_grad():
        model.read[1].load_state_dict(model.read[0].state_dict())
    codes = torch.randint(K, (1, 12))
    codes[0, :2] = torch.tensor([1, 3])
    swapped = codes.clone()
    swapped[0, :2] = torch.tensor([3, 1])
    torch.testing.assert_close(model(codes)[:, 2:], model(swapped)[:, 2:])
    assert not torch.allclose(model(codes)[:, 1], model(swapped)[:, 1])


def test_each_book_has_a_head_of_its_own() -> None:
    model = rq()
    codes = torch.randint(K, (4, 18))
    before = model(codes).view(4, 6, 3, K)
    with torch.no_grad():
        model.head[1].weight.zero_()  # type: ignore[operator]
    after = model(codes).view(4, 6, 3, K)
    assert not after[:, :, 1].any()
    assert torch.equal(after[:, :, ::2], before[:, :, ::2])


@pytest.mark.parametrize("num_codebooks", [1, 2, 4])
@pytest.mark.parametrize("inputs", ["codes", "embedding"])
def test_any_number_of_codebooks_is_decoded_as_it_is_judged(
    num_codebooks: int, inputs: str
) -> None:
    model = rq(num_codebooks, inputs=inputs)
    codes = torch.randint(K, (3, 6 * num_codebooks))
    decode = model.decoder(3)
    steps = [decode(codes[:, t - 1] if t else None) for t in range(6 * num_codebooks)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes), rtol=1e-3, atol=1e-4)


def test_samples_are_grids_of_as_many_codes_as_there_are_codebooks() -> None:
    assert sample(rq(3), Sampler.unmodified(), 4, seed=0).shape == (4, *GRID, 3)
    assert sample(rq(1), Sampler.unmodified(), 4, seed=0).shape == (4, *GRID)


def test_the_codebooks_are_no_parameters() -> None:
    assert not [
        name
        for name, _ in make_prior("rq").named_parameters()
        if name.endswith("vectors") and "read" in name
    ]
