"""One tokenizer at many rates: nested dropout of sequences, decoding of the first codes, and the curve of stage=evaluate."""

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from codegrid.data.images import to_uint8
from codegrid.engine.errors import InputError
from codegrid.engine.module import ClockedModule
from codegrid.evaluation.table import format_rates
from tests.helpers.commands import QUICK, TINY, Command
from tests.helpers.evaluation import choose_settings
from tests.helpers.parts import make
from tests.helpers.stage1 import Noise, lightning_warnings, make_tokenizer
from vqgan.judging import TokenizerJudge
from vqgan.networks.vit import ViTDecoder, ViTEncoder
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.kl import KL
from vqgan.quantizers.multiscale import MultiScaleResidual
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.vq import VQ
from vqgan.rates import Rate, RateJudge, list_rates
from vqgan.tokenizer import Tokenizer, draw_lengths

pytestmark = lightning_warnings

N = 6  # codes of a sequence


def make_sequence(nested: float = 0.5, quantizer: Any = None, **settings: Any) -> Tokenizer:
    """A small tokenizer of N codes without places for images of 16x16 pixels."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "image_size": 16, "channels": 3, "grid": 4, "tokens": N, "patch": 4, "width": 16, "depth": 1, "heads": 2,
        "mlp_ratio": 2, "layout": None, "gated": False, "positions": "sine", **settings,
    }  # fmt: skip
    decoder = ViTDecoder(**sizes)
    torch.nn.init.normal_(decoder.last.weight, std=0.1)
    quantizer = quantizer or make(VQ, K=16, dim=8)
    return Tokenizer(ViTEncoder(**sizes), quantizer, decoder, None, nested=nested)


def make_residual(num_codebooks: int = 3, nested: float = 0.0) -> Tokenizer:
    quantizer = make(Residual, partial(make, EMA), 16, num_codebooks, 8, nested=nested)
    return make_tokenizer(quantizer=quantizer)


def make_scales() -> Tokenizer:
    """Grids of 1, 2, 3 and 4 codes a side."""
    quantizer = make(
        MultiScaleResidual, partial(make, EMA), 16, 8, scales=None, shared=True, convolutions=2
    )
    return make_tokenizer(quantizer=quantizer)


def make_images(n: int = 5) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw_codes(tokenizer: Tokenizer, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(tokenizer.K or 0, (n, *tokenizer.code_shape), generator=generator)


# What a tokenizer makes of the first codes.


@torch.no_grad()
@pytest.mark.parametrize("n", range(1, N + 1))
def test_the_first_codes_of_a_sequence_are_decoded_with_zeros_behind_them(n: int) -> None:
    tokenizer = make_sequence().eval()
    codes = draw_codes(tokenizer)
    z_q = tokenizer.quantizer.lookup(codes)
    z_q[..., n:] = 0
    expected = tokenizer.decode(z_q)
    assert torch.equal(tokenizer.decode_indices(codes[:, :, :n]), expected)
    pictures = tokenizer.decode_codes(codes[:, :, :n], output="tensor")
    assert torch.equal(pictures, expected.clamp(-1, 1))


@torch.no_grad()
def test_the_first_codebooks_are_decoded_as_the_sum_of_their_codes() -> None:
    tokenizer = make_residual().eval()
    codes = draw_codes(tokenizer)
    tables = tokenizer.quantizer.codebooks()
    for n in (1, 2, 3):
        z_q = sum(F.embedding(codes[..., i], tables[i]) for i in range(n))
        expected = tokenizer.decode(z_q.movedim(-1, 1))  # type: ignore[union-attr]
        pictures = tokenizer.decode_codes(codes[..., :n], output="tensor")
        torch.testing.assert_close(pictures, expected.clamp(-1, 1))


@pytest.mark.parametrize(
    ("make_one", "cut"),
    [
        (make_sequence, (slice(None), slice(None), slice(0))),
        (make_residual, (..., slice(0))),
        (partial(make_tokenizer, dim=8), (..., slice(0))),
    ],
)
def test_no_codes_are_no_image(make_one: Any, cut: Any) -> None:
    tokenizer = make_one()
    with pytest.raises(InputError, match="at least one grid"):
        tokenizer.decode_codes(draw_codes(tokenizer)[cut])


def test_more_codes_than_a_tokenizer_has_are_refused() -> None:
    sequence, residual = make_sequence(), make_residual()
    with pytest.raises(InputError, match="this vision transformer serves 1x6 alone"):
        sequence.decode_codes(torch.zeros(1, 1, N + 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"codes of shape \[1, 4, 4, 4\] must be \(B, h, w, 3\)"):
        residual.decode_codes(torch.zeros(1, 4, 4, 4, dtype=torch.int64))


# Nested dropout of sequences; that of codebooks is in quantizers/test_multi_codebook.py.


def test_lengths_are_all_or_uniform_below_all() -> None:
    torch.manual_seed(0)
    stays = draw_lengths(torch.ones(20_000, 8, 1, N), 0.6)[:, 0, 0]
    lengths = stays.sum(1).long()
    first = torch.arange(N) < lengths[:, None]
    assert torch.equal(stays, first.float())  # the first codes stay, never others
    shares = torch.bincount(lengths, minlength=N + 1) / len(lengths)
    torch.testing.assert_close(shares, torch.tensor([0, *[0.12] * 5, 0.4]), atol=0.01, rtol=0)


@torch.no_grad()
def test_training_decodes_the_first_codes_of_each_image_and_evaluation_all() -> None:
    tokenizer = make_sequence(nested=1.0)
    q = tokenizer.encode(make_images(8))
    whole = tokenizer.eval().decode(q.z_q)
    options = [tokenizer.decode(q.z_q[..., :n]) for n in range(1, N)]
    tokenizer.train()
    x_hat = tokenizer.decode(q.z_q)
    chosen = [
        next(i for i, option in enumerate(options) if torch.allclose(option[b], image, atol=1e-5))
        for b, image in enumerate(x_hat)
    ]
    assert len(set(chosen)) > 1
    tokenizer.decoder.eval()  # as where the decoder rests
    assert torch.equal(tokenizer.decode(q.z_q), whole)


def test_codes_that_are_left_out_get_no_gradient_of_the_decoder() -> None:
    tokenizer = make_sequence(nested=1.0)
    z_q = torch.randn(8, 8, 1, N, requires_grad=True)
    tokenizer.decode(z_q).square().sum().backward()
    assert z_q.grad is not None
    reached = z_q.grad.abs().sum((1, 2)) > 0
    assert reached[:, 0].all()
    assert not reached[:, -1].any()
    assert torch.equal(reached, reached.long().cumprod(1).bool())


@pytest.mark.parametrize(
    ("nested", "settings", "sentence"),
    [
        (1.5, {}, "model.nested=1.5 must be a number from 0 to 1"),
        (
            0.5,
            {"tokens": None},
            "model.grid=4 is no sequence of several codes; use model=vit model",
        ),
        (0.5, {"tokens": 1}, r"and model.grid=1 is no sequence of several codes"),
        (0.0, {"tokens": 0}, "model.tokens=0 must be a whole number of at least 1 code"),
        (0.0, {"layout": "grid"}, "model.tokens=6 are codes without places, and model.layout=grid"),
    ],
)
def test_settings_that_can_not_work_are_refused(
    nested: float, settings: dict, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        make_sequence(nested, **settings)


def test_tokens_are_a_grid_of_one_row_with_a_random_start() -> None:
    tokenizer = make_sequence()
    other = make_sequence(tokens=None, grid=(1, N))
    assert tokenizer.grid == other.grid == (1, N)
    assert tokenizer.patches is None
    assert tokenizer.fingerprint() == other.fingerprint()
    assert make_sequence(0.0, tokens=None).patches is not None


# The rates of a curve.


@pytest.mark.parametrize(
    ("tokenizer", "wanted", "expected"),
    [
        (make_sequence(), True, [{"tokens": n} for n in range(1, N)]),
        (make_sequence(0.0), True, []),
        (make_sequence(0.0), [4, 1, 4], [{"tokens": 1}, {"tokens": 4}]),
        (make_sequence(), False, []),
        (make_residual(), True, [{"depth": 1}, {"depth": 2}]),
        (make_residual(), [2, 3], [{"depth": 2}]),
        (make_residual(1), True, []),
        (make_scales(), True, [{"tokens": 1}, {"tokens": 5}, {"tokens": 14}]),
        (make_scales(), [5, 30], [{"tokens": 5}]),
        (make_tokenizer(), True, []),
        (make_tokenizer(quantizer=make(KL, 4)), True, []),
    ],
)
def test_a_curve_has_the_rates_of_nested_codes(
    tokenizer: Tokenizer, wanted: Any, expected: list[dict]
) -> None:
    whole = [Rate()] if expected else []
    assert list_rates(tokenizer, wanted) == [*(Rate(**each) for each in expected), *whole]


def test_many_rates_double() -> None:
    sequence, residual = make_sequence(tokens=40), make_residual(20)
    assert [rate.tokens for rate in list_rates(sequence, True)] == [1, 2, 4, 8, 16, 32, None]
    assert [rate.depth for rate in list_rates(residual, True)] == [1, 2, 4, 8, 16, None]


def test_a_sequence_of_several_codebooks_has_a_curve_of_its_length() -> None:
    quantizer = make(Residual, partial(make, EMA), 16, 2, 8)
    tokenizer = make_sequence(quantizer=quantizer)
    rates = list_rates(tokenizer, [1, N])
    assert [rate.count(tokenizer) for rate in rates] == [2, 2 * N]
    bits = [rate.describe(tokenizer, 24)["bits_per_image"] for rate in rates]
    assert bits == [8, 8 * N]


@torch.no_grad()
def test_each_scale_is_a_rate_of_its_own_bits() -> None:
    tokenizer = make_scales().eval()
    rates = list_rates(tokenizer, True)
    assert [rate.describe(tokenizer, 24)["bits_per_image"] for rate in rates] == [4, 20, 56, 120]
    codes = draw_codes(tokenizer)
    assert torch.equal(rates[1].cut(codes), codes[..., :5])


@pytest.mark.parametrize(
    ("tokenizer", "wanted", "sentence"),
    [
        (make_sequence(), [1, 7], r"rates=7 must be one of 1, 2, 3, ..., 6"),
        (make_residual(), [4], r"rates=4 must be one of 1, 2, 3$"),
        (make_scales(), [2], r"rates=2 must be one of 1, 5, 14, 30$"),
        (make_tokenizer(), [2], "rates needs codes of which the first are an image.*leave rates=2"),
        (make_tokenizer(quantizer=make(KL, 4)), [2], "and this tokenizer has none"),
    ],
)
def test_numbers_that_are_no_rate_are_refused(
    tokenizer: Tokenizer, wanted: Any, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        list_rates(tokenizer, wanted)


@pytest.mark.parametrize("rates", ["all", 3, [0], [1.5], [True]])
def test_a_setting_that_is_no_list_of_numbers_is_refused(rates: Any) -> None:
    with pytest.raises(InputError, match=r"rates=.* must be"):
        choose_settings(rates=rates)


def measure_slowly(x: Tensor, x_hat: Tensor) -> float:
    """The mean over images of each image's PSNR, of whole pixels."""
    a, b = (to_uint8(each).numpy().astype(np.float64) for each in (x, x_hat))
    errors = ((a - b) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / errors)))


