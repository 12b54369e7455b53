"""Two processes with half of the weights each train, validate, sample and save like one process."""

import errno
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from codegrid.engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.callbacks.signals import Signals, Stop
from codegrid.engine.checkpoint import AVERAGE, read_checkpoint
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.collectives import is_main
from codegrid.engine.folder import LAST
from codegrid.engine.fsdp import ShardedStrategy, reshard, sharded_parts, unshard
from codegrid.engine.writer import AtomicCheckpointIO
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.module import PriorModule
from tests.helpers.priors import PRIORS, UNLABELLED, make_prior
from tests.helpers.ranks import read_rank_results, run_both_ranks
from tests.helpers.shared import share_folder
from tests.helpers.stage2 import ABOUT, NATS, lightning_warnings, make_code_data, make_trainer

pytestmark = [lightning_warnings, pytest.mark.slow]

K, GRID = 5, (2, 3)

LEARNED = [name for name in PRIORS if name not in UNLABELLED]

# The updates of these priors draw random numbers.
UNCERTAIN = ("rar", "maskgit", "maskgit-embedding", "diffusion")

STEPS = 6
CLIP = 0.05  # small enough to clip most updates


class Watched(PriorModule):
    """A prior that records the loss of each micro-batch and the gradient norm of each update."""

    def log_terms(self, terms: dict[str, Tensor]) -> None:
        super().log_terms(terms)
        noted = self.__dict__.setdefault("noted", {"loss": [], "grad_model": []})
        for name in noted.keys() & terms.keys():
            noted[name].append(self.vitals[name])


def prior(name: str, **update: Any) -> Watched:
    torch.manual_seed(0)
    model = make_prior(name, K=K, grid=GRID, classes=3).train()
    # With a small eps AdamW would turn a rounding error of a gradient near 0 into a full step.
    return Watched(
        model,
        lambda p: torch.optim.AdamW(p, 1e-2, eps=0.1, weight_decay=0.5),
        Budget(STEPS),
        Schedule(0, floor=0.02),
        label_drop=0.0,
        label_smoothing=0.0,
        **update,
    )


def run(
    folder: Path,
    name: str,
    batch_size: int,
    ranks: Any = None,
    more: tuple[Callback, ...] = (),
    **update: Any,
) -> tuple[Watched, dict[str, Any]]:
    """Train a prior, or resume it if `folder` has a checkpoint, and return it with its losses, norms and figures.

    `ranks` is the strategy of two processes; without it there is one process.
    """
    module, numbers = prior(name, **update), make_code_data(name, batch_size)
    before = [BestCheckpoint(ABOUT, NATS), WeightAverage(0.5)]
    callbacks = [*before, Checkpoints(ABOUT, 3, pauses=(0, 0)), *more]
    settings: dict[str, Any] = {"devices": 2, "strategy": ranks} if ranks else {}
    settings["plugins"] = [AtomicCheckpointIO(is_async=True)]
    fit = make_trainer(
        val_every=3, callbacks=callbacks, default_root_dir=folder, inference_mode=False, **settings
    )
    fit.fit(module, numbers, ckpt_path=folder / LAST if (folder / LAST).is_file() else None)
    [figures] = fit.validate(module, numbers, verbose=False)
    losses = fit.strategy.reduce(
        torch.stack(module.noted["loss"]).view(-1, module.accumulate).mean(1)
    )
    norms = [float(norm) for norm in module.noted["grad_model"]]
    return module, {
        "losses": losses.tolist(),
        "norms": norms,
        "figures": figures,
        "step": module.step,
    }


def replicated() -> str:
    return "ddp_find_unused_parameters_true"


def sharded() -> ShardedStrategy:
    return ShardedStrategy(2)


def train_every_prior(folder: Path) -> dict[str, Any]:
    """Train each prior under both strategies; return the size of its shards, and samples that the first rank draws alone."""
    outcome: dict[str, Any] = {}
    for name in LEARNED:
        for how in (replicated, sharded):
            module, facts = run(
                folder / name / how.__name__, name, 16, how(), accumulate=2, clip=CLIP
            )
            outcome[f"{name} {how.__name__}"] = facts
        optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
        moments = [
            value
            for state in optimizer.state.values()
            for value in (state["exp_avg"], state["exp_avg_sq"])
        ]
        tensors_of = {"parameters": list(module.model.parameters()), "moments": moments}
        for what, tensors in tensors_of.items():
            own, whole = (
                sum(size(x) for x in tensors)
                for size in (lambda x: x.to_local().numel(), lambda x: x.numel())
            )
            outcome[f"{name} {what}"] = own / whole
        unshard(module.model)
        if is_main():
            outcome[f"{name} drawn"] = sample(
                module.model, Sampler.unmodified(), 20, seed=3, labels=torch.arange(20) % 3
            )
        reshard(module.model)
        module.model.learn(
            torch.zeros(4, module.model.L, dtype=torch.int64), None, 0.0
        ).logits.mean().backward()
        outcome[f"{name} parts"] = len(sharded_parts(module.model))
    return outcome


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> "Ranks":
    folder = share_folder(
        tmp_path_factory, "sharded priors", partial(run_both_ranks, train_every_prior)
    )
    return folder, read_rank_results(folder)


