import argparse
import importlib
import json
import math
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor

from benchmarks.adversarial import FIGURES, Judge, draw_reconstructions, format_spread, format_table
from benchmarks.adversarial import main as measure_adversarial
from benchmarks.bottlenecks import GRID, choose_words, list_bottlenecks
from benchmarks.checkouts import UNITS, format_comparison, imports_from
from benchmarks.distilling import format_rows as format_students
from benchmarks.distilling import measure_quality, measure_times
from benchmarks.drawing import Subject, rebuild
from benchmarks.drawing import main as compare_drawing
from benchmarks.few_images import DISTANCES
from benchmarks.few_images import format_rows as format_few_images
from benchmarks.few_images import measure as measure_few_images
from benchmarks.fine_tuning import Plan, Trial, format_rows, link_halves, list_trials
from benchmarks.fine_tuning import main as measure_fine_tuning
from benchmarks.fitting import Plan as FittingPlan
from benchmarks.fitting import add_ratios
from benchmarks.fitting import format_rows as format_fitting
from benchmarks.fitting import list_trials as list_fitting_trials
from benchmarks.fitting import main as measure_fitting
from benchmarks.heads import HEADS, make_step
from benchmarks.optimizers import main as measure_optimizers
from benchmarks.optimizers import read_comparison
from benchmarks.orders import find_best, format_ratios, list_variants
from benchmarks.orders import main as compare_orders
from benchmarks.products import PRIORS, ProductRecorder, divide_rest
from benchmarks.products import main as measure_products
from benchmarks.quantizers import COLUMNS, measure_ours
from benchmarks.rates import format_means, list_numbers_of, list_runs
from benchmarks.scaling import count
from benchmarks.step import VARIANTS
from benchmarks.training256 import GRID as GRID_256
from benchmarks.training256 import PHOTOGRAPHS, PX, SAME, Quarters, cut_photographs
from benchmarks.training256 import main as compare_at_256
from benchmarks.validity import main as judge_validity
from codegrid.data.images import to_model_input, to_uint8
from codegrid.data.shapes import Shapes
from codegrid.evaluation.features import FeatureNetwork
from prior.decoding.sampling import ORDERS
from prior.heads.softmax import Softmax
from tests.helpers.commands import TINY, TINY_PRIOR, launch
from tests.helpers.configs import ROOT, compose_config, compose_plain, list_options
from tests.helpers.images import make_images
from tests.helpers.runs import SMALL_PRIOR, save_prior_run, save_tokenizer_run
from tests.helpers.stage1 import make_module, make_tokenizer
from vqgan.load import build_tokenizer, start_images
from vqgan.quantizers.base import Quantized
from vqgan.rates import list_rates
from vqgan.tokenizer import Tokenizer


def test_all_bottlenecks_are_compared_at_equal_bits() -> None:
    assert list_bottlenecks() == list_options("quantizer")
    for name in list_bottlenecks():
        words, num_codebooks = choose_words(name, bits=576)
        quantizer = compose_config("stage=vqgan", *words).quantizer
        if num_codebooks:
            assert num_codebooks == quantizer.get("num_codebooks", 1)
            if name == "multiscale":  # of K codes, which is no power of two
                assert 570 < sum(n**2 for n in quantizer.scales) * math.log2(quantizer.K) <= 576
                continue
            assert GRID**2 * num_codebooks * math.log2(quantizer.K) == 576
        else:
            assert "K" not in quantizer


def test_every_head_of_a_prior_is_measured_by_a_step_on_random_codes() -> None:
    size = {"K": 16, "T": 4, "batch": 8, "width": 8, "precision": "32-true", "device": "cpu"}
    for name in HEADS:
        nats = make_step(name, argparse.Namespace(**size))()
        assert nats == pytest.approx(math.log(16), abs=0.5), name


def test_an_arm_of_the_comparison_has_settings_of_its_file_and_others() -> None:
    words, num_codebooks = choose_words("fsq:levels=[8,8,8]:from=0.1:data.batch_size=8", bits=576)
    assert words == [
        "quantizer=fsq", "quantizer.levels=[8,8,8]", "quantizer.from=0.1", "data.batch_size=8", "quantizer.K=512",
    ]  # fmt: skip
    assert num_codebooks == 1
    assert choose_words("ema:gradient=rotation:entropy.weight=0.1", bits=576)[0][1:3] == [
        "quantizer.gradient=rotation",
        "quantizer.entropy.weight=0.1",
    ]


