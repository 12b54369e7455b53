"""Sweeps as a user types them; tests that need no training replace the run by one that takes no time."""

import errno
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, SoftFileLock
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from codegrid.engine import sweep
from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.errors import InputError
from codegrid.engine.folder import append_record, write_config, write_metrics
from codegrid.engine.run import Run
from tests.helpers.commands import TINY, launch, start
from tests.helpers.configs import compose_config

Command = Callable[..., int]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:.*logging on a CPU",
    "ignore:.*batch_size.*ambiguous",
)
ROOT = Path(__file__).parent.parent
ONE = ["-m", "stage=vqgan", "sweep=mine"]
TWO = [*ONE, "seed=0,1"]


class Played:
    """A run of stage=vqgan that writes its folder, a checkpoint and metrics without training; `ends` maps seeds to exceptions."""

    def __init__(self) -> None:
        self.configs: list[DictConfig] = []
        self.ends: dict[int, BaseException] = {}
        self.checkpoint = True

    def __call__(self, config: DictConfig) -> dict[str, Any]:
        with Run.open(config) as run:
            folder = run.start("played")
            self.configs.append(run.config)
            if self.checkpoint:
                save_atomically({}, folder / "checkpoints/last.ckpt")
            if config.seed in self.ends:
                raise self.ends[config.seed]
            metrics = {"run": str(folder), "id": run.config.id, "psnr": 20.0 + config.seed}
            result = run.finish(metrics)
        assert result is not None
        return result

    @property
    def names(self) -> list[str]:
        return [Path(config.run_dir).name for config in self.configs]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr("vqgan.stages.train.train_tokenizer", played)
    return played


def config_of(*words: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(words), return_hydra_config=True)


@pytest.mark.parametrize(
    ("experiment", "words", "n"),
    [
        ("grid_by_K", [], 3 * 5 * 3),
        ("grid_by_K", ["model.grid=4,8", "seed=0", "trainer.max_steps=300"], 2 * 5),
        ("K_by_width", [], 4 * 4 * 3),
        ("K_by_width", ["quantizer.dim=8"], 4 * 3),
    ],
)
def test_an_experiment_holds_its_sweep_and_the_command_line_wins(
    experiment: str, words: list[str], n: int
) -> None:
    params = config_of(f"experiment={experiment}").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides(
        [*(f"{key}={value}" for key, value in params.items()), *words]
    )
    [points] = BasicSweeper.split_arguments(overrides, None)
    assert len({tuple(point) for point in points}) == len(points) == n
    assert all(point.count(word) == 1 for point in points for word in words if "," not in word)
    assert all(
        config_of(f"experiment={experiment}", *point).stage == "vqgan" for point in points[:2]
    )


def test_the_names_of_folders_tell_the_points_apart(command: Command, played: Played) -> None:
    assert (
        command(
            "experiment=grid_by_K",
            "model.grid=8",
            "quantizer.K=64,512",
            "seed=0",
            "trainer.max_steps=300",
        )
        == 0
    )
    assert played.names == [
        "0_model.grid-8_quantizer.K-64_seed-0",
        "1_model.grid-8_quantizer.K-512_seed-0",
    ]
    assert {str(Path(config.run_dir).parent) for config in played.configs} == {
        "runs/sweeps/grid_by_K"
    }
    assert [
        (config.model.grid, config.quantizer.K, config.trainer.max_steps)
        for config in played.configs
    ] == [
        (8, 64, 300),
        (8, 512, 300),
    ]


@pytest.mark.slow
def test_the_whole_of_grid_by_K_is_one_short_command(command: Command, played: Played) -> None:
    assert command("-m", "experiment=grid_by_K") == 0
    assert len(set(played.names)) == 45
    assert {(config.model.grid, config.quantizer.K, config.seed) for config in played.configs} == {
        (grid, K, seed)
        for grid in (4, 8, 16)
        for K in (64, 128, 256, 512, 1024)
        for seed in (0, 1, 2)
    }


