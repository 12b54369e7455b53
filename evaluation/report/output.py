"""What a report writes besides its page: lines on the terminal and a table of all runs."""

import csv
from pathlib import Path
from typing import Any

from codegrid.engine.console import log_line
from codegrid.evaluation.report.groups import flatten_run
from codegrid.evaluation.report.read import ReportedRuns, rerun_command
from codegrid.evaluation.report.story import Story, format_count

MAX_PROBLEMS_LOGGED = 5


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
