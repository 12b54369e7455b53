"""Compiled modules train and sample like uncompiled ones."""

import copy
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch._dynamo.testing import CompileCounterWithBackend

from codegrid.engine import compile as compiling
from codegrid.engine.callbacks.eager import EagerValidation
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.compile import check_compile, compile_failure, compile_parts
from codegrid.engine.errors import InputError
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.trainer import make_trainer
from prior.decoding.generate import check_compile_sampler, sample
from prior.decoding.kv_decoder import CompiledKVSteps, KVSteps, StepCache
from prior.decoding.sampling import Sampler
from prior.models.base import Autoregressive, PriorModel
from prior.models.transformer import rotary
from prior.module import PriorModule
from tests.helpers.commands import TINY, TINY_PRIOR, TWO, launch, read_report
from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.priors import HEADS, STEP_GRID, WIDTH, make_blocks, make_prior, run_at_once
from tests.helpers.runs import save_tokenizer_run
from tests.helpers.stage2 import lightning_warnings, make_code_data
from tests.helpers.stage2 import make_trainer as make_plain_trainer
from vqgan.load import start_images
from vqgan.stages.building import build_module

# torch reads gradients while it traces. It hides the warning, but not where warnings are errors.
pytestmark = [
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),  # of 3.13.0 alone
]
ROOT = Path(__file__).parent.parent
TRANSFORMERS = ("gpt", "rar", "rq", "maskgit", "diffusion")