def test_a_sweeps_folder_is_named_by_itself_its_experiment_or_the_moment() -> None:
    assert sweep.name_sweep("mine", "grid_by_K") == "mine"
    assert sweep.name_sweep(None, "grid_by_K") == "grid_by_K"
    assert sweep.name_sweep(None, None).startswith("20")
    assert sweep.name_sweep(None, "grid_by_K,K_by_width").startswith("20")


def test_a_list_is_no_sweep_and_a_param_is_always_in_the_name() -> None:
    words = ["logger=[csv,wandb]", "seed=0", "quantizer.K=64,128", "optimizer.lr=interval(0.1,1)"]
    assert sweep.find_swept_keys({"seed": "0,1,2"}, words) == [
        "seed",
        "quantizer.K",
        "optimizer.lr",
    ]


def test_long_names_are_cut_and_still_differ(tmp_path: Path) -> None:
    words = [[f"model.{'x' * 150}={i}"] for i in range(2)]
    one, two = (sweep.name_point(str(tmp_path), 0, word, [word[0].split("=")[0]]) for word in words)
    assert len(one) == len(two) < 140
    assert one != two


def test_a_name_of_many_bytes_is_cut_between_letters(tmp_path: Path) -> None:
    word = f"data.root={'写真ä' * 40}"
    name = sweep.name_point(str(tmp_path), 0, [word], ["data.root"])
    assert len(name.encode()) < 140
    (tmp_path / f"{name}.txt").touch()


def test_values_of_a_sweep_are_taken_as_they_are_typed(command: Command, played: Played) -> None:
    roots = ["data.root=/data/Füße (1),/data/x=1,'/data/a, b'", "data=folder"]
    words = ["stage=vqgan", *roots, "-m", "sweep=mein Lauf (1), #2", "logger.csv.name=2024"]
    assert command(*words) == 0
    assert [config.data.root for config in played.configs] == [
        "/data/Füße (1)",
        "/data/x=1",
        "/data/a, b",
    ]
    assert {str(Path(config.run_dir).parent) for config in played.configs} == {
        "runs/sweeps/mein Lauf (1), #2"
    }
    assert {config.logger.csv.name for config in played.configs} == {"2024"}
    assert command(*words) == 0
    assert len(played.configs) == 3, "the same command finds its points again"


@pytest.mark.parametrize("name", ["7", "true", "2024_11_28", "1e3", "0"])
def test_a_sweep_may_have_a_name_that_looks_like_a_number(
    command: Command, played: Played, name: str
) -> None:
    assert command("-m", "stage=vqgan", "seed=0", f"sweep={name}") == 0
    assert Path(f"runs/sweeps/{name}/multirun.yaml").is_file()


def test_home_is_expanded_in_the_folder_of_a_sweep(
    command: Command, played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home (1)"))
    assert command("-m", "stage=vqgan", "seed=0,1", "hydra.sweep.dir=~/typed") == 0
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweep:\n    dir: ~/written\n"
    )
    assert command("stage=vqgan", "experiment=own", "seed=0,1", "--config-dir", "mine") == 0
    for folder in ("typed", "written"):
        points = sorted(path.name for path in (tmp_path / "home (1)" / folder).glob("[0-9]*"))
        assert points == ["0_seed-0", "1_seed-1"]
    assert not Path("~").exists()


