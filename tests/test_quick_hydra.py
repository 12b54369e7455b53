"""The shortcuts of tests/helpers/quick_hydra.py change no config."""

from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import codegrid.engine.sweep  # noqa: F401  # registers the resolvers that sweeps need
from tests.helpers import quick_hydra

CONF = Path(__file__).parents[1] / "conf"

WORDS = [
    "",
    "stage=vqgan",
    "stage=vqgan experiment=demo_tokenizer data.batch_size=3 +note=x",
    "stage=prior prior=maskgit",
    "stage=prior experiment=demo_prior",
    "stage=vqgan quantizer=residual quantizer@quantizer.inner=fsq loss/perceptual=features",
    "stage=evaluate hydra/job_logging=none",
    "stage=vqgan experiment=grid_by_K",
]


def describe(words: str, with_hydra: bool = False) -> str:
    """The config of these words as text, or the error that they get."""
    try:
        return OmegaConf.to_yaml(compose("config", words.split(), return_hydra_config=with_hydra))
    except HydraException as error:
        return f"{type(error).__name__}: {error}"


def describe_both(words: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[str, str]:
    """With shortcuts, for the second time, and without."""
    describe(words, **settings)
    quick = describe(words, **settings)
    with monkeypatch.context() as patch:
        quick_hydra.restore_composition(patch)
        return quick, describe(words, **settings)


@pytest.mark.parametrize("words", WORDS)
def test_configs_are_those_of_hydra(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        quick, slow = describe_both(words, monkeypatch, with_hydra=True)
    assert quick == slow
    assert "hydra:" in quick


@pytest.mark.parametrize("words", ["quantizer=none_such", "model.widht=3", "stage=vqgan data=[a"])
def test_errors_are_those_of_hydra(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        quick, slow = describe_both(words, monkeypatch)
    assert quick == slow
    assert "Error" in quick or "Exception" in quick


def test_files_that_change_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "the second"):
        (tmp_path / "config.yaml").write_text(f"defaults: [_self_, part: it]\nroot: {value}\n")
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part/it.yaml").write_text(f"value: {value}\n")
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            quick, slow = describe_both("root=${part.value}x", monkeypatch)
        assert quick == slow
        assert value in quick


TEXTS = [
    "a: 1e-3\nb: 2026-01-01\nc: .5\nd: 1_0\ne: on\nf: 'ü, 写'\ng: 012\nh: 1:30\ni: ~",
    "a: [1,", "stage: [vqgan\n  x: }", "a: 1\na: 2", "\tx: 1", "", "a: \0", "a: [&x {b: 1}, *x]", "!!python/name:os.system",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_file", [True, False])
def test_yaml_is_read_as_omegaconf_reads_it(
    text: str, is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.yaml").write_text(text)

    def read() -> str:
        try:
            return repr(
                OmegaConf.load(tmp_path / "text.yaml") if is_file else OmegaConf.create(text)
            )
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            return f"{type(error).__name__}: {error}"

    quick = read()
    with monkeypatch.context() as patch:
        quick_hydra.restore_composition(patch)
        assert quick == read()


def test_points_of_a_sweep_are_those_of_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, with other settings for the second time, and with a config that each point changes."""

    def sweep(*words: str) -> list[str]:
        points: list[str] = []

        @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        def run(config: Any) -> None:
            config.seed += 7
            job = HydraConfig.get()
            words = list(job.overrides.task)
            points.append(f"{OmegaConf.to_yaml(config)}{words}{job.sweep.dir}{job.sweep.subdir}")

        monkeypatch.setattr("sys.argv", ["train.py", "-m", "seed=1,2", *words])
        run()
        return points

    monkeypatch.chdir(tmp_path)
    report = ["stage=report", "sweep=a"]
    lines = (report, [*report, "objective=psnr"], ["stage=report,export", "sweep=b"])
    quick = [sweep(*words) for words in lines]
    with monkeypatch.context() as patch:
        quick_hydra.restore_composition(patch)
        assert quick == [sweep(*words) for words in lines]
    assert [len(points) for points in quick] == [2, 2, 4]


def changed_configs_leave_no_trace(words: list[str]) -> bool:
    """Whether a config is the same after one of the same words has had all its leaves replaced."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        first = compose("config", words)
        before = OmegaConf.to_yaml(first)
        OmegaConf.set_struct(first, False)
        replace_leaves(first)
        return OmegaConf.to_yaml(compose("config", words)) == before


def replace_leaves(node: Any) -> None:
    """Zeros for all values, in place."""
    for key in list(node) if OmegaConf.is_dict(node) else range(len(node)):
        child = node._get_node(key)
        if OmegaConf.is_config(child) and not child._is_none() and not child._is_interpolation():
            replace_leaves(child)
        else:
            node[key] = 0


@pytest.mark.parametrize("words", WORDS[:4])
def test_a_config_that_is_changed_changes_no_later_one(words: str) -> None:
    assert changed_configs_leave_no_trace(words.split())


def test_a_reader_that_forgets_to_copy_the_root_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: files become the root of a config as they are, so that its changes stay."""
    monkeypatch.setattr(
        quick_hydra.ConfigLoaderImpl,
        "_embed_result_config",
        staticmethod(quick_hydra.embed_result_config),
    )
    monkeypatch.setattr(
        quick_hydra.ConfigRepository, "load_config", quick_hydra.FileReader().load_config
    )
    assert not changed_configs_leave_no_trace(["stage=vqgan"])
