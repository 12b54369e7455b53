import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.adversarial import MEASURED, Judge, sheet, spread, table
from benchmarks.bottlenecks import GRID, choose_words, list_bottlenecks
from benchmarks.quantizers import COLUMNS, measure_ours
from benchmarks.scaling import counted
from benchmarks.step import PARTS
from data.images import to_model_input, to_uint8
from data.shapes import Shapes
from evaluation.features import FeatureNetwork
from tests.helpers.commands import TINY
from tests.helpers.configs import compose_config, list_options
from tests.helpers.images import make_images
from tests.helpers.stage1 import make_tokenizer
from vqgan.load import start_images
from vqgan.quantizers.base import Quantized
from vqgan.tokenizer import Tokenizer


def test_all_bottlenecks_are_compared_at_equal_bits() -> None:
    assert list_bottlenecks() == list_options("quantizer")
    for name in list_bottlenecks():
        words, num_codebooks = choose_words(name, bits=576)
        quantizer = compose_config("stage=vqgan", *words).quantizer
        if num_codebooks:
            assert num_codebooks == quantizer.get("num_codebooks", 1)
            assert GRID**2 * num_codebooks * math.log2(quantizer.K) == 576
        else:
            assert "K" not in quantizer


def test_a_row_of_the_quantizers_benchmark_has_all_columns() -> None:
    row = measure_ours((1, 2, 32, 4), "cpu")
    assert tuple(row) == COLUMNS
    assert row["ours_ms"] > 0
    assert row["extra_mib"] >= 0


def test_what_a_model_takes_is_counted_as_by_hand() -> None:
    net, x = (
        torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)),
        torch.randn(4, 256),
    )
    found = counted(net, lambda: net(x).sum())
    product = (
        2 * 4 * 256 * 512
    )  # of each layer; backward there are two more, but the first layer's input needs none
    assert found["parameters"] == 256 * 512 * 2 + 512 + 256
    assert found["gflops_forward"] == round(2 * product / 1e9, 3)
    assert found["gflops_training"] == round(5 * product / 1e9, 3)
    assert found["activation_mib"] == round(4 * (256 * 4 + 512 * 4) / 2**20, 1)


CPU = torch.device("cpu")


@pytest.fixture
def shapes(tmp_path: Path) -> Shapes:
    return make_images(
        Shapes, image_size=16, n_train=256, n_val=128, cache_dir=str(tmp_path / "cache")
    )