@pytest.fixture
def graphs() -> Iterator[CompileCounterWithBackend]:
    """Compiling in a test traces forward and backward, counts the graphs, and runs them without a C++ compiler."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch.compiler.reset()


def learned(name: str, compile: bool, **update: Any) -> PriorModule:
    """A prior after six updates and two validations, with batches of 16 and one of 1."""
    torch.manual_seed(0)
    module = PriorModule(
        make_prior(name, classes=3, dropout=0.0).train(),
        lambda p: torch.optim.AdamW(p, 1e-2, eps=0.1), Budget(6), Schedule(0, floor=0.02), label_drop=0.0,
        label_smoothing=0.0, **update,
    )  # fmt: skip
    if compile:
        compile_parts(module.blocks)
    torch.manual_seed(1)
    make_plain_trainer(val_every=3, callbacks=[WeightAverage(0.5), EagerValidation()]).fit(
        module, make_code_data(name, 16)
    )
    return module


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_compiled_prior_trains_like_an_uncompiled_one_and_is_traced_once_per_kind_of_block(
    name: str, graphs: CompileCounterWithBackend
) -> None:
    plain = learned(name, compile=False)
    assert graphs.frame_count == 0
    quick = learned(name, compile=True)
    # Six updates share a graph; validations are not compiled.
    assert graphs.frame_count == (2 if name == "rq" else 1)
    for (name, value), (other, compiled) in zip(
        plain.state_dict().items(), quick.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(compiled, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quick.loss_map, plain.loss_map, rtol=1e-4, atol=1e-5)


def test_micro_batches_of_two_sizes_are_traced_twice(graphs: CompileCounterWithBackend) -> None:
    learned("gpt", compile=True, accumulate=3)
    assert graphs.frame_count == 2


def test_a_traced_block_computes_the_same_in_bf16_too(graphs: CompileCounterWithBackend) -> None:
    model, codes = make_prior("gpt", grid=(4, 4)), torch.randint(5, (3, 16))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.judge(codes, None).logits
        compile_parts(model.train().blocks)  # type: ignore[arg-type]
        logits = model.judge(codes, None).logits
    assert graphs.frame_count == 1
    assert graphs.op_count > 20
    assert (logits - expected).norm() < 0.02 * expected.norm()


GAN = [
    "loss.gate.start=0.5",
    "loss.gate.warmup=0.2",
    "loss.discriminator.width=8",
    "callbacks=default",
]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "precision",
    ["32-true", *(pytest.param(name, marks=SLOW) for name in ("bf16-mixed", "16-mixed"))],
)
@pytest.mark.parametrize(
    ("words", "traced"),
    [
        ([], 3),  # the encoder, the decoder, and the encoder when codes are frozen
        pytest.param(
            ["loss.freeze_codes=false", "loss.r1.weight=1", "trainer.accumulate=2"], 2, marks=SLOW
        ),
        pytest.param(
            [
                "loss/discriminator=fine",
                "loss.discriminator.spectral=true",
                "loss/augment=diffaugment",
            ],
            3,
            marks=SLOW,
        ),
        pytest.param(["loss/discriminator=fine"], 3, marks=SLOW),
    ],
    ids=["codes frozen", "codes trained", "spectral norm", "judged once"],
)
def test_a_compiled_tokenizer_trains_like_an_uncompiled_one(
    words: list[str], traced: int, precision: str, graphs: CompileCounterWithBackend, tmp_path: Path
) -> None:
    chosen = compose_config(
        "stage=vqgan",
        *TINY,
        *GAN,
        f"trainer.precision={precision}",
        f"cache_dir={tmp_path}",
        *words,
    )
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        settings = TrainerSettings.read(chosen.trainer)
        data = instantiate(chosen.data)
        module = build_module(chosen, settings)
        module.tokenizer.initialise(start_images(data))
        if compile:
            compile_parts(module.costly)
        torch.manual_seed(1)
        make_trainer(
            settings, tmp_path, [*instantiate(chosen.callbacks).values(), EagerValidation()], []
        ).fit(module, data)
        assert (module.step, module.discriminator_step > 0) == (6, True)
        ends.append(module)
        assert graphs.frame_count == (traced if compile else 0)
    plain, quick = (end.state_dict() for end in ends)
    assert list(plain) == list(quick)
    if precision == "32-true":
        for name, value in plain.items():
            torch.testing.assert_close(
                quick[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
    psnr, other = (float(end.trainer.callback_metrics["val/psnr"]) for end in ends)
    assert other == pytest.approx(psnr, abs=0.01 if precision == "32-true" else 0.3)


def test_copies_and_files_of_a_compiled_module_equal_those_of_the_uncompiled_one(
    graphs: CompileCounterWithBackend,
) -> None:
    model, codes = make_prior("gpt").train(), torch.randint(5, (3, 6))
    names = list(model.state_dict())
    expected = model.judge(codes, None).logits
    compile_parts(model.blocks)  # type: ignore[arg-type]
    assert list(model.state_dict()) == names
    model.judge(codes, None)
    copied: PriorModel = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    before = graphs.frame_count
    for other in (copied, torch.load(file, weights_only=False)):
        torch.testing.assert_close(other.judge(codes, None).logits, expected)
    assert graphs.frame_count == before > 0


def test_a_machine_that_can_not_compile_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Callable[..., Any]:
        raise RuntimeError("no g++\nand a long story")

    monkeypatch.setattr(compiling.torch, "compile", broken)
    assert compile_failure("cpu") == "no g++"
    check_compile("trainer.compile", False, "cpu")
    for kind, need in (("cpu", "a C[+][+] compiler"), ("cuda", "Triton")):
        monkeypatch.setattr(compiling, "compile_failure", lambda kind: "no g++")
        with pytest.raises(
            InputError,
            match=rf"trainer\.compile=true needs .*{need}.*[(]no g[+][+][)].*trainer\.compile=false",
        ):
            check_compile("trainer.compile", True, kind)


@pytest.mark.parametrize("value", ["yes", 1, None, "default"])
def test_a_value_of_compile_other_than_true_or_false_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="must be true or false"):
        check_compile("trainer.compile", value, "cpu")


def test_a_prior_without_blocks_refuses_to_be_compiled(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "compile_failure", lambda kind: None)
    save_tokenizer_run(Path("tokenizer"), "data.n_train=32", "data.n_val=8")
    small = [word for word in TINY_PRIOR if not word.startswith("prior.heads")]
    words = ["stage=prior", "prior=lstm", "ckpt=tokenizer", *small, "trainer.compile=true"]
    assert command(*words) == 2
    assert (
        "trainer.compile=true compiles transformer blocks, and LSTM has none"
        in capsys.readouterr().err
    )
    assert not Path("runs/prior").exists()


@pytest.fixture
def inside(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes to an empty folder; the tests, in all processes of pytest-xdist, share a cache of compiled code."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "compiled"))
    # Its own processes would import everything again.
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("inside")
def test_runs_are_compiled_by_one_setting_and_are_resumed_with_or_without_it() -> None:
    words = [*TINY, "loss=vqvae", "trainer.precision=32-true"]
    plain = read_report(launch("stage=vqgan", *words))
    quick = read_report(launch("stage=vqgan", *words, "trainer.compile=true"))
    assert quick["psnr"] == pytest.approx(plain["psnr"], abs=0.02)
    exact = [*TINY_PRIOR, "trainer.precision=32-true", "ckpt=runs/vqgan/shapes"]
    plain, quick = (
        read_report(launch("stage=prior", *exact, f"trainer.compile={word}"))
        for word in ("false", "true")
    )
    assert quick["nats_per_token"] == pytest.approx(plain["nats_per_token"], abs=1e-3)
    assert "compile: true" in Path(str(quick["run"]), "config.yaml").read_text()
    again = read_report(
        launch(
            "stage=prior", f"resume={quick['run']}", "trainer.max_steps=8", "trainer.compile=false"
        )
    )
    assert again["steps"] == 8
    again = read_report(
        launch(
            "stage=prior", f"resume={plain['run']}", "trainer.max_steps=8", "trainer.compile=true"
        )
    )
    assert again["steps"] == 8


@pytest.mark.slow
@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_compile_their_parts(strategy: str) -> None:
    read_report(launch("stage=vqgan", *TINY))
    words = [*TINY_PRIOR, *TWO, "ckpt=runs/vqgan/shapes", f"trainer.strategy={strategy}"]
    plain, quick = (
        read_report(launch("stage=prior", *words, f"trainer.compile={word}"))
        for word in ("false", "true")
    )
    assert quick["nats_per_token"] == pytest.approx(plain["nats_per_token"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("inside")
def test_without_a_compiler_a_run_ends_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = launch("stage=vqgan", *TINY, "trainer.compile=true", imports=True)
    assert done.returncode == 2
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "no-such-compiler" in sentence
    assert not Path("runs").exists()


STEPWISE = ("gpt", "gpt-embedding", "rar", "rq")


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_compiled_steps_sample_the_same_codes_with_one_graph_per_stack(
    name: str, guidance: float, graphs: CompileCounterWithBackend
) -> None:
    model, labels = make_prior(name, grid=(3, 4), classes=3), torch.arange(10) % 3
    how = {"guidance": guidance, "grid": "4x6"}
    plain = sample(model, make(Sampler, **how), 10, seed=1, labels=labels, batch_size=4)  # type: ignore[arg-type]
    assert graphs.frame_count == 0
    quick = sample(
        model, make(Sampler, **how, compile=True), 10, seed=1, labels=labels, batch_size=4
    )  # type: ignore[arg-type]
    # Three batches, the last of which is smaller, with six windows each share a graph.
    assert graphs.frame_count == (2 if name == "rq" else 1)
    assert torch.equal(quick, plain)


@pytest.mark.parametrize("name", STEPWISE)
def test_compiled_steps_return_the_logits_of_the_whole_sequence(
    name: str, graphs: CompileCounterWithBackend
) -> None:
    model = make_prior(name, grid=(3, 4))
    assert isinstance(model, Autoregressive)
    codes = torch.randint(5, (4, model.L))
    cache = StepCache()
    for n in (4, 3, 4):  # the cache of earlier samples must not be visible
        decode = model.decoder(n, None, cache)
        logits = torch.stack([decode(codes[:n, t - 1] if t else None) for t in range(model.L)], 1)
        torch.testing.assert_close(logits, model(codes[:n]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_steps_are_as_accurate_under_autocast_as_uncompiled_ones(
    graphs: CompileCounterWithBackend,
) -> None:
    stack, x, angles = make_blocks(), torch.randn(4, 12, WIDTH), rotary(STEP_GRID, WIDTH // HEADS)
    exact = run_at_once(stack, x)
    with torch.autocast("cpu", torch.bfloat16):
        errors = []
        for kind in (KVSteps, CompiledKVSteps):
            over = kind(stack, angles, 4)
            errors.append((torch.stack([over(x[:, t]) for t in range(12)], 1) - exact).norm())
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("name", ["lstm", "pixelcnn", "maskgit", "uniform"])
def test_priors_without_steps_refuse_compiled_sampling(name: str) -> None:
    check_compile_sampler(make_prior(name), Sampler.unmodified(), "cpu")
    with pytest.raises(
        InputError,
        match=r"sampler\.compile=true compiles the steps of prior=gpt, rar and rq, and \w+ has none",
    ):
        check_compile_sampler(make_prior(name), make(Sampler, compile=True), "cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("inside")
def test_sampling_is_compiled_by_one_setting() -> None:
    read_report(launch("stage=vqgan", *TINY))
    read_report(launch("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR))
    words = ["stage=sample", "ckpt=runs/prior/shapes", "n=10", "batch_size=8", "accelerator=cpu"]
    plain, quick = (
        read_report(launch(*words, f"sampler.compile={word}")) for word in ("false", "true")
    )
    one, other = (
        torch.load(Path(str(result["run"])) / "codes.pt")["codes"] for result in (plain, quick)
    )
    assert (one == other).float().mean() > 0.9  # bf16 rounds, if the processor has it