def test_a_study_that_optuna_can_not_keep_is_refused_in_one_sentence(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.engine.sweep.version", lambda name: "2.0.4")
    words = ["experiment=optuna_tokenizer", "hydra.sweeper.storage=sqlite:///my study.db"]
    assert command("-m", *words) == 2
    assert "needs SQLAlchemy below 2, and 2.0.4 is installed" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert not Path("my study.db").exists()
    assert sweep.explain_storage(None) is None
    monkeypatch.setattr("codegrid.engine.sweep.version", lambda name: "1.4.54")
    assert sweep.explain_storage("sqlite:///my study.db") is None


def test_a_sweep_started_again_skips_what_is_finished(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    command(*TWO)
    capsys.readouterr()
    assert command(*TWO) == 0
    assert len(played.configs) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"runs/sweeps/mine/{name}: finished before" for name in played.names
    ]


def test_a_sweep_with_more_values_runs_the_new_points_only(
    command: Command, played: Played
) -> None:
    command(*TWO)
    assert command(*ONE, "seed=3,0,1") == 0
    assert played.names == ["0_seed-0", "1_seed-1", "0_seed-3"]


def test_a_dry_run_skips_nothing_and_does_not_say_so(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    played.ends = {0: ValueError("the disk is full")}
    for _ in range(2):
        assert command(*TWO, "dry_run=true") == 2
        errors = capsys.readouterr().err
        assert "1 point(s) failed; a dry run keeps nothing" in errors
        assert "skips" not in errors
    assert len(played.names) == 4


def test_a_point_that_failed_is_reported_and_run_again(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    played.ends = {0: ValueError("the disk is full")}
    assert command(*TWO) == 2
    assert played.names == ["0_seed-0", "1_seed-1"], "the others are made"
    errors = capsys.readouterr().err
    assert "1 point(s) failed; the same command runs them again and skips" in errors
    assert "0_seed-0: ValueError: the disk is full" in errors
    assert "Traceback" in (tmp_path / "runs/sweeps/mine/failed/0_seed-0.txt").read_text()
    played.ends = {}
    assert command(*TWO) == 0
    assert played.names[2:] == ["0_seed-0"]
    assert not list((tmp_path / "runs/sweeps/mine/failed").iterdir())


def test_failures_of_earlier_starts_do_not_fail_this_one(command: Command, played: Played) -> None:
    played.ends = {1: ValueError("the disk is full")}
    assert command(*TWO) == 2
    assert command(*ONE, "seed=0,2") == 0
    assert Path("runs/sweeps/mine/failed/1_seed-1.txt").is_file()


def test_a_point_that_broke_off_is_resumed(command: Command, played: Played) -> None:
    played.ends = {1: ValueError("the power failed")}
    command(*TWO, "quantizer.K=64")
    played.ends = {}
    assert command(*TWO, "quantizer.K=64") == 0
    first, again = played.configs[1:]
    assert again.resume == first.run_dir == "runs/sweeps/mine/1_seed-1"
    assert again.id == first.id


def test_a_point_that_broke_off_before_its_first_checkpoint_is_started_again(
    command: Command, played: Played
) -> None:
    played.ends, played.checkpoint = {1: ValueError("the power failed")}, False
    command(*ONE, "seed=1,2")
    played.ends = {}
    assert command(*ONE, "seed=1,2") == 0
    first, _, again = played.configs
    assert (again.resume, again.run_dir) == (None, first.run_dir)
    assert again.id != first.id
    assert OmegaConf.load("runs/sweeps/mine/.0_seed-1-1/config.yaml").id == first.id, "kept aside"


def test_a_point_that_was_killed_before_its_config_was_written_is_started_again(
    command: Command, played: Played
) -> None:
    folder = Path("runs/sweeps/mine/0_seed-1")
    folder.mkdir(parents=True)
    (folder / "record.jsonl").touch()
    assert command(*ONE, "seed=1,2") == 0
    assert played.names == ["0_seed-1", "1_seed-2"]
    assert Path("runs/sweeps/mine/.0_seed-1-1/record.jsonl").exists()


def test_a_folder_of_somebody_elses_files_is_left_alone(command: Command, played: Played) -> None:
    folder = Path("runs/sweeps/mine/0_seed-1")
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert command(*ONE, "seed=1,2") == 2
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    assert played.names == ["1_seed-2"]


@pytest.mark.parametrize(
    ("file", "number"),
    [(".locks", errno.EROFS), (".locks", errno.EACCES), ("mine", errno.ENOSPC)],
)
def test_a_sweep_whose_folder_can_not_be_written_is_one_sentence(
    command: Command,
    played: Played,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    number: int,
) -> None:
    make = Path.mkdir

    def refuse(self: Path, *arguments: Any, **settings: Any) -> None:
        if self.name == file:
            raise OSError(number, os.strerror(number))
        make(self, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert command(*TWO) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: can't write the sweep's folder runs/sweeps/mine")
    assert "sweep=..." in line
    assert not played.configs


def test_an_error_that_can_not_be_written_down_is_counted(
    command: Command,
    played: Played,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = Path.write_text

    def refuse(self: Path, text: str, *arguments: Any) -> int:
        if self.parent.name == "failed":
            self.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, *arguments)

    monkeypatch.setattr(Path, "write_text", refuse)
    played.ends = {1: ValueError("the power failed")}
    assert command(*TWO) == 2
    printed = capsys.readouterr().err
    assert "the power failed" in printed
    assert "1_seed-1: its error could not be written" in printed


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks"), OSError(errno.ENOSYS, "none")]
)
def test_points_have_locks_on_any_file_system(
    command: Command, played: Played, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("codegrid.engine.locks.FileLock.acquire", refuse)
    locks = Path("runs/sweeps/mine/.locks")
    locks.mkdir(parents=True)
    with SoftFileLock(locks / "0_seed-0.held.lock"):
        assert command(*TWO) == 0
    assert played.names == ["1_seed-1"]


def test_a_point_with_another_config_is_refused_in_one_sentence(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    command(*TWO)
    before = Path("runs/sweeps/mine/0_seed-0/config.yaml").read_text()
    capsys.readouterr()
    assert command(*TWO, "trainer.max_steps=7") == 2
    assert (
        "error: runs/sweeps/mine/0_seed-0 holds a run with trainer.max_steps=20000, and this one has trainer.max_steps=7; "
        "name another folder with sweep=..." in capsys.readouterr().err
    )
    assert len(played.configs) == 2
    assert Path("runs/sweeps/mine/0_seed-0/config.yaml").read_text() == before


def folder_config(**data: Any) -> DictConfig:
    config = OmegaConf.create(
        {"seed": 0, "data": {"_target_": "codegrid.data.folder.Folder", "n_val": 4}}
    )
    config.data.update(data)
    return config


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"split_seed": 0, "split_at": None}, {"split_seed": 0, "split_at": 0.25}),
        ({"split_seed": 0, "split_at": 0.25}, {"split_seed": 0, "split_at": 0.25}),
        ({"split_seed": None, "split_at": None}, {}),
        ({"split_seed": 1, "split_at": None}, {"split_seed": 1, "split_at": "cats/7.png"}),
    ],
)
def test_what_the_images_of_a_run_decided_is_no_difference(
    mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert sweep.config_difference(folder_config(**mine), folder_config(**theirs)) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "key"),
    [
        ({"split_seed": 0, "split_at": None}, {}, "data.split_seed"),
        ({"split_seed": 0, "split_at": 0.5}, {"split_seed": 0, "split_at": 0.25}, "data.split_at"),
        ({"split_seed": 1}, {"split_seed": 0}, "data.split_seed"),
        ({"n_val": None}, {}, "data.n_val"),
    ],
)
def test_another_split_is_a_difference(
    mine: dict[str, Any], theirs: dict[str, Any], key: str
) -> None:
    differs = sweep.config_difference(folder_config(**mine), folder_config(**theirs))
    assert differs
    assert differs[0] == key


