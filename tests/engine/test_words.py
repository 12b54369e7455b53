"""What a user types is what a setting becomes, and what the program prints can be pasted into a shell."""

import random
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from codegrid.engine.errors import InputError
from codegrid.engine.words import (
    OPTIONS,
    arrange_words,
    format_word,
    parse_word,
    prepare_words,
    quote_word,
)

LETTERS = "ab7Füß写 é'\"()[]{},=:#&!;<>|*?$%^`~\\/.+-@_\t\n"


def read_value(word: str, multirun: bool = False) -> Any:
    """What Hydra and OmegaConf make of a word."""
    override = parse_word(quote_word(word, multirun))
    assert override is not None, word
    assert not override.is_sweep_override(), word
    return OmegaConf.create({"value": override.value()}).value


def read_sweep(word: str) -> list[Any]:
    override = parse_word(quote_word(word, multirun=True))
    assert override is not None, word
    assert override.is_sweep_override(), word
    return [getattr(value, "text", value) for value in override.value().list]  # type: ignore[union-attr]


def random_texts(n: int) -> list[str]:
    stream = random.Random(0)
    return ["".join(stream.choices(LETTERS, k=stream.randint(1, 12))) for _ in range(n)]


@pytest.mark.parametrize(
    "text",
    [
        "/data/Füße/photos",
        "/data/my photos (2024)",
        "/data/cats, dogs, birds",
        "/data/lr=0.1",
        "/data/#1",
        "R&D",
        "wow!",
        "it's",
        'the "best"',
        "写真/猫",
        "photos(1)",
        "choice(a)",
        "[2024] photos",
        "a{b}c",
        "back\\slash",
        "50%^2",
        "semi;colon",
        "a|b>c<d",
        "tick`s",
        "line\nbreak",
        "a,b",
        "1, 2",
        "(a",
        "a)",
        "x: y",
    ],
)
def test_a_text_is_taken_as_it_is_typed(text: str) -> None:
    assert read_value(f"data.root={text}") == text


@pytest.mark.parametrize(
    "text",
    ["7", "007", "1e3", "2024_11_28", "1_000", "true", "-5", "+3", "inf", "nan", "0x10"],
)
def test_a_text_that_looks_like_a_number_stays_as_it_is_typed(text: str) -> None:
    for key in (
        "name",
        "run_dir",
        "sweep",
        "data.root",
        "logger.wandb.project",
        "evaluate.features",
    ):
        assert read_value(f"{key}={text}") == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("quantizer.K=512", 512),
        ("optimizer.lr=1e-3", 1e-3),
        ("data.flip=false", False),
        ("name=null", None),
        ("name='a, b'", "a, b"),
        ('name="7"', "7"),
        ("name=str(7)", "7"),
        ("data.root=my\\ photos", "my photos"),
        ("save=[grid,png]", ["grid", "png"]),
        ("trainer.devices=[0,1]", [0, 1]),
        ("label=[1,2]", [1, 2]),
        ("data.files={train: a.tar, validation: b.tar}", {"train": "a.tar", "validation": "b.tar"}),
        ("resume=false", False),
        ("x=", ""),
    ],
)
def test_what_hydra_reads_rightly_stays(word: str, value: Any) -> None:
    assert quote_word(word, multirun=False) == word
    assert read_value(word) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("a.npz", "a.npz"),
        ("my samples (1), K=512.npz", "my samples (1), K=512.npz"),
        ("2024_11/07.npz", "2024_11/07.npz"),
    ],
)
def test_a_setting_that_is_a_number_or_a_file_is_either(text: str, value: Any) -> None:
    for key in ("samples", "evaluate.samples"):
        assert read_value(f"{key}={text}") == value


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("runs=[/a/Füße,b c (1)]", ["/a/Füße", "b c (1)"]),
        ("runs=[runs/vqgan, runs/x=1]", ["runs/vqgan", "runs/x=1"]),
        ("runs=['a, b',c#d]", ["a, b", "c#d"]),
        ("logger.wandb.tags=[1,2]", ["1", "2"]),
        ("logger.wandb.tags=[größe,a b,1e3]", ["größe", "a b", "1e3"]),
        ("data.files={train: ä/*.parquet}", {"train": "ä/*.parquet"}),
        ("data.files=[a (1).tar,b.tar]", ["a (1).tar", "b.tar"]),
    ],
)
def test_the_texts_of_a_list_are_taken_as_they_are_typed(word: str, value: Any) -> None:
    assert read_value(word) == value


def test_a_reference_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    assert read_value("data.root=${oc.env:PLACE}/photos") == "/data/photos"
    assert read_value("data.root=${oc.env:PLACE}/my photos (1)") == "/data/my photos (1)"
    with pytest.raises(InputError, match="begins a reference"):
        quote_word("name=a${b", multirun=False)


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("quantizer.K=128,512", [128, 512]),
        ("data.root=/data/Füße,/data/my photos (1)", ["/data/Füße", "/data/my photos (1)"]),
        ("data.root='/data/a, b',/data/c", ["/data/a, b", "/data/c"]),
        ("data.root=2023,2024", ["2023", "2024"]),
        ("data.root=a=1,b=2", ["a=1", "b=2"]),
        ("name=it's,that's", ["it's", "that's"]),
        ("name=(a,b", ["(a", "b"]),
        ("name=choice(a,b)", ["a", "b"]),
        ("optimizer.lr=choice(1e-3,2e-3)", [1e-3, 2e-3]),
        ("quantizer=vq,ema", ["vq", "ema"]),
    ],
)
def test_in_a_sweep_commas_outside_of_quotes_separate_values(word: str, values: list[Any]) -> None:
    assert read_sweep(word) == values