@pytest.mark.parametrize(("kind", "bits"), [("sequence", 144), ("residual", 384)])
def test_runs_of_nested_codes_are_compared_with_those_of_one_rate(kind: str, bits: int) -> None:
    runs = dict(list_runs(kind, 0.5, own=[1, 4, 99]))
    built = {}
    for name, words in runs.items():
        config = compose_config("stage=vqgan", *words)
        built[name] = build_tokenizer(config.model, config.quantizer)
    nested, plain = built["nested"], built["plain"]
    assert (nested.nested, nested.quantizer.nested) in ((0.5, 0.0), (0.0, 0.5))
    assert plain.nested == plain.quantizer.nested == 0
    assert nested.state_dict().keys() == plain.state_dict().keys()
    assert math.prod(nested.grid) * nested.quantizer.bits == bits
    whole = 16 if kind == "sequence" else 4
    alone = built["own 1"]
    assert math.prod(alone.grid) * alone.quantizer.bits == bits / whole
    assert "own 99" not in built
    assert all(list_rates(nested, list_numbers_of(kind, name)) for name in ("nested", "plain"))
    assert list_numbers_of(kind, "own 1") == []


def test_rows_of_the_rates_benchmark_are_means_over_seeds() -> None:
    rows = [
        {
            "kind": "residual",
            "run": "nested",
            "steps": 10,
            "bits_per_image": 96.0,
            "psnr": p,
            "ssim": 0.5,
        }
        for p in (18.0, 19.0)
    ]
    assert format_means(rows).splitlines()[-1] == (
        "| residual | 96 | nested | 18.50 ± 0.71 | 0.500 | 10 |"
    )


def test_a_row_of_the_quantizers_benchmark_has_all_columns() -> None:
    row = measure_ours((1, 2, 32, 4), "cpu")
    assert tuple(row) == COLUMNS
    assert row["ours_ms"] > 0
    assert row["extra_mib"] >= 0


def test_parameters_flops_and_activations_are_counted_as_by_hand() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    x = torch.randn(4, 256)
    costs = count(net, lambda: net(x).sum())
    # Each layer has one product forward and two backward, except that the input of the first needs no gradient.
    product = 2 * 4 * 256 * 512
    assert costs["parameters"] == 256 * 512 * 2 + 512 + 256
    assert costs["gflops_forward"] == round(2 * product / 1e9, 3)
    assert costs["gflops_training"] == round(5 * product / 1e9, 3)
    assert costs["activation_mib"] == round(4 * (256 * 4 + 512 * 4) / 2**20, 1)


def test_validation_images_are_judged_and_drawn_by_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "verdicts.png"
    words = ["--data", "--n", "4", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["validity", *words])
    judge_validity()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["subject"], figures["n"]) == ("data", 4)
    assert figures["valid"] * 4 + sum(figures["by_reason"].values()) == 4
    with Image.open(picture) as sheet:
        assert sheet.size == (4 * (3 * 64 + 4) - 4, 3 * 64 + 26)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--n", "4"], "--ckpt names the run to judge"),
        (["--data", "--n", "0"], "--n 0 must be at least 1"),
        (["--data", "sampler.top_p=0.9"], "sampler.top_p=0.9 is for samples"),
        (["--ckpt", "x", "top_p=0.9"], "top_p=0.9 is no setting of the sampler"),
        (["--ckpt", "x", "--min-iou", "85"], "--min-iou 85.0 must be above 0 and at most 1"),
        (["--ckpt", "x"], "error: ckpt=x has no checkpoint"),
    ],
)
def test_a_mistake_in_the_command_that_judges_gets_a_sentence(
    words: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["validity", *words])
    with pytest.raises(SystemExit) as exit:
        judge_validity()
    assert complaint in f"{exit.value.code} {capsys.readouterr().err}"


CPU = torch.device("cpu")
DIFFUSERS_WEIGHTS = (
    5_033_323  # of VQModel with the benchmark's settings, its 1024 codes of 64 numbers among them
)


def test_the_pyramid_at_256_pixels_has_the_weights_of_the_network_it_is_compared_with() -> None:
    words = [f"data.image_size={PX}", f"model.grid={GRID_256}", "quantizer=vq", "quantizer.K=1024"]
    config = compose_config("stage=vqgan", *words, *SAME, "model.start=random")
    with torch.device("meta"):
        tokenizer = build_tokenizer(config.model, config.quantizer)
    assert sum(p.numel() for p in tokenizer.parameters()) == DIFFUSERS_WEIGHTS