def test_a_sweep_goes_on_where_things_have_moved(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "cache_dir=elsewhere",
        "data.num_workers=1",
        "data.cache=ram",
        "trainer.accelerator=cpu",
        "logger=csv",
    ]
    played.ends = {1: ValueError("the power failed")}
    command(*TWO)
    played.ends = {}
    capsys.readouterr()
    assert command(*TWO, *words) == 0
    printed = capsys.readouterr().err
    assert "runs/sweeps/mine/0_seed-0: finished before" in printed
    assert "runs/sweeps/mine/1_seed-1: resumes" in printed
    for word in words:
        key, value = word.split("=")
        resumed = OmegaConf.select(played.configs[-1], key)
        assert str(resumed) == value or list(resumed) == [value], word


def test_a_swept_place_is_what_a_point_is(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = [*ONE, "data=folder", "data.n_val=1"]
    assert command(*line, "data.root=a,b") == 0
    assert played.names == ["0_data.root-a", "1_data.root-b"]
    Path("runs/sweeps/mine/1_data.root-b").rename("runs/sweeps/mine/1_data.root-c")
    assert command(*line, "data.root=a,c") == 2
    assert "holds a run with data.root=b, and this one has data.root=c" in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False])
def test_a_moved_checkpoint_is_known_by_its_run(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, same: bool
) -> None:
    for name, run_id in (("before", "a1"), ("now", "a1" if same else "b2")):
        header = make_header("vqgan", {"id": run_id})
        save_atomically({"codegrid": header}, tmp_path / name / "checkpoints/last.ckpt")
    folder = tmp_path / "point"
    folder.mkdir()
    config = compose_config("stage=evaluate", f"ckpt={tmp_path / 'before'}")
    write_config(folder, OmegaConf.to_yaml(config, resolve=True))
    append_record(folder, {"of": "a1"}, None)
    write_metrics(folder, {"run": str(folder), "picture": f"{folder}/pictures/a.png"})
    config.ckpt = str(tmp_path / "now")
    moved = folder.rename(tmp_path / "elsewhere")
    if same:
        figures = sweep.run_once(lambda _: None, config, moved)
        assert figures == {"run": str(moved), "picture": f"{moved}/pictures/a.png"}
    else:
        with pytest.raises(
            InputError, match="holds a run with ckpt=.*before, and this one has ckpt=.*now"
        ):
            sweep.run_once(lambda _: None, config, moved)


