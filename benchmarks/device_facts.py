"""What a device is and what it can do at most, for benchmarks.device; and the tests that run on it."""

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.device_report import Bench
from benchmarks.device_steps import COMPILED
from codegrid.engine.environment import git_revision, installed_memory, processor_name

ROOT = Path(__file__).parents[1]
GIB = 2**30
PACKAGES = (
    "torch", "torchvision", "triton", "lightning", "hydra-core", "numpy", "diffusers", "x-transformers"
)  # fmt: skip
QUERIES = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"


def query_gpu(fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), map(str.strip, done.stdout.split(",")), strict=True))


def package_versions() -> dict[str, str]:
    """The versions of the packages that matter, of those that are installed."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def describe_machine(bench: Bench) -> None:
    """The card, the machine and the versions."""
    card = processor_name()
    if bench.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = properties.name
        bench.remember(
            card=card,
            gpu_memory_gib=round(properties.total_memory / GIB, 1),
            multiprocessors=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            **{f"smi {key}": value for key, value in query_gpu(QUERIES).items()},
        )
    bench.remember(
        card=card,
        processor=processor_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gib=installed_memory(),
        python=platform.python_version(),
        system=platform.platform(),
        git=git_revision(),
        bf16=torch.cuda.is_bf16_supported() if bench.device == "cuda" else None,
        float32_matmul=torch.get_float32_matmul_precision(),
        conv_tf32=torch.backends.cudnn.allow_tf32,
        **package_versions(),
    )
    for name, value in bench.facts.items():
        bench.add(name, value=value)


def measure_peaks(bench: Bench) -> None:
    """The rates that no step exceeds: of matrix products, of convolutions and of copies."""
    side = 256 if bench.tiny else 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with bench.guard(f"{name} product"):
            size = side if dtype == torch.bfloat16 else side // 2
            a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
            seconds = bench.time_calls(lambda a=a, b=b: a @ b, 0.5)  # type: ignore[misc]
            tflops = 2 * size**3 / seconds / 1e12
            bench.add(f"{name} product", side=size, tflops=tflops, ms=1000 * seconds)
            if dtype == torch.bfloat16:
                bench.remember(peak_tflops=tflops)
            else:
                bench.remember(peak_float32_tflops=tflops)
            del a, b
    with bench.guard("copy"):
        count = 2**18 if bench.tiny else 2**31  # float32: 8 GiB
        source = torch.empty(count, device=bench.device).uniform_()
        target = torch.empty_like(source)
        seconds = bench.time_calls(lambda: target.copy_(source), 0.5)
        rate = 2 * source.nbytes / seconds / 1e9  # bytes read and written
        bench.add(
            "copy within the device", gb_per_s=rate, ms=1000 * seconds, mib=source.nbytes >> 20
        )
        bench.remember(copy_gb_per_second=rate)
    if bench.device == "cuda":
        measure_transfers(bench)
    with bench.guard("convolution"):
        measure_convolution(bench)


def measure_transfers(bench: Bench) -> None:
    """Copies from the host, pinned and not, and what a single small kernel costs."""
    for pinned in (False, True):
        name = "copy from pinned memory" if pinned else "copy from pageable memory"
        with bench.guard(name):
            source = torch.empty(2**26, dtype=torch.uint8)
            source = source.pin_memory() if pinned else source
            target = torch.empty(2**26, dtype=torch.uint8, device="cuda")
            seconds = bench.time_calls(
                lambda s=source, t=target: t.copy_(s, non_blocking=True),  # type: ignore[misc]
                0.2,
            )
            bench.add(name, gb_per_s=source.nbytes / seconds / 1e9, ms=1000 * seconds, mib=64)
    with bench.guard("launch"):
        x = torch.ones(8, device="cuda")
        seconds = bench.time_calls(lambda: x.add_(1), 0.1, most=5000)
        bench.add("small kernel after small kernel", ms=1000 * seconds)


def measure_convolution(bench: Bench) -> None:
    """The 3 x 3 convolution that taming's networks spend most time in, forward, in both memory formats."""
    batch, width, side = (1, 8, 16) if bench.tiny else (32, 128, 256)
    conv = torch.nn.Conv2d(width, width, 3, padding=1, device=bench.device, dtype=torch.bfloat16)
    shape = (batch, width, side, side)
    x = torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
    flop = 2 * 9 * width**2 * batch * side**2
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    for name, memory_format in formats.items():
        part, images = conv.to(memory_format=memory_format), x.to(memory_format=memory_format)
        with torch.no_grad():
            seconds = bench.time_calls(lambda p=part, i=images: p(i), 0.3)  # type: ignore[misc]
        tflops = flop / seconds / 1e12
        bench.add(f"convolution {width} x 3 x 3, {name}", tflops=tflops, ms=1000 * seconds)


def run_tests(bench: Bench) -> None:
    """`pytest -m device` on this device, a row for each test. Meanwhile, what is measured later is compiled into torch's cache."""
    results = bench.out / "tests.jsonl"
    command = [
        sys.executable, "-m", "pytest", "-m", "device", "tests/device", "-p", "no:cacheprovider",
        "-W", "default", "-vv", "--tb=short",
    ]  # fmt: skip
    if bench.tiny:
        command += ["-k", "a_step_of_stage"]
    environment = os.environ | {
        "CODEGRID_TEST_DEVICE": bench.device,
        "CODEGRID_TEST_ROWS": str(results),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic products
    }
    compilers = [Compiler.start(bench.device, name) for name in COMPILED if not bench.tiny]
    with bench.guard("tests"):
        text, ended = run_limited(command, environment, bench.left - 8)
        bench.write("tests", text[-40_000:])
        for row in read_results(results):
            bench.add(**row)
        if not ended:
            bench.add("tests", error="they were cut off; profile.txt has what they printed")
        results.unlink(missing_ok=True)
    for compiler in compilers:
        compiler.wait(bench)


@dataclass
class Compiler:
    """A process that compiles a case that is measured later: torch's cache on the disk has it from then on."""

    name: str
    printed: IO[str]  # a file: a pipe that nobody reads meanwhile would fill up
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, device: str, name: str) -> "Compiler":
        printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.device_steps", device, name]
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=printed, stderr=subprocess.STDOUT
        )
        return cls(name, printed, process)

    def wait(self, bench: Bench) -> None:
        """Wait until it has ended, or the section nearly has, and add a row."""
        label = f"compiling {self.name}"
        try:
            self.process.wait(max(bench.left - 3, 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            bench.add(label, error="it was cut off")
            return
        self.printed.seek(0)
        text = self.printed.read()
        if self.process.returncode:
            bench.write(label, text[-5_000:])
            bench.add(label, error=f"it ended with {self.process.returncode}; see profile.txt")
        else:
            bench.add(label, result=text.splitlines()[-1])


def run_limited(
    command: Sequence[str], environment: dict[str, str], seconds: float
) -> tuple[str, bool]:
    """What a command prints within some seconds, and whether it ended in them."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then says what failed so far
        else:
            return text, True
        try:
            text, _ = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
    return text, False


def read_results(file: Path) -> list[dict[str, Any]]:
    """The rows of the tests that ended: what failed or was skipped has a sentence."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        why = row.pop("why")
        if row["result"] != "passed":
            row = {"name": row["name"], "error": f"{row['result']}: {why}"}
        rows.append(row)
    return rows
