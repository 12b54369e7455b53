"""Two processes with half of the weights each: they learn, judge, draw and keep what one process would."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from engine.callbacks.ema import WeightAverage
from engine.callbacks.signals import Signals, Stop
from engine.checkpoint import AVERAGE, read_checkpoint
from engine.clock import Budget, Schedule
from engine.distributed import is_main
from engine.folder import LAST
from engine.fsdp import ShardedStrategy, reshard, sharded_parts, unshard
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.module import Prior
from tests.helpers.commands import free_port
from tests.helpers.priors import PRIORS, UNLABELLED, make_prior
from tests.helpers.stage2 import ABOUT, NATS, lightning_warnings, make_code_data, make_trainer

pytestmark = [lightning_warnings, pytest.mark.slow]

K, GRID = 5, (2, 3)

LEARNED = [name for name in PRIORS if name not in UNLABELLED]

UNCERTAIN = (
    "rar",
    "maskgit",
    "maskgit-embedding",
    "diffusion",
)  # whose updates draw random numbers

STEPS, CLIP = 6, 0.05  # a clip that most updates feel

PATIENCE = 600  # seconds until two processes that wait for each other have failed


class Watched(Prior):
    """A prior that notes the loss of each micro-batch and the length of the gradient of each update."""

    def log_terms(self, terms: dict[str, Tensor]) -> None:
        super().log_terms(terms)
        noted = self.__dict__.setdefault("noted", {"loss": [], "grad_model": []})
        for name in noted.keys() & terms.keys():
            noted[name].append(self.vitals[name])


def prior(name: str, **update: Any) -> Watched:
    torch.manual_seed(0)
    model = make_prior(name, K=K, grid=GRID, classes=3).train()
    # A large eps, or AdamW would make a rounding of a gradient near 0 a step of full length.
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
    """Train a prior, or go on where `folder` has a checkpoint, and what came of it; `ranks` is how two of them share the work."""
    module, numbers = prior(name, **update), make_code_data(name, batch_size)
    before = [BestCheckpoint(ABOUT, NATS), WeightAverage(0.5)]
    callbacks = [*before, Checkpoints(ABOUT, 3, pauses=(0, 0)), *more]
    settings = {"devices": 2, "strategy": ranks} if ranks else {}
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


def plain() -> str:
    return "ddp_find_unused_parameters_true"


def shares() -> ShardedStrategy:
    return ShardedStrategy(2)


def together(work: Callable[..., None], folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What two processes, as torchrun would have started them, leave in <folder>/<rank>.pt; they must not wait for ever."""
    context = mp.spawn(joined, (work, folder, free_port(), arguments), nprocs=2, join=False)
    assert context is not None
    end = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def joined(
    rank: int,
    work: Callable[..., dict[str, Any]],
    folder: Path,
    port: int,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_RANK": 0,
        "MASTER_PORT": port,
    }
    os.environ.update(
        {name: str(value) for name, value in ranks.items()},
        MASTER_ADDR="localhost",
        TORCHELASTIC_RUN_ID="test",
    )
    torch.save(work(folder, *arguments), folder / f"{rank}.pt")


def every_prior(folder: Path) -> dict[str, Any]:
    """Each prior under both strategies; what its shares are, and what the first rank alone draws from all of them."""
    outcome: dict[str, Any] = {}
    for name in LEARNED:
        for how in (plain, shares):
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
        held = {"parameters": list(module.model.parameters()), "moments": moments}
        for what, tensors in held.items():
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
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, together(every_prior, folder)


Ranks = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("name", LEARNED)
class TestEveryPrior:
    def test_learns_and_is_judged_with_shares_as_with_copies_of_its_weights(
        self, ranks: Ranks, name: str
    ) -> None:
        folder, outcomes = ranks
        for rank in outcomes:
            one, other = rank[f"{name} plain"], rank[f"{name} shares"]
            assert one["step"] == other["step"] == STEPS
            assert max(one["norms"]) > CLIP
            for figures in ("losses", "norms"):
                assert other[figures] == pytest.approx(one[figures], rel=1e-4)
            assert other["figures"] == pytest.approx(one["figures"], rel=1e-4, abs=1e-4)
        same(*(read_checkpoint(folder / name / how / LAST, "prior") for how in ("plain", "shares")))
        best = [read_checkpoint(folder / name / how, "prior") for how in ("plain", "shares")]
        for key, value in best[0]["state_dict"].items():
            torch.testing.assert_close(best[1]["state_dict"][key], value, rtol=1e-3, atol=1e-5)

    def test_leaves_each_rank_about_half_of_weights_and_moments(
        self, ranks: Ranks, name: str
    ) -> None:
        _, outcomes = ranks
        for what in ("parameters", "moments"):
            halves = [rank[f"{name} {what}"] for rank in outcomes]
            assert sum(halves) == pytest.approx(1)
            assert max(halves) < 0.6

    def test_is_drawn_from_by_one_rank_alone_as_by_a_single_process(
        self, ranks: Ranks, name: str
    ) -> None:
        folder, outcomes = ranks
        model = make_prior(name, K=K, grid=GRID, classes=3)
        state = read_checkpoint(folder / name / "shares" / LAST, "prior")["state_dict"]
        model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
        expected = sample(model, Sampler.unmodified(), 20, seed=3, labels=torch.arange(20) % 3)
        assert torch.equal(outcomes[0][f"{name} drawn"], expected)

    def test_has_its_blocks_sharded_one_by_one(self, ranks: Ranks, name: str) -> None:
        blocks = {"rq": 3, "pixelcnn": 0, "pixelcnn-embedding": 0, "lstm": 0, "lstm-embedding": 0}
        assert ranks[1][0][f"{name} parts"] == 1 + blocks.get(name, 2)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two checkpoints of the same state, to rounding: weights, their average and the optimizer, in the same form."""
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
def test_two_halves_of_a_batch_train_shares_as_one_process_trains_the_whole(
    tmp_path: Path, ranks: Ranks, name: str
) -> None:
    folder, outcomes = ranks
    _, alone = run(tmp_path, name, 32, clip=CLIP)
    for rank in outcomes:
        assert rank[f"{name} shares"]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert rank[f"{name} shares"]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert rank[f"{name} shares"]["figures"] == pytest.approx(
            alone["figures"], rel=1e-4, abs=1e-4
        )
    same(
        read_checkpoint(tmp_path / LAST, "prior"),
        read_checkpoint(folder / name / "shares" / LAST, "prior"),
    )


class Kick(Callback):
    """A signal to this process in the middle of the update after step 3."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if module.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder: Path, batch_size: int, ranks: Any = None, name: str = "gpt") -> int:
    """A run that ends by a signal, which of two processes the second one gets; this process's exit code."""
    kicked = not torch.distributed.is_initialized() or not is_main()
    with pytest.raises(Stop) as stop, Signals() as signals:
        run(folder, name, batch_size, ranks, (signals, *([Kick()] if kicked else [])))
    return int(str(stop.value.code))