@pytest.mark.parametrize("word", ["run_dir=elsewhere", "resume=elsewhere", "trainer.devices=2"])
def test_settings_of_single_runs_are_refused(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert command(*ONE, "seed=0", word) == 2
    assert f"error: {word} " in capsys.readouterr().err
    assert not played.configs


def test_ctrl_c_stops_the_sweep(command: Command, played: Played) -> None:
    played.ends = {1: KeyboardInterrupt()}
    assert command(*ONE, "seed=0,1,2") == 130
    assert played.names == ["0_seed-0", "1_seed-1"]


@pytest.mark.parametrize(("stop", "code"), [(SystemExit(), 143), (SystemExit(1), 1)])
def test_the_end_of_the_process_is_the_end_of_the_sweep_and_no_success(
    command: Command, played: Played, stop: SystemExit, code: int
) -> None:
    played.ends = {1: stop}
    assert command(*ONE, "seed=0,1,2") == code
    assert played.names == ["0_seed-0", "1_seed-1"]
    assert command("stage=vqgan", "seed=1") == code, "nor is that of a single run"


def test_a_point_that_another_process_is_running_is_skipped(
    command: Command, played: Played, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    locks = tmp_path / "runs/sweeps/mine/.locks"
    locks.mkdir(parents=True)
    with FileLock(locks / "0_seed-0"):
        assert command(*TWO) == 0
    assert played.names == ["1_seed-1"]
    assert (
        "runs/sweeps/mine/0_seed-0: skipped, another process is running it"
        in capsys.readouterr().err
    )


def test_an_objective_must_be_a_figure() -> None:
    figures = {"run": "x", "psnr": 20, "alarms": []}
    assert sweep.read_objective(figures, "psnr") == 20.0
    assert sweep.read_objective(figures, None) is None
    with pytest.raises(ValueError, match="objective=pnsr is not a metric of x; there is psnr"):
        sweep.read_objective(figures, "pnsr")


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"psnr": None, "absent": {"psnr": "each image is blank"}}, "each image is blank"),
        ({"psnr": math.inf}, "it is infinite"),  # of an earlier version
        ({"psnr": math.nan, "ssim": 0.5}, "it is no number (NaN)"),
    ],
)
def test_an_objective_that_is_no_number_is_refused_with_the_reason(
    figures: dict[str, Any], reason: str
) -> None:
    message = re.escape(f"objective=psnr of x can't be compared: {reason}")
    with pytest.raises(InputError, match=message):
        sweep.read_objective({"run": "x", **figures}, "psnr")


