"""The commands that measure the tables, and stage=evaluate beside another checkout."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evaluating, tables
from benchmarks.bottlenecks import list_bottlenecks
from benchmarks.priors import PRIORS
from benchmarks.tables import (
    add_missing,
    count_steps,
    find_interval,
    find_timed,
    format_table,
    insert_table,
    list_keys,
    parse_options,
    read_rows,
    train_words,
)
from tests.helpers.configs import compose_config


def choose(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Any, list[dict[str, Any]]]:
    """The options of a command line, and the keys of its rows."""
    monkeypatch.setattr(sys, "argv", ["tables", *words])
    options, extra = parse_options()
    return options, list_keys(options, extra)


def make_row(key: Mapping[str, Any], **figures: float | None) -> dict[str, Any]:
    about = {
        "command": f"python train.py {key['arm']}",
        "steps": 4,
        "exact": True,
        "machine": "a machine",
    }
    columns = dict.fromkeys(tables.COLUMNS[key["table"]])
    return {**about, "figures": {**columns, **figures}}


def write_tokenizer(folder: Path, *more: str) -> None:
    """What a table of priors reads of a tokenizer's run."""
    (folder / "metrics.json").write_text('{"id": "abc"}')
    lines = ["data:", "  _target_: codegrid.data.shapes.Shapes", *(f"  {line}" for line in more)]
    (folder / "config.yaml").write_text("\n".join(lines))


