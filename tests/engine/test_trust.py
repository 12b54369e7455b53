"""A checkpoint or run folder from somebody else can't execute code, read secrets or leave its folder."""

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from codegrid.engine.checkpoint import build_trusted, save_atomically
from codegrid.engine.choices import CHECKPOINT_GROUPS, route_choices
from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from codegrid.engine.trust import OTHERS, Trust, admit, check_trusted, settle_trust
from codegrid.engine.version import FORMAT, VERSION, Stamp
from tests.helpers.commands import TINY, TINY_PRIOR, Command, lightning_warnings, read_mistake
from tests.helpers.configs import ROOT, compose_config, compose_plain
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA as EMAQuantizer

pytestmark = lightning_warnings

EMA = compose_plain("stage=vqgan", "quantizer=ema", "quantizer.K=8", "quantizer.dim=4")["quantizer"]

EVIL = [
    "os.system",
    "torch.load",
    "builtins.eval",
    "vqganx.Evil",
    "codegrid.engine.run.subprocess.run",  # a name that a module only imports
    "codegrid.engine.run.os.system",
    "codegrid.engine.run.subprocess",
    "codegrid.data.decode.Image",
    "codegrid.engine.checkpoint.nn.Module",
    "codegrid.engine.checkpoint.save_atomically",  # a function, which would write a file
    "vqgan.quantizers.ema.EMA.lookup",  # an attribute of a class
    "vqgan.quantizers.ema.EMA.__init__.__globals__",
    "vqgan.quantizers.vq.Codebook",  # a class of ours, but not by the module that defines it
    "vqgan..ema.EMA",
    "vqgan",
    "",
    "${oc.env:HOME}",
    7,
]


@pytest.mark.parametrize("target", EVIL)
def test_a_checkpoints_config_builds_only_classes_that_this_project_defines(target: Any) -> None:
    for config in (
        {**EMA, "inner": {"_target_": target}},
        {**EMA, "a": [[{"_target_": target}]]},
        {"_target_": target},
    ):
        with pytest.raises(InputError, match="don't trust the file"):
            build_trusted(config, Quantizer)  # type: ignore[type-abstract]


@pytest.mark.parametrize("key", ["_args_", "_recursive_", "_mode_"])
def test_a_checkpoints_config_can_not_change_how_it_is_built(key: str) -> None:
    with pytest.raises(InputError, match=f"says {key}"):
        build_trusted({**EMA, key: ["x"]} if key == "_mode_" else {**EMA, key: "x"}, Quantizer)  # type: ignore[type-abstract]


def test_a_checkpoints_config_can_not_read_this_machines_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "8")
    with pytest.raises(InputError, match="asks for something else on this machine"):
        build_trusted({**EMA, "K": "${oc.env:SECRET}"}, Quantizer)  # type: ignore[type-abstract]


def test_a_checkpoints_config_builds_only_the_expected_kind_of_class() -> None:
    with pytest.raises(
        InputError,
        match=r"has vqgan.quantizers.ema.EMA, which is not derived from .*Linear; derive",
    ):
        build_trusted(EMA, nn.Linear)
    assert build_trusted(EMA, Quantizer).K == 8  # type: ignore[type-abstract]


