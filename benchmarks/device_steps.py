"""Training steps on a device for benchmarks.device: how fast they are, what they compute and hold, and where they wait."""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.configs import compose_config
from benchmarks.device_report import Bench, Row
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.samples import ArraySamples
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.module import ClockedModule
from codegrid.engine.settings import TrainerSettings
from codegrid.engine.trainer import make_trainer
from prior.module import PriorModule
from prior.training import prepare_blocks
from vqgan.module import prepare_layers
from vqgan.stages.building import build_module

ROOT = Path(__file__).parents[1]
GIB = 2**30
OPEN = [
    "loss.gate.start=0", "loss.gate.ramp=0", "loss.gate.warmup=0", "loss.freeze_codes=false"
]  # fmt: skip
RANDOM = ["model.start=random", "quantizer.kmeans=false"]  # the speed is the same
F16 = ["data.image_size=256", "model.grid=16", "quantizer.K=1024", *RANDOM]
VIT = ["model=vit", "model.width=512", "model.depth=8", "model.heads=8"]  # ViT-VQGAN's small
CHECKPOINTED = "trainer.checkpoint_activations=true"
TAMING = [
    "model=taming_f16", "data.image_size=256", "quantizer=vq", "quantizer.K=16384",
    "quantizer.dim=256", *RANDOM,
]  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """A module in training: the words of train.py that describe it, its batch, and the codes of a prior.

    Its batches lie on the device, unless it `reads` them as a run does.
    """

    name: str
    words: tuple[str, ...]
    batch: int
    K: int = 0  # of the codes that a prior learns
    side: int = 0  # of their grid
    reads: bool = False

    @property
    def is_prior(self) -> bool:
        return self.K > 0


def list_cases(tiny: bool) -> list[StepCase]:
    """The modules that are measured, most important first."""
    if tiny:
        small = ("data.image_size=32", "model.grid=4", "model.width=16", "quantizer.K=32", *RANDOM)
        pyramid = ("model=pyramid", *small[:2], "model.width=32", "model.z_channels=8", *small[3:])
        sizes = ("prior.width=32", "prior.depth=2", "prior.heads=2")
        return [
            StepCase("conv 32 px", ("loss=vqvae", *small), 4),
            StepCase("conv 32 px, GAN", (*OPEN, *small), 4),
            StepCase("pyramid 32 px, checkpointed", ("loss=vqvae", CHECKPOINTED, *pyramid), 2),
            StepCase("conv 32 px, read from memory", ("loss=vqvae", *small), 4, reads=True),
            StepCase("gpt, 16 codes", sizes, 4, 32, 4),
        ]
    base = ("prior/size=base",)
    taming_gan = (*OPEN, *TAMING)
    return [
        StepCase("conv 64 px", ("loss=vqvae", *RANDOM), 256),
        StepCase("conv_f16 256 px", ("loss=vqvae", "model=conv_f16", *F16), 128),
        StepCase("gpt base, 256 codes", base, 64, 16384, 16),
        StepCase("taming_f16 256 px", ("loss=vqvae", *TAMING), 32),
        StepCase("taming_f16 256 px, GAN", taming_gan, 16),
        StepCase("conv 64 px, GAN", (*OPEN, *RANDOM), 256),
        StepCase("conv 64 px, muon", ("loss=vqvae", "optimizer=muon", *RANDOM), 256),
        StepCase("gpt base, 64 codes", base, 256, 16384, 8),
        StepCase("conv_f16 256 px, GAN", (*OPEN, "model=conv_f16", *F16), 64),
        StepCase("conv 64 px, read from memory", ("loss=vqvae", *RANDOM), 256, reads=True),
        StepCase("taming_f16 256 px, GAN, checkpointed", (CHECKPOINTED, *taming_gan), 16),
        StepCase("vit f16 256 px", ("loss=vqvae", *VIT, *F16), 64),
        StepCase("gpt base, 256 codes, checkpointed", (CHECKPOINTED, *base), 64, 16384, 16),
        StepCase("conv 64 px, batch 16", ("loss=vqvae", *RANDOM), 16),
        StepCase("conv f16 256 px", ("loss=vqvae", *F16), 128),
    ]


