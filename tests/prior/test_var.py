"""Next-scale prediction: what may depend on what, and drawing with a cache, on larger grids and around what is known."""

import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.decoding.generate import sample
from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import describe_codes
from prior.models.var import VAR, place_window
from tests.helpers.parts import make
from tests.helpers.priors import DIM, PRIORS, build_prior, make_scales, randomised
from tests.helpers.stage1 import make_tokenizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.quantizers.scales import Scales

K = 5


def make_var(grid: tuple[int, int] = (4, 4), classes: int = 0, **settings: object) -> VAR:
    torch.manual_seed(0)
    model = randomised(build_prior(PRIORS["var"], K, grid, classes, **settings)).eval()
    assert isinstance(model, VAR)
    return model


def test_a_code_changes_the_logits_of_later_scales_and_no_others() -> None:
    model = make_var()
    codes = torch.randint(K, (1, model.L))
    before = model(codes)
    for k, span in enumerate(model.spans):
        for t in range(span.start, span.stop):
            changed = codes.clone()
            changed[0, t] = (codes[0, t] + 1) % K
            after = model(changed)
            torch.testing.assert_close(after[:, : span.stop], before[:, : span.stop])
            for later in model.spans[k + 1 :]:
                assert (after[:, later] - before[:, later]).abs().max() > 1e-4


def test_positions_of_one_scale_read_each_others_inputs() -> None:
    """The mask lets a scale attend to itself: its inputs are those of the scales before."""
    model = make_var()
    mask = model.mask
    for span in model.spans:
        assert (mask[span, : span.stop] == 0).all()
        assert mask[span, span.stop :].isinf().all()


@torch.no_grad()
def fill_slowly(model: VAR, numbers: Numbers, known: Tensor, codes: Tensor) -> Tensor:
    """Every scale by a run of the whole network."""
    codes, uniform = codes.clone(), numbers.uniform(model.L)
    for span in model.spans:
        logits = model(codes)[:, span]
        for i, t in enumerate(range(span.start, span.stop)):
            if not known[t]:
                codes[:, t] = Sampler.unmodified().draw(logits[:, i], uniform[:, t])
    return codes


@torch.no_grad()
def test_drawing_with_a_cache_is_drawing_without() -> None:
    model = make_var()
    known = torch.arange(model.L) % 4 == 1
    codes = torch.randint(K, (20, model.L))
    filled = model.fill(codes, known, Numbers(3, range(20)), Sampler.unmodified(), None)
    assert torch.equal(filled, fill_slowly(model, Numbers(3, range(20)), known, codes))


@torch.no_grad()
@pytest.mark.parametrize("classes", [0, 3])
def test_windows_of_the_priors_own_grid_are_that_grid(classes: int) -> None:
    model = make_var(classes=classes)
    sampler = make(Sampler, guidance=2.0 if classes else 1.0, top_k=3, temperature=0.8)
    labels = torch.arange(20) % classes if classes else None
    by_windows = model.fill_windows(20, (4, 4), Numbers(1, range(20)), sampler, labels)
    drawn = sample(model, sampler, 20, seed=1, labels=labels)
    assert torch.equal(by_windows, drawn[:, 0])


def test_a_larger_grid_has_larger_scales() -> None:
    model = make_var()
    sampler = make(Sampler, grid="6x8")
    codes = sample(model, sampler, 12, seed=0)
    sizes = model.read.scales.sizes_on((6, 8))
    assert sizes == ((2, 2), (3, 4), (5, 6), (6, 8))
    assert codes.shape == (12, 1, sum(h * w for h, w in sizes))
    assert codes.min() >= 0
    assert torch.equal(codes[:5], sample(model, sampler, 5, seed=0, batch_size=2))


@pytest.mark.parametrize(
    ("start", "n", "size", "whole", "part", "place"),
    [
        (0, 4, 2, 16, 8, 0),
        (2, 4, 2, 16, 8, 8),
        (1, 4, 2, 16, 8, 4),
        (0, 2, 2, 9, 8, 0),
        (1, 3, 2, 9, 8, 1),
    ],
)
def test_a_window_of_a_scale_lies_on_its_part_of_the_grid(
    start: int, n: int, size: int, whole: int, part: int, place: int
) -> None:
    assert place_window(start, n, size, whole, part) == place