def start(tokenizer: Tokenizer, data: Noise) -> Tokenizer:
    tokenizer.initialise(data.preprocess(data.take_evenly("train", 32)[0]))
    tokenizer.rules = data.rules
    return tokenizer.eval()


@pytest.mark.parametrize("make_one", [make_sequence, make_residual])
@torch.no_grad()
def test_a_curve_has_the_scores_of_each_rate(make_one: Any, tmp_path: Path) -> None:
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    tokenizer = start(make_one(), data)
    judge = TokenizerJudge(tokenizer, data, choose_settings(), None)
    judge.measure_all()
    sheet = judge.scores()
    rows = judge.rates.scores(sheet)
    x = data.preprocess(data.take_evenly("val", 24)[0])
    codes = tokenizer.indices(x)
    assert len(rows) == (N if make_one is make_sequence else 3)
    for i, row in enumerate(rows, 1):
        first = codes[:, :, :i] if make_one is make_sequence else codes[..., :i]
        assert row["codes"] == first[0].numel()
        assert row["bits_per_image"] == 4 * row["codes"]
        assert row["compression_ratio"] == pytest.approx(
            16 * 16 * 24 / (4 * row["codes"]), rel=1e-4
        )
        expected = measure_slowly(x, tokenizer.decode_indices(first))
        assert row["psnr"] == pytest.approx(expected, abs=2e-3)
    for name in ("psnr", "ssim", "bits_per_image", "compression_ratio"):
        assert rows[-1][name] == sheet.values[name]
    psnrs = [row["psnr"] for row in rows]
    assert len(set(psnrs)) == len(psnrs)
    pictures = judge.save_rates(tmp_path, rows, sheet, [])
    assert [picture.name for picture in pictures] == ["rate-distortion.png", "rates.png"]
    with Image.open(pictures[1]) as picture:  # images, each rate below all, all; three each
        assert picture.size == (2 * (3 * 18 - 2), 2 * ((len(rows) + 1) * 18 - 2))
        counts = ", ".join(str(row["codes"]) for row in rows)
        assert f"reconstructions from {counts} codes" in picture.text["Description"]  # type: ignore[attr-defined]
    with (tmp_path / "rates.csv").open(newline="") as lines:
        written = list(csv.DictReader(lines))
    assert [float(row["psnr"]) for row in written] == psnrs
    table = format_rates(rows).splitlines()
    assert table[0].split() == ["first", "codes", "of", "bits_per_image", "psnr", "ssim"]
    assert table[1].split()[:3] == [str(rows[0]["codes"]), "of", str(rows[-1]["codes"])]