def test_every_trusted_name_of_another_package_exists() -> None:
    from hydra.utils import get_object

    assert all(callable(get_object(target)) for target in OTHERS)


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.slow
def test_no_stage_executes_a_pickle(command: Command, tmp_path: Path) -> None:
    command("stage=vqgan", *TINY)
    command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR)
    executed = tmp_path / "executed"
    for file in Path("runs").rglob("*.ckpt"):
        content = torch.load(file, weights_only=True)
        torch.save({**content, "more": Malicious(executed)}, file)
    metrics = Path("runs/vqgan/shapes/metrics.json").read_bytes()
    for line in (
        ["stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR],
        ["stage=extract", "ckpt=runs/vqgan/shapes", "accelerator=cpu"],
        ["stage=evaluate", "ckpt=runs/vqgan/shapes", "accelerator=cpu"],
        ["stage=sample", "ckpt=runs/prior/shapes", "accelerator=cpu"],
        ["stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9"],
        ["stage=prior", "resume=runs/prior/shapes", "trainer.max_steps=9"],
    ):
        try:
            assert command(*line) != 0, line
        except (InputError, pickle.UnpicklingError):
            assert any(word.startswith("resume=") for word in line)
        assert not executed.exists(), line
    assert Path("runs/vqgan/shapes/metrics.json").read_bytes() == metrics


@pytest.mark.slow
def test_a_cache_with_a_pickle_in_it_is_rebuilt(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", *TINY)
    [images] = Path("cache").glob("shapes-val-*")
    evil = np.empty(1, object)
    evil[0] = Malicious(tmp_path / "executed")
    for file in images.glob("*.npy"):
        np.save(file, evil, allow_pickle=True)
    capsys.readouterr()
    assert command("stage=vqgan", *TINY, "name=again") == 0
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_run_folder_of_somebody_else_is_resumed_without_executing_its_code(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("stage=vqgan", *TINY)
    file = Path("runs/vqgan/shapes/config.yaml")
    original = OmegaConf.load(file)
    for change in (
        {
            "callbacks": {
                "evil": {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "executed")}
            }
        },
        {
            "callbacks": {
                "evil": {
                    "_target_": "codegrid.engine.run.subprocess.run",
                    "args": ["touch", "executed"],
                }
            }
        },
        {"optimizer": {"_target_": "os.mkdir", "path": "executed"}},
        {"logger": {"csv": {"_target_": "torch.utils.tensorboard.SummaryWriter"}}},
        {"data": {"_args_": ["executed"]}},
        {"run": "os.system"},
        {"name": "${oc.env:HOME}"},
    ):
        OmegaConf.save(OmegaConf.merge(original, change), file)
        capsys.readouterr()
        assert command("stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9") != 0
        assert "don't trust the file" in read_mistake(capsys)
        assert not Path("executed").exists()
    OmegaConf.save(original, file)
    assert command("stage=vqgan", "resume=runs/vqgan/shapes", "trainer.max_steps=9") == 0


def test_an_optimizer_of_the_users_own_is_trusted_if_the_command_names_it_again() -> None:
    config = {"optimizer": {"_target_": "my.optimizers.Lion", "_partial_": True}}
    with pytest.raises(InputError, match=r"asks for my.optimizers.Lion"):
        check_trusted(config, "x/config.yaml", OTHERS)
    check_trusted(config, "x/config.yaml", OTHERS | {"my.optimizers.Lion"})


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "a/b"])
def test_the_name_of_a_run_can_not_lead_out_of_its_folder(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for line in (
        ["stage=vqgan", f"name={name}", *TINY],
        ["-m", "stage=vqgan", f"sweep={name}", "quantizer.K=8,16", *TINY],
    ):
        assert command(*line) != 0
        assert "must be the name of one folder below runs/" in read_mistake(capsys)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == []


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_into_a_run_folder(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = {
        "WANDB_API_KEY": "deadbeef" * 5,
        "HF_TOKEN": "hf_verysecrettoken",
        "AWS_SECRET_ACCESS_KEY": "awsverysecret",
    }
    for name, value in {**secrets, "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    words = [word for word in TINY if not word.startswith("logger")]
    assert command("stage=vqgan", *words, "logger=[wandb,csv]") == 0
    assert (
        command(
            "stage=prior",
            "ckpt=runs/vqgan/shapes",
            *(w for w in TINY_PRIOR if not w.startswith("logger")),
        )
        == 0
    )
    files = [
        file for file in (*Path("runs").rglob("*"), *Path("cache").rglob("*")) if file.is_file()
    ]
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        content = file.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], file


def test_a_file_with_a_pickle_is_no_checkpoint(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    save_atomically({"codegrid": Malicious(tmp_path / "executed")}, tmp_path / "x.ckpt")
    assert command("stage=evaluate", "ckpt=x.ckpt", "accelerator=cpu") == 2
    assert "asks for getattr" in (sentence := read_mistake(capsys))
    assert sentence.endswith("don't trust the file")
    assert not (tmp_path / "executed").exists()


MINE = ["mydata.Mine", "my.lab.nets.Decoder", "lion_pytorch.Lion"]


@pytest.mark.parametrize("target", MINE)
def test_a_class_of_ones_own_is_admitted_by_its_name_and_by_no_other(target: str) -> None:
    config = {"data": {"_target_": target, "inner": {"_target_": EMA["_target_"]}}}
    check_trusted(config, "x", {target})
    with pytest.raises(InputError, match=rf"asks for {target}.* add trust=\[{target}\], else"):
        check_trusted(config, "x", {f"{target}2", target.rpartition(".")[0]})


def test_all_classes_that_have_to_be_admitted_are_named_at_once() -> None:
    config = {"a": {"_target_": MINE[0]}, "b": [{"_target_": MINE[1]}, {"_target_": "os.system"}]}
    with pytest.raises(InputError, match=r"add trust=\[my\.lab\.nets\.Decoder,mydata\.Mine\]"):
        check_trusted(config, "x")


@pytest.mark.parametrize(
    "target",
    ["os.system", "pathlib.Path.touch", "torch.load", "subprocess.Popen", "numpy.load", "Mine"],
)
def test_no_sentence_advises_to_trust_functions_or_python_itself(target: str) -> None:
    with pytest.raises(InputError) as refusal:
        check_trusted({"_target_": target}, "x")
    assert "trust=" not in str(refusal.value)
    assert "don't trust the file" in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trust=[mydata.Mine]"], {"mydata.Mine"}),
        (["trust=mydata.Mine"], {"mydata.Mine"}),
        (["trust=[a.B,c.d.E]"], {"a.B", "c.d.E"}),
        (["trust=null"], set()),
        ([], set()),
        (["optimizer._target_=my.Lion"], {"my.Lion"}),
    ],
)
def test_a_command_trusts_what_it_names(words: list[str], expected: set[str]) -> None:
    assert Trust.read(compose_config("stage=vqgan", *words)).names == expected


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("trust=[Mine]", "trust=Mine must be the full name of a class"),
        ("trust=[7]", "trust=7 must be the full name"),
        ("trust=true", "trust=True must be the full name"),
        ("trust=['my data.Mine']", "trust=my data.Mine must be the full name"),
        ("trust=[os.system]", "trust=os.system is part of Python itself"),
        ("trust=[subprocess.Popen]", "is part of Python itself"),
    ],
)
def test_what_is_no_name_of_a_class_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Run.open(compose_config("stage=vqgan", word))


