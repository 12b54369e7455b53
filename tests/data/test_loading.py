from itertools import islice

import numpy as np
import pytest
import torch

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.images import to_float
from data.loading import Batches, Samples
from data.tokens import CodeDataModule, sequences


def first(batches: Batches, n: int) -> list[list[int]]:
    return list(islice(iter(batches), n))


def test_an_epoch_shows_every_sample_once() -> None:
    epoch = first(Batches(12, 4, seed=0), 3)
    assert sorted(i for batch in epoch for i in batch) == list(range(12))


def test_epochs_differ_and_seeds_differ() -> None:
    batches = first(Batches(12, 4, seed=0), 6)
    assert batches[:3] != batches[3:]
    assert batches != first(Batches(12, 4, seed=1), 6)


@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_run_that_starts_at_batch_i_continues_one_that_was_cut_there(start: int) -> None:
    assert first(Batches(14, 4, seed=0), 12)[start:] == first(Batches(14, 4, seed=0, start=start), 12 - start)


def test_ranks_share_every_epoch_without_overlap() -> None:
    ranks = [first(Batches(16, 4, seed=0, rank=rank, world=2), 2) for rank in range(2)]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(16))


def test_fewer_samples_than_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="3 training samples don't fill one batch of 4"):
        Batches(3, 4, seed=0)


class Fixed(ImageDataModule):
    def load(self, split: str) -> Samples:
        values = np.arange(10 * 3 * 4 * 4, dtype=np.uint32).astype(np.uint8).reshape(10, 3, 4, 4)
        return Samples(values, np.arange(10))


def fixed(**settings: object) -> Fixed:
    return Fixed(4, 3, 4, True, int(settings.get("num_workers", 0)), 0, "cache")  # type: ignore[call-overload]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_shows_every_sample_once_whatever_the_workers(workers: int) -> None:
    batches = list(fixed(num_workers=workers).val_dataloader())
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))


def test_batches_arrive_in_the_models_range_and_layout() -> None:
    data = fixed()
    images, _ = next(iter(data.val_dataloader()))
    x, labels = data.on_after_batch_transfer((images, torch.zeros(4)), 0)
    assert torch.equal(x, to_float(images))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert len(labels) == 4


def test_augmentation_mirrors_each_image_by_its_own_coin() -> None:
    data = fixed()
    images = torch.from_numpy(data.split("val").values).repeat(20, 1, 1, 1)
    x, plain = data.augment(images), to_float(images)
    mirrored = (x == plain.flip(3)).all(3).all(2).all(1)
    assert ((x == plain).all(3).all(2).all(1) | mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_codes_arrive_as_int64_grids_and_uint16_is_no_trouble() -> None:
    grids = np.arange(5 * 2 * 2, dtype=np.uint16).reshape(5, 2, 2) + 65500
    data = CodeDataModule(Samples(grids, np.zeros(5)), Samples(grids, np.zeros(5)), batch_size=5, seed=0)
    indices, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert indices.dtype == torch.int64
    assert indices.flatten().tolist() == list(range(65500, 65520))
    assert torch.equal(sequences(data.split("val")), indices.flatten(1))
