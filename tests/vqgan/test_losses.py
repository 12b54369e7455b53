import math
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from codegrid.engine.clock import Budget, Now
from codegrid.engine.errors import InputError
from tests.helpers.configs import ROOT
from tests.helpers.pages import load_example
from tests.helpers.parts import make
from tests.helpers.stage1 import paper_weight
from vqgan.discriminators.base import Judgement
from vqgan.discriminators.fine import Fine
from vqgan.discriminators.patch import PatchGAN
from vqgan.losses.adversarial import Game, Hinge, LeastSquares, NonSaturating, Vanilla
from vqgan.losses.gate import Gate
from vqgan.losses.perceptual import LPIPS, DiscriminatorFeatures
from vqgan.losses.pixel import Pixel
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import AdaptiveWeight, ConstantWeight


def test_pixel_losses_are_the_means_over_pixels() -> None:
    x, x_hat = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert make(Pixel, l1=1, l2=0)(x, x_hat) == 0.5
    assert make(Pixel, l1=0, l2=1)(x, x_hat) == 0.25
    assert make(Pixel, l1=2, l2=4)(x, x_hat) == 2.0
    assert make(Pixel, l1=1, l2=1)(x, x) == 0


def test_pixel_losses_are_computed_in_float32() -> None:
    assert (
        make(Pixel)(torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)).dtype
        == torch.float32
    )


CONF = ROOT / "conf" / "loss"
EXAMPLE = "docs/extending/loss.md"  # its code blocks are a perceptual loss, which must pass too

GAMES = {  # a line for each file in conf/loss/adversarial
    "hinge": Hinge(),
    "vanilla": Vanilla(),
    "non_saturating": NonSaturating(),
    "least_squares": LeastSquares(),
}
PERCEPTUAL: dict[str, dict[str, Any] | None] = {  # a line for each file in conf/loss/perceptual
    "features": None,  # takes features, not images
    "lpips": {"net": "squeeze", "pretrained": False},
    "backbone": {"backbone": {"name": "squeezenet1_1", "pretrained": False}},
    EXAMPLE: {},
}
each_game = pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)


def test_every_game_and_perceptual_loss_of_conf_is_under_its_contract() -> None:
    for folder, lines in (("adversarial", GAMES), ("perceptual", PERCEPTUAL)):
        files = {file.stem: OmegaConf.load(file) for file in (CONF / folder).glob("*.yaml")}
        assert lines.keys() - {EXAMPLE} == files.keys()
    for name, game in GAMES.items():
        assert type(instantiate(OmegaConf.load(CONF / "adversarial" / f"{name}.yaml"))) is type(
            game
        )


@pytest.mark.filterwarnings("ignore")  # the packages' own, at import
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name, line in PERCEPTUAL.items() if line is not None])
def test_a_perceptual_loss_is_a_distance_with_a_gradient_to_the_reconstruction(
    name: str, channels: int
) -> None:
    if name == EXAMPLE:
        settings = OmegaConf.create(load_example(EXAMPLE))
    else:
        settings = OmegaConf.load(CONF / "perceptual" / f"{name}.yaml")  # type: ignore[assignment]
    loss = instantiate(OmegaConf.merge(settings, PERCEPTUAL[name] or {}))
    x = torch.rand(2, channels, 32, 32) * 2 - 1
    x_hat = (x + 0.5 * torch.randn_like(x)).requires_grad_()
    distance = loss(x, x_hat)
    distance.backward()
    assert distance.shape == ()
    assert loss(x, x).abs() < 1e-6 < distance.abs()  # LPIPS of random weights may be negative
    assert x_hat.grad is not None
    assert x_hat.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(x, x_hat).dtype == torch.float32
    assert loss.state_dict() == {}


def test_the_hinge_is_one_for_a_blind_discriminator_and_zero_for_a_sure_one() -> None:
    hinge = Hinge()
    assert hinge.discriminator(torch.zeros(4), torch.zeros(4)) == 1
    assert hinge.discriminator(torch.ones(4), -torch.ones(4)) == 0
    assert (
        hinge.discriminator(-torch.ones(4), torch.ones(4)) == 2
    )  # real and fake taken for each other