def test_names_are_admitted_inside_of_a_run_alone() -> None:
    class Mine(EMAQuantizer):
        pass

    name = f"{__name__}.Mine"
    globals()["Mine"] = Mine
    Mine.__qualname__ = "Mine"
    with admit(Trust(frozenset({name}))):
        assert type(build_trusted({**EMA, "_target_": name}, Quantizer)) is Mine  # type: ignore[type-abstract]
        with pytest.raises(InputError, match="not derived from .*Linear"):
            build_trusted({**EMA, "_target_": name}, nn.Linear)
    with pytest.raises(InputError, match="is not part of Codegrid"):
        build_trusted({**EMA, "_target_": name}, Quantizer)  # type: ignore[type-abstract]


def test_a_class_that_only_another_version_has_is_not_mistrusted() -> None:
    config = {"loss": {"gate": {"_target_": "vqgan.losses.adversarial.Gate"}}}
    with pytest.raises(InputError, match="written by Codegrid 0.1 or earlier.*has no vqgan.losses"):
        check_trusted(config, "x", stamp=Stamp())
    for stamp in (None, Stamp(VERSION, FORMAT)):
        with pytest.raises(InputError, match="does not have.*else don't trust the file"):
            check_trusted(config, "x", stamp=stamp)


@pytest.mark.parametrize(
    "target", ["codegrid.engine.run.OmegaConf", "os.system", "vqgan.load.load_tokenizer"]
)
def test_the_version_in_a_file_excuses_nothing_else(target: str) -> None:
    with pytest.raises(InputError, match="is not part of Codegrid; don't trust the file"):
        check_trusted({"_target_": target}, "x", stamp=Stamp("0.1.0", 1))


def test_every_stage_with_a_place_for_a_choice_is_routed_there() -> None:
    places = {}
    for file in (ROOT / "conf" / "stage").glob("*.yaml"):
        if groups := re.findall(r"^  - /(\w+)@own\.\1: null", file.read_text(), re.MULTILINE):
            places[file.stem] = set(groups)
    assert places == {stage: set(groups) for stage, groups in CHECKPOINT_GROUPS.items()}


def test_a_later_stage_takes_a_choice_again_for_trust_alone() -> None:
    words = route_choices(["stage=prior", "ckpt=a", "data=folder", "prior=gpt", "data.root=b"])
    assert words == ["stage=prior", "ckpt=a", "data@own.data=folder", "prior=gpt", "data.root=b"]
    config = compose_config(*words)
    trust = Trust.read(config)
    assert trust.choices == {"data": "codegrid.data.folder.Folder"}
    trust.check_choice("data", "codegrid.data.folder.Folder")
    trust.check_choice("quantizer", "vqgan.quantizers.ema.EMA")
    with pytest.raises(
        InputError, match="chooses codegrid.data.folder.Folder for data, and the checkpoint has"
    ):
        trust.check_choice("data", "codegrid.data.shapes.Shapes")
    settled = settle_trust(config, trust)
    assert settled.data.root == "b"
    assert settled.trust == []
    assert "own" not in settled


@pytest.mark.parametrize("stage", ["vqgan", "pipeline", "report"])
def test_the_choices_of_a_stage_that_makes_them_stay(stage: str) -> None:
    words = [f"stage={stage}", "data=folder", "quantizer=ema", "prior=gpt"]
    assert route_choices(words) == words


@pytest.mark.parametrize("stage", ["sample", "evaluate"])
def test_every_group_of_a_checkpoint_can_be_chosen_again(stage: str) -> None:
    words = [f"stage={stage}", "data=shapes", "model=conv", "quantizer=fsq", "prior=maskgit"]
    assert set(Trust.read(compose_config(*route_choices(words))).choices) == {
        "data", "encoder", "decoder", "quantizer", "prior",
    }  # fmt: skip