# The cases that are compiled too, most important first.
COMPILED = ("gpt base, 256 codes", "conv_f16 256 px", "conv 64 px")


class RepeatedBatch:
    """One batch on the device, for ever: what reading images costs is measured elsewhere."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.batch


@dataclass
class Training:
    """A module with its data and settings, ready for a trainer."""

    module: ClockedModule
    data: L.LightningDataModule
    settings: TrainerSettings
    callbacks: list[Callback] = field(default_factory=list)

    def fit(self, *callbacks: Callback) -> None:
        """Train until a callback stops it."""
        with TemporaryDirectory() as folder:
            trainer = make_trainer(self.settings, Path(folder), [*self.callbacks, *callbacks], [])
            trainer.limit_val_batches = 0
            trainer.fit(self.module, self.data)


def build_training(
    case: StepCase, device: str, compiled: bool = False, around: bool = False
) -> Training:
    """The module of a case on batches of its own; `around` adds the callbacks of conf/callbacks."""
    stage = "prior" if case.is_prior else "vqgan"
    batch = f"batch_size={case.batch}" if case.is_prior else f"data.batch_size={case.batch}"
    words = [
        f"stage={stage}", batch, "trainer.max_steps=1000000", *case.words,
        f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}",
    ]  # fmt: skip
    config = compose_config(*words, f"trainer.compile={str(compiled).lower()}")
    settings = TrainerSettings.read(config.trainer)
    torch.manual_seed(0)
    build = build_prior if case.is_prior else build_tokenizer_training
    training = build(case, config, settings, device)
    if around:
        callbacks = instantiate(config.callbacks).values()
        training.callbacks = [c for c in callbacks if c is not None]
    return training


def build_tokenizer_training(
    case: StepCase, config: Any, settings: TrainerSettings, device: str
) -> Training:
    n = 8 * case.batch if case.reads else case.batch
    data: ImageDataModule = instantiate(config.data, n_train=n, n_val=1, cache="ram")
    module = build_module(config, settings)
    prepare_layers(module, settings)
    if not case.reads:
        images, labels = data.samples("train").__getitems__(range(case.batch))
        batch = images.to(device), labels.to(device)
        data.train_dataloader = lambda: RepeatedBatch(batch)  # type: ignore[method-assign,assignment,return-value]
    return Training(module, data, settings)


def build_prior(case: StepCase, config: Any, settings: TrainerSettings, device: str) -> Training:
    grid = (case.side, case.side)
    codebook = torch.randn(1, case.K, 16)
    model = instantiate(config.prior, codebook=codebook, grid=grid, classes=0)
    module = PriorModule(
        model, instantiate(config.optimizer), settings.budget, instantiate(config.schedule),
        config.label_drop, config.label_smoothing, clip=settings.clip,
        accumulate=settings.accumulate,
    )  # fmt: skip
    prepare_blocks(module, settings)
    grids = np.random.default_rng(0).integers(0, case.K, (case.batch, *grid)).astype(np.uint16)
    samples = ArraySamples(grids, np.zeros(case.batch, np.int64))
    data = CodeDataModule(samples, samples, case.batch, 0)
    codes = torch.from_numpy(grids.astype(np.int64)).to(device)
    batch = codes, torch.zeros(case.batch, dtype=torch.int64, device=device)
    data.train_dataloader = lambda: RepeatedBatch(batch)  # type: ignore[method-assign,assignment,return-value]
    return Training(module, data, settings)


class FlopCount(TorchDispatchMode):
    """Adds up the floating-point operations of products, convolutions and attention, by torch's own formulas.

    torch's FlopCounterMode also follows the modules, by hooks that torch.autograd.grad of a leaf, which lambda needs, refuses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Meter(Callback):
    """Measures steps in one run of a trainer: their time, then the operations of one, then the kernels of three."""

    def __init__(self, bench: Bench, seconds: float, counts: bool) -> None:
        self.bench, self.turn, self.counts = bench, seconds, counts
        self.figures: Row = {}
        self.table = ""
        self.millions = 0.0  # parameters
        self.plan = self.measure()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ClockedModule)
        self.millions = sum(p.numel() for p in module.learned.parameters()) / 1e6

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        try:
            next(self.plan)
        except StopIteration:
            trainer.should_stop = True

    def measure(self) -> Iterator[None]:
        """What is done between the steps; a step passes at each yield."""
        tiny = self.bench.tiny
        for _ in range(1 if tiny else 4):
            yield
        once, _ = yield from self.time_steps(1)
        steps = max(2, min(200, int(self.turn / once)))
        if self.bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, issued = yield from self.time_steps(steps)
        self.figures = {"steps": steps, "ms": 1000 * seconds / steps}
        if self.bench.device == "cuda":
            self.figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            # Right after a synchronisation, when the queue of launches is empty.
            _, issued = yield from self.time_steps(2)
            self.figures["host_ms"] = 1000 * issued / 2
        if self.counts:
            with FlopCount() as counter:
                yield
            self.figures["tflop"] = counter.total / 1e12
        yield from self.profile_steps(1 if tiny else 3)

    def time_steps(self, n: int) -> Generator[None, None, tuple[float, float]]:
        """Seconds of n steps, and seconds until the host had issued them."""
        self.bench.synchronize()
        began = perf_counter()
        for _ in range(n):
            yield
        issued = perf_counter() - began
        self.bench.synchronize()
        return perf_counter() - began, issued

    def profile_steps(self, n: int) -> Iterator[None]:
        """The table of the operations that take most time in n steps."""
        with start_profile(self.bench.device) as profiler:
            for _ in range(n):
                yield
            self.bench.synchronize()
        self.table, kernels = read_profile(profiler, self.bench.device)
        if kernels:
            total, count = (figure / n for figure in kernels)
            busy = min(1.0, total / self.figures["ms"])
            self.figures |= {"kernel_ms": total, "kernels": int(count), "gpu_busy": busy}