def test_distances_of_each_rate_are_to_the_same_images(tmp_path: Path) -> None:
    """The proxy's; other networks would take long."""
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    tokenizer = start(make_residual(), data)
    judge = TokenizerJudge(tokenizer, data, choose_settings(proxy=3), None)
    judge.measure_all()
    sheet = judge.scores()
    rows = judge.rates.scores(sheet)
    assert rows[-1]["rfid_proxy"] == sheet.values["rfid_proxy"]
    assert all(row["rfid_proxy"] > 0 for row in rows)
    alone = RateJudge(tokenizer, data, choose_settings(rates=[1]), judge.feature_sets)
    x = data.rules.to_pixels(data.preprocess(data.take_evenly("val", 24)[0]))
    alone.update(x, tokenizer.indices(data.preprocess(data.take_evenly("val", 24)[0])))
    assert alone.scores(sheet)[0]["rfid_proxy"] == pytest.approx(rows[0]["rfid_proxy"], rel=1e-3)


def test_a_run_without_nested_codes_has_no_curve(tmp_path: Path) -> None:
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    judge = TokenizerJudge(start(make_tokenizer(), data), data, choose_settings(), None)
    judge.measure_all()
    sheet = judge.scores()
    assert judge.rates.scores(sheet) == []
    assert judge.save_rates(tmp_path / "run", [], sheet, []) == []
    assert format_rates([]) == ""
    assert not (tmp_path / "run").exists()