@pytest.mark.parametrize(
    ("group", "option", "extra"),
    [
        ("launcher", "joblib", "joblib"),
        ("launcher", "submitit_slurm", "submitit"),
        ("sweeper", "optuna", "optuna"),
    ],
)
def test_a_missing_plugin_gets_the_command_that_installs_it(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    option: str,
    extra: str,
) -> None:
    command("--help")  # finds all plugins
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][group], f"{option}.yaml")
    capsys.readouterr()
    assert command("-m", "stage=vqgan", "seed=0,1", f"hydra/{group}={option}") == 2
    assert capsys.readouterr().err.splitlines() == [
        f'error: hydra/{group}={option} needs a plugin of Hydra that is not installed; pip install "codegrid[{extra}]"'
    ]


def test_gpus_are_shared_out_by_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    taken, processes = [], []
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
        monkeypatch.setattr(sweep, "_slots", [])
        sweep.claim_gpu()
        sweep.claim_gpu()  # its next job
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
        processes.append(sweep._slots)
    assert taken == ["4", "GPU-5", "4"]
    for [slot] in processes:
        slot.release()


def test_joblib_runs_one_point_per_gpu_at_once_unless_n_jobs_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    for jobs, used in ((-1, 3), (5, 5)):
        launcher = {"_target_": "joblib", "n_jobs": jobs}
        config = OmegaConf.create({"dry_run": False, "hydra": {"launcher": launcher}})
        sweep.Sweep(str(tmp_path), []).on_multirun_start(config)
        assert config.hydra.launcher.n_jobs == used


# Real runs.


def words(*more: str) -> list[str]:
    return [*ONE, "loss=vqvae", *TINY, *more]


def results() -> dict[str, dict[str, Any]]:
    return {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(Path("runs/sweeps/mine").glob("*/metrics.json"))
    }


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_sweep_that_a_signal_ended_is_continued_to_the_same_result(
    how: signal.Signals, code: int
) -> None:
    more = [
        "quantizer.K=8,16,32",
        "trainer.max_steps=60",
        "trainer.val_every=30",
        "trainer.precision=32-true",
    ]
    process = start(*words(*more))
    second = Path("runs/sweeps/mine/1_quantizer.K-16")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (second / "checkpoints/last.ckpt").is_file():
        time.sleep(0.005)
    process.send_signal(how)
    assert process.wait() == code
    assert list(results()) == ["0_quantizer.K-8"], "it was to be ended in its second point"
    done = launch(*words(*more))
    assert done.returncode == 0, done.stderr
    assert "0_quantizer.K-8: finished before" in done.stderr
    assert "1_quantizer.K-16: resumes" in done.stderr
    assert len((second / "record.jsonl").read_text().splitlines()) == 2
    ended = results()
    Path("runs/sweeps/mine").rename("runs/sweeps/ended")
    assert launch(*words(*more)).returncode == 0
    for name, whole in results().items():
        assert ended[name]["steps"] == whole["steps"] == 60
        assert {key: ended[name][key] for key in ("psnr", "perplexity")} == {
            key: whole[key] for key in ("psnr", "perplexity")
        }