def test_all_bottlenecks_see_as_many_images_of_the_same_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, keys = choose(
        monkeypatch, "bottlenecks", "--images", "1000", "--data", "photos", "model.width=32"
    )
    assert [key["arm"] for key in keys[: len(keys) // 3]] == list_bottlenecks()
    assert {key["seed"] for key in keys} == {0, 1, 2}
    for key in keys[: len(keys) // 3]:
        config = compose_config(*train_words(key, options, count_steps(key))[1:])
        assert config.trainer.max_steps == math.ceil(1000 / config.data.batch_size)
        assert config.trainer.max_minutes is None
        assert (config.data.root, config.data.seed, config.seed) == ("photos", 0, 0)
        assert (config.model.grid, config.model.width, config.data.image_size) == (8, 32, 64)


def test_all_priors_see_as_many_images_of_one_tokenizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, "root: pictures/photos")
    options, keys = choose(
        monkeypatch, "priors", "--ckpt", str(tmp_path), "--images", "640", "--seeds", "5"
    )
    assert [key["arm"] for key in keys] == list(PRIORS)
    assert {(key["tokenizer"], key["seed"], key["data"]) for key in keys} == {("abc", 5, "photos")}
    for key in keys:
        config = compose_config(*train_words(key, options, count_steps(key))[1:])
        assert (config.trainer.max_steps, config.batch_size, config.seed) == (10, 64, 5)


def test_a_table_of_priors_needs_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--ckpt"):
        choose(monkeypatch, "priors")


def test_a_row_that_is_in_the_file_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The third run is interrupted, and a kill cuts the last line off."""
    file = tmp_path / "rows.jsonl"
    _, keys = choose(monkeypatch, "bottlenecks", "--only", "ema", "fsq", "--seeds", "0", "1")
    measured = []

    def measure(key: Mapping[str, Any]) -> dict[str, Any]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append((key["arm"], key["seed"]))
        return make_row(key, psnr=20.0)

    with pytest.raises(KeyboardInterrupt):
        add_missing(file, keys, measure)
    assert measured == [("ema", 0), ("fsq", 0)]
    with file.open("a") as lines:
        lines.write('{"table": "bott')
    measured.clear()
    rows = add_missing(file, keys, measure)
    assert measured == [("ema", 1), ("fsq", 1)]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (key["arm"], key["seed"]) for key in keys
    ]
    assert read_rows(file) == rows

    _, others = choose(
        monkeypatch, "bottlenecks", "--only", "ema", "--seeds", "0", "--images", "64"
    )
    measured.clear()
    add_missing(file, others, measure)
    assert measured == [("ema", 0)], "rows of other images are others"

    line = ["bottlenecks", "--only", "ema", "--seeds", "0", "--evaluate", "samples=10"]
    _, judged = choose(monkeypatch, *line)
    add_missing(file, judged, measure)
    assert len(measured) == 2, "rows that were judged otherwise are others"


def test_commands_are_listed_by_what_they_have_in_common() -> None:
    commands = [
        "python train.py data=shapes quantizer=vq seed=0",
        "python train.py data=shapes quantizer=kl K=8 seed=0",
    ]
    lines = tables.format_commands(commands)
    assert lines == [
        "    python train.py data=shapes seed=0 ...",
        "        quantizer=vq",
        "        quantizer=kl K=8",
    ]
    assert tables.format_commands(commands[:1]) == [f"    {commands[0]}"]


def test_a_table_of_one_seed_says_that_it_has_no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    _, keys = choose(monkeypatch, "bottlenecks", "--only", "ema", "--seeds", "0")
    table = format_table([{**key, **make_row(key, psnr=20.0)} for key in keys], {})
    assert "seed 0 alone, so without intervals" in table
    assert "±" not in table


def test_a_figure_that_is_no_number_is_none() -> None:
    assert tables.round_figure(math.nan) is None
    assert tables.round_figure(12.345678) == 12.346


def test_a_table_has_means_over_seeds_with_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    _, keys = choose(monkeypatch, "bottlenecks", "--only", "ema", "kl", "--images", "128")
    values = {"ema": (19.0, 20.0, 21.0), "kl": (24.0, 24.0, 24.0)}
    rows = [
        {
            **key,
            **make_row(
                key,
                psnr=values[key["arm"]][key["seed"]],
                usage=1.0 if key["arm"] == "ema" else None,
            ),
        }
        for key in keys
    ]
    lines = format_table(rows, {}).splitlines()
    assert lines[0].startswith("| `quantizer=` | PSNR dB | SSIM |")
    assert lines[2].split(" | ")[:2] == ["| ema", "20.00 ± 2.48"]
    assert lines[3].split(" | ")[:2] == ["| kl", "24.00 ± 0.00"]
    assert "1.000 ± 0.000" in lines[2]
    assert "1.000" not in lines[3]
    assert "128 images (4 updates), seeds 0, 1, 2" in lines[5]
    assert lines[-3:] == ["    python train.py ...", "        ema", "        kl"]


def test_the_time_of_a_step_is_the_difference_of_two_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each run takes 7 seconds to start, and 0.25 a step. Rows of other settings have speeds of their own."""
    file = tmp_path / "rows.jsonl"
    line = ["bottlenecks", "--only", "ema", "kl"]
    options, keys = choose(monkeypatch, *line, "--speed", "--evaluate", "probe=0")

    def train_run(command: list[str], run: Path) -> Path:
        [steps] = [int(word.split("=")[1]) for word in command if "max_steps=" in word]
        run.mkdir(parents=True)
        (run / "metrics.json").write_text(json.dumps({"seconds": 7 + steps * 0.25, "steps": steps}))
        return run

    monkeypatch.setattr(tables, "train_run", train_run)
    timed = add_missing(file, keys, lambda key: tables.time_row(key, options))
    assert [row["figures"] for row in timed] == [{"ms_per_step": 250.0}] * 2
    _, trained = choose(monkeypatch, *line, "--seeds", "0")
    rows = [{**key, **make_row(key, psnr=20.0)} for key in trained]
    lines = format_table(rows, find_timed(timed, rows[0])).splitlines()
    assert lines[0].split(" | ")[7] == "ms a step"
    assert lines[2].split(" | ")[7] == "250"
    _, others = choose(monkeypatch, *line, "--data", "shapes", "model.width=32")
    assert find_timed(timed, others[0]) == {}


def test_an_interval_is_students() -> None:
    """t of 2 degrees of freedom is 4.303 at 97.5 %, by any table."""
    mean, half = find_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert find_interval([1.5]) == (1.5, None)


def test_a_bound_is_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    _, keys = choose(
        monkeypatch, "priors", "--ckpt", str(tmp_path), "--only", "gpt", "maskgit", "--seeds", "0"
    )
    rows = [
        {**key, **make_row(key, nats_per_token=3.0), "exact": key["arm"] == "gpt"} for key in keys
    ]
    lines = format_table(rows, {}).splitlines()
    assert lines[2].startswith("| gpt | 3.000 |")
    assert lines[3].startswith("| maskgit | at most 3.000 |")


def test_a_table_replaces_the_one_between_its_marks_and_nothing_else() -> None:
    page = insert_table("# Tables\n\nText.\n", "priors, shapes", "| old |")
    page = insert_table(page, "bottlenecks, shapes", "| other |")
    page = insert_table(page, "priors, shapes", "| new |")
    assert page == (
        "# Tables\n\nText.\n\n<!-- table: priors, shapes -->\n\n| new |\n\n<!-- end -->\n\n"
        "<!-- table: bottlenecks, shapes -->\n\n| other |\n\n<!-- end -->\n"
    )


def test_evaluations_of_two_checkouts_are_compared_in_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other takes twice as long, and has another PSNR."""
    commands = []

    def run_command(checkout: Path, words: list[str]) -> dict[str, float]:
        other = checkout == tmp_path
        named = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        commands.append((other, Path(named["ckpt"]).name, words))
        run = Path(named["run_dir"])
        run.mkdir(parents=True)
        scores = {
            "psnr": 20.5 if other else 20.0,
            "ssim": 0.5,
            "provenance": {"psnr": {}, "ssim": {}},
        }
        (run / "metrics.json").write_text(json.dumps(scores))
        return {"seconds": 20.0 if other else 10.0, "cpu_seconds": 1.0, "peak_mib": 100}

    monkeypatch.setattr(evaluating, "run_command", run_command)
    runs = ["--tokenizer", "tok", "--prior", "pri"]
    line = ["show=3", "--other", str(tmp_path), *runs, "--rounds", "2", "--here", "probe=0"]
    monkeypatch.setattr(sys, "argv", ["evaluating", *line])
    evaluating.main()
    text = capsys.readouterr().out
    assert "| tokenizer, again, seconds | 10 | 20 | 0.500 | s |" in text
    assert "first" not in text.split("\n| ")[-1]
    assert "tokenizer: psnr: 20.0, 20.5" in text
    rows = [json.loads(row) for row in text.splitlines() if row.startswith("{")]
    assert [(row["of"], row["checkout"]) for row in rows] == [
        ("tokenizer", "this"), ("tokenizer", "other"), ("prior", "this"), ("prior", "other"),
        ("tokenizer", "other"), ("tokenizer", "this"), ("prior", "other"), ("prior", "this"),
    ]  # fmt: skip
    for other, _, words in commands:
        assert ("probe=0" in words) == (not other)
        assert "show=3" in words