# Whether it learns.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequence", "residual"])
def test_nested_dropout_makes_the_first_codes_better_images(kind: str) -> None:
    """On sixteen smooth images, after as many updates with it as without."""
    corners = torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = F.interpolate(corners, 16, mode="bilinear", align_corners=True)
    errors: dict[float, list[float]] = {}
    for nested in (0.0, 0.7):
        quantizer = None
        if kind == "residual":
            torch.manual_seed(0)
            quantizer = make(Residual, partial(make, EMA), 4, N, 8, nested=nested)
            tokenizer = make_tokenizer(quantizer=quantizer)
        else:
            tokenizer = make_sequence(nested, width=32)
        learn(tokenizer, x, *((40, 1e-2) if quantizer else (120, 3e-3)))
        with torch.no_grad():
            codes = tokenizer.eval().indices(x)
            firsts = [codes[..., :n] if quantizer else codes[:, :, :n] for n in (1, 2, N)]
            errors[nested] = [float(F.mse_loss(tokenizer.decode_indices(c), x)) for c in firsts]
    assert errors[0.7][0] < 0.9 * errors[0.0][0]
    assert errors[0.7][1] < 0.9 * errors[0.0][1]
    assert errors[0.7][0] > errors[0.7][2]


def learn(tokenizer: Tokenizer, x: Tensor, steps: int, rate: float) -> None:
    """So many updates on these images."""
    tokenizer.initialise(x)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), rate)
    for _ in range(steps):
        q = tokenizer.train().encode(x)
        loss = F.mse_loss(tokenizer.decode(q.z_q), x) + q.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokenizer.quantizer.update(q)


