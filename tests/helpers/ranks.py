"""Two processes as torchrun starts them, forked from one that has the imports."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.helpers.commands import free_port

# What both processes would import, each for itself.
PRELOADED = [
    "torch",
    "lightning",
    "torchvision",
    "torch.distributed.fsdp",
    "prior.stages.train",
    "vqgan.stages.train",
]

PATIENCE = 600  # seconds until two processes that wait for each other count as deadlocked


def run_both_ranks(
    work: Callable[..., Any], folder: Path, *arguments: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of `work(folder, *arguments)` in two processes, of which each knows its rank. A deadlock fails.

    Results are what torch.load reads with weights_only.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = mp.start_processes(
        _run_rank,
        (work, folder, free_port(), arguments),
        nprocs=2,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + PATIENCE
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return read_rank_results(folder)


def read_rank_results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What run_both_ranks returned when it ran in this folder."""
    one, two = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return one, two


def _run_rank(
    rank: int, work: Callable[..., Any], folder: Path, port: int, arguments: tuple[Any, ...]
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