class Identity(Tokenizer):
    """Gives every image back."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def encode(self, x: Tensor) -> Quantized:
        return Quantized(x, x, None, torch.zeros(()), {})

    def decode(self, z_q: Tensor) -> Tensor:
        return z_q


def test_a_tokenizer_that_loses_nothing_has_no_distance_and_full_sharpness(shapes: Shapes) -> None:
    judge = Judge(shapes, FeatureNetwork(3).eval(), None, CPU)
    found = judge.measured(Identity())
    assert found == {
        "frechet_proxy": pytest.approx(0, abs=1e-4),
        "energy_ratio": 1,
        "psnr": float("inf"),
        "lpips": None,
    }


def test_tokenizers_are_judged_one_by_one(shapes: Shapes) -> None:
    judge = Judge(shapes, FeatureNetwork(3).eval(), None, CPU)
    started = make_tokenizer()
    started.initialise(start_images(shapes))
    first = judge.measured(started)
    floor = judge.floor()
    judge.measured(Identity())
    assert judge.measured(started) == first
    assert judge.floor() == floor
    assert floor > 0


def test_the_distance_is_frechets_even_where_the_covariance_lacks_rank(shapes: Shapes) -> None:
    """Dowson & Landau 1982: |mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the roots by eigen-decomposition."""

    class Given(FeatureNetwork):
        num_features = 64

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :64] @ mix

    mix = torch.randn(64, 64)
    mix[:, 40:] = mix[:, :24]  # rank 40
    judge, started = Judge(shapes, Given(3), None, CPU), make_tokenizer()
    started.initialise(start_images(shapes))
    x = to_model_input(shapes.samples("val").__getitems__(range(128))[0])
    with torch.no_grad():
        x_hat = to_model_input(to_uint8(started.eval().decode(started.encode(x).z_q)))
    a, b = (Given(3)(each).double() for each in (x, x_hat))
    root = root_of(a.T.cov())
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    expected -= 2 * root_of(root @ b.T.cov() @ root).trace()
    assert judge.measured(started)["frechet_proxy"] == pytest.approx(float(expected), rel=1e-3)


def root_of(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def test_the_sheet_has_a_row_of_originals_and_one_a_tokenizer(shapes: Shapes) -> None:
    made = sheet([Identity(), Identity()], shapes, CPU)
    assert made.shape == (3, 2 * (3 * 18 - 2), 2 * (12 * 18 - 2))
    assert made[:, :32].equal(made[:, 36:68])


def test_the_table_pairs_the_losses_seed_by_seed() -> None:
    figures = {
        "frechet_proxy": 2.0,
        "energy_ratio": 0.5,
        "psnr": 20.0,
        "lpips": None,
        "ms_per_step": 10.0,
    }
    rows = [{"loss": "vqvae", "seed": s, **figures, "psnr": 20.0 + s} for s in (0, 1)]
    rows += [
        {
            "loss": "vqgan",
            "seed": s,
            **figures,
            "frechet_proxy": 1.0,
            "psnr": 19.5 + s,
            "ms_per_step": 15.0,
        }
        for s in (0, 1)
    ]
    found = table(rows).splitlines()
    assert found[2] == "| frechet_proxy | 2.000 ± 0.000 | 1.000 ± 0.000 | -50.0 ± 0.0 % |"
    assert found[4] == "| psnr | 20.50 ± 0.71 | 20.00 ± 0.71 | -0.50 ± 0.00 dB |"
    assert found[5] == "| lpips | - | - | - |"
    assert found[6].endswith("| 1.50 ± 0.00 times |")
    assert spread([3.0], 1) == "3.0"


def test_the_table_leaves_out_what_is_relative_to_nothing() -> None:
    figures = {
        "frechet_proxy": 2.0,
        "energy_ratio": 0.5,
        "psnr": 20.0,
        "lpips": None,
        "ms_per_step": 0.0,
    }
    found = table(
        [{"loss": loss, "seed": 0, **figures} for loss in ("vqvae", "vqgan")]
    ).splitlines()
    assert found[6] == "| ms_per_step | - | - | - |"


@pytest.mark.slow
def test_the_adversarial_benchmark_ends_with_one_line_a_run(tmp_path: Path) -> None:
    small = [
        word
        for word in TINY
        if not word.startswith(("trainer.max_steps", "trainer.val_every", "logger"))
    ]
    words = [
        *small,
        f"cache_dir={tmp_path / 'cache'}",
        "--steps=4",
        "--seeds",
        "1",
        "--classifier-steps=2",
    ]
    words += ["--vqgan", "loss/discriminator=grain"]
    files = ["--keep", str(tmp_path / "runs"), "--pictures", str(tmp_path / "sheet.png")]
    printed = []
    for _ in range(2):  # the second time measures the same runs
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.adversarial", *words, *files],
            cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True,
            env={**os.environ, "https_proxy": "http://127.0.0.1:9"},  # nothing is fetched for lpips
        )  # fmt: skip
        printed.append(
            [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        )
    assert [(row["loss"], row["seed"]) for row in printed[0]] == [("vqvae", 1), ("vqgan", 1)]
    assert all(tuple(row) == ("bench", "data", "loss", "seed", *MEASURED) for row in printed[0])
    assert printed[0] == printed[1]
    assert "grain.Grain" in (tmp_path / "runs" / "vqgan-1" / "config.yaml").read_text()
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("name", list(PARTS))
def test_every_part_of_the_step_that_is_measured_composes_and_has_what_it_says(name: str) -> None:
    chosen = compose_config("stage=vqgan", *(word for word in PARTS[name] if word != "callbacks"))
    assert ("discriminator" in chosen.loss) == (name != "loss=vqvae")
    assert chosen.loss.get("freeze_codes", True) == (
        "freeze_codes=false" not in " ".join(PARTS[name])
    )