Ranks = tuple[Path, tuple[dict[str, Any], dict[str, Any]]]


@pytest.mark.parametrize("name", LEARNED)
class TestEveryPrior:
    def test_trains_and_validates_with_sharded_weights_as_with_replicated_ones(
        self, ranks: Ranks, name: str
    ) -> None:
        folder, outcomes = ranks
        for rank in outcomes:
            one, other = rank[f"{name} replicated"], rank[f"{name} sharded"]
            assert one["step"] == other["step"] == STEPS
            assert max(one["norms"]) > CLIP
            for figures in ("losses", "norms"):
                assert other[figures] == pytest.approx(one[figures], rel=1e-4)
            assert other["figures"] == pytest.approx(one["figures"], rel=1e-4, abs=1e-4)
        assert_same(
            *(
                read_checkpoint(folder / name / how / LAST, "prior")
                for how in ("replicated", "sharded")
            )
        )
        best = [read_checkpoint(folder / name / how, "prior") for how in ("replicated", "sharded")]
        for key, value in best[0]["state_dict"].items():
            torch.testing.assert_close(best[1]["state_dict"][key], value, rtol=1e-3, atol=1e-5)

    def test_gives_each_rank_about_half_of_the_weights_and_moments(
        self, ranks: Ranks, name: str
    ) -> None:
        _, outcomes = ranks
        for what in ("parameters", "moments"):
            halves = [rank[f"{name} {what}"] for rank in outcomes]
            assert sum(halves) == pytest.approx(1)
            assert max(halves) < 0.6

    def test_is_sampled_by_one_rank_alone_as_by_a_single_process(
        self, ranks: Ranks, name: str
    ) -> None:
        folder, outcomes = ranks
        model = make_prior(name, K=K, grid=GRID, classes=3)
        state = read_checkpoint(folder / name / "sharded" / LAST, "prior")["state_dict"]
        model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
        expected = sample(model, Sampler.unmodified(), 20, seed=3, labels=torch.arange(20) % 3)
        assert torch.equal(outcomes[0][f"{name} drawn"], expected)

    def test_has_its_blocks_sharded_one_by_one(self, ranks: Ranks, name: str) -> None:
        blocks = {"rq": 3, "pixelcnn": 0, "pixelcnn-embedding": 0, "lstm": 0, "lstm-embedding": 0}
        assert ranks[1][0][f"{name} parts"] == 1 + blocks.get(name, 2)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check that two checkpoints have equal weights, averaged weights and optimizers, up to rounding, in the same format."""
    assert one.keys() == other.keys()
    for state in ("state_dict", AVERAGE):
        assert one[state].keys() == other[state].keys()
        for name, value in one[state].items():
            torch.testing.assert_close(
                other[state][name],
                value,
                rtol=1e-3,
                atol=1e-5,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    [mine], [theirs] = one["optimizer_states"], other["optimizer_states"]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, values in mine["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(theirs["state"][number][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LEARNED if name not in UNCERTAIN])
def test_two_sharded_halves_of_a_batch_train_as_one_process_trains_the_whole(
    tmp_path: Path, ranks: Ranks, name: str
) -> None:
    folder, outcomes = ranks
    _, alone = run(tmp_path, name, 32, clip=CLIP)
    for rank in outcomes:
        assert rank[f"{name} sharded"]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert rank[f"{name} sharded"]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert rank[f"{name} sharded"]["figures"] == pytest.approx(
            alone["figures"], rel=1e-4, abs=1e-4
        )
    assert_same(
        read_checkpoint(tmp_path / LAST, "prior"),
        read_checkpoint(folder / name / "sharded" / LAST, "prior"),
    )


class Kick(Callback):
    """Sends a signal to this process in the middle of the update after step 3."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if module.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def train_until_signal(folder: Path, batch_size: int, ranks: Any = None, name: str = "gpt") -> int:
    """Train until a signal ends the run, and return this process's exit code. Of two processes the second gets the signal."""
    kicked = not torch.distributed.is_initialized() or not is_main()
    with pytest.raises(Stop) as stop, Signals() as signals:
        run(folder, name, batch_size, ranks, (signals, *([Kick()] if kicked else [])))
    return int(str(stop.value.code))


