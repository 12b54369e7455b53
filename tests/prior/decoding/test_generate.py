"""Samples of any prior: windows of large grids, completed images, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.decode import decode
from codegrid.data.form import Form
from codegrid.data.images import to_float
from codegrid.engine.errors import InputError
from prior.conditions import encode_init_image, show_init_image
from prior.decoding.generate import generate, sample
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler
from prior.models.base import Prediction, PriorModel
from prior.models.gpt import GPT
from prior.models.var import VAR
from prior.orders import windows
from tests.helpers.parts import make
from tests.helpers.priors import BOOKS, PRIORS, UNLABELLED, make_prior
from tests.helpers.stage1 import make_tokenizer
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.residual import Residual
from vqgan.tokenizer import Tokenizer

K = 5


class Counts(PriorModel):
    """Fills in numbers that identify the call, and records the arguments of each call."""

    def __init__(self, grid: tuple[int, int], num_codebooks: int = 1) -> None:
        super().__init__(torch.randn(num_codebooks, 1000, 2), grid, classes=3)
        self.register_buffer("here", torch.zeros(()))
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def learn(
        self, codes: torch.Tensor, labels: torch.Tensor | None, progress: float
    ) -> Prediction:
        raise AssertionError

    def judge(self, codes: torch.Tensor, labels: torch.Tensor | None) -> Prediction:
        raise AssertionError

    def fill(
        self,
        codes: torch.Tensor,
        known: torch.Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: torch.Tensor | None,
        cache: StepCache | None = None,
    ) -> torch.Tensor:
        self.calls.append((codes.clone(), known.clone(), labels))
        return torch.where(known, codes, 100 * len(self.calls) + torch.arange(self.L))


@pytest.mark.parametrize(
    ("grid", "size", "corners"),
    [
        ((4, 4), (4, 4), [(0, 0)]),
        ((4, 6), (4, 4), [(0, 0), (0, 2)]),
        ((7, 4), (4, 4), [(0, 0), (2, 0), (3, 0)]),
        ((5, 5), (4, 4), [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ((1, 3), (1, 1), [(0, 0), (0, 1), (0, 2)]),
    ],
)
def test_windows_are_half_a_window_apart_and_the_last_ones_at_the_border(
    grid: tuple[int, int], size: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    covering = windows(grid, size)
    assert [(rows.start, columns.start) for rows, columns in covering] == corners
    assert all(
        (rows.stop - rows.start, columns.stop - columns.start) == size for rows, columns in covering
    )


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_each_code_of_a_large_grid_is_drawn_once_and_known_from_then_on(num_codebooks: int) -> None:
    model = Counts((4, 4), num_codebooks)
    codes = sample(model, make(Sampler, grid="7x6"), 2, seed=0).view(2, 7, 6, num_codebooks)
    drawn = torch.zeros(7, 6, dtype=torch.int64)
    for call, ((rows, columns), (window, known, _)) in enumerate(
        zip(windows((7, 6), (4, 4)), model.calls, strict=True), 1
    ):
        known = known.view(4, 4, num_codebooks)
        assert torch.equal(known, (drawn[rows, columns] > 0)[..., None].expand_as(known))
        assert torch.equal(
            window.view(2, 4, 4, num_codebooks)[:, known], codes[:, rows, columns][:, known]
        )
        drawn[rows, columns] = drawn[rows, columns].where(drawn[rows, columns] > 0, call)
    assert torch.equal(codes // 100, drawn[None, :, :, None].expand_as(codes))


def test_every_window_has_the_samples_label() -> None:
    model = Counts((2, 2))
    sample(
        model,
        make(Sampler, grid="3x4"),
        5,
        seed=0,
        batch_size=3,
        labels=torch.tensor([0, 1, 2, -1, 0]),
    )
    classes = [[] if labels is None else labels.tolist() for *_, labels in model.calls]
    assert classes == 6 * [[0, 1, 2]] + 6 * [[-1, 0]]


def test_a_large_grid_follows_the_conditional_distribution_of_each_window() -> None:
    """Code by code as the definition has it, without a cache and with a distribution function of its own."""
    model = make_prior("gpt", grid=(2, 4))
    assert isinstance(model, GPT)
    codes = sample(model, make(Sampler, grid="3x6"), 3, seed=4)
    numbers, canvas = Numbers(4, range(3)), torch.full((3, 3, 6), -1)
    for top, left in ((0, 0), (0, 2), (1, 0), (1, 2)):
        uniform = numbers.uniform(8)
        for t in range(8):
            window = canvas[:, top : top + 2, left : left + 4].reshape(3, 8)
            at = top + t // 4, left + t % 4
            if canvas[0, at[0], at[1]] < 0:
                p = model(window.clamp(min=0))[:, t].double().softmax(-1)
                canvas[:, at[0], at[1]] = (p.cumsum(-1) <= uniform[:, t, None]).sum(-1)
    assert torch.equal(codes, canvas)


def test_an_image_is_encoded_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer().eval()
    own, modes = tokenizer.indices, []

    def indices(x: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        return own(x)

    monkeypatch.setattr(tokenizer, "indices", indices)
    encode_init_image(torch.zeros(3, 16, 16), tokenizer)
    assert modes == [False]


def list_known(model: PriorModel, known: torch.Tensor) -> torch.Tensor:
    """Which codes (L,) stay if these places (h, w) are known."""
    if isinstance(model, VAR):
        return torch.cat([part.flatten() for part in model.read.scales.touched(known)])
    return known.flatten().repeat_interleave(model.num_codebooks)


@pytest.mark.parametrize("name", PRIORS)
class TestEveryPrior:
    def test_larger_grids_depend_on_the_seed_and_not_on_the_batch_size(self, name: str) -> None:
        model = make_prior(name)
        codes = sample(model, make(Sampler, grid="3x5"), 6, seed=1)
        num_codebooks = (BOOKS[name],) if name in BOOKS else ()
        shape = model.shape_on((3, 5))[:2] if name == "var" else (3, 5, *num_codebooks)
        assert codes.shape == (6, *shape)
        assert set(codes.unique().tolist()) <= set(range(K))
        assert torch.equal(codes, sample(model, make(Sampler, grid="3x5"), 6, seed=1, batch_size=4))
        assert not torch.equal(codes, sample(model, make(Sampler, grid="3x5"), 6, seed=2))

    def test_a_grid_of_the_priors_own_size_is_drawn_as_without_saying_so(self, name: str) -> None:
        model = make_prior(name)
        assert torch.equal(
            sample(model, make(Sampler, grid="2x3"), 4, seed=1),
            sample(model, Sampler.unmodified(), 4, seed=1),
        )

    def test_the_upper_rows_of_an_image_stay_and_the_others_are_drawn(self, name: str) -> None:
        model = make_prior(name, grid=(3, 2))
        init = torch.randint(K, (model.L,))
        sampler = make(Sampler, init_image="x", rows=2)
        codes = sample(model, sampler, 64, seed=0, init_codes=init).flatten(1)
        stay = list_known(model, sampler.known((3, 2)))
        assert (codes[:, stay] == init[stay]).all()
        assert (codes[:, ~stay] != init[~stay]).any(0).all()

    def test_a_region_is_drawn_and_all_around_it_stays(self, name: str) -> None:
        model = make_prior(name, grid=(3, 3))
        init = torch.randint(K, (model.L,))
        sampler = make(Sampler, init_image="x", region=[0, 1, 2, 3])
        codes = sample(model, sampler, 64, seed=0, init_codes=init).flatten(1)
        changed = (codes != init).any(0)
        assert torch.equal(changed, ~list_known(model, sampler.known((3, 3))))
        in_place = changed[-9 * model.num_codebooks :].view(3, 3, -1).any(2)  # of the last grid
        assert in_place.tolist() == [[False, True, True], [False, True, True], [False] * 3]

    def test_a_larger_grid_keeps_its_class(self, name: str) -> None:
        if name not in UNLABELLED:
            model = make_prior(name, classes=2)
            labels = torch.tensor([0, 1, -1, 1] * 8)
            codes, free = (
                sample(model, make(Sampler, grid="2x4"), 32, seed=1, labels=each)
                for each in (labels, torch.full_like(labels, -1))
            )
            assert torch.equal(codes[labels < 0], free[labels < 0])
            assert not torch.equal(
                codes[labels >= 0][:, :, 3:], free[labels >= 0][:, :, 3:]
            )  # drawn in the second window


def test_a_masked_priors_region_depends_on_what_comes_after_it() -> None:
    for name, depends in (("diffusion", True), ("gpt", False)):
        model = make_prior(name, grid=(2, 3))
        for p in model.parameters():
            p.data *= 5  # before training, codes depend on each other only weakly
        one = torch.randint(K, (2, 3))
        other = torch.cat([one[:1], (one[1:] + 1) % K])
        drawn = [
            sample(
                model,
                make(Sampler, init_image="x", region=[0, 0, 1, 3]),
                64,
                seed=0,
                init_codes=init,
            )[:, 0]
            for init in (one, other)
        ]
        assert torch.equal(*drawn) is not depends


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"grid": "16x"}, r"sampler\.grid=16x must be rows x columns"),
        (
            {"grid": [16, 0]},
            r"sampler\.grid=16x0 must be rows x columns of codes, such as 16x24 or",
        ),
        ({"grid": [2, 2, 2]}, r"sampler\.grid=2x2x2 must be rows x columns"),
        ({"grid": 1.5}, r"sampler\.grid=1\.5 must be rows x columns"),
        ({"grid": True}, r"sampler\.grid=True must be rows x columns"),
        ({"grid": "0x8"}, r"sampler\.grid=0x8 must be rows x columns"),
        ({"grid": "8x-8"}, r"sampler\.grid=8x-8 must be"),
        ({"rows": 2}, r"sampler\.rows=2 .* sampler\.init_image="),
        ({"region": [0, 0, 1, 1]}, r"sampler\.region=\[0, 0, 1, 1\] .* sampler\.init_image="),
        ({"init_image": "a.png"}, r"sampler\.init_image=a\.png needs sampler\.rows=4"),
        ({"init_image": "a.png", "rows": 2, "region": [0, 0, 1, 1]}, "exclude each other"),
        ({"init_image": "a.png", "rows": 2, "grid": "9x9"}, r"leave sampler\.grid=9x9 out"),
        ({"init_image": "a.png", "rows": 2, "grid": [9, 8]}, r"leave sampler\.grid=9x8 out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        make(Sampler, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [4, 9, -1, 1.5, "two"])
def test_rows_that_leave_nothing_to_draw_or_are_no_number_are_refused(rows: int) -> None:
    with pytest.raises(InputError, match=rf"sampler\.rows={rows} must be"):
        make(Sampler, init_image="x", rows=rows).known((4, 4))


@pytest.mark.parametrize(
    "region",
    [
        [0, 0, 5, 4],
        [0, 0, 4, 7],
        [2, 0, 2, 4],
        [0, 3, 4, 1],
        [-1, 0, 4, 4],
        [0, 0, 4],
        [0, 0, 1.5, 4],
        3,
    ],
)
def test_regions_that_are_empty_or_reach_over_the_grid_are_refused(region: list[int]) -> None:
    with pytest.raises(InputError, match=r"sampler\.region="):
        make(Sampler, init_image="x", region=region).known((4, 6))


@pytest.mark.parametrize(
    ("grid", "size"),
    [("16x24", (16, 24)), ([16, 24], (16, 24)), ((4, 4), (4, 4)), (16, (16, 16)), ("16", (16, 16))],
)
def test_a_grid_is_rows_and_columns_in_either_form_or_one_number(
    grid: Any, size: tuple[int, int]
) -> None:
    assert make(Sampler, grid=grid).size((4, 4)) == size


@pytest.mark.parametrize("grid", ["1x9", "9x2"])
def test_a_grid_smaller_than_the_priors_is_refused(grid: str) -> None:
    with pytest.raises(InputError, match=f"sampler.grid={grid} must be at least 2x3"):
        next(generate(make_prior("gpt"), make(Sampler, grid=grid), 1, seed=0))


@pytest.mark.parametrize("start", ["patches", "random"])
@pytest.mark.parametrize(
    "quantizer", [lambda: make(EMA, 16, 8), lambda: make(Residual, partial(make, EMA), 16, 2, 8)]
)
def test_a_tokenizer_decodes_larger_grids(quantizer: Callable[[], Quantizer], start: str) -> None:
    usual = make_tokenizer(start=start)
    t = Tokenizer(usual.encoder, quantizer(), usual.decoder, start).eval()
    num_codebooks = (t.num_codebooks,) if t.num_codebooks > 1 else ()
    assert t.decode_indices(torch.randint(16, (2, 6, 9, *num_codebooks))).shape == (2, 3, 24, 36)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file that has to be cut and turned."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    return tmp_path / "image.png"


def test_codes_of_an_image_file_are_those_of_its_middle(image: Path) -> None:
    t = make_tokenizer().eval()
    codes, original = encode_init_image(str(image), t)
    head = show_init_image(original, codes, t, torch.ones(4, 4, dtype=torch.bool))
    pixels = torch.from_numpy(decode(image.read_bytes(), Form.square(16, 3)).copy())
    assert torch.equal(codes, t.indices(to_float(pixels[None]))[0])
    assert torch.equal(head[0][0], pixels)
    assert torch.equal(head[1], head[2])


def test_the_picture_of_an_init_image_shows_where_it_ends(image: Path) -> None:
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:1, :3] = True
    t = make_tokenizer().eval()
    codes, original = encode_init_image(str(image), t)
    _, decoded, part = show_init_image(original, codes, t, known)
    assert torch.equal(part[..., :4, :12], decoded[..., :4, :12])
    assert (part[..., 4:, :] == 128).all()
    assert (part[..., 12:] == 128).all()


def test_a_grey_tokenizer_reads_a_colour_image(image: Path) -> None:
    t = make_tokenizer(channels=1).eval()
    codes, original = encode_init_image(str(image), t)
    head = show_init_image(original, codes, t, torch.ones(4, 4, dtype=torch.bool))
    assert [picture.shape for picture in head] == 3 * [(1, 1, 16, 16)]


def test_an_init_image_that_is_no_image_is_refused(tmp_path: Path) -> None:
    t = make_tokenizer().eval()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(
        InputError, match=r"text\.png can't be read as an image \(no image of a known format\)"
    ):
        encode_init_image(str(tmp_path / "text.png"), t)
    for missing in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(InputError, match=r"is not there; give an image file"):
            encode_init_image(str(missing), t)
