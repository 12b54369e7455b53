import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from codegrid.data.loading import BatchDataModule
from codegrid.data.order import BatchOrder
from codegrid.data.samples import ArraySamples
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.errors import InputError


def first(batches: BatchOrder, n: int) -> list[list[int]]:
    return list(islice(iter(batches), n))


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def test_an_epoch_shows_every_sample_once() -> None:
    assert sorted(flat(first(BatchOrder(12, 4, seed=0), 3))) == list(range(12))


def test_epochs_differ_and_seeds_differ() -> None:
    batches = first(BatchOrder(12, 4, seed=0), 6)
    assert batches[:3] != batches[3:]
    assert batches != first(BatchOrder(12, 4, seed=1), 6)


@pytest.mark.parametrize("shards", [None, [5, 0, 3, 6]])
@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_run_that_starts_at_batch_i_continues_one_that_was_interrupted_there(
    start: int, shards: list[int] | None
) -> None:
    whole = first(BatchOrder(14, 4, seed=0, shard_sizes=shards), 12)
    assert whole[start:] == first(
        BatchOrder(14, 4, seed=0, start=start, shard_sizes=shards), 12 - start
    )


@pytest.mark.parametrize("shards", [None, [10, 6]])
def test_ranks_share_every_epoch_without_overlap(shards: list[int] | None) -> None:
    ranks = [
        first(BatchOrder(16, 4, seed=0, rank=rank, world_size=2, shard_sizes=shards), 2)
        for rank in range(2)
    ]
    assert sorted(i for rank in ranks for i in flat(rank)) == list(range(16))