def test_crops_of_validation_are_of_other_photographs_and_always_the_same(tmp_path: Path) -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    for name in ("once", "again"):
        cut_photographs(tmp_path / name, px=16, crops=9)
    once, again = (sorted((tmp_path / name).rglob("*.png")) for name in ("once", "again"))
    assert [path.parent.name for path in once] == ["train"] * 9 + ["val"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_pauses_for_measurements_are_no_time_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.training256.time.monotonic", lambda: clock[0])
    reported: list[float] = []

    def measure(seconds: float) -> None:
        reported.append(seconds)
        clock[0] += 100

    module, trainer = make_module(), L.Trainer(logger=False, accelerator="cpu")
    quarters = Quarters(8, measure)
    for _ in range(8):
        clock[0] += 1
        module.step, module.seconds = module.step + 1, clock[0]
        quarters.on_train_batch_end(trainer, module, None, None, 0)
    assert reported == [2, 4, 6, 8]
    assert quarters.seconds == 8


@pytest.mark.slow
def test_the_benchmark_at_256_pixels_prints_each_turn_and_ends_with_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--models", "conv", "--batch", "1", "--rounds", "2", "--steps", "1", "--no-memory"]
    small = ["model=conv_f16", "model.width=8"]
    monkeypatch.setattr(sys, "argv", ["training256", *words, "--", *small])
    compare_at_256()
    *table, row = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in table[2:]] == [[" 1 ", " conv "], [" 2 ", " conv "]]
    figures = json.loads(row)
    assert (figures["bench"], figures["model"], figures["px"]) == ("training256", "conv", 256)
    assert figures["images_per_second"] > 0
    assert figures["decode_images_per_second"] > 0


@pytest.fixture
def shapes(tmp_path: Path) -> Shapes:
    return make_images(
        Shapes, image_size=16, n_train=256, n_val=128, cache_dir=str(tmp_path / "cache")
    )


