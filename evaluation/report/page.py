"""A report's story as one HTML file that needs nothing beside it."""

import base64
import html
import io
import json
from datetime import datetime
from pathlib import Path

from PIL import Image

from evaluation.report.charts import Chart
from evaluation.report.read import ReportedRun, command
from evaluation.report.story import DAGGER, Cell, Section, Shown, Story, StoryTable, plural

HERE = Path(__file__).parent

WIDEST, HEAVIEST = (
    1400,
    300_000,
)  # pixels and bytes of a picture on the page; larger ones are made smaller

escape = html.escape


def page(story: Story, title: str, written: datetime) -> str:
    """The whole file."""
    found = story.found
    sections = [_section(section) for section in story.sections]
    if story.shown:
        body = "".join(_picture(shown) for shown in story.shown)
        sections.insert(
            max(0, len(sections) - 1),
            f'<section id="pictures"><h2>Pictures</h2><div class="grid">{body}</div></section>',
        )
    names = [(_id(section.title), section.title) for section in story.sections]
    names += [("pictures", "Pictures")] if story.shown else []
    names += [(table.name, table.title) for table in story.tables]
    links = "".join(
        f'<a href="#{name}">{escape(called)}</a>'
        for name, called in [*names, ("about", "About this report")]
    )
    unfinished = (
        f"; {plural(len(found.problems), 'folder')} could not be used, see the end"
        if found.problems
        else ""
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: report</title>
<link rel="icon" href="data:,">
<style>
{(HERE / "page.css").read_text()}</style>
</head>
<body>
<main>
<p class="kicker">Codegrid report</p>
<h1>{escape(title)}</h1>
<p class="meta">Written {written:%Y-%m-%d %H:%M} from {plural(len(found.runs), "finished run")}{unfinished}.</p>
<div class="head">{"".join(f"<p>{escape(sentence).replace(' ± ', '&nbsp;±&nbsp;')}</p>" for sentence in story.head)}</div>
<nav aria-label="Contents">{links}</nav>
{"".join(sections)}
{"".join(_table(table) for table in story.tables)}
{_about(story)}
</main>
<aside id="teller" hidden aria-live="polite"><div class="top"><pre></pre><button type="button" class="close">Close</button></div>
<div class="commands"></div></aside>
<script type="application/json" id="runs">{_runs(story)}</script>
<script>
{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def _id(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _section(section: Section) -> str:
    body = "".join(_figure(chart) for chart in section.charts)
    return f'<section id="{_id(section.title)}"><h2>{escape(section.title)}</h2><div class="grid">{body}</div></section>\n'


def _figure(chart: Chart) -> str:
    return f"<figure><h3>{escape(chart.title)}</h3>{chart.svg()}<figcaption>{escape(chart.caption)}</figcaption></figure>\n"


def _picture(shown: Shown) -> str:
    said = escape(shown.title)
    return f'<figure><h3>{said}</h3><img src="{embedded(shown.file)}" alt="{said}"></figure>\n'


def embedded(file: Path) -> str:
    """A picture as a data URI, made smaller where it is large."""
    raw = file.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        kind = (image.format or "png").lower()
        if image.width > WIDEST or len(raw) > HEAVIEST:
            small = image.convert("RGB")
            small.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
            made = io.BytesIO()
            small.save(made, "JPEG", quality=88)
            raw, kind = made.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def _table(table: StoryTable) -> str:
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button"><b>{escape(name)}</b><small>{escape(unit)}</small></button></th>'
        for name, unit in table.heads
    )
    rows = "".join(_row(cells, runs) for cells, runs in table.rows)
    return (
        f'<section id="{table.name}"><h2>{escape(table.title)}</h2>'
        f'<p class="quiet">{escape(table.words)} A click on a head sorts by it.</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead>\n{rows}</table></div></section>\n'
    )


def _row(cells: list[Cell], runs: list[ReportedRun]) -> str:
    first, *rest = cells
    told = [
        f'<td{_value(first)}><button type="button" class="open" aria-expanded="false">{escape(first.text)}</button></td>'
    ]
    told += [
        f"<td{_value(cell)}{' class=text' if isinstance(cell.value, str) else ''}>{escape(cell.text)}</td>"
        for cell in rest
    ]
    ids = escape(" ".join(run.id for run in runs))
    detail = f'<tr class="detail" hidden><td colspan="{len(cells)}"></td></tr>'
    return f'<tbody><tr data-runs="{ids}">{"".join(told)}</tr>{detail}</tbody>\n'


def _value(cell: Cell) -> str:
    return "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'


def _runs(story: Story) -> str:
    """What the page's script tells of each run; no tag in it can end the script."""
    found = {}
    for runs in (story.tokenizers, story.priors):
        for run in runs:
            found[run.id] = {"folder": str(run.folder), "git": run.git, "command": command(run)}
    return json.dumps(found).replace("<", "\\u003c")


def _about(story: Story) -> str:
    """How figures came about, what could not be used, and what to run for more."""
    revisions = sorted({run.git for run in story.found.runs if run.git})
    how = [
        "± and bars are half of a 95% confidence interval of the mean over seeds, by Student's t; of a single seed there is none.",
        "Runs are grouped by all of their settings but the seed.",
        "What stage=evaluate found counts before what the training run said of itself.",
        "Scores are put on one axis, and compared, only where they were measured alike.",
        *story.notes,
    ]
    if any(
        DAGGER in cell.text for table in story.tables for cells, _ in table.rows for cell in cells
    ):
        how.append(
            f"{DAGGER} in a table: measured otherwise than most of its column, so not to be compared with it."
        )
    if len(revisions) > 1:
        how.append(
            f"The runs are of {len(revisions)} revisions of the program: {', '.join(revisions)}."
        )
    said = f'<section id="about"><h2>About this report</h2>{_list(how)}'
    if story.missing:
        said += f"<h3>For more</h3>{_list(story.missing)}"
    if story.found.problems:
        problems = [f"{folder}: {why}" for folder, why in story.found.problems.items()]
        said += f"<h3>Folders that could not be used</h3>{_list(problems)}"
    return said + "</section>"


def _list(sentences: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"
