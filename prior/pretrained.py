"""A prior for a script or a notebook from wherever it is: a run, an export, the hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from codegrid.data.labels import ClassTable
from codegrid.engine.checkpoint import build_trusted, check_weights
from codegrid.engine.errors import InputError, summarize_error
from codegrid.engine.trust import Trust, admit, check_name, check_trusted, current_trust
from codegrid.engine.version import STAMP, Stamp, check_format
from prior.conditioning.vectors import VectorCondition
from prior.export.safetensors import PRIOR_CLASS, PRIOR_FACTS, PRIOR_WEIGHTS
from prior.load import load_prior
from prior.models.base import PriorModel, describe_codes
from prior.prior import Prior
from vqgan.formats.files import open_folder
from vqgan.formats.hub import HubFolder
from vqgan.formats.locate import FileTree
from vqgan.pretrained import SETTING, is_run, read_facts
from vqgan.tokenizer import Tokenizer


def load_any_prior(source: str | Path, revision: str | None, trust: Sequence[str]) -> Prior:
    """The prior in a run folder or checkpoint, in an export by format=safetensors, or in one on the hub."""
    for name in trust:
        check_name(name)
    with admit(Trust(frozenset(trust))):
        if not is_run(source):
            return load_exported(source, revision)
        if revision is not None:
            raise InputError(
                f"revision={revision} is of a repository on the hub, and {SETTING}={source} is a run here; leave revision out"
            )
        return load_prior(source)


def load_exported(source: str | Path, revision: str | None) -> Prior:
    """The prior in what stage=export wrote. Raises InputError for what holds none."""
    folder, inner = open_folder(str(source), revision, SETTING)
    facts = read_prior_facts(folder, inner, source)
    stamp = Stamp.read(facts[STAMP])
    check_format(str(source), stamp)
    of_tokenizer = read_facts(folder, inner)
    if of_tokenizer.get("id") != facts["id"]:
        raise InputError(
            f"{SETTING}={source} has a prior and a tokenizer of two exports; export the prior's run again"
        )
    check_trusted(facts["prior"], str(source), current_trust().names)
    commit = folder.commit if isinstance(folder, HubFolder) else None  # of one moment
    tokenizer = Tokenizer.from_pretrained(source, commit, trust=tuple(current_trust().names))
    space = describe_codes(facts["prior"], tokenizer)
    settings = {**facts["prior"], **space, "classes": facts["classes"]}
    model = build_trusted(settings, PriorModel, source, stamp)  # type: ignore[type-abstract]
    described = facts.get("condition")
    condition = VectorCondition.from_description(described) if described else None
    if condition is not None:
        condition.attach(model)
    file = folder.fetch(join_name(inner, PRIOR_WEIGHTS))
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise InputError(
            f"{file} is damaged ({summarize_error(error)}); fetch it again, or export the prior's run again"
        ) from error
    check_weights(weights, model.state_dict(), file, stamp)
    model.load_state_dict(weights)
    return Prior(
        model=model.eval(),
        tokenizer=tokenizer,
        name=Path(str(source)).name,
        config={name: facts[name] for name in ("id", "prior")},
        data={},
        classes=ClassTable(facts["class_names"], facts["class_labels"]),
        tokenizer_of=facts["tokenizer_of"],
        condition=condition,
    )


def join_name(inner: str, name: str) -> str:
    """The name of a file in a folder's subfolder, which may be none."""
    return f"{inner}/{name}" if inner else name


def read_prior_facts(folder: FileTree, inner: str, source: str | Path) -> dict[str, Any]:
    """What stage=export wrote about a prior. Raises InputError if it wrote none there."""
    names = [join_name(inner, name) for name in (PRIOR_FACTS, PRIOR_WEIGHTS)]
    # A folder here lists only the subfolders of tokenizers.
    is_there = all(
        name in folder.names or (not folder.is_remote and folder.fetch(name).is_file())
        for name in names
    )
    try:
        facts: Any = json.loads(folder.fetch(names[0]).read_text()) if is_there else None
    except ValueError as error:
        raise InputError(
            f"{folder.address(names[0])} is damaged ({summarize_error(error)}); fetch it again, or export the prior's run again"
        ) from error
    if not isinstance(facts, Mapping) or facts.get("_class_name") != PRIOR_CLASS:
        raise InputError(
            f"{SETTING}={source} has no prior: give a run folder of stage=prior, or what stage=export wrote of one with "
            "format=safetensors"
        )
    return dict(facts)
