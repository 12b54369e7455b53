"""stage=report, from run folders to one page."""

import csv
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from engine.console import log_line
from engine.errors import InputError
from engine.run import Run
from evaluation.report.charts import style
from evaluation.report.groups import flat
from evaluation.report.page import page
from evaluation.report.read import ReportedRuns, command, find_runs
from evaluation.report.story import Story, plural


def report(config: DictConfig) -> dict[str, Any] | None:
    """Read all run folders below `runs`; write report.html, its charts as PNG and its table as CSV."""
    if not config.runs:
        raise InputError(
            "stage=report needs the runs to report on; add runs=<a run folder, or one that has some below>"
        )
    if config.resume:
        raise InputError(f"stage=report has nothing to resume; leave resume={config.resume} out")
    roots = (
        [str(root) for root in config.runs]
        if isinstance(config.runs, ListConfig)
        else [str(config.runs)]
    )
    found = find_runs(roots)
    if not found.runs:
        why = next((f"; {folder} is {reason}" for folder, reason in found.problems.items()), "")
        raise InputError(
            f"runs={','.join(roots)} has no finished run of stage=vqgan or stage=prior{why}; train one first"
        )
    name = Path(roots[0]).resolve().name
    story = Story(found)
    run = Run.open(config)
    folder = run.start(name)
    (folder / "charts").mkdir()
    drawn = [chart for section in story.sections for chart in section.charts]
    with style():
        for chart in drawn:
            chart.png(folder / "charts" / f"{chart.name}.png")
        (folder / "report.html").write_text(page(story, name, datetime.now()))
    write_runs_table(found, folder / "runs.csv")
    result = {
        "run": str(folder),
        "report": str(folder / "report.html"),
        "table": str(folder / "runs.csv"),
        "runs": len(found.runs),
        "configurations": len(story.of_tokenizers) + len(story.of_priors),
        "evaluated": sum(run.evaluated for run in found.runs),
        "unused": {str(where): why for where, why in found.problems.items()},
        "charts": [str(folder / "charts" / f"{chart.name}.png") for chart in drawn],
        "head": story.head,
    }
    log_story(story, result)
    return run.finish(result)


def log_story(story: Story, result: dict[str, Any]) -> None:
    """What was found, on the terminal."""
    lines = [
        *story.head,
        *(f"left out: {where}: {why}" for where, why in list(result["unused"].items())[:5]),
    ]
    if (more := len(result["unused"]) - 5) > 0:
        lines.append(f"left out: {plural(more, 'more folder')}; the report names them all")
    log_line(
        "\n".join([*lines, f"the report of {plural(result['runs'], 'run')}: {result['report']}"])
    )


def write_runs_table(found: ReportedRuns, file: Path) -> None:
    """All runs and all that is known of them: settings, figures, folder, command."""
    rows = [
        {
            "run": str(run.folder),
            "id": run.id,
            "stage": run.stage,
            "seed": run.seed,
            "evaluated": run.evaluated,
            **run.figures,
            **{f"config.{key}": value for key, value in flat(run).items()},
            "tokenizer": run.metrics.get("tokenizer_of"),
            "git": run.git,
            "command": command(run),
        }
        for run in found.runs
    ]
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
