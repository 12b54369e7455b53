"""A prior's graph computes what the prior does, position by position or for a whole grid."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.export.compare import compare_logits, compare_prior
from prior.export.graphs import StepGraph, describe_graph, start_inputs, trace_prior
from prior.export.programs import ONNXPrior, PT2Prior
from prior.models.gpt import GPT
from tests.helpers.exports import needs_onnx
from tests.helpers.priors import (
    PRIORS,
    build_prior,
    documented_prior,
    make_conditioned,
    make_prior,
)

NETWORKS = [
    "gpt",
    "gpt-embedding",
    "gpt-bits",
    "rar",
    "rq",
    "maskgit",
    "diffusion",
    "pixelcnn",
    "lstm",
    "var",
]


@pytest.mark.parametrize("name", ["gpt", "gpt-embedding", "rar"])
@pytest.mark.parametrize("classes", [0, 3])
@torch.no_grad()
def test_steps_with_a_cache_have_the_logits_of_the_whole_grid(name: str, classes: int) -> None:
    model = make_prior(name, classes=classes)
    assert isinstance(model, GPT)
    graph, inputs = StepGraph(model), start_inputs(model, 3)
    codes = torch.randint(model.K, (3, model.L))
    labels = inputs.get("labels")
    expected = model(codes, labels)
    cache = inputs["cache"]
    for t in range(model.L):
        before = codes[:, t - 1] if t else inputs["codes"]
        logits, cache = graph(before, torch.tensor(t), cache, labels)
        assert torch.allclose(logits, expected[:, t], atol=1e-5)


@torch.no_grad()
def test_steps_with_a_cache_read_vectors() -> None:
    model = make_conditioned("gpt", "vectors")
    assert isinstance(model, GPT)
    graph, inputs = StepGraph(model), start_inputs(model, 3)
    codes, labels = torch.randint(model.K, (3, model.L)), inputs["labels"]
    assert labels.isnan().all(1).tolist() == [True, False, False]
    expected = model(codes, labels)
    cache = inputs["cache"]
    for t in range(model.L):
        before = codes[:, t - 1] if t else inputs["codes"]
        logits, cache = graph(before, torch.tensor(t), cache, labels)
        assert torch.allclose(logits, expected[:, t], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "maskgit", "pixelcnn"])
def test_a_traced_graph_reads_vectors(name: str) -> None:
    model = make_conditioned(name, "vectors")
    graph = trace_prior(model).module()

    def run(inputs: Any) -> list[torch.Tensor]:
        returned = graph(**inputs)
        return list(returned) if isinstance(returned, tuple) else [returned]

    assert compare_prior("pt2", model, run)["equal_codes"] == 1


@torch.no_grad()
def test_the_first_step_reads_no_code_and_what_a_cache_holds_beyond_a_position_is_not_read() -> (
    None
):
    model = make_prior("gpt")
    assert isinstance(model, GPT)
    graph, inputs = StepGraph(model), start_inputs(model, 2)
    logits, cache = graph(**inputs)
    full = torch.full_like(inputs["cache"], 9.0)
    again, other = graph(torch.tensor([3, 4]), torch.tensor(0), full)
    assert torch.equal(again, logits)
    assert torch.equal(other[..., :1, :], cache[..., :1, :])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", [0, 3])
def test_a_traced_graph_is_the_prior_for_any_number_of_samples(name: str, classes: int) -> None:
    depth = {} if classes else {"depth": 1}  # a graph costs by its nodes
    model = make_prior(name, classes=classes, **depth)
    graph = trace_prior(model).module()

    def run(inputs: Any) -> list[torch.Tensor]:
        returned = graph(**inputs)
        return list(returned) if isinstance(returned, tuple) else [returned]

    figures = compare_prior("pt2", model, run)
    assert figures["equal_codes"] == 1
    assert figures["largest_logit_difference"] < 1e-5


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["gpt", "gpt-bits", "rar", "rq", "maskgit", "pixelcnn", "lstm", "var"]
)
def test_onnxruntime_computes_the_prior_and_a_change_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = {} if name == "gpt" else {"depth": 1}  # a graph costs by its nodes
    trained: Any = SimpleNamespace(model=make_prior(name, classes=3, **depth))
    program = trace_prior(trained.model)
    monkeypatch.setattr("prior.export.programs.trace_prior", lambda model: program)
    for exporter in (ONNXPrior(), PT2Prior()):
        exporter.check(trained)
        for file, content in exporter.encode_files(trained).items():
            (tmp_path / file).write_bytes(content)
        figures = exporter.verify(trained, tmp_path)
        assert figures["equal_codes"] == 1
        assert figures["largest_logit_difference"] < 1e-5
    with torch.no_grad():
        for p in trained.model.head.parameters():
            p += 0.01
    one_of_each_kind = name in ("gpt", "maskgit", "pixelcnn")
    for exporter in (ONNXPrior(), PT2Prior()) if one_of_each_kind else (ONNXPrior(),):
        with pytest.raises(InputError, match=f"format={exporter.name} was written and read back"):
            exporter.verify(trained, tmp_path)


@pytest.mark.parametrize("name", sorted(set(PRIORS) - set(NETWORKS)))
def test_a_prior_that_counts_is_no_graph(name: str) -> None:
    if name.endswith(("-embedding", "-bits")):
        describe_graph(make_prior(name))
        return
    trained: Any = SimpleNamespace(model=make_prior(name))
    for exporter in (ONNXPrior(), PT2Prior()):
        with pytest.raises(InputError, match=f"format={exporter.name}: .*use format=safetensors"):
            exporter.check(trained)


class Counting(GPT):
    """A prior of the user's own that asks for a length."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return super().logits(x) * len(x)


def test_a_prior_of_the_users_own_that_cannot_be_traced_is_a_sentence() -> None:
    model = make_prior("gpt")
    model.__class__ = Counting
    with pytest.raises(InputError, match="Counting can't be traced by torch.export"):
        trace_prior(model)


@pytest.mark.slow
def test_the_example_of_the_documentation_is_traced() -> None:
    model = build_prior(documented_prior(), classes=2).eval()
    graph = trace_prior(model).module()
    assert compare_prior("pt2", model, lambda inputs: [graph(**inputs)])["equal_codes"] == 1


def test_logits_are_compared_by_their_size() -> None:
    expected = torch.tensor([[0.0, 50.0], [1.0, 0.0]])
    assert compare_logits("onnx", expected + 4e-3, expected)[1] == pytest.approx(8e-5, rel=1e-2)
    assert compare_logits("onnx", expected.flip(1) * 0 + expected, expected)[0] == 1
    for bad in (expected + 6e-3, expected * float("nan"), expected[:1]):
        with pytest.raises(InputError, match="logits differ by"):
            compare_logits("onnx", bad, expected)
    near = torch.tensor([[1.0, 1.0 + 1e-5]])
    assert compare_logits("onnx", near.flip(1), near) == (0.0, pytest.approx(1e-5, rel=0.1))
