"""A GPU computes what the CPU computes: `python -m pytest -m device tests/device` on a machine that has one."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.compile import compile_parts
from codegrid.engine.module import ClockedModule
from prior.decoding.generate import sample
from prior.decoding.kv_decoder import CompiledKVSteps, KVSteps
from prior.decoding.sampling import Sampler
from prior.models.transformer import rotary
from tests.helpers.commands import TINY, TINY_GAN, TINY_PRIOR
from tests.helpers.parts import make
from tests.helpers.priors import HEADS, STEP_GRID, WIDTH, make_blocks, make_prior, run_at_once
from tests.helpers.stage1 import (
    Noise,
    lightning_warnings,
    make_module,
    make_tokenizer,
    paper_weight,
)
from tests.helpers.stage2 import make_prior_module
from vqgan.losses.gate import Gate
from vqgan.quantizers.ema import EMA
from vqgan.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.device,
    lightning_warnings,
    pytest.mark.filterwarnings("ignore:.*ambiguous"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 without TensorFloat-32, so that two devices differ by rounding alone."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def fit_on(
    device: str,
    module: ClockedModule,
    data: L.LightningDataModule,
    callbacks: tuple[Callback, ...] = (),
    **settings: Any,
) -> None:
    """Train a module on a device until its budget is spent, with the same order of batches on all."""
    trainer = L.Trainer(
        max_epochs=-1, accelerator="gpu" if device == "cuda" else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0, callbacks=list(callbacks),
        use_distributed_sampler=False, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, data)


def gradient_descent(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Without moments: AdamW's first updates have the size of the rate, however small a gradient is."""
    return torch.optim.SGD(parameters, 0.05)


def make_still_images() -> Noise:
    """Images that are not mirrored, since each device has random numbers of its own."""
    return Noise(16, cache="ram", batch_size=4, flip=False)


def make_still_tokenizer() -> Tokenizer:
    """A tokenizer that draws nothing in training."""
    tokenizer = make_tokenizer()
    still = make(EMA, 16, 8, revive=0.0)
    tokenizer = Tokenizer(tokenizer.encoder, still, tokenizer.decoder, "patches")
    images = torch.from_numpy(make_still_images().samples("train").values)
    tokenizer.initialise(make_still_images().preprocess(images))
    return tokenizer