SEQUENCE = [
    *(word for word in TINY if not word.startswith("model.")), "model=vit", f"model.tokens={N}", "model.nested=0.5",
    "model.width=16", "model.depth=1", "model.heads=2", "model.patch=4", "loss=vqvae",
]  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_draws_the_lengths_of_an_uninterrupted_one(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SEQUENCE, "quantizer=residual", "quantizer.num_codebooks=3", "quantizer.nested=0.5"]
    assert command("stage=vqgan", "run_dir=whole", *words) == 0
    tick = ClockedModule.tick

    def fail(self: ClockedModule) -> None:
        tick(self)
        if self.step == 4:
            raise RuntimeError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr(ClockedModule, "tick", fail)
        with pytest.raises(RuntimeError, match="the power failed"):
            command("stage=vqgan", "run_dir=halves", *words)
    assert command("stage=vqgan", "resume=halves") == 0
    one, two = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "halves")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_one_run_has_a_curve_in_its_evaluation_and_in_the_report(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", *SEQUENCE) == 0
    assert command("stage=evaluate", "ckpt=runs/vqgan/shapes", *QUICK, "rates=[1,2,4]") == 0
    folder = tmp_path / "runs" / "evaluate" / "shapes"
    evaluation = json.loads((folder / "metrics.json").read_text())
    rows = evaluation["rates"]
    assert [row.get("tokens") for row in rows] == [1, 2, 4, None]
    assert rows[-1]["bits_per_image"] == evaluation["bits_per_image"] == N * 4
    assert all(math.isfinite(row["psnr"]) and math.isfinite(row["rfid_proxy"]) for row in rows)
    assert {"rate-distortion.png", "rates.png"} <= {Path(p).name for p in evaluation["pictures"]}
    assert (folder / "rates.csv").is_file()
    assert "\nfirst codes of " in capsys.readouterr().err
    assert command("stage=report", "runs=runs") == 0
    report = json.loads((tmp_path / "runs/report/runs/metrics.json").read_text())
    names = {Path(chart).stem for chart in report["charts"]}
    assert {"run-rates-psnr", "run-rates-rfid_proxy"} <= names
    assert command("stage=evaluate", "ckpt=runs/vqgan/shapes", *QUICK, "rates=[9]") != 0
    assert "rates=9 must be one of 1, 2, 3, ..., 6" in capsys.readouterr().err
