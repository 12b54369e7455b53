"""Measures all that must be known of a device, most important first, within some minutes.

python -m benchmarks.device --minutes 8
python -m benchmarks.device --device cpu --tiny --minutes 1          tries the program itself

Prints each row when it is measured, and writes after each row, in the folder --out: device.json with all figures, device.md
with a table for each section, profile.txt with the operations that take most time, and pictures of what the runs learn.
Each section runs in a process of its own, so that a failure or a lack of time in one never costs the others; the time
that a section leaves goes to those after it. --minutes is a hard limit. --only runs some of the sections.
"""

import time

STARTED = time.monotonic()  # before the imports, which count too

import argparse  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else this process could not fork
os.environ.setdefault("WANDB_MODE", "disabled")

import torch  # noqa: E402

from benchmarks.device_facts import describe_machine, measure_peaks, run_tests  # noqa: E402
from benchmarks.device_report import RESERVE, Report, Section  # noqa: E402
from benchmarks.device_runs import train_both_stages  # noqa: E402
from benchmarks.device_sampling import measure_peers, measure_sampling  # noqa: E402
from benchmarks.device_steps import (  # noqa: E402
    COMPILED,
    measure_compiled,
    measure_syncs,
    measure_training,
)  # fmt: skip

COLUMNS = (
    "of_peak is the share of the rate of bfloat16 matrix products; host_ms is what the host needs to issue a step, kernel_ms what "
    "the device needs for it."
)
# name -> what it measures, its share of the time, and its function; most important first
SECTIONS: dict[str, tuple[str, float, Section]] = {
    "facts": ("The card, the machine and the versions.", 5, describe_machine),
    "peaks": ("The rates that no step exceeds.", 8, measure_peaks),
    "tests": ("`pytest -m device`: the device computes what the CPU computes.", 55, run_tests),
    "training": (f"Steps of training, with batches on the device. {COLUMNS}", 90, measure_training),
    **{
        f"compiled {name}": (
            f"The same with trainer.compile=true. {COLUMNS}", 30, partial(measure_compiled, name=name)
        )
        for name in COMPILED
    },
    "syncs": (
        "Lines at which the host waits for the device, in 20 steps of which one is logged.",
        15,
        measure_syncs,
    ),
    "sampling": ("Encoding, decoding, and drawing codes.", 60, measure_sampling),
    "peers": (
        "Other libraries in the same bare loop of forward, backward and AdamW.", 35, measure_peers
    ),
    "runs": ("Both stages by train.py, on the built-in shapes.", 120, train_both_stages),
}  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all, a hard limit")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("runs/device"), help="a folder")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds anywhere")
    parser.add_argument(
        "--only", nargs="+", choices=sorted({name.split()[0] for name in SECTIONS}), help="these sections alone",
    )  # fmt: skip
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes} must be above 0")
    if (options.out / "device.json").exists():
        parser.error(f"--out {options.out} has a device.json already; give another folder")
    return options


def choose_start(report: Report, settings: dict[str, Any]) -> str:
    """How sections' processes start: by a fork, which imports nothing again, unless CUDA does not work in forks."""
    report.run_section("start", "Whether a forked process can use the device.", try_device,
                       settings, "fork", time.monotonic() + 60)  # fmt: skip
    works = any("error" not in row for row in report.rows.pop("start", []))
    del report.sections["start"]
    return "fork" if works else "spawn"


def try_device(bench: Any) -> None:
    """One row if the device computes."""
    bench.add("start", value=float(torch.ones(2, device=bench.device).sum()))


def main() -> None:
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    command = shlex.join(["python", "-m", "benchmarks.device", *sys.argv[1:]])
    report = Report(options.out, {"bench": "device", "device": device, "command": command})
    settings = {"device": device, "tiny": options.tiny, "out": options.out.resolve()}
    end = STARTED + 60 * options.minutes - RESERVE
    print(f"the imports took {time.monotonic() - STARTED:.0f} s", flush=True)
    start = choose_start(report, settings)
    names = [name for name in SECTIONS if not options.only or name.split()[0] in options.only]
    if options.tiny:  # a CPU compiles for minutes
        names = [name for name in names if not name.startswith("compiled")]
    shares = {name: SECTIONS[name][1] for name in names}
    for name in names:
        title, share, section = SECTIONS[name]
        now = time.monotonic()
        seconds = (end - now) * share / sum(shares.values())
        del shares[name]
        report.run_section(name, title, section, settings, start, now + seconds)
    print(f"{options.out / 'device.md'}: {time.monotonic() - STARTED:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