def interrupt_and_resume(folder: Path) -> dict[str, Any]:
    """Runs that these two processes start, resume, or both."""
    torch.distributed.init_process_group("gloo")
    codes = [
        train_until_signal(folder / first, 16, how())
        for first, how in (("sharded-replicated", sharded), ("replicated-sharded", replicated))
    ]
    codes += [
        train_until_signal(folder / "sharded-sharded", 16, sharded()),
        train_until_signal(folder / "sharded-alone", 16, sharded()),
    ]
    for then, how in (
        ("sharded-replicated", replicated),
        ("replicated-sharded", sharded),
        ("sharded-sharded", sharded),
        ("alone-sharded", sharded),
    ):
        run(folder / then, "gpt", 16, how())
    uncertain = {"name": "rar", "batch_size": 16}  # each rank draws its own random numbers
    train_until_signal(folder / "again", ranks=sharded(), **uncertain)
    run(folder / "again", ranks=sharded(), **uncertain)
    run(folder / "at once", ranks=sharded(), **uncertain)
    return {"codes": codes}


def test_a_run_that_a_signal_to_one_rank_ends_is_resumed_under_any_strategy(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    assert train_until_signal(folder / "alone-sharded", 32) == 143
    first, second = run_both_ranks(interrupt_and_resume, folder)
    assert first["codes"] == [143] * 4
    assert (
        second["codes"] == [0] * 4
    )  # otherwise Lightning's observer would kill the first while it saves
    assert read_checkpoint(folder / "sharded-alone" / LAST, "prior")["clock"]["step"] == 4
    run(folder / "sharded-alone", "gpt", 32)
    run(tmp_path / "whole", "gpt", 32)
    whole = read_checkpoint(tmp_path / "whole" / LAST, "prior")
    for way in (
        "sharded-replicated",
        "replicated-sharded",
        "sharded-sharded",
        "sharded-alone",
        "alone-sharded",
    ):
        assert_same(whole, read_checkpoint(folder / way / LAST, "prior"))
    at_once, again = (read_checkpoint(folder / way / LAST, "prior") for way in ("at once", "again"))
    for name, value in (at_once["state_dict"] | at_once[AVERAGE]).items():
        assert torch.equal((again["state_dict"] | again[AVERAGE])[name], value), name


def count_reductions(folder: Path) -> dict[str, Any]:
    """Count the gradient reductions of a run whose updates have four micro-batches."""
    with CommDebugMode() as communication:
        module, _ = run(folder, "gpt", 16, sharded(), accumulate=4)
    return {
        "times": communication.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_],
        "parts": len(sharded_parts(module.model)),
    }


def test_gradients_are_reduced_in_the_last_micro_batch_only(tmp_path: Path) -> None:
    for rank in run_both_ranks(count_reductions, tmp_path):
        assert rank["times"] == STEPS * rank["parts"] > 0


def fill_disk(folder: Path) -> dict[str, Any]:
    """Runs in which the disk is full for the first checkpoint, and twice for the last."""

    import codegrid.engine.writer

    save, steps = codegrid.engine.writer.save_atomically, []

    def refuse(content: Any, file: Path, previous: Path | None = None) -> None:
        if file.name == LAST.name:
            steps.append(content["clock"]["step"])
            if len(steps) in (1, 3, 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, previous)

    codegrid.engine.writer.save_atomically = refuse
    tried = {}
    for how in (replicated, sharded):
        steps.clear()
        run(folder / how.__name__, "gpt", 16, how())
        tried[how.__name__] = list(steps)
    return tried


def test_a_checkpoint_that_the_main_rank_can_not_write_is_retried_by_all(
    tmp_path: Path,
) -> None:
    one, other = run_both_ranks(fill_disk, tmp_path)
    assert one == {"replicated": [3, 3, 6, 6, 6], "sharded": [3, 3, 6, 6, 6]}
    assert other == {"replicated": [], "sharded": []}
    assert_same(
        *(read_checkpoint(tmp_path / how / LAST, "prior") for how in ("replicated", "sharded"))
    )


def train_in_bf16(folder: Path) -> dict[str, Any]:
    norms = {}
    for how in (replicated, sharded):
        module = prior("gpt")
        fit = make_trainer(
            precision="bf16-mixed", devices=2, strategy=how(), default_root_dir=folder
        )
        fit.fit(module, make_code_data("gpt", 16))
        norms[how.__name__] = [float(norm) for norm in module.noted["grad_model"]]
        kinds = {
            value.dtype
            for value in fit.strategy.lightning_module_state_dict().values()
            if value is not None
        }
        has_none = how is sharded and not is_main()  # the main rank alone gathers the shards
        assert kinds == (set() if has_none else {torch.float32})
    return norms


def test_sharded_weights_are_stored_in_float32_and_computed_in_bf16_like_replicated_ones(
    tmp_path: Path,
) -> None:
    for rank in run_both_ranks(train_in_bf16, tmp_path):
        assert rank["sharded"] == pytest.approx(rank["replicated"], rel=1e-3)