class Identity(Tokenizer):
    """Reconstructs every image exactly."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def encode(self, x: Tensor) -> Quantized:
        return Quantized(x, x, None, torch.zeros(()), {})

    def decode(self, z_q: Tensor) -> Tensor:
        return z_q


def test_a_lossless_tokenizer_has_distance_0_and_energy_ratio_1(shapes: Shapes) -> None:
    judge = Judge(shapes, FeatureNetwork(3).eval(), None, CPU)
    assert judge.measure(Identity()) == {
        "frechet_proxy": pytest.approx(0, abs=1e-4),
        "energy_ratio": 1,
        "psnr": 58.923,
        "lpips": None,
    }


def test_measuring_one_tokenizer_does_not_affect_the_next(shapes: Shapes) -> None:
    judge = Judge(shapes, FeatureNetwork(3).eval(), None, CPU)
    tokenizer = make_tokenizer()
    tokenizer.initialise(start_images(shapes))
    first = judge.measure(tokenizer)
    floor = judge.measure_floor()
    judge.measure(Identity())
    assert judge.measure(tokenizer) == first
    assert judge.measure_floor() == floor
    assert floor > 0


def test_the_frechet_distance_is_right_even_if_the_covariance_lacks_rank(shapes: Shapes) -> None:
    """Dowson & Landau 1982: |mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), with roots by eigendecomposition."""

    class RankDeficient(FeatureNetwork):
        num_features = 64

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :64] @ mix

    mix = torch.randn(64, 64)
    mix[:, 40:] = mix[:, :24]  # rank 40
    judge = Judge(shapes, RankDeficient(3), None, CPU)
    tokenizer = make_tokenizer()
    tokenizer.initialise(start_images(shapes))
    x = to_model_input(shapes.samples("val").__getitems__(range(128))[0])
    with torch.no_grad():
        x_hat = to_model_input(to_uint8(tokenizer.eval().decode(tokenizer.encode(x).z_q)))
    a, b = (RankDeficient(3)(images).double() for images in (x, x_hat))
    root = matrix_root(a.T.cov())
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    expected -= 2 * matrix_root(root @ b.T.cov() @ root).trace()
    assert judge.measure(tokenizer)["frechet_proxy"] == pytest.approx(float(expected), rel=1e-3)


def matrix_root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def test_the_picture_has_a_row_of_originals_and_one_per_tokenizer(shapes: Shapes) -> None:
    picture = draw_reconstructions([Identity(), Identity()], shapes, CPU)
    assert picture.shape == (3, 2 * (3 * 18 - 2), 2 * (12 * 18 - 2))
    assert picture[:, :32].equal(picture[:, 36:68])


def test_the_table_pairs_the_losses_by_seed() -> None:
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
    lines = format_table(rows).splitlines()
    assert lines[2] == "| frechet_proxy | 2.000 ± 0.000 | 1.000 ± 0.000 | -50.0 ± 0.0 % |"
    assert lines[4] == "| psnr | 20.50 ± 0.71 | 20.00 ± 0.71 | -0.50 ± 0.00 dB |"
    assert lines[5] == "| lpips | - | - | - |"
    assert lines[6].endswith("| 1.50 ± 0.00 times |")
    assert format_spread([3.0], 1) == "3.0"


def test_the_table_leaves_out_a_change_relative_to_0() -> None:
    figures = {
        "frechet_proxy": 2.0,
        "energy_ratio": 0.5,
        "psnr": 20.0,
        "lpips": None,
        "ms_per_step": 0.0,
    }
    rows = [{"loss": loss, "seed": 0, **figures} for loss in ("vqvae", "vqgan")]
    lines = format_table(rows).splitlines()
    assert lines[6] == "| ms_per_step | - | - | - |"


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a benchmark are forks, which need no imports."""
    monkeypatch.setattr(
        "benchmarks.adversarial.subprocess.run", lambda line, **_: launch(*line[2:], folder=ROOT)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_adversarial_benchmark_ends_with_one_line_per_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(
        "https_proxy", "http://127.0.0.1:9"
    )  # so that LPIPS's weights aren't downloaded
    skipped = ("trainer.max_steps", "trainer.val_every", "logger")
    words = [word for word in TINY if not word.startswith(skipped)]
    words += [
        f"cache_dir={tmp_path / 'cache'}",
        "--steps=4",
        "--seeds",
        "1",
        "--classifier-steps=2",
    ]
    words += ["--vqgan", "loss/discriminator=grain"]
    files = ["--keep", str(tmp_path / "runs"), "--pictures", str(tmp_path / "sheet.png")]
    monkeypatch.setattr("sys.argv", ["adversarial", *words, *files])
    printed = []
    for _ in range(2):  # the second call measures the same runs again
        measure_adversarial()
        lines = capsys.readouterr().out.splitlines()
        printed.append([json.loads(line) for line in lines if line.startswith("{")])
    assert [(row["loss"], row["seed"]) for row in printed[0]] == [("vqvae", 1), ("vqgan", 1)]
    assert all(tuple(row) == ("bench", "data", "loss", "seed", *FIGURES) for row in printed[0])
    assert printed[0] == printed[1]
    assert "grain.Grain" in (tmp_path / "runs" / "vqgan-1" / "config.yaml").read_text()
    assert (tmp_path / "sheet.png").is_file()


def test_the_products_of_a_step_are_noted_and_can_be_repeated() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    x = torch.randn(4, 256)
    with ProductRecorder() as recorder:
        net(x).sum().backward()
    # As in the test of parameters and FLOPs: the input of the first layer needs no gradient.
    assert [product.flop for product in recorder.products] == [2 * 4 * 256 * 512] * 5
    before = [p.detach().clone() for p in net.parameters()]
    for product in recorder.products:
        product.run()
    assert all(torch.equal(p, was) for p, was in zip(net.parameters(), before, strict=True))


def test_what_is_no_product_is_divided_by_its_kind() -> None:
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(20):
            torch.softmax((x @ w).add(1), -1)
    rest = divide_rest(profiler.key_averages())
    assert {"arithmetic", "softmax and loss"} <= set(rest)
    assert 0 < sum(rest.values()) < 1  # the products are not among them


def test_the_benchmark_of_products_ends_with_one_line_per_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [name, *_] = PRIORS
    words = ["--steps", name, "--batch", "2", "--turn", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["products", *words, "--precision", "32-true"])
    measure_products()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["step"], row["batch"]) == (name, 2)
    # Four grids: three products of each weight matrix, and those of attention.
    width, hidden, K, tokens, blocks = 128, 352, 512, 4 * 64, 4
    weights = blocks * (4 * width**2 + 3 * width * hidden) + width * K + width * 64
    attention = blocks * 4 * tokens * 64 * width  # forward, and at least twice as much backward
    products = 3 * 2 * tokens * weights
    assert products + 3 * attention < 1e9 * row["gflop"] * 1.02
    assert 1e9 * row["gflop"] < products + 5 * attention
    assert row["products_ms"] > 0


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_of_the_step_benchmark_composes_and_matches_its_name(name: str) -> None:
    config = compose_config(
        "stage=vqgan", *(word for word in VARIANTS[name] if word != "callbacks")
    )
    assert ("discriminator" in config.loss) == (name != "loss=vqvae")
    assert config.loss.get("freeze_codes", True) == (
        "freeze_codes=false" not in " ".join(VARIANTS[name])
    )


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Five classes of twelve images each."""
    images = make_images(Shapes, image_size=16, n_train=60, cache_dir=str(tmp_path / "cache"))
    for i, image in enumerate(images.samples("train").__getitems__(range(60))[0]):
        folder = tmp_path / "photos" / f"class-{i % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_the_classes_are_divided_into_two_halves_of_links(
    class_folders: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # the second call continues the first
        halves = link_halves(class_folders, tmp_path / "work")
    assert [path.name for path in sorted(halves["first"].iterdir())] == ["class-0", "class-1"]
    assert len(list(halves["other"].iterdir())) == 3
    assert all(path.is_symlink() for path in halves["other"].iterdir())
    (class_folders / "class-9").mkdir()
    with pytest.raises(SystemExit, match="has other classes"):
        link_halves(class_folders, tmp_path / "work")
    with pytest.raises(SystemExit, match="at least two class folders, and it has 0"):
        link_halves(class_folders / "class-0", tmp_path / "other work")


def test_a_run_that_starts_from_another_takes_its_architecture_from_there() -> None:
    plan = Plan(
        list_trials(2, 8, ["loss.gate.start=0.2"]), [0, 1], ["model.grid=4", "data.n_val=9"]
    )
    folder = Path("work")
    halves = {"first": Path("one"), "other": Path("two")}
    commands = {name: plan.command(name, 1, folder, halves) for name in plan.trials}
    for name, command in commands.items():
        is_free = plan.trials[name].start is None
        assert is_free == any(word.startswith("model") for word in command)
        assert is_free != any(word.startswith("init=") for word in command)
        assert "data.n_val=9" in command
        assert (name == "decoder") == ("loss.gate.start=0.2" in command)
        compose_config(*command[1:])
    assert "data.root=one" in commands["first"]
    assert {"init=work/first-1", "data.root=two", "lora=8"} <= set(commands["lora"])
    assert {"init=work/tuned-1", "learn=decoder", "loss=vqgan"} <= set(commands["decoder"])
    minutes = [trial.minutes for trial in plan.trials.values()]
    assert minutes == [2, 4, 2, 2, 2]
    assert plan.describe().startswith("10 runs with 24 minutes of training in all")


def test_fine_tuned_runs_are_compared_with_the_run_from_scratch_of_their_seed() -> None:
    figures = {"psnr": 20.0, "perplexity": None, "energy_ratio": 0.5, "steps": 9}
    proxies = {"scratch": (2.0, 4.0), "tuned": (1.0, 1.0)}
    rows = [
        {"run": name, "seed": seed, "proxy": proxy, **figures}
        for name, values in proxies.items()
        for seed, proxy in enumerate(values)
    ]
    trials = {
        "scratch": Trial("other", 4, None, None),
        "tuned": Trial("other", 2, "first", "scratch"),
    }
    lines = format_rows(rows, trials).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    spread = "20.00 ± 0.00 | - | 3.000 ± 1.414 | - | 0.500 ± 0.000 | 9 ± 0 |"
    assert lines[2] == f"| scratch | 4 | {spread}"
    assert "| 1.000 ± 0.000 | 0.38 ± 0.18 |" in lines[3]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_fine_tuning_benchmark_ends_with_a_table_and_continues_where_it_broke_off(
    class_folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["data.image_size=16", "data.n_val=8", "trainer.accelerator=cpu", "quantizer.K=16"]
    small += ["model.grid=4", "model.z_channels=8", "quantizer.dim=8"]
    flags = ["--minutes=0.01", "--seeds", "1", "--classifier-steps=2", "--lora=2"]
    flags += ["--gan", "loss.discriminator.width=8", "--keep", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["fine_tuning", *small, "--root", str(class_folders), *flags])
    printed = []
    for _ in range(2):
        measure_fine_tuning()
        printed.append(capsys.readouterr().out)
        (tmp_path / "runs" / "decoder-1" / "metrics.json").unlink()
    rows = [json.loads(text) for text in printed[0].splitlines() if text.startswith("{")]
    assert [row["run"] for row in rows] == ["first", "scratch", "tuned", "lora", "decoder"]
    assert all(row["steps"] > 0 and row["perplexity"] >= 1 for row in rows)
    table = [text for text in printed[0].splitlines() if text.startswith("|")]
    assert [text.split(" | ")[0] for text in table[2:]] == [f"| {row['run']}" for row in rows]
    again = [json.loads(text) for text in printed[1].splitlines() if text.startswith("{")]
    assert again[:4] == rows[:4]


def test_an_arm_of_the_optimizers_benchmark_has_settings_of_its_own() -> None:
    words = ["--arms", "adamw", "muon:matrix_lr=0.04:data.batch_size=8", "loss=vqvae"]
    comparison, keep = read_comparison([*words, "--steps", "5", "--seeds", "3"])
    assert keep is None
    commands = [comparison.command(arm, mark, seed) for seed, mark, arm in comparison.order()]
    usual, tuned = (compose_config(*command[1:]) for command in commands)
    for config in (usual, tuned):
        assert (config.seed, config.trainer.max_steps, config.trainer.max_minutes) == (3, 5, None)
        assert "discriminator" not in config.loss
    assert usual.optimizer._target_ == "torch.optim.AdamW"
    assert (tuned.optimizer.matrix_lr, tuned.data.batch_size) == (0.04, 8)
    assert usual.data.batch_size != 8


def test_each_seed_of_the_optimizers_benchmark_begins_with_another_arm() -> None:
    comparison, _ = read_comparison(["--arms", "adamw", "muon", "--minutes", "1", "2"])
    order = [(seed, mark, arm.name) for seed, mark, arm in comparison.order()]
    assert order[:4] == [(0, 1, "adamw"), (0, 1, "muon"), (0, 2, "adamw"), (0, 2, "muon")]
    assert order[4:6] == [(1, 1, "muon"), (1, 1, "adamw")]
    assert len(order) == len(set(order)) == 12


def test_the_table_of_the_optimizers_benchmark_has_medians_and_ranges() -> None:
    comparison, _ = read_comparison(["--arms", "adamw", "muon", "--seeds", "0", "1", "2"])
    figures = [(20.0, 100, 9), (20.5, None, 8), (19.0, 120, 9)]
    rows = [
        {"arm": "muon", "minutes": 1, "seed": seed, "psnr": psnr, "perplexity": p, "steps": steps}
        for seed, (psnr, p, steps) in enumerate(figures)
    ]
    assert comparison.format(rows).splitlines()[2:] == [
        "| adamw | 1 | - | - | - |",
        "| muon | 1 | 20.00 (19.00-20.50) | 110 (100-120) | 9 (8-9) |",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arms", "sgd"], "sgd must be one of adamw, muon"),
        (["--arms", "muon:fast"], "'fast' must be <setting>=<value>"),
        (["--stage", "prior"], "--stage prior needs --ckpt"),
        (["loss", "--minutes", "1"], "unrecognized arguments: loss"),
    ],
)
def test_the_optimizers_benchmark_refuses_what_it_does_not_know(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        read_comparison(words)
    assert sentence in f"{refused.value.code}{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_optimizers_benchmark_compares_tokenizers_and_their_priors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = ("trainer.max_steps", "trainer.val_every", "logger")
    small = [word for word in TINY if not word.startswith(skipped)]
    small += ["loss=vqvae", f"cache_dir={tmp_path / 'cache'}"]
    flags = ["--arms", "adamw", "muon:momentum=0.9", "--seeds", "1"]
    runs = ["--keep", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["optimizers", *flags, *small, "--steps", "2", *runs])
    measure_optimizers()
    tokenizer = str(tmp_path / "runs" / "muon_momentum=0.9-2-1")
    sizes = ["prior.width=16", "prior.depth=1", "prior.heads=2", "trainer.accelerator=cpu"]
    prior = ["--stage", "prior", "--ckpt", tokenizer, "--minutes", "0.01"]
    monkeypatch.setattr("sys.argv", ["optimizers", *flags, *sizes, *prior])
    measure_optimizers()
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["steps"] for row in rows[:2]] == [2, 2]
    assert all(row["psnr"] > 0 for row in rows[:2])
    assert [row["minutes"] for row in rows[2:]] == [0.01, 0.01]
    assert all(row["nats_per_token"] > 0 for row in rows[2:])
    assert lines[-1].startswith("| muon:momentum=0.9 | 0.01 | ")


def test_two_checkouts_are_compared_by_medians_and_by_the_ratios_of_each_round() -> None:
    here, there = dict.fromkeys(UNITS, 3.0), dict.fromkeys(UNITS, 2.0)
    table = format_comparison([(here, there), (here, here), (there, here)])
    assert "| memory | 3 | 3 | 1.000 (0.667-1.500) | MiB |" in table


def test_each_order_has_a_line_as_it_is_and_one_for_each_way_to_draw_codes_again() -> None:
    lines = list_variants(["halton", "random"], [0, 2], [0.1, 0.0])
    assert [tuple(line.values()) for line in lines] == [
        (order, *redrawn)
        for order in ("halton", "random")
        for redrawn in ((0, 0.0), (2, 0.0), (0, 0.1))
    ]


def test_orders_are_ranked_at_each_number_of_passes_and_by_their_mean_where_all_were_measured() -> (
    None
):
    plain = {"corrector": 0, "remask": 0.0}
    rows = [
        {"passes": 4, "order": "halton", **plain, "ratio": 2.0},
        {"passes": 4, "order": "random", **plain, "ratio": 8.0},
        {"passes": 16, "order": "halton", **plain, "ratio": 2.0},
        {"passes": 16, "order": "random", **plain, "ratio": 1.5},
        {"passes": 16, "order": "random", "corrector": 1, "remask": 0.0, "ratio": 1.25},
    ]
    assert format_ratios(rows).splitlines()[2:] == [
        "| halton | 2.00 | 2.00 |",
        "| random | 8.00 | 1.50 |",
        "| random, corrector=1 | - | 1.25 |",
    ]
    assert find_best(rows) == {"4": "halton", "16": "random, corrector=1", "mean": "halton"}


def test_the_orders_benchmark_draws_as_many_passes_in_each_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"cache_dir={tmp_path / 'cache'}"]
    save_prior_run(tmp_path / "run", "prior=maskgit", *SMALL_PRIOR, tokenizer_words=small)
    flags = ["--passes", "2", "3", "--correctors", "1", "--samples", "8", "--classifier", "1"]
    words = ["--ckpt", str(tmp_path / "run"), *flags, "sampler.top_p=0.9"]
    monkeypatch.setattr(sys, "argv", ["orders", *words])
    compare_orders()
    lines = capsys.readouterr().out.splitlines()
    first, *rows, last = [json.loads(line) for line in lines if line.startswith("{")]
    assert first["floor"] > 0
    assert [(row["passes"], row["steps"], row["order"], row["corrector"]) for row in rows] == [
        *((2, steps, order, 2 - steps) for order in ORDERS for steps in (2, 1)),
        *((3, 3, order, 0) for order in ORDERS),
    ]
    assert all(row["ratio"] > 0 and row["images_per_second"] > 0 for row in rows)
    assert last["best"] == find_best(rows)


def test_modules_of_another_checkout_stand_beside_ours() -> None:
    import prior.decoding.sampling as ours

    path = sys.path[:]
    with imports_from(ROOT):
        theirs = importlib.import_module("prior.decoding.sampling")
        head = instantiate(compose_config("stage=prior").prior.head)
    assert theirs.__file__ == ours.__file__
    assert theirs.Sampler is not ours.Sampler
    assert theirs.InputError is not ours.InputError
    assert (head.func.__name__, head.func is Softmax) == ("Softmax", False)
    assert sys.modules["prior.decoding.sampling"] is ours
    assert sys.path == path


EARLIER_GPT = """
import torch

