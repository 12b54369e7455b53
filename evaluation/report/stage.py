"""stage=report: from run folders to one page."""

import csv
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from engine.console import log_line
from engine.errors import InputError
from engine.run import Run
from evaluation.report.figure import report_style
from evaluation.report.groups import flatten_run
from evaluation.report.page import render_page
from evaluation.report.read import ReportedRuns, find_runs, rerun_command
from evaluation.report.story import Story, format_count

MAX_PROBLEMS_LOGGED = 5


def report(config: DictConfig) -> dict[str, Any] | None:
    """Read all run folders below `runs`; write report.html, its charts as PNG and its table as CSV."""
    with Run.open(config, resumes="has nothing to resume") as run:
        roots = list_roots(run.config.runs)
        reported = find_finished_runs(roots)
        name = Path(roots[0]).resolve().name
        story = Story(reported)
        folder = run.start(name)
        charts = [chart for section in story.sections for chart in section.charts]
        (folder / "charts").mkdir()
        with report_style():
            for chart in charts:
                chart.png(folder / "charts" / f"{chart.name}.png")
            (folder / "report.html").write_text(render_page(story, name, datetime.now()))
        write_runs_table(reported, folder / "runs.csv")
        result = {
            "run": str(folder),
            "report": str(folder / "report.html"),
            "table": str(folder / "runs.csv"),
            "runs": len(reported.runs),
            "configurations": len(story.of_tokenizers) + len(story.of_priors),
            "evaluated": sum(run.evaluated for run in reported.runs),
            "unused": {str(path): reason for path, reason in reported.problems.items()},
            "charts": [str(folder / "charts" / f"{chart.name}.png") for chart in charts],
            "head": story.head,
        }
        log_story(story, result)
        return run.finish(result)


def list_roots(runs: Any) -> list[str]:
    """The folders that `runs` names."""
    if not runs:
        raise InputError(
            "stage=report needs the runs to report on; add runs=<a run folder, or one that has some below>"
        )
    return [str(root) for root in runs] if isinstance(runs, list | ListConfig) else [str(runs)]


def find_finished_runs(roots: list[str]) -> ReportedRuns:
    """The runs below `roots`; InputError if there is none."""
    reported = find_runs(roots)
    if not reported.runs:
        problems = [f"; {folder} is {reason}" for folder, reason in reported.problems.items()]
        raise InputError(
            f"runs={','.join(roots)} has no finished run of stage=vqgan or stage=prior{''.join(problems[:1])}; train one first"
        )
    return reported


def log_story(story: Story, result: dict[str, Any]) -> None:
    """Log the head of the report, the unusable folders and where the report is."""
    lines = list(story.head)
    problems = list(result["unused"].items())
    for path, reason in problems[:MAX_PROBLEMS_LOGGED]:
        lines.append(f"left out: {path}: {reason}")
    more = len(problems) - MAX_PROBLEMS_LOGGED
    if more > 0:
        lines.append(f"left out: {format_count(more, 'more folder')}; the report lists all of them")
    lines.append(f"report on {format_count(result['runs'], 'run')}: {result['report']}")
    log_line("\n".join(lines))


def write_runs_table(reported: ReportedRuns, file: Path) -> None:
    """Write all runs with their settings, figures, folder and command as CSV."""
    rows = [
        {
            "run": str(run.folder),
            "id": run.id,
            "stage": run.stage,
            "seed": run.seed,
            "evaluated": run.evaluated,
            **run.figures,
            **{f"config.{key}": value for key, value in flatten_run(run).items()},
            "tokenizer": run.metrics.get("tokenizer_of"),
            "git": run.git,
            "command": rerun_command(run),
        }
        for run in reported.runs
    ]
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
