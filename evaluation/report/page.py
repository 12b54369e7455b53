"""A report's story as one HTML file that needs no other files."""

import base64
import io
from datetime import datetime
from pathlib import Path

from PIL import Image

from codegrid.engine.templates import render_template
from codegrid.evaluation.report.read import rerun_command
from codegrid.evaluation.report.story import DAGGER, Story, format_count
from codegrid.evaluation.scores import write_range

PAGE_TEMPLATE = Path(__file__).with_name("page.html.j2")

# Larger pictures are scaled down.
MAX_PICTURE_WIDTH = 1400  # pixels
MAX_PICTURE_SIZE = 300_000  # bytes


def render_page(story: Story, title: str, written: datetime) -> str:
    """The whole file."""
    runs = (*story.tokenizers, *story.priors)
    problems = story.reported.problems
    folders = format_count(len(problems), "folder")
    return render_template(
        PAGE_TEMPLATE,
        escape=True,
        filters={"anchor": make_anchor},
        story=story,
        title=title,
        css=PAGE_TEMPLATE.with_name("page.css").read_text(),
        script=PAGE_TEMPLATE.with_name("page.js").read_text(),
        written=f"{written:%Y-%m-%d %H:%M}",
        counted=format_count(len(story.reported.runs), "finished run"),
        unusable=f"; {folders} could not be used, see the end" if problems else "",
        contents=list_contents(story),
        pictures=[
            {
                "title": shown.title,
                "source": inline_image(shown.file),
                "caption": shown.caption,
            }
            for shown in story.shown
        ],
        about=explain(story),
        problems=[f"{folder}: {reason}" for folder, reason in problems.items()],
        runs={
            run.id: {"folder": str(run.folder), "git": run.git, "command": rerun_command(run)}
            for run in runs
        },
    )


def make_anchor(title: str) -> str:
    """The id of a section."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def list_contents(story: Story) -> list[tuple[str, str]]:
    """The ids and names of the page's parts."""
    contents = [(make_anchor(section.title), section.title) for section in story.sections]
    if story.shown:
        contents.append(("pictures", "Pictures"))
    contents += [(table.name, table.title) for table in story.tables]
    return [*contents, ("about", "About this report")]


def inline_image(file: Path) -> str:
    """A picture as a data URI, scaled down if it is large."""
    raw = file.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        kind = (image.format or "png").lower()
        if image.width > MAX_PICTURE_WIDTH or len(raw) > MAX_PICTURE_SIZE:
            small = image.convert("RGB")
            small.thumbnail((MAX_PICTURE_WIDTH, 4 * MAX_PICTURE_WIDTH), Image.Resampling.LANCZOS)
            jpeg = io.BytesIO()
            small.save(jpeg, "JPEG", quality=88)
            raw = jpeg.getvalue()
            kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def describe_ranges(story: Story) -> list[str]:
    """Which range of pixels PSNR and other scores of pixels refer to; several sentences if runs differ."""
    alike: dict[str, int] = {}
    for run in story.tokenizers:
        if about := run.provenance.get("psnr"):
            stated = f"{write_range(about['range'])} in {about['depth']} bits"
            alike[stated] = alike.get(stated, 0) + 1
    names = "PSNR, SSIM, L1 and L2"
    if len(alike) == 1:
        return [f"{names} refer to the range {next(iter(alike))} a channel."]
    return [
        f"{names} of {format_count(n, 'tokenizer')} refer to the range {stated} a channel."
        for stated, n in alike.items()
    ]


def explain(story: Story) -> list[str]:
    """How the figures of the report came about."""
    sentences = [
        "± and bars are half of a 95% confidence interval of the mean over seeds, by Student's t; a single seed has none.",
        "Differences between configurations are paired by seed: they are taken within each seed, and ± is that of their mean. "
        "What a seed does to all configurations alike cancels, so two of them can differ clearly though their intervals overlap.",
        "Runs are grouped by all of their settings except the seed.",
        "Results of stage=evaluate override those of the training run.",
        "Scores share an axis, and are compared, only if they were measured in the same way.",
        *describe_ranges(story),
        *story.notes,
    ]
    cells = [cell for table in story.tables for row, _ in table.rows for cell in row]
    if any(DAGGER in cell.text for cell in cells):
        sentences.append(
            f"{DAGGER} in a table: measured differently from most of its column, so not comparable with it."
        )
    revisions = sorted({run.git for run in story.reported.runs if run.git})
    if len(revisions) > 1:
        sentences.append(
            f"The runs come from {len(revisions)} revisions of the program: {', '.join(revisions)}."
        )
    return sentences
