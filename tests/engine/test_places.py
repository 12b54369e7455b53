"""Which settings say where things are, and which what a run is."""

import pytest

from codegrid.engine.errors import InputError
from codegrid.engine.places import (
    admit_places,
    declared_places,
    is_place,
    limit_advice,
    list_places,
    places_of,
)
from tests.helpers.configs import compose_config


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        ("stage=vqgan data=folder", "data.root", True),
        ("stage=vqgan data=folder", "data.n_val", False),
        ("stage=vqgan data=hf", "data.files.train", True),
        ("stage=vqgan data=hf", "data.train", False),
        ("stage=vqgan data=litdata", "data.train", True),
        ("stage=vqgan data=litdata", "data.local_cache", True),
        ("stage=vqgan data=mnist", "data.download", True),
        ("stage=vqgan", "data.batch_size", False),
        ("stage=vqgan", "cache_dir", True),
        ("stage=vqgan", "seed", False),
        ("stage=vqgan", "trainer.accelerator", True),
        ("stage=vqgan", "trainer.max_steps", False),
        ("stage=vqgan", "logger.wandb.project", True),
        ("stage=vqgan", "quantizer.K", False),
        ("stage=prior", "data.root", True),
        ("stage=prior", "prior.width", False),
        ("stage=extract", "devices", True),
        ("stage=evaluate", "compare_to", True),
        ("stage=evaluate", "samples", False),
        ("stage=pipeline", "stage2.trainer.accelerator", True),
        ("stage=pipeline", "evaluate.data.root", True),
        ("stage=pipeline", "stage2.flip", False),
        ("stage=pipeline", "nothing.here", False),
    ],
)
def test_a_setting_says_where_or_what(words: str, key: str, expected: bool) -> None:
    assert is_place(compose_config(*words.split()), key) is expected


def test_a_class_adds_its_places_to_those_of_its_bases() -> None:
    assert declared_places("codegrid.data.folder.Folder")[:2] == ("root", "val_root")
    assert "cache_dir" in declared_places("codegrid.data.folder.Folder")
    assert declared_places("prior.models.gpt.GPT") == ()
    assert declared_places("codegrid.engine.loggers.make_wandb_logger") == ()


def test_the_root_of_a_dataset_of_ones_own_is_a_place_even_if_it_does_not_say_so() -> None:
    assert "root" in places_of({"_target_": "codegrid.data.shapes.Shapes", "root": "x"})
    assert "root" not in places_of({"_target_": "codegrid.data.shapes.Shapes", "n_train": 3})
    assert places_of({"_target_": "codegrid.data.folder.Folder", "root": "x"}).count("root") == 1


def test_the_places_of_a_run_are_listed_once() -> None:
    places = list(list_places(compose_config("stage=vqgan", "data=folder")))
    assert sorted(places) == sorted(set(places))
    assert {"cache_dir", "data.root", "data.cache"} <= set(places)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("resume=x data.root=y", "resume=x ++data.root=y"),
        ("stage=prior ckpt=x data.shards=y seed=1", "stage=prior ckpt=x ++data.shards=y seed=1"),
        ("resume=x +data.root=y", "resume=x ++data.root=y"),
        ("resume=x evaluate.data.root=y", "resume=x ++evaluate.data.root=y"),
        ("stage=vqgan data=folder data.root=y", "stage=vqgan data=folder data.root=y"),
        ("resume=x data=folder", "resume=x data=folder"),
        ("-m ckpt=x data.root=y,z", "-m ckpt=x data.root=y,z"),
        ("resume=x trainer.max_stepps=1", "resume=x trainer.max_stepps=1"),
        ("init=x quantizer.kl_weight=1", "init=x ++quantizer.kl_weight=1"),
        ("init=x quantizer=gumbel data.roots=y", "init=x quantizer=gumbel data.roots=y"),
        ("-m init=x quantizer.kl_weight=1,2", "-m init=x quantizer.kl_weight=1,2"),
    ],
)
def test_places_of_a_run_are_admitted_before_its_dataset_is_known(
    words: str, expected: str
) -> None:
    assert admit_places(words.split()) == expected.split()
    assert admit_places(expected.split()) == expected.split()


@pytest.mark.parametrize("advice", ["set data.image=img", "there are 3, so data.n_val=1000"])
def test_a_sentence_that_advises_what_is_refused_says_what_is_not(advice: str) -> None:
    with pytest.raises(InputError) as caught, limit_advice(["data.path", "data.files"]):
        raise InputError(f"there is no image; {advice}")
    assert str(caught.value).endswith("can only say where they are: data.path, data.files")


@pytest.mark.parametrize("advice", ["give another with data.path=x", "mend the file"])
def test_other_sentences_stay_as_they_are(advice: str) -> None:
    with pytest.raises(InputError) as caught, limit_advice(["data.path"]):
        raise InputError(advice)
    assert str(caught.value) == advice