def start_profile(device: str) -> profile:
    """torch's profiler of the host, and of a GPU."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    return profile(activities=kinds)


def read_profile(profiler: profile, device: str) -> tuple[str, tuple[float, float] | None]:
    """The table of the operations that take most time; on a GPU also milliseconds of all kernels, and their number."""
    on_gpu = device == "cuda"
    averages = profiler.key_averages()
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=15, max_name_column_width=90)
    if not on_gpu:
        return table, None
    # Kernels and copies themselves; operators have the same time once more.
    kernels = [
        event
        for event in averages
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    return table, (total, sum(event.count for event in kernels))


def measure_training(bench: Bench) -> None:
    """Rows of all cases, as they are by default."""
    for case in list_cases(bench.tiny):
        measure_case(bench, case, compiled=False)


def measure_compiled(bench: Bench, name: str) -> None:
    """The row of a case with trainer.compile=true."""
    cases = {case.name: case for case in list_cases(bench.tiny)}
    measure_case(bench, cases[name], compiled=True)


def compile_case(device: str, name: str) -> None:
    """Make a few compiled steps of a case, which leaves the compiled code in torch's cache on the disk."""
    warnings.simplefilter("ignore")
    began = perf_counter()
    [case] = [case for case in list_cases(tiny=False) if case.name == name]

    class Stop(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    build_training(case, device, compiled=True).fit(Stop())
    print(f"{perf_counter() - began:.0f} s")


def measure_case(bench: Bench, case: StepCase, compiled: bool) -> None:
    """One row: how fast the steps of a case are, with what share of the card's peak."""
    if bench.left < 2:
        return
    name = f"{case.name}, {'compiled' if compiled else 'eager'}"
    meter = Meter(bench, 0.2 if bench.tiny else 1.5, counts=not compiled)
    began = perf_counter()
    with bench.guard(name):
        training = build_training(case, bench.device, compiled)
        training.fit(meter)
        del training
    if not meter.figures:  # it failed before anything was measured
        return
    figures = meter.figures
    tflop = figures.pop("tflop", None) or bench.facts.get(f"tflop {case.name}")
    if not compiled:
        bench.remember(**{f"tflop {case.name}": tflop})
    images = 1000 * case.batch / figures["ms"]
    row: Row = {"batch": case.batch, "images_per_s": images}
    if case.is_prior:
        row["tokens_per_s"] = images * case.side**2
    if tflop:
        row |= rate_against_peak(bench, tflop, figures["ms"])
    rest = perf_counter() - began - figures["steps"] * figures["ms"] / 1000
    bench.add(name, **row, **figures, params_m=meter.millions, rest_s=rest)
    bench.write(name, meter.table)


def rate_against_peak(bench: Bench, tflop: float, ms: float) -> Row:
    """TFLOP of a step, TFLOP/s, and the share of the measured peak of bf16 matrix products."""
    rate = 1000 * tflop / ms
    peak = bench.facts.get("peak_tflops")
    return {"tflop": tflop, "tflops": rate, **({"of_peak": rate / peak} if peak else {})}


class SyncRecorder(Callback):
    """Counts, by the line of this program, where the host waits for the device during some steps."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps
        self.places: Counter[str] = Counter()
        self.inside: AbstractContextManager[Any] = nullcontext()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch_idx + 1 == self.first:
            torch.cuda.set_sync_debug_mode("warn")
        if batch_idx + 1 == self.first + self.steps:
            torch.cuda.set_sync_debug_mode("default")
            trainer.should_stop = True

    def show(self, message: Any, *_: Any, **__: Any) -> None:
        """In place of warnings.showwarning: the call stack is still that of the operation that waits."""
        place = find_line(traceback.extract_stack())
        if "synchroniz" in str(message) and "set_sync_debug_mode" not in place:
            self.places[place] += 1


def find_line(stack: traceback.StackSummary) -> str:
    """The innermost line of this program in a call stack, and below it the innermost of another package."""
    frames = [f for f in stack if Path(f.filename).name not in ("device_steps.py", "warnings.py")]
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and ".venv" not in f.filename]
    mine = ours[-1] if ours else frames[-1]
    where = f"{short_name(mine.filename)}:{mine.lineno} {mine.name}: {mine.line}"
    last = frames[-1]
    if last is mine:
        return where
    return f"{where} [in {short_name(last.filename)}:{last.lineno} {last.name}]"


def short_name(file: str) -> str:
    """A file's path without what lies above the program, or above the package."""
    path = file.removeprefix(f"{ROOT}/")
    return path.rpartition("-packages/")[2]


def measure_syncs(bench: Bench) -> None:
    """Where 20 steps of each kind wait for the device, with the callbacks of a usual run."""
    if bench.device != "cuda":
        bench.add("all", error="torch reports where it waits for a GPU, and the device is the CPU")
        return
    # The adversarial step first, which does most, then those that other modules have.
    cases = {case.name: case for case in list_cases(bench.tiny)}
    chosen = ("conv 64 px, GAN", "gpt base, 64 codes", "conv 64 px", "taming_f16 256 px, GAN")
    for name in cases if bench.tiny else chosen:
        if bench.left < 3:
            return
        case = cases[name]
        with bench.guard(case.name):
            small = replace(case, batch=min(case.batch, 16))
            recorder = record_syncs(build_training(small, bench.device, around=True))
            total = sum(recorder.places.values())
            bench.add(case.name, times=total, per_step=total / recorder.steps, place="all")
            for place, times in recorder.places.most_common(12):
                bench.add(case.name, times=times, per_step=times / recorder.steps, place=place)


def record_syncs(training: Training) -> SyncRecorder:
    """The places where 20 steps wait, one of which is a logged one; the first five warm up."""
    recorder = SyncRecorder(5, 20)
    usual = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = recorder.show
        try:
            training.fit(recorder)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = usual
    return recorder


if __name__ == "__main__":
    compile_case(*sys.argv[1:])