def test_codes_with_a_part_of_what_is_known_stay() -> None:
    model = make_var()
    codes = torch.randint(K, (64, 1, model.L))
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:2] = True
    with torch.no_grad():
        filled = model.fill_grid(codes, known, Numbers(0, range(64)), Sampler.unmodified(), None)
    touched = torch.cat([part.flatten() for part in model.read.scales.touched(known)])
    assert touched[0]
    assert torch.equal(filled[..., touched], codes[..., touched])
    assert (filled[..., ~touched] != codes[..., ~touched]).any(0).all()


def test_nats_of_a_place_are_the_mean_over_the_codes_that_describe_it() -> None:
    model = make_var(grid=(2, 2))
    nats = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert model.map_nats(nats).tolist() == [[[1.5, 2.0], [2.5, 3.0]]]


def test_steps_are_those_of_the_scales() -> None:
    model = make_var()
    assert torch.equal(
        sample(model, make(Sampler, steps=4), 3, seed=0),
        sample(model, Sampler.unmodified(), 3, seed=0),
    )
    with pytest.raises(InputError, match="this prior draws its 4 scales in one step each"):
        sample(model, make(Sampler, steps=8), 3, seed=0)


def test_codebooks_of_their_own_are_read_by_scale() -> None:
    torch.manual_seed(0)
    scales = make_scales((2, 2))
    books = torch.randn(2, K, DIM)
    settings = {"width": 16, "depth": 1, "heads": 2, "scales": scales}
    model = randomised(make(VAR, books, (2, 2), **settings)).eval()
    codes = torch.randint(K, (4, 5))
    before = model(codes)
    model.read.vectors[1] += 1  # of the last scale, whose codes nothing reads
    assert torch.equal(model(codes), before)
    model.read.vectors[0] += torch.randn(K, DIM)
    assert not torch.equal(model(codes), before)


def test_a_prior_reads_what_the_tokenizer_adds_up() -> None:
    """The map behind the codes of all scales is z_q."""
    torch.manual_seed(0)
    tokenizer = make_multiscale_tokenizer()
    space = describe_codes({"scales": None}, tokenizer)
    model = make(VAR, **space, width=16, depth=1, heads=2)
    codes = torch.randint(16, (3, 1, model.L))
    z_hat = model.read.start(3, model.grid)
    for k, part in enumerate(model.read.scales.split(codes[:, 0])):
        z_hat = model.read.add(z_hat, part, k)
    torch.testing.assert_close(z_hat, tokenizer.quantizer.lookup(codes))
    assert model.grid == tokenizer.grid
    assert model.code_shape == (*tokenizer.code_shape, 1)


def make_multiscale_tokenizer(shared: bool = True) -> object:
    quantizer = MultiScaleResidual(
        lambda K, dim: make(EMA, K, dim), 16, DIM, None, shared, convolutions=2, strength=0.5
    )
    return make_tokenizer(dim=DIM, quantizer=quantizer)


def test_codes_that_a_prior_can_not_learn_are_refused() -> None:
    with pytest.raises(InputError, match="train one with quantizer=multiscale, or use prior=gpt"):
        describe_codes({"scales": None}, make_tokenizer())
    with pytest.raises(InputError, match="only prior=var tells apart"):
        describe_codes({}, make_multiscale_tokenizer(shared=False))
    space = describe_codes({}, make_multiscale_tokenizer())
    assert space["grid"] == (1, 30)  # a row to every other prior
    assert "scales" not in space
    with pytest.raises(InputError, match="are not those of scales"):
        make(
            VAR,
            torch.randn(1, K, DIM),
            (4, 4),
            scales=make_scales((2, 2)),
            width=16,
            depth=1,
            heads=2,
        )


def test_scales_learn_nothing_in_a_prior() -> None:
    model = make_var()
    assert isinstance(model.read.scales, Scales)
    assert not any("scales" in name for name, _ in model.named_parameters())
    assert any("scales.kernel_0" in name for name in model.state_dict())
