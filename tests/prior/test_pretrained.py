"""Prior.from_pretrained: a run, its export, and the export on a hub give the same prior; nothing else gives one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from prior import Prior
from prior.export.joined import join_prior, read_prior_origin
from prior.export.safetensors import PRIOR_FACTS, PRIOR_WEIGHTS
from prior.load import load_prior
from tests.helpers.exports import export_folder
from tests.helpers.hub_server import HubServer
from tests.helpers.runs import save_prior_run, save_tokenizer_run
from vqgan.export.discover import choose_exporters
from vqgan.export.writing import write_export


def export_run() -> None:
    """Export the prior in the run folder `run` to the folder `out`."""
    trained, origin = load_prior("run"), read_prior_origin("run", load_prior("run"))
    joined = join_prior(choose_exporters("safetensors"), trained)
    write_export(trained.tokenizer, origin, joined, "mit", Path("out"), "stage: export\n")


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `out`, an export of the prior in the run folder `run`."""
    monkeypatch.chdir(tmp_path)
    save_prior_run(Path("run"), classes=3)
    export_run()
    return Path("out")


def test_an_export_gives_the_prior_of_its_run(exported: Path) -> None:
    one, other = Prior.from_pretrained(exported), Prior.from_pretrained("run")
    assert one.classes == other.classes
    assert torch.equal(one.sample(3, output="tensor"), other.sample(3, output="tensor"))
    codes = one.sample(3, output="codes")
    assert torch.equal(one.nats_of_codes(codes, label=1), other.nats_of_codes(codes, label=1))


def test_an_export_keeps_rectangles_bands_units_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data.image_size=[16,24]", "model.grid=[4,6]", "data.channels=5", "data.depth=16"]
    words += ["data.range=[-1000,3000]", "data.number_type=int16", "data.show=[4,2,1]"]
    save_prior_run(Path("run"), classes=["oak", "sessile oak", "beech"], tokenizer_words=words)
    export_run()
    one, other = Prior.from_pretrained("out"), Prior.from_pretrained("run")
    assert (one.grid, one.tokenizer.rules) == ((4, 6), other.tokenizer.rules)
    for label in ("sessile oak", ["beech", 0, -1]):
        drawn = one.sample(3, label=label, output="array")
        assert drawn.dtype == np.int16
        assert np.array_equal(drawn, other.sample(3, label=label, output="array"))
    assert [np.asarray(image).tolist() for image in one.sample(2, label="oak")] == [
        np.asarray(image).tolist() for image in other.sample(2, label=0)
    ]
    with pytest.raises(InputError, match=r"label=Beach is no class, did you mean beech\?"):
        one.sample(1, label="Beach")


def test_a_repository_is_read_at_one_commit(exported: Path, hub: HubServer) -> None:
    files = {
        file.relative_to(exported).as_posix(): file.read_bytes()
        for file in exported.rglob("*")
        if file.is_file()
    }
    repository = hub.add("ann/faces", files)
    repository.refs["v1"] = repository.refs["main"]
    repository.commit({"README.md": b"empty now"})
    with pytest.raises(InputError, match="ckpt=ann/faces has no prior"):
        Prior.from_pretrained("ann/faces")
    one, other = Prior.from_pretrained("ann/faces", "v1"), Prior.from_pretrained("run")
    assert torch.equal(one.sample(3, output="tensor"), other.sample(3, output="tensor"))


def test_damage_and_mixed_exports_are_sentences(exported: Path) -> None:
    weights, facts = exported / PRIOR_WEIGHTS, exported / PRIOR_FACTS
    whole, described = weights.read_bytes(), json.loads(facts.read_text())
    weights.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"prior/model\.safetensors is damaged"):
        Prior.from_pretrained(exported)
    weights.write_bytes(whole)
    facts.write_text(json.dumps({**described, "id": "another"}))
    with pytest.raises(InputError, match="has a prior and a tokenizer of two exports"):
        Prior.from_pretrained(exported)
    facts.write_text("{")
    with pytest.raises(InputError, match=r"prior/config\.json is damaged"):
        Prior.from_pretrained(exported)


def test_a_class_that_a_file_names_is_built_only_if_it_is_admitted(exported: Path) -> None:
    facts = json.loads((exported / PRIOR_FACTS).read_text())
    facts["prior"]["_target_"] = "os.system"
    (exported / PRIOR_FACTS).write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"os\.system"):
        Prior.from_pretrained(exported)


def test_what_holds_no_prior_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_folder(Path("tokenizer"))
    save_tokenizer_run(Path("run"))
    with pytest.raises(InputError, match="ckpt=tokenizer has no prior: give a run folder of stage"):
        Prior.from_pretrained("tokenizer")
    with pytest.raises(InputError, match="stage=prior"):
        Prior.from_pretrained("run")
    with pytest.raises(InputError, match="ckpt=nowhere does not exist"):
        Prior.from_pretrained("nowhere")
    with pytest.raises(InputError, match="revision=v1 is of a repository on the hub, and ckpt=run"):
        Prior.from_pretrained("run", "v1")
    with pytest.raises(InputError, match="trust=mine must be the full name of a class"):
        Prior.from_pretrained("run", trust=["mine"])