def halves(folder: Path) -> dict[str, Any]:
    """Runs that these processes begin, go on with, or both."""
    torch.distributed.init_process_group("gloo")
    codes = [
        interrupted(folder / first, 16, how())
        for first, how in (("shares-plain", shares), ("plain-shares", plain))
    ]
    codes += [
        interrupted(folder / "shares-shares", 16, shares()),
        interrupted(folder / "shares-alone", 16, shares()),
    ]
    for then, how in (
        ("shares-plain", plain),
        ("plain-shares", shares),
        ("shares-shares", shares),
        ("alone-shares", shares),
    ):
        run(folder / then, "gpt", 16, how())
    uncertain = {"name": "rar", "batch_size": 16}  # whose random numbers are each rank's own
    interrupted(folder / "again", ranks=shares(), **uncertain)
    run(folder / "again", ranks=shares(), **uncertain)
    run(folder / "at once", ranks=shares(), **uncertain)
    return {"codes": codes}


def test_a_run_that_a_signal_to_one_rank_ends_goes_on_under_any_strategy(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    assert interrupted(folder / "alone-shares", 32) == 143
    first, second = together(halves, folder)
    assert first["codes"] == [143] * 4
    assert second["codes"] == [0] * 4  # or Lightning's observer would kill the first while it saves
    assert read_checkpoint(folder / "shares-alone" / LAST, "prior")["clock"]["step"] == 4
    run(folder / "shares-alone", "gpt", 32)
    run(tmp_path / "whole", "gpt", 32)
    whole = read_checkpoint(tmp_path / "whole" / LAST, "prior")
    for way in ("shares-plain", "plain-shares", "shares-shares", "shares-alone", "alone-shares"):
        same(whole, read_checkpoint(folder / way / LAST, "prior"))
    at_once, again = (read_checkpoint(folder / way / LAST, "prior") for way in ("at once", "again"))
    for name, value in (at_once["state_dict"] | at_once[AVERAGE]).items():
        assert torch.equal((again["state_dict"] | again[AVERAGE])[name], value), name


def counted(folder: Path) -> dict[str, Any]:
    """How often gradients are shared in a run whose updates have four micro-batches."""
    with CommDebugMode() as communication:
        module, _ = run(folder, "gpt", 16, shares(), accumulate=4)
    return {
        "times": communication.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_],
        "parts": len(sharded_parts(module.model)),
    }


def test_micro_batches_share_their_gradients_with_the_last_alone(tmp_path: Path) -> None:
    for rank in together(counted, tmp_path):
        assert rank["times"] == STEPS * rank["parts"] > 0


def full(folder: Path) -> dict[str, Any]:
    """Runs whose first rank finds no room for its first checkpoint, and twice none for its last."""
    import engine.checkpoint

    save, steps = engine.checkpoint.save_atomically, []

    def refuse(content: Any, file: Path, previous: Path | None = None) -> None:
        if file.name == LAST.name:
            steps.append(content["clock"]["step"])
            if len(steps) in (1, 3, 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, previous)

    engine.checkpoint.save_atomically = refuse
    tried = {}
    for how in (plain, shares):
        steps.clear()
        run(folder / how.__name__, "gpt", 16, how())
        tried[how.__name__] = list(steps)
    return tried


def test_a_checkpoint_that_the_first_rank_can_not_write_is_tried_again_by_all(
    tmp_path: Path,
) -> None:
    one, other = together(full, tmp_path)
    assert one == {"plain": [3, 3, 6, 6, 6], "shares": [3, 3, 6, 6, 6]}
    assert other == {"plain": [], "shares": []}
    same(*(read_checkpoint(tmp_path / how / LAST, "prior") for how in ("plain", "shares")))


def rounded(folder: Path) -> dict[str, Any]:
    norms = {}
    for how in (plain, shares):
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
        has_none = how is shares and not is_main()  # the main rank alone gathers the shards
        assert kinds == (set() if has_none else {torch.float32})
    return norms


def test_shares_are_kept_in_float32_and_computed_with_in_bf16_as_copies_are(tmp_path: Path) -> None:
    for rank in together(rounded, tmp_path):
        assert rank["shares"] == pytest.approx(rank["plain"], rel=1e-3)