@pytest.mark.parametrize(
    "word", ["seed=range(3)", "optimizer.lr=interval(1e-4,1e-2)", "seed=glob(*)"]
)
def test_hydras_functions_stay_in_a_sweep(word: str) -> None:
    assert quote_word(word, multirun=True) == word


def test_an_empty_value_of_a_sweep_is_reported() -> None:
    with pytest.raises(InputError, match="nothing before or after one of its commas"):
        quote_word("quantizer.K=128,", multirun=True)


@pytest.mark.parametrize("multirun", [False, True])
def test_quoting_twice_is_quoting_once(multirun: bool) -> None:
    for text in random_texts(60):
        if "${" in text or (multirun and "," in text):
            continue
        for key in ("data.root", "x.y"):
            once = quote_word(f"{key}={text}", multirun)
            assert quote_word(once, multirun) == once, text


@pytest.mark.parametrize("key", ["resume", "name"])
def test_a_printed_word_survives_the_shell_and_hydra(key: str) -> None:
    texts = [
        *random_texts(100),
        "null",
        "true",
        "7",
        "1e3",
        "",
        " ",
        "a ",
        "[x]",
        "{x}",
        "'x'",
        "a${b}",
        "\\${x}",
        "$${",
        "~",
    ]
    for text in texts:
        [word] = shlex.split(format_word(key, text))
        wanted = str(Path.home()) if text == "~" and key != "name" else text
        if text.startswith("~") and text != "~":
            continue  # see test_texts.py
        assert read_value(word) == wanted, (text, word)


def test_a_printed_word_has_quotes_only_where_it_needs_them() -> None:
    assert format_word("resume", Path("runs/vqgan/shapes")) == "resume=runs/vqgan/shapes"
    assert format_word("resume", "runs/vqgan/Füße (1)") == "'resume=runs/vqgan/Füße (1)'"
    assert format_word("resume", "runs/vqgan/7") == "resume=runs/vqgan/7"
    assert format_word("resume", "null") == "'resume=\"null\"'"


def test_options_may_stand_anywhere() -> None:
    words = ["stage=vqgan", "-m", "seed=0,1", "--config-dir", "my conf", "sweep=s", "--cfg", "job"]
    assert arrange_words(words) == (
        ["-m", "--config-dir", "my conf", "--cfg", "job"],
        ["stage=vqgan", "seed=0,1", "sweep=s"],
    )
    assert arrange_words(["a=1", "--info", "b=2"]) == (["--info"], ["a=1", "b=2"])
    assert arrange_words(["a=1", "-i", "plugins", "b=2"]) == (["-i", "plugins"], ["a=1", "b=2"])
    assert arrange_words(["a=1", "--cfg=all", "--multi"]) == (["--cfg=all", "--multi"], ["a=1"])
    assert arrange_words(["-m", "--", "a=1"]) == (["-m"], ["a=1"])


def test_the_options_are_hydras() -> None:
    actions = [action for action in get_args_parser()._actions if action.option_strings]
    assert {name for action in actions for name in action.option_strings} == set(OPTIONS)
    for action in actions:
        for name in action.option_strings:
            takes_value = action.nargs != 0
            assert (OPTIONS[name] is not None) == takes_value, name
            assert tuple(action.choices or ()) == (OPTIONS[name] or ()), name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--epochs", "5"], "--epochs is not an option"),
        (["stage=vqgan", "-x"], "-x is not an option"),
        (["stage=vqgan", "--cfg"], "--cfg needs one of job, hydra, all"),
        (["--cfg", "stage=vqgan"], "--cfg needs one of job, hydra, all"),
        (["stage=vqgan", "-cd"], "-cd needs a value"),
        (["data.root=/data/my", "photos"], "photos is not a setting, which is written key=value"),
        (["größe=5"], "größe in größe=5 can't be the name of a setting"),
        (["data root=5"], "data root in data root=5 can't be"),
        (["=5"], "can't be the name of a setting"),
        (["data..root=5"], "data..root in data..root=5 can't be"),
        (["data.=5"], "can't be the name of a setting"),
        (["+=5"], "can't be the name of a setting"),
        (["--multirun=yes"], "--multirun takes no value"),
        (["--cfg=both"], "--cfg=both must be one of job, hydra, all"),
        (["data.root=\udcff"], "bytes that are no UTF-8"),
        (["~/photos"], "~/photos is not a setting"),
    ],
)
def test_a_word_that_is_neither_option_nor_setting_gets_a_sentence(
    words: list[str], says: str
) -> None:
    with pytest.raises(InputError) as mistake:
        prepare_words(words)
    assert says in str(mistake.value)


@pytest.mark.parametrize(
    "word", ["~loss/perceptual", "+x.y=1", "++x=1", "~x=1", "a@b.c=x", "loss/perceptual@x=y"]
)
def test_all_forms_of_a_key_are_settings(word: str) -> None:
    assert prepare_words([word]) == [word]


def test_a_file_that_makes_the_command_a_sweep_counts(tmp_path: Path) -> None:
    words = ["data.root=/a (1),/b"]
    swept = ['data.root="/a (1)",/b']
    text = ['data.root="/a (1),/b"']
    assert prepare_words(["stage=vqgan", *words])[1:] == text
    assert prepare_words(["-m", "stage=vqgan", *words])[2:] == swept
    assert prepare_words(["hydra.mode=MULTIRUN", *words])[1:] == swept
    assert prepare_words(["experiment=grid_by_K", *words])[1:] == swept
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/own.yaml").write_text("# @package _global_\nhydra:\n  mode: MULTIRUN\n")
    assert prepare_words(["-cd", str(tmp_path), "experiment=own", *words])[3:] == swept