def assert_same_weights(one: nn.Module, other: nn.Module, rtol: float = 1e-3) -> None:
    for (name, value), (same, expected) in zip(
        one.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == same
        torch.testing.assert_close(
            value.cpu(), expected.cpu(), rtol=rtol, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("gate", [None, (0.0, 0.0, 0.0), (10**6, 0.0, 10**6)])
def test_a_step_of_stage_1_is_that_of_the_cpu(
    device: str, gate: tuple[float, float, float] | None
) -> None:
    """A VQ-VAE; a VQGAN whose gate is open; and one whose discriminator only warms up."""
    torch.manual_seed(0)
    tokenizer = make_still_tokenizer()
    ends = []
    for kind in ("cpu", device):
        module = make_module(
            gate=gate and Gate(*gate), steps=3, tokenizer=copy.deepcopy(tokenizer),
            **({"freeze_codes": False, "adaptive": paper_weight()} if gate else {}),
        )  # fmt: skip
        module.make_optimizers = dict.fromkeys(module.make_optimizers, gradient_descent)  # type: ignore[arg-type]
        fit_on(kind, module, make_still_images())
        ends.append(module)
    assert_same_weights(ends[1], ends[0])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_of_stage_2_is_that_of_the_cpu(device: str, accumulate: int) -> None:
    ends = []
    for kind in ("cpu", device):
        module, data = make_prior_module(
            steps=3,
            optimizer=gradient_descent,
            accumulate=accumulate,  # type: ignore[arg-type]
        )
        fit_on(kind, module, data)
        ends.append(module)
    assert_same_weights(ends[1].model, ends[0].model)


def test_the_average_of_the_weights_is_that_of_the_cpu(device: str) -> None:
    averages = []
    for kind in ("cpu", device):
        average = WeightAverage(0.9)
        module, data = make_prior_module(steps=3, optimizer=gradient_descent)  # type: ignore[arg-type]
        fit_on(kind, module, data, (average,))
        averages.append(average.values)
    for name, value in averages[0].items():
        assert averages[1][name].device.type == device
        torch.testing.assert_close(averages[1][name].cpu(), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains_near_float32(device: str, precision: str) -> None:
    if device == "cpu" and precision == "16-mixed":
        pytest.skip("Lightning replaces float16 on a CPU")
    losses = []
    for chosen in ("32-true", precision):
        module, data = make_prior_module(steps=5)
        fit_on(device, module, data, precision=chosen)
        module.check()
        losses.append(float(module.vitals["loss"]))
        assert all(p.dtype == torch.float32 for p in module.model.parameters())
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_a_tokenizer_encodes_and_decodes_as_on_the_cpu(device: str) -> None:
    tokenizer = make_still_tokenizer().eval()
    x = torch.randn(64, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        q = tokenizer.encode(x)
        x_hat = tokenizer.decode(q.z_q)
        other = copy.deepcopy(tokenizer).to(device)
        moved = other.encode(x.to(device))
        decoded = other.decode(q.z_q.to(device))
    assert q.indices is not None
    assert moved.indices is not None
    assert (moved.indices.cpu() == q.indices).float().mean() > 0.99
    torch.testing.assert_close(decoded.cpu(), x_hat, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt", "rar", "maskgit", "lstm", "pixelcnn", "rq", "diffusion"])
def test_a_prior_draws_the_codes_that_it_draws_on_the_cpu(device: str, name: str) -> None:
    model = make_prior(name, grid=(4, 4))
    codes = sample(model, Sampler.unmodified(), 32, seed=1)
    other = sample(copy.deepcopy(model).to(device), Sampler.unmodified(), 32, seed=1)
    assert other.device.type == device
    assert (other.cpu() == codes).float().mean() > 0.95  # rounding can move a draw to the next code


@pytest.mark.parametrize("kind", [KVSteps, CompiledKVSteps])
def test_cached_steps_equal_all_at_once(device: str, kind: Any) -> None:
    blocks = make_blocks()
    T = STEP_GRID[0] * STEP_GRID[1]
    x = torch.randn(5, T, WIDTH)
    expected = run_at_once(blocks, x)
    blocks, angles = blocks.to(device), rotary(STEP_GRID, WIDTH // HEADS).to(device)
    steps = kind(blocks, angles, 5)
    steps.restart()
    with torch.no_grad():
        outputs = torch.stack([steps(x[:, t].to(device)) for t in range(T)], 1)
    torch.testing.assert_close(outputs.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt", "rar"])
def test_windows_draw_the_codes_that_they_draw_on_the_cpu(device: str, name: str) -> None:
    model = make_prior(name, grid=(4, 4))
    codes = sample(model, make(Sampler, parallel=4), 32, seed=1)
    other = copy.deepcopy(model).to(device)
    for parallel in (5, "auto"):
        drawn = sample(other, make(Sampler, parallel=parallel), 32, seed=1)
        assert (drawn.cpu() == codes).float().mean() > 0.95


def test_compiled_sampling_draws_the_same_codes(device: str) -> None:
    model = make_prior("gpt", grid=(4, 4)).to(device)
    plain = sample(model, make(Sampler), 10, seed=1, batch_size=4)
    quick = sample(model, make(Sampler, compile=True), 10, seed=1, batch_size=4)
    assert (quick == plain).float().mean() > 0.95


def test_compiled_blocks_train_as_eager_ones(device: str) -> None:
    ends = []
    for is_compiled in (False, True):
        module, data = make_prior_module(steps=3, optimizer=gradient_descent)  # type: ignore[arg-type]
        if is_compiled:
            compile_parts(module.blocks)
        fit_on(device, module, data)
        ends.append(module)
    assert_same_weights(ends[1].model, ends[0].model)


def test_a_compiled_tokenizer_trains_as_an_eager_one(device: str) -> None:
    tokenizer = make_still_tokenizer()
    ends = []
    for is_compiled in (False, True):
        module = make_module(steps=3, tokenizer=copy.deepcopy(tokenizer))
        module.make_optimizers = dict.fromkeys(module.make_optimizers, gradient_descent)  # type: ignore[arg-type]
        if is_compiled:
            compile_parts(module.costly)
        fit_on(device, module, make_still_images())
        ends.append(module)
    assert_same_weights(ends[1], ends[0])


@pytest.mark.parametrize("stage", ["vqgan", "vqvae", "prior"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    device: str, stage: str, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's deterministic operations: others add in an order that differs from run to run. Where one has no such variant
    the runs are compared up to rounding, and the test is skipped with its name."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    kind = f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"

    def on_device(words: list[str]) -> list[str]:
        return [word for word in words if not word.startswith("trainer.accelerator")] + [kind]

    gate = ["loss.gate.start=2", "loss.gate.ramp=2", "loss.gate.warmup=1"]
    words = {
        "vqgan": ["stage=vqgan", *on_device(TINY_GAN), *gate],
        "vqvae": ["stage=vqgan", "loss=vqvae", *on_device(TINY)],
        "prior": ["stage=prior", "ckpt=tokenizer", *on_device(TINY_PRIOR)],
    }[stage]
    if stage == "prior":
        assert command("stage=vqgan", "run_dir=tokenizer", *on_device(TINY)) == 0
    torch.use_deterministic_algorithms(True)
    try:
        whole, halves = train_twice(command, words, "exact")
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(False)
        whole, halves = train_twice(command, words, "near")
        for name, value in whole["state_dict"].items():
            torch.testing.assert_close(halves["state_dict"][name], value, rtol=0.05, atol=0.02)
        pytest.skip(f"near, and not to the bit: {str(error).splitlines()[0]}")
    finally:
        torch.use_deterministic_algorithms(False)
    differing = [
        name
        for name, value in whole["state_dict"].items()
        if not torch.equal(value, halves["state_dict"][name])
    ]
    assert not differing
    if device == "cuda":
        assert torch.equal(whole["random"][0]["cuda"], halves["random"][0]["cuda"])


def train_twice(
    command: Callable[..., int], words: list[str], name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last checkpoint of a run, and that of the same run with an interruption at step 4."""
    whole, halves = (Path(f"{name}-{part}") for part in ("whole", "halves"))
    assert command(f"run_dir={whole}", *words) == 0
    interrupt_at(4, lambda: command(f"run_dir={halves}", *words))
    assert command(words[0], f"resume={halves}") == 0
    one, two = (
        torch.load(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
        for run in (whole, halves)
    )
    assert two["clock"]["step"] == one["clock"]["step"] == 6
    return one, two


def interrupt_at(step: int, run: Callable[[], int]) -> None:
    """Run something that an exception ends after that step."""
    tick = ClockedModule.tick

    def interrupted(self: ClockedModule) -> None:
        tick(self)
        if self.step == step:
            raise RuntimeError("the power failed")

    ClockedModule.tick = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="the power failed"):
            run()
    finally:
        ClockedModule.tick = tick  # type: ignore[method-assign]


def test_a_checkpoint_of_this_device_samples_on_the_cpu(
    device: str, command: Callable[..., int]
) -> None:
    kind = "gpu" if device == "cuda" else "cpu"
    words = [w for w in TINY if not w.startswith("trainer.accelerator")]
    assert command("stage=vqgan", *words, f"trainer.accelerator={kind}", "run_dir=a") == 0
    words = [w for w in TINY_PRIOR if not w.startswith("trainer.accelerator")]
    kinds = f"trainer.accelerator={kind}"
    assert command("stage=prior", "ckpt=a", *words, kinds, "run_dir=b") == 0
    for name in ("cpu", kind):
        save = ["save=npz", "n=4", f"accelerator={name}", f"run_dir=samples-{name}"]
        assert command("stage=sample", "ckpt=b", *save) == 0
