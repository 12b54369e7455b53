"""The rows of benchmarks.device: each section measures in a process of its own, and what it sends is printed and saved at once."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESERVE = 2.0  # seconds at the end that no section gets: for the last rewrite of the files
LONGEST_SENTENCE = 300


@dataclass
class Bench:
    """What a section measures on, and where its rows go."""

    device: str
    tiny: bool
    out: Path
    deadline: float  # of the section, time.monotonic()
    facts: (
        Row  # what earlier sections measured: peak_tflops, copy_gb_per_second, flops of a step ...
    )
    connection: Connection

    @property
    def left(self) -> float:
        """Seconds until the section is cut off."""
        return self.deadline - time.monotonic()

    def add(self, name: str, **figures: Any) -> None:
        """Send a row, which the other process prints and saves."""
        self.connection.send(("row", {"name": name, **figures}))

    def remember(self, **facts: Any) -> None:
        """Facts for the sections that follow, which are saved too."""
        self.facts |= facts
        self.connection.send(("facts", facts))

    def write(self, title: str, text: str) -> None:
        """Append a text to profile.txt."""
        self.connection.send(("text", f"== {title}\n{text}\n"))

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Inside, an exception becomes a row with its sentence, and the section continues."""
        try:
            yield
        except Exception as error:
            self.add(name, error=describe_error(error))
        finally:
            gc.collect()  # a trainer and its module refer to each other
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time_calls(self, run: Callable[[], Any], seconds: float, most: int = 1000) -> float:
        """Seconds of a call: the mean over as many calls as fit into `seconds`, after three that warm up."""
        for _ in range(1 if self.tiny else 3):
            run()
        self.synchronize()
        began = time.perf_counter()
        run()
        self.synchronize()
        once = time.perf_counter() - began
        n = max(1, min(most, int(seconds / max(once, 1e-6))))
        began = time.perf_counter()
        for _ in range(n):
            run()
        self.synchronize()
        return (time.perf_counter() - began) / n


Section = Callable[[Bench], None]


def describe_error(error: BaseException) -> str:
    """An exception as one sentence, with the line of this program that it came from."""
    lines = (str(error).strip() or "no message").splitlines()
    root = str(Path(__file__).parents[1])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    where = ""
    if frames:
        where = f" ({os.path.relpath(frames[-1].filename, root)}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {' '.join(lines)[:LONGEST_SENTENCE]}{where}"


def work(section: Section, bench: Bench) -> None:
    """The process of a section, with a group of its own, so that it ends together with what it starts."""
    os.setsid()
    try:
        section(bench)
    except Exception as error:
        bench.add("section", error=describe_error(error))
        bench.write("traceback", traceback.format_exc())
    bench.connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not by way of handlers that other libraries left for the end of a process


@dataclass
class Report:
    """All rows so far, in the folder `out` as device.json, device.md and profile.txt."""

    out: Path
    head: Row
    sections: dict[str, Row] = field(default_factory=dict)  # name -> seconds and how it ended
    rows: dict[str, list[Row]] = field(default_factory=dict)
    facts: Row = field(default_factory=dict)

    def receive(self, section: str, kind: str, content: Any) -> None:
        """A message of a section: a row is printed, and all files are written again."""
        if kind == "row":
            self.rows.setdefault(section, []).append(content)
            print(f"{section} | {format_row(content)}", flush=True)
        elif kind == "facts":
            self.facts |= content
        else:
            with (self.out / "profile.txt").open("a") as file:
                file.write(content)
        self.save()

    def save(self) -> None:
        """Write device.json and device.md."""
        whole = {**self.head, "facts": self.facts, "sections": self.sections, "rows": self.rows}
        replace_text(self.out / "device.json", json.dumps(whole, indent=1, default=str) + "\n")
        replace_text(self.out / "device.md", self.format_page())

    def format_page(self) -> str:
        """The page: a table for each section, and below it what failed."""
        card = self.facts.get("card", self.head["device"])
        lines = [f"# {card}", "", f"`{self.head['command']}`", ""]
        for section, about in self.sections.items():
            rows = self.rows.get(section, [])
            lines += [f"## {section}", "", f"{about['title']} {about['state']}", ""]
            sound = [row for row in rows if "error" not in row]
            if sound:
                lines += [*format_table(sound), ""]
            failed = [row for row in rows if "error" in row]
            lines += [f"* {row['name']}: {row['error']}" for row in failed]
            lines += [""] if failed else []
        return "\n".join(lines)

    def run_section(
        self, name: str, title: str, section: Section, bench_settings: Row, start: str, end: float
    ) -> None:
        """Run one section in a process of its own until `end`, time.monotonic(), and then stop it."""
        began = time.monotonic()
        about = self.sections[name] = {"title": title, "state": "Running."}
        if end - began < 1:
            about["state"] = "Not run: no time was left."
            print(f"{name} | not run: no time was left", flush=True)
            self.save()
            return
        print(f"{name} | {end - began:.0f} s at most", flush=True)
        context: Any = multiprocessing.get_context(start)
        receiving, sending = context.Pipe(False)
        bench = Bench(deadline=end - 0.5, facts=self.facts, connection=sending, **bench_settings)
        process = context.Process(target=work, args=(section, bench))
        process.start()
        sending.close()
        try:
            ended = self.listen(name, receiving, end)
        finally:
            stop_group(process.pid)
            process.join(5)
        seconds = time.monotonic() - began
        about["seconds"] = round(seconds, 1)
        about["state"] = f"{seconds:.0f} s."
        if not ended:
            about["state"] = f"Cut off after {seconds:.0f} s."
            print(f"{name} | cut off after {seconds:.0f} s", flush=True)
        elif process.exitcode not in (0, -signal.SIGKILL):
            about["state"] = f"Its process ended with {process.exitcode} after {seconds:.0f} s."
            print(f"{name} | its process ended with {process.exitcode}", flush=True)
        self.save()

    def listen(self, section: str, receiving: Connection, end: float) -> bool:
        """Take what a section sends until it has ended or `end` has come; whether it has ended."""
        while (left := end - time.monotonic()) > 0:
            if not receiving.poll(min(left, 1)):
                continue
            try:
                message = receiving.recv()
            except EOFError:
                return True
            self.receive(section, *message)
        return False


def stop_group(pid: int | None) -> None:
    """End a section's process and all that it started."""
    if pid is None:
        return
    for stop in (lambda: os.killpg(pid, signal.SIGKILL), lambda: os.kill(pid, signal.SIGKILL)):
        try:
            stop()
        except (ProcessLookupError, PermissionError):  # it has ended, or leads no group yet
            continue


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_suffix(f"{file.suffix}.part")
    part.write_text(text)
    part.replace(file)


def format_figure(value: Any) -> str:
    """A figure with three or four significant digits, anything else as it is."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def format_row(row: Mapping[str, Any]) -> str:
    """A row as a line of a log."""
    figures = [f"{key} {format_figure(value)}" for key, value in row.items() if key != "name"]
    return f"{row['name']}: " + ", ".join(figures)


def format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table with all columns that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [format_figure(row.get(column)).replace("|", "\\|") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