class GPT(torch.nn.Module):
    def __init__(self, codebook, grid, classes, **settings):
        super().__init__()
        self.arguments = codebook.shape, grid, classes, settings

    def load_state_dict(self, state):
        self.state = state
"""


def test_a_prior_is_rebuilt_by_a_checkout_from_before_heads(tmp_path: Path) -> None:
    (tmp_path / "prior/models").mkdir(parents=True)
    for name, content in (("__init__", ""), ("models/__init__", ""), ("models/gpt", EARLIER_GPT)):
        (tmp_path / f"prior/{name}.py").write_text(content)
    words = ["prior.width=16", "prior.depth=1", "prior.heads=2", "prior.head.group_share=0.5"]
    config = compose_plain("stage=prior", *words)["prior"]
    model = instantiate(config, codebook=torch.randn(1, 32, 4), grid=(2, 3), classes=2)
    subject = Subject("new", model, config)
    with imports_from(tmp_path):
        other: Any = rebuild(subject, tmp_path)
    of_head = ("head", "_target_")
    settings = {name: value for name, value in config.items() if name not in of_head}
    assert other.arguments == ((1, 32, 4), (2, 3), 2, settings)
    assert other.state.keys() == model.state_dict().keys() - {"head.groups"}
    bits = compose_plain("stage=prior", *words[:3], "prior/head=bits")["prior"]
    model = instantiate(bits, codebook=torch.randn(1, 32, 4), grid=(2, 3), classes=2)
    with (
        imports_from(tmp_path),
        pytest.raises(SystemExit, match="softmax heads only.* new has Bits"),
    ):
        rebuild(Subject("new", model, bits), tmp_path)


def test_the_benchmark_of_drawing_compares_windows_with_another_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_prior_run(tmp_path / "model", classes=2)
    flags = ["--rounds", "1", "--batches", "2", "--windows", "4", "auto", "--sampler", "top_p=0.9"]
    words = ["--ckpt", str(tmp_path / "model"), "--other", str(ROOT), *flags]
    monkeypatch.setattr("benchmarks.drawing.TURN", 0.0)
    monkeypatch.setattr("sys.argv", ["drawing", *words])
    compare_drawing()
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert rows[:4] == rows[4:]
    assert [row["how"] for row in rows[:4]] == [
        "code by code",
        "parallel=4",
        "parallel=auto",
        "other",
    ]
    assert all(row["images_per_s"] > 0 for row in rows)
    assert [row["passes"] for row in (rows[0], rows[3])] == [16, 16]
    assert 1 < rows[1]["passes"] <= 16
    assert rows[3]["ratio"] == 1
    assert any(line.startswith("| model | 16 | 2 | parallel=4 | ") for line in lines)


def test_levels_that_differ_are_ranked_and_levels_that_do_not_are_not() -> None:
    features = torch.randn(5, 400, 4)
    apart = [each + 0.8 * level for level, each in enumerate(features)]
    rows = []
    for name, distance in DISTANCES.items():
        figures = measure_few_images(apart, 40, 4, distance)
        assert figures["ranked"] == 1
        assert (figures["covered"] is None) == (name == "Fréchet")
        alike = measure_few_images(list(features), 40, 6, distance)
        assert 0.2 < alike["ranked"] < 0.8
        rows.append({"n": 1000, "distance": name, **figures})
    assert "| 1,000 | Fréchet | 1.0 |" in format_few_images(rows)


FITTING = ("plain", "perturb", "cost", "more", "redraw")


def test_what_fits_codes_to_a_prior_is_compared_with_runs_of_the_same_start(tmp_path: Path) -> None:
    trials = list_fitting_trials(0.1, 0.01, ["redraw.share=0.7"], ["redraw", "cost"])
    assert list(trials) == ["plain", "cost", "more", "redraw"]
    words = ["data.image_size=16", "model.grid=4", "quantizer.K=64"]
    plan = FittingPlan(
        trials, ["data=shapes"], 8, 7, 6, words, ["prior.width=16"], ["learn=decoder"]
    )
    commands = {name: plan.tokenizer_command(name, 3, tmp_path) for name in trials}
    for command in commands.values():
        config = compose_config(*command[1:])
        assert (config.data.image_size, config.seed) == (16, 3)
    assert set(commands["cost"]) - set(commands["plain"]) == {"loss.code_cost=0.01"}
    codes = f"codes={tmp_path / 'plain-prior-3'}"
    assert set(commands["redraw"]) - set(commands["more"]) == {codes, "redraw.share=0.7"}
    assert f"init={tmp_path / 'plain-3'}" in commands["more"]
    assert not [word for word in commands["more"] if word.startswith(("model.", "quantizer."))]
    prior = compose_config(*plan.prior_command("cost", 3, tmp_path)[1:])
    assert (prior.ckpt, prior.trainer.max_steps) == (str(tmp_path / "cost-3"), 7)


def test_ratios_of_fitting_are_to_the_run_of_the_same_seed() -> None:
    trials = list_fitting_trials(0.1, 0.01, [], FITTING)
    one = {"psnr": 20.0, "rfid": 2.0, "pfid": 4.0, "gfid": 8.0, "nats": 100.0, "codes": 50.0}
    rows: list[dict[str, Any]] = []
    for seed, factor in ((0, 0.5), (1, 0.25)):
        rows.append({"run": "more", "seed": seed, **one})
        rows.append({"run": "redraw", "seed": seed, **one, "gfid": 8 * factor, "psnr": 19.5})
    more, redraw, _, other = add_ratios(rows, trials)
    assert "gfid_ratio" not in more
    assert (redraw["gfid_ratio"], redraw["psnr_change"], other["gfid_ratio"]) == (0.5, -0.5, 0.25)
    assert "| redraw | more | 19.50 ± 0.00 |" in format_fitting(add_ratios(rows, trials), trials)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_benchmark_of_fitting_prints_a_row_for_each_run_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [
        "data.image_size=16",
        "data.n_train=64",
        "data.n_val=16",
        "data.batch_size=8",
        "model.grid=4",
    ]
    small += ["model.width=8", "quantizer.K=16", "quantizer.dim=8", "trainer.accelerator=cpu"]
    steps = [
        "--steps",
        "4",
        "--prior-steps",
        "4",
        "--decoder-steps",
        "4",
        "--classifier-steps",
        "4",
    ]
    words = [*small, *steps, "--samples", "16", "--keep", str(tmp_path), "--prior", *TINY_PRIOR]
    words += ["--decoder", "loss.discriminator.width=8", "trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["fitting", *words, "--only", "redraw"])
    measure_fitting()
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith('{"bench": "fitting", "run"')]
    assert [row["run"] for row in rows] == ["plain", "more", "redraw"]
    assert rows[2].keys() >= {"gfid_ratio", "pfid_ratio", "rfid_ratio", "psnr_change"}
    assert json.loads(lines[-1])["rows"] == 3
    measure_fitting()  # the runs are there
    assert capsys.readouterr().out.splitlines()[1:4] == lines[1:4]


def test_students_are_measured_against_their_teacher(tmp_path: Path) -> None:
    tokenizer, _ = save_tokenizer_run(tmp_path / "run", "data.n_train=32", "data.n_val=8")
    other = deepcopy(tokenizer)
    with torch.no_grad():
        other.decoder.last.bias.add_(0.1)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    tokenizers = {"teacher": tokenizer, "same": deepcopy(tokenizer), "other": other}
    times = measure_times(tokenizers, repeats=2)
    assert [row["speed"] for row in times[:1]] == [1.0]
    assert all(row["ms"] > 0 for row in times)
    taught, same, differs = measure_quality(tokenizers, x)
    assert list(taught) == ["psnr"]
    assert same["psnr"] == taught["psnr"]
    assert same["psnr_to_teacher"] == same["psnr_painted"] == 58.92  # without error
    assert differs["psnr_to_teacher"] == pytest.approx(20 * math.log10(2 / 0.1), abs=0.3)
    assert "| other |" in format_students([row | {"psnr": 1.0} for row in times])
