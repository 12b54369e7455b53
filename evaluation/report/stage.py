"""stage=report: from run folders to one page."""

from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from codegrid.engine.run import Run
from codegrid.evaluation.report.figure import report_style
from codegrid.evaluation.report.groups import unify_starts
from codegrid.evaluation.report.output import log_story, write_runs_table
from codegrid.evaluation.report.page import render_page
from codegrid.evaluation.report.read import find_finished_runs, list_roots
from codegrid.evaluation.report.story import Story


def report(config: DictConfig) -> dict[str, Any] | None:
    """Read all run folders below `runs`; write report.html, its charts as PNG and its table as CSV."""
    with Run.open(config, resumes="has nothing to resume") as run:
        roots = list_roots(run.config.runs)
        reported = find_finished_runs(roots)
        unify_starts(reported.runs)
        name = Path(roots[0]).resolve().name
        if run.is_dry:
            return run.preview(name, f"report on {len(reported.runs)} runs in")
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