@pytest.mark.slow
def test_a_finished_point_without_figures_gets_them(command: Command) -> None:
    line = [*ONE, "loss=vqvae", *TINY, "quantizer.K=8,16"]
    command(*line)
    before = results()
    Path("runs/sweeps/mine/1_quantizer.K-16/metrics.json").unlink()
    assert command(*line) == 0
    again = results()["1_quantizer.K-16"]
    of_the_process = {"pictures": [], "memory_gib": None}
    assert again | of_the_process == before["1_quantizer.K-16"] | of_the_process


@pytest.mark.slow
@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_points_in_processes_of_their_own_fail_and_are_run_again(launcher: str) -> None:
    more = [
        f"hydra/launcher={launcher}",
        "model.grid=4,5,2",
        *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []),
    ]
    done = launch(*words(*more))
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.count("5: error: data.image_size=16 is not model.grid=5 times one whole number")
        == 1
    )
    assert list(results()) == ["0_model.grid-4", "2_model.grid-2"]
    line = json.loads(Path("runs/sweeps/mine/2_model.grid-2/record.jsonl").read_text())["command"]
    assert line.startswith("train.py ")
    assert "model.grid=2" in line.split()
    done = launch(*words(*more[:1], "model.grid=4,2,8", *more[2:]))
    assert done.returncode == 0, done.stderr
    assert list(results()) == ["0_model.grid-4", "2_model.grid-2", "2_model.grid-8"]
    assert (
        len(Path("runs/sweeps/mine/0_model.grid-4/record.jsonl").read_text().splitlines()) == 1
    ), "skipped"


@pytest.mark.slow
@pytest.mark.usefixtures("empty")
def test_optuna_optimises_the_objective_and_continues_its_study() -> None:
    line = ["experiment=optuna_tokenizer", "hydra.sweeper.sampler.n_startup_trials=1"]
    assert launch(*words(*line, "hydra.sweeper.n_trials=2")).returncode == 0
    first = results()
    assert len(first) == 2
    done = launch(*words(*line, "hydra.sweeper.n_trials=3"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished before") == 2
    assert len(results()) == 3
    assert all(results()[name] == metrics for name, metrics in first.items())
    best: Any = OmegaConf.load("runs/sweeps/mine/optimization_results.yaml")
    assert best.best_value == max(metrics["psnr"] for metrics in results().values())
    assert all(metrics["pruned_at"] is None for metrics in results().values()), (
        "too few to compare with"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("empty")
def test_optuna_ends_with_a_sentence_if_all_points_fail_and_their_folders_stay() -> None:
    more = ["experiment=optuna_tokenizer", "optimizer.lr=1e30", "schedule.warmup=0"]
    done = launch(*words(*more, "hydra.sweeper.n_trials=2"))
    assert done.returncode == 2
    assert not re.search("Traceback|Failed|No trials", done.stderr)
    *failed, last = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert [text[:43] for text in failed] == ["error: the loss or its gradient is no numbe"] * 2
    assert last.startswith(
        "error: Optuna found nothing because no point of the sweep was completed; failed/ in the sweep's folder"
    )
    assert done.stderr.splitlines()[-1] == last
    folder = Path("runs/sweeps/mine")
    assert (
        len(list(folder.glob("[01]_*/card.md"))) == len(list(folder.glob("failed/[01]_*.txt"))) == 2
    )


@pytest.mark.slow
def test_a_sweep_ends_points_that_do_worse_than_the_others(command: Command) -> None:
    rates = "optimizer.lr=1e-3,2e-3,3e-3,50"  # the last is far too high
    line = [
        *ONE,
        "loss=vqvae",
        rates,
        "callbacks/prune=psnr",
        "callbacks.prune.least=2",
        "callbacks.average=null",
        *TINY,
    ]
    assert command(*line, "trainer.val_every=1", "schedule.warmup=0", "trainer.max_steps=8") == 0
    metrics = results()
    assert metrics["3_optimizer.lr-50"]["pruned_at"] == metrics["3_optimizer.lr-50"]["steps"] == 2
    assert metrics["0_optimizer.lr-0.001"]["pruned_at"] is None