@each_game
def test_a_discriminator_wants_larger_logits_for_real_and_smaller_for_fake(game: Game) -> None:
    """Where targets and logits change places, as in a cross-entropy called with its arguments the wrong way round, it doesn't."""
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    game.discriminator(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()
    torch.testing.assert_close(real.grad, -fake.grad)


@each_game
def test_the_generator_wants_larger_logits(game: Game) -> None:
    fake = torch.full((4,), -0.5, requires_grad=True)
    game.generator(fake).backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all()


@each_game
def test_losses_of_games_are_means_in_float32(game: Game) -> None:
    real, fake = torch.randn(6), torch.randn(6)
    torch.testing.assert_close(
        game.discriminator(real.repeat(3), fake.repeat(3)), game.discriminator(real, fake)
    )
    torch.testing.assert_close(game.generator(fake.repeat(3)), game.generator(fake))
    assert game.discriminator(real.bfloat16(), fake.bfloat16()).dtype == torch.float32
    assert game.generator(fake.half()).dtype == torch.float32


def test_the_logistic_games_are_the_binary_cross_entropy() -> None:
    real, fake, one = torch.randn(50), torch.randn(50), torch.ones(50)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for game in (Vanilla(), NonSaturating()):
        torch.testing.assert_close(
            game.discriminator(real, fake), (bce(real, one) + bce(fake, 0 * one)) / 2
        )
        assert game.blind == pytest.approx(math.log(2))
    torch.testing.assert_close(NonSaturating().generator(fake), bce(fake, one))
    torch.testing.assert_close(Vanilla().generator(fake), -bce(fake, 0 * one))


def test_the_minimax_generator_saturates_where_it_is_worst_and_the_other_does_not() -> None:
    slopes = []
    for game in (Vanilla(), NonSaturating()):
        fake = torch.full((1,), -20.0, requires_grad=True)
        game.generator(fake).backward()
        slopes.append(float(fake.grad))  # type: ignore[arg-type]
    assert slopes == pytest.approx([0, -1], abs=1e-6)


def test_least_squares_pull_to_one_minus_one_and_the_middle() -> None:
    game = LeastSquares()
    assert game.discriminator(torch.ones(3), -torch.ones(3)) == 0
    assert game.discriminator(torch.zeros(3), torch.zeros(3)) == game.blind == 1
    assert game.generator(torch.zeros(3)) == 0


def at(step: int = 0, progress: float = 0.0) -> Now:
    return Now(step, progress)


def test_a_gate_in_steps_opens_by_steps() -> None:
    gate = Gate(start=100, ramp=10, warmup=20)
    assert [gate.training(at(step, 1.0)) for step in (79, 80)] == [False, True]
    assert [gate.weight(at(step, 1.0)) for step in (99, 100, 105, 110, 500)] == [0, 0, 0.5, 1, 1]


def test_a_gate_in_fractions_opens_by_progress() -> None:
    gate = Gate(start=0.5, ramp=0.2, warmup=0.1)
    assert [gate.training(at(10**6, progress)) for progress in (0.39, 0.41)] == [False, True]
    assert gate.weight(at(10**6, 0.5)) == 0
    assert math.isclose(gate.weight(at(0, 0.6)), 0.5)
    assert gate.weight(at(0, 0.9)) == 1


def test_a_gates_phase_runs_from_0_to_1_before_the_opening_and_again_after_it() -> None:
    fractions, steps = Gate(start=0.25, ramp=0.1, warmup=0.1), Gate(start=25, ramp=1, warmup=1)
    for step, phase in ((0, 0.0), (10, 0.4), (25, 0.0), (40, 0.2), (100, 1.0)):
        assert fractions.phase(at(step, step / 100)) == pytest.approx(phase)
        assert steps.phase(at(step, step / 100)) == pytest.approx(phase)
    assert Gate(start=1.0, ramp=0.0, warmup=0.0).phase(at(9, 1.0)) == 1


BEFORE, WARMUP, OPENED = "before the gate", "discriminator warms up", "gate open"


@pytest.mark.parametrize(
    ("gate", "budget", "phases"),
    [
        (Gate(100, ramp=50, warmup=20), Budget(101), {BEFORE: 0, WARMUP: 80, OPENED: 150}),
        (Gate(100, ramp=0, warmup=20), Budget(100), {BEFORE: 0, WARMUP: 80}),
        (Gate(100, ramp=0, warmup=20), Budget(80), {BEFORE: 0}),
        (Gate(100, ramp=0, warmup=0), Budget(80), {BEFORE: 0}),
        (Gate(100, ramp=0, warmup=20), Budget(max_minutes=1), {BEFORE: 0, WARMUP: 80, OPENED: 100}),
        (Gate(20, ramp=0, warmup=20), Budget(20), {WARMUP: 0}),
        (Gate(0, ramp=0, warmup=0), Budget(1), {OPENED: 0}),
        (Gate(0.5, ramp=0.25, warmup=0.5), Budget(4), {WARMUP: 0.0, OPENED: 0.75}),
        (Gate(0.9, ramp=0.0, warmup=0.0), Budget(10), {BEFORE: 0, OPENED: 0.9}),
        (Gate(0.9, ramp=0.0, warmup=0.0), Budget(9), {BEFORE: 0}),
        (Gate(1.0, ramp=0.0, warmup=0.0), Budget(max_minutes=1), {BEFORE: 0}),
    ],
)
def test_the_phases_of_a_gate_are_those_that_a_run_reaches(
    gate: Gate, budget: Budget, phases: dict[str, float]
) -> None:
    assert gate.list_phases(budget) == phases
    if budget.max_steps:
        now = [budget.now(step, 0) for step in range(budget.max_steps)]
        assert any(map(gate.open, now)) == (OPENED in phases)


def test_a_gate_without_a_ramp_is_a_step() -> None:
    assert [Gate(start=5, ramp=0, warmup=0).weight(at(step)) for step in (4, 5)] == [0, 1]


@pytest.mark.parametrize("marks", [(100, 0.1, 0), (0.5, 10, 0), (-1, 0, 0), (0.5, 0.1, 1.5)])
def test_gates_that_mix_units_or_leave_the_run_are_refused(
    marks: tuple[float, float, float],
) -> None:
    with pytest.raises(InputError, match=r"gate start="):
        Gate(*marks)


def lambdas(adaptive: AdaptiveWeight, pairs: list[tuple[float, float]]) -> list[float]:
    """lambda after updates whose gradients have these lengths, one after the other."""
    values = []
    for rec, adv in pairs:
        adaptive.measure(torch.tensor([[rec]]), torch.tensor([[adv]]))
        values.append(float(adaptive.update()["lambda"]))
    return values


def test_lambda_is_the_ratio_of_the_gradient_norms() -> None:
    # VQGAN eq. 7 by hand: gradients of 3 and of 0.5 everywhere have norms 3 sqrt(n) and 0.5 sqrt(n).
    adaptive = paper_weight(scale=1.0)
    adaptive.measure(torch.full((2, 3), 3.0), torch.full((2, 3), 0.5))
    figures = adaptive.update()
    torch.testing.assert_close(figures["lambda"], torch.tensor(6.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        (figures["grad_rec"], figures["grad_adv"]),
        (torch.tensor(3 * 6**0.5), torch.tensor(0.5 * 6**0.5)),
    )
    assert adaptive.weight == figures["lambda"]


def test_there_is_no_lambda_before_the_first_measurement() -> None:
    assert paper_weight().weight == 0
    assert ConstantWeight(0.1).weight == pytest.approx(0.1)


def test_lambda_is_scaled_and_capped() -> None:
    assert lambdas(paper_weight(scale=0.8), [(1, 0)]) == [0.8e4]
    assert lambdas(paper_weight(scale=0.5, max_weight=10), [(1, 1e-3)]) == [5]


def test_a_constant_lambda_stays_and_is_measured_all_the_same() -> None:
    constant = ConstantWeight(0.25)
    constant.measure(torch.ones(4), torch.ones(1))
    assert {name: float(value) for name, value in constant.update().items()} == {
        "lambda": 0.25,
        "grad_rec": 2,
        "grad_adv": 1,
    }


def test_the_gradients_of_micro_batches_are_averaged_before_their_length_is_taken() -> None:
    """Two that point apart leave nothing: the mean of their lengths would be 1."""
    adaptive = paper_weight(scale=1.0)
    for sign in (1.0, -1.0):
        adaptive.measure(torch.tensor([sign]), torch.tensor([1.0]), 0.5)
    figures = adaptive.update()
    assert (figures["grad_rec"], figures["grad_adv"]) == (0, 1)


def test_a_smooth_lambda_is_the_ratio_of_running_means() -> None:
    adaptive = paper_weight(scale=1.0, smooth=2)
    expected, rec, adv = [], 0.0, 0.0
    for n, (r, a) in enumerate([(1.0, 1.0), (3.0, 1.0), (5.0, 4.0)], 1):
        rec, adv = rec + (r - rec) / min(n, 2), adv + (a - adv) / min(n, 2)
        expected.append(rec / adv)
    assert lambdas(adaptive, [(1, 1), (3, 1), (5, 4)]) == pytest.approx(expected, rel=1e-4)


def test_gradients_that_overflow_are_left_out_of_lambda() -> None:
    adaptive = paper_weight(scale=1.0, smooth=3)
    assert lambdas(
        adaptive, [(2, 1), (math.inf, 1), (math.nan, 1), (2, math.inf)]
    ) == pytest.approx([2] * 4, rel=1e-4)
    assert adaptive.calls == 1


def test_an_anchored_lambda_is_deaf_to_a_reconstruction_that_gets_worse() -> None:
    """The ratio of the moment would multiply by ten what ruined it."""
    early, late = [(1.0, 2.0)] * 4, [(10.0, 2.0)] * 4
    assert lambdas(paper_weight(scale=1.0, smooth=50, anchor=4), early + late) == pytest.approx(
        [0.5] * 8, rel=1e-4
    )
    assert lambdas(paper_weight(scale=1.0), early + late) == pytest.approx(
        [0.5] * 4 + [5.0] * 4, rel=1e-4
    )


def test_an_anchored_lambda_stands_on_the_mean_of_the_first_gradients() -> None:
    anchored = paper_weight(scale=1.0, smooth=50, anchor=3)
    assert lambdas(anchored, [(1, 1), (2, 1), (6, 1), (99, 1)])[2:] == pytest.approx(
        [3, 3], rel=1e-4
    )


def test_a_discriminator_that_tells_nothing_apart_gets_no_unbounded_weight() -> None:
    silent = lambdas(
        paper_weight(scale=1.0, smooth=50, anchor=2, growth=5.0),
        [(1.0, 1.0)] * 2 + [(1.0, 0.0)] * 500,
    )
    assert max(silent) == pytest.approx(5.0, rel=1e-3)


def test_what_lambda_remembers_is_in_the_state() -> None:
    one, two = (paper_weight(scale=1.0, smooth=5, anchor=2) for _ in range(2))
    lambdas(one, [(1.0, 2.0)] * 3)
    two.load_state_dict(one.state_dict())
    assert two.weight == one.weight
    assert lambdas(two, [(9.0, 2.0)]) == lambdas(one, [(9.0, 2.0)])


def test_lecam_is_the_squared_distance_beyond_the_other_sides_mean() -> None:
    lecam, real, fake = (
        make(LeCam, weight=0.5, decay=0.9),
        torch.randn(4, 1, 3, 3),
        torch.randn(4, 1, 3, 3),
    )
    lecam(real, fake)
    lecam.update()
    r, f = 0.1 * real.mean(), 0.1 * fake.mean()
    torch.testing.assert_close(lecam.means, torch.stack([r, f]))
    expected = (
        sum(max(v - f, 0) ** 2 for v in real.flatten()) / 36
        + sum(max(r - v, 0) ** 2 for v in fake.flatten()) / 36
    )
    torch.testing.assert_close(lecam(real, fake), 0.5 * expected)


def test_lecam_pulls_the_logits_of_both_sides_together() -> None:
    real, fake = (
        torch.full((4,), 3.0, requires_grad=True),
        torch.full((4,), -3.0, requires_grad=True),
    )
    make(LeCam)(real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad > 0).all()
    assert (fake.grad < 0).all()


def test_lecams_means_survive_in_the_state_and_move_once_an_update() -> None:
    one, two, real, fake = (
        make(LeCam, decay=0.5),
        make(LeCam, decay=0.5),
        torch.randn(6, requires_grad=True),
        torch.randn(6),
    )
    for part in range(3):  # in micro-batches
        one(real[2 * part : 2 * part + 2], fake[2 * part : 2 * part + 2], 1 / 3)
        assert (one.means == 0).all()
    one.update()
    torch.testing.assert_close(one.means, torch.stack([real.detach().mean(), fake.mean()]) / 2)
    assert not one.means.requires_grad
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.means, one.means)


class Linear(nn.Module):
    """A discriminator whose slope is known: the mean logit of an image is the sum of w times its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: torch.Tensor) -> Judgement:
        return Judgement((x * self.w).sum((1, 2, 3))[:, None, None, None].expand(-1, 1, 2, 2), [])


def test_r1_is_the_squared_slope_at_the_real_images_and_pays_for_the_updates_between() -> None:
    linear, r1 = Linear(), make(R1, weight=3.0, every=4)
    penalty = r1(linear, torch.randn(5, 3, 4, 4))
    torch.testing.assert_close(penalty, 3.0 / 2 * 4 * linear.w.square().sum())
    penalty.backward()
    torch.testing.assert_close(linear.w.grad, 3.0 * 4 * linear.w.detach())
    assert [r1.due(update) for update in range(5)] == [True, False, False, False, True]
    assert not make(R1, 0.0).due(0)


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"weight": 1, "every": 0}])
def test_an_r1_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"loss.r1."):
        make(R1, **wrong)


def test_the_fine_discriminator_sees_28_pixels_around_each_logit() -> None:
    discriminator, x = make(Fine, 64, 3, width=8), torch.randn(1, 3, 64, 64, requires_grad=True)
    for block in discriminator.blocks:
        if isinstance(block[-2], torch.nn.GroupNorm):
            block[-2] = torch.nn.Identity()  # which sees the whole image by its statistics
    judgement = discriminator(x)
    assert judgement.logits.shape == (1, 1, 16, 16)
    judgement.logits[0, 0, 8, 8].backward()
    assert x.grad is not None
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 28


def test_a_size_the_fine_discriminator_cant_take_is_refused() -> None:
    with pytest.raises(
        InputError,
        match="data.image_size=30 is not divisible by 4, as loss/discriminator=fine needs",
    ):
        make(Fine, 30, 3)


@pytest.mark.parametrize(("depth", "size", "grid"), [(1, 16, 6), (2, 32, 6), (3, 64, 6)])
def test_the_discriminator_judges_patches(depth: int, size: int, grid: int) -> None:
    judgement = make(PatchGAN, 3, width=8, depth=depth)(torch.randn(2, 3, size, size))
    assert judgement.logits.shape == (2, 1, grid, grid)
    assert len(judgement.features) == depth + 1


def test_the_published_size_has_the_published_depth() -> None:
    # Isola et al.: C64-C128-C256-C512 and a last convolution; 30x30 logits on 256x256 pixels.
    judgement = make(PatchGAN, 3, width=64, depth=3)(torch.randn(1, 3, 256, 256))
    assert [f.shape[1] for f in judgement.features] == [64, 128, 256, 512]
    assert judgement.logits.shape == (1, 1, 30, 30)


def test_no_discriminator_layer_mixes_images_of_a_batch() -> None:
    discriminator, x = make(PatchGAN, 3, width=8), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(discriminator(x).logits[:2], discriminator(x[:2]).logits)


def test_feature_distance_is_zero_between_equal_features_and_does_not_change_with_their_scale() -> (
    None
):
    real, fake = [torch.randn(2, 4, 8, 8)], [torch.randn(2, 4, 8, 8)]
    loss = DiscriminatorFeatures()
    assert loss(real, real) == 0
    torch.testing.assert_close(loss([100 * real[0]], [100 * fake[0]]), loss(real, fake))
    each = [
        (f - r).abs().mean() / r.abs().mean() for r, f in zip(real[0], fake[0], strict=True)
    ]  # by image: no batch counts
    expected = torch.stack(each).mean()
    torch.testing.assert_close(loss(real, fake), expected)


def test_feature_distance_moves_the_reconstruction_alone() -> None:
    real, fake = [torch.randn(2, 3).requires_grad_()], [torch.randn(2, 3).requires_grad_()]
    DiscriminatorFeatures()(real, fake).backward()
    assert real[0].grad is None
    assert fake[0].grad is not None


@pytest.mark.filterwarnings("ignore")  # the packages' own, at import
class TestLPIPS:
    def test_grey_and_small_images_are_handled_and_equal_images_have_no_distance(self) -> None:
        loss = LPIPS("squeeze", pretrained=False)
        x = torch.rand(2, 1, 16, 16) * 2 - 1
        assert loss(x, x) == 0
        assert loss(x, -x) != 0

    def test_its_weights_are_in_no_state_dict_and_never_train(self) -> None:
        loss = LPIPS("squeeze", pretrained=False)
        assert list(loss.parameters()) == []
        assert loss.state_dict() == {}
        loss.train()
        assert not loss._network[0].training

    def test_it_equals_the_package_on_images_it_takes_as_they_are(self) -> None:
        loss = LPIPS("squeeze", pretrained=False)
        x, y = torch.rand(2, 2, 3, 64, 64) * 2 - 1
        torch.testing.assert_close(loss(x, y), loss._network[0](x, y).mean())

    def test_weights_that_cannot_be_fetched_are_named_with_their_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def offline(*_: object, **__: object) -> None:
            raise URLError("no network")

        monkeypatch.setattr("torch.hub.download_url_to_file", offline)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(
            InputError, match=r"vgg16-397923af\.pth.*checkpoints.*use loss/perceptual=features"
        ):
            LPIPS("vgg", pretrained=True)

    def test_an_unknown_network_is_refused(self) -> None:
        with pytest.raises(InputError, match="must be one of vgg, alex, squeeze"):
            LPIPS("resnet", pretrained=False)