def test_all_ranks_together_see_what_a_single_one_would() -> None:
    ranks = [first(BatchOrder(16, 2, seed=0, rank=rank, world_size=2), 4) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == first(BatchOrder(16, 4, seed=0), 4)


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(
        InputError,
        match="3 training samples don't fill one batch of 4; use data.batch_size=3, or less",
    ):
        BatchOrder(3, 4, seed=0)


@pytest.mark.parametrize(
    ("n", "world_size", "way_out"),
    [(7, 1, "use x=7, or less"), (7, 2, "use x=3, or less"), (2, 3, "3 devices need more")],
)
def test_a_batch_that_fits_is_named_with_its_setting(n: int, world_size: int, way_out: str) -> None:
    with pytest.raises(InputError, match=f"don't fill one batch of {8 * world_size}; {way_out}"):
        BatchOrder(n, 8, seed=0, world_size=world_size, setting="x")
    if n >= world_size:
        BatchOrder(n, n // world_size, seed=0, world_size=world_size)


@pytest.mark.parametrize("shards", [[7] * 40, [0, 100, 0, 3, 177, 0], [280], [1] * 280])
def test_an_epoch_of_shards_shows_every_sample_once(shards: list[int]) -> None:
    batches = BatchOrder(280, 10, seed=0, shard_sizes=shards)
    for epoch in range(2):
        assert sorted(batches.permute_epoch(epoch)) == list(range(280))


def reach(shard: NDArray[np.int64]) -> list[int]:
    """For each shard the number of images shown from its first to its last, with the epoch as a ring."""
    spans = []
    for number in range(shard.max() + 1):
        at = np.flatnonzero(shard == number)
        gaps = np.diff(at, append=at[0] + len(shard))
        spans.append(len(shard) - int(gaps.max()) + 1)
    return spans


def test_a_shard_is_shown_while_it_is_one_of_the_open_ones() -> None:
    shard = BatchOrder(100 * 64, 10, seed=0, shard_sizes=[100] * 64).permute_epoch(0) // 100
    assert max(reach(shard)) < 1.2 * BatchOrder.OPEN_SHARDS * 100
    assert min(reach(shard)) > 0.8 * BatchOrder.OPEN_SHARDS * 100


def test_every_part_of_an_epoch_is_mixed_alike() -> None:
    shard = BatchOrder(100 * 64, 10, seed=0, shard_sizes=[100] * 64).permute_epoch(0) // 100
    assert all(15 <= len(set(shard[at : at + 200])) <= 19 for at in range(0, 6400, 200))


def test_the_images_of_open_shards_are_mixed() -> None:
    shard = BatchOrder(7 * 40, 10, seed=0, shard_sizes=[7] * 40).permute_epoch(0) // 7
    assert np.count_nonzero(np.diff(shard)) > 200  # in file order there would be 39


def test_shards_are_opened_in_a_new_order_each_epoch() -> None:
    batches = BatchOrder(7 * 40, 10, seed=0, shard_sizes=[7] * 40)
    opened = [set(batches.permute_epoch(epoch)[:20] // 7) for epoch in range(2)]
    assert opened[0] != opened[1]


def test_a_memory_map_is_sent_to_a_worker_by_file_name(tmp_path: Path) -> None:
    np.save(tmp_path / "values.npy", np.arange(100_000, dtype=np.uint8))
    samples = ArraySamples(
        np.load(tmp_path / "values.npy", mmap_mode="r"), np.arange(100_000) % 7, np.arange(10, 20)
    )
    there = pickle.dumps(ArraySamples(samples.values, np.arange(3)))
    assert len(there) < 2_000
    again = pickle.loads(pickle.dumps(samples))
    assert isinstance(again.values, np.memmap)
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.__getitems__([0, 9]), samples.__getitems__([0, 9]), strict=True)
    )


class Numbers(BatchDataModule):
    """Ten samples whose values and labels are their indices."""

    def load_samples(self, split: str) -> ArraySamples:
        return ArraySamples(np.arange(10, dtype=np.uint8)[:, None], np.arange(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_shows_every_sample_once_whatever_the_workers(workers: int) -> None:
    batches = list(Numbers(4, workers, seed=0).val_dataloader())
    assert [len(values) for values, _ in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))


def test_a_loader_draws_no_number_from_the_models_stream() -> None:
    before = torch.get_rng_state()
    data = Numbers(4, 0, seed=0)
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_stays_as_it_is_on_the_cpu() -> None:
    batch = next(iter(Numbers(4, 0, seed=0).val_dataloader()))
    moved = Numbers(4, 0, seed=0).transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert [a is b for a, b in zip(moved, batch, strict=True)] == [True, True]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_pinned_unless_they_come_through_pipes(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Numbers(4, workers, seed=0).train_dataloader().pin_memory
    monkeypatch.setattr("codegrid.data.loading.free_shared_memory", lambda: 0)
    assert Numbers(4, workers, seed=0).train_dataloader().pin_memory == (not workers)


def test_chunks_are_those_that_were_asked_for() -> None:
    chunks = [
        labels.tolist() for _, labels in Numbers(4, 0, seed=0).iterate_chunks("val", 3, [3, 0, 2])
    ]
    assert chunks == [[9], [0, 1, 2], [6, 7, 8]]


def test_samples_are_taken_evenly_from_a_split() -> None:
    data = Numbers(4, 0, seed=0)
    assert data.take_evenly("val", 4)[1].tolist() == [0, 3, 6, 9]
    assert data.take_evenly("val", 1)[1].tolist() == [0]
    assert data.take_evenly("val", 99)[1].tolist() == list(range(10))


def test_samples_taken_from_shards_are_those_that_training_shows_first() -> None:
    data = Numbers(4, 0, seed=0)
    data.samples("train").shard_sizes = [5, 5]
    assert (
        data.take_evenly("train", 4)[1].tolist()
        == first(BatchOrder(10, 4, seed=0, shard_sizes=[5, 5]), 1)[0]
    )


def test_rows_leave_the_other_samples_out() -> None:
    samples = ArraySamples(
        np.arange(10, dtype=np.uint8), 10 * np.arange(10), rows=np.array([2, 3, 5, 7])
    )
    values, labels = samples.__getitems__([3, 0])
    assert len(samples) == 4
    assert (values.tolist(), labels.tolist()) == ([7, 2], [70, 20])
    assert samples[1][0] == 3


def test_codes_arrive_as_int64_grids_even_if_they_are_stored_as_uint16() -> None:
    grids = np.arange(5 * 2 * 2, dtype=np.uint16).reshape(5, 2, 2) + 65500
    data = CodeDataModule(
        ArraySamples(grids, np.zeros(5)), ArraySamples(grids, np.zeros(5)), batch_size=5, seed=0
    )
    indices, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert indices.dtype == torch.int64
    assert indices.flatten().tolist() == list(range(65500, 65520))
    assert np.array_equal(data.samples("val").values, indices)
