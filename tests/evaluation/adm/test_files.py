"""The .npz files of ADM's evaluator."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from codegrid.evaluation.adm.files import AdmFile
from prior.saving import NpzFile, SampleBatch
from tests.helpers.small_adm import as_batch, draw_pictures, save_pictures_as

IMAGES = draw_pictures(7, 0, (4, 6))
MOMENTS = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": np.eye(2)}


def open_file(file: Path | str) -> AdmFile:
    return AdmFile.open("reference", str(file))


def read_all(file: AdmFile, batch_size: int = 3) -> torch.Tensor:
    batches = list(file.iterate_batches(batch_size))
    assert max(map(len, batches)) <= batch_size
    return torch.cat(batches)


@pytest.mark.parametrize("how", ["stored", "compressed", "fortran", "version 2"])
def test_images_are_read_in_batches_however_numpy_has_saved_them(tmp_path: Path, how: str) -> None:
    file = tmp_path / "a.npz"
    if how == "version 2":
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array(member, IMAGES, version=(2, 0))
    elif how == "compressed":
        np.savez_compressed(file, arr_0=IMAGES, arr_1=np.arange(7))
    else:
        np.savez(file, arr_0=np.asfortranarray(IMAGES) if how == "fortran" else IMAGES)
    opened = open_file(file)
    assert (opened.num_images, opened.size) == (7, [3, 4, 6])
    for batch_size in (1, 3, 7, 100):
        assert torch.equal(read_all(opened, batch_size), as_batch(IMAGES))
    assert opened.images_hash == open_file(save_pictures_as(tmp_path / "b.npz", IMAGES)).images_hash


def test_a_change_of_one_grey_level_changes_the_hash_of_the_images(tmp_path: Path) -> None:
    hashes = set()
    for i, change in enumerate((0, 1)):
        changed = IMAGES.copy()
        changed[3, 2, 1, 0] += change
        hashes.add(open_file(save_pictures_as(tmp_path / f"{i}.npz", changed)).images_hash)
    assert len(hashes) == 2
    reshaped = IMAGES.reshape(7, 6, 4, 3)
    hashes.add(open_file(save_pictures_as(tmp_path / "c.npz", reshaped)).images_hash)
    assert len(hashes) == 3


def test_statistics_are_read_with_and_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", **MOMENTS)  # type: ignore[arg-type]
    bare = open_file(tmp_path / "bare.npz")
    assert (bare.shape, bare.size, bare.num_images) == (None, None, 0)
    assert {name: array.tolist() for name, array in bare.statistics.items()} == {
        name: array.tolist() for name, array in MOMENTS.items()
    }
    both = open_file(save_pictures_as(tmp_path / "both.npz", IMAGES, **MOMENTS))
    assert both.num_images == 7
    names = ("mu", "sigma")
    assert both.hash_statistics(names) == bare.hash_statistics(names)
    np.savez(tmp_path / "other.npz", **{**MOMENTS, "mu": np.full(3, 1e-9)})  # type: ignore[arg-type]
    assert open_file(tmp_path / "other.npz").hash_statistics(names) != bare.hash_statistics(names)


def test_covariances_without_mu_are_no_statistics_as_the_evaluator_looks_for_mu(
    tmp_path: Path,
) -> None:
    file = save_pictures_as(tmp_path / "a.npz", IMAGES, sigma=np.eye(3))
    assert not open_file(file).statistics


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES / 255}, "of float64, and the evaluator needs (n, h, w, 3) of uint8; round the pixels"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "save images.transpose(0, 2, 3, 1)"),
        ({"arr_0": IMAGES[..., 0]}, "repeat the grey channel three times"),
        ({"arr_0": IMAGES[..., :1]}, "repeat the grey channel three times"),
        ({"arr_0": IMAGES[:0]}, "arr_0 (0, 4, 6, 3) of uint8, and the evaluator needs"),
        ({"arr_0": np.array(["a", "b"])}, "can't be read as an .npz"),
        ({"images": IMAGES}, "holds images; the evaluator needs images arr_0 (n, h, w, 3), or statistics mu and sigma"),
        ({}, "holds nothing; the evaluator needs"),
        ({"mu": np.zeros(3)}, "has mu alone; mu and sigma belong together"),
        ({**MOMENTS, "sigma": np.eye(4)}, "has mu (3,) and sigma (4, 4); a mean is (D,) and its covariance (D, D)"),
        ({**MOMENTS, "mu": np.eye(3)}, "has mu (3, 3) and sigma (3, 3)"),
        ({**MOMENTS, "sigma_s": np.full((2, 2), np.nan)}, "has NaN or infinity in mu_s or sigma_s"),
        ({**MOMENTS, "mu": np.array([{}], dtype=object)}, "can't be read as an .npz"),
    ],
)  # fmt: skip
def test_what_the_evaluator_cannot_read_is_refused_in_a_sentence(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        open_file(tmp_path / "a.npz")
    assert str(error.value).startswith(f"reference={tmp_path}/a.npz ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not there; give an .npz of images, or a run folder"):
        open_file(tmp_path / "a.npz")
    with pytest.raises(InputError, match="is not there"):
        open_file(tmp_path)
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(InputError, match="can't be read as an .npz .File is not a zip file"):
        open_file(tmp_path / "a.npz")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_refused_while_it_is_read(tmp_path: Path, compressed: bool) -> None:
    """The checksum of the archive covers each pixel."""
    file = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(file, arr_0=IMAGES)
    content = bytearray(file.read_bytes())
    content[300] ^= 4
    file.write_bytes(content)
    with pytest.raises(InputError, match="can't be read as an .npz .*save it again with np.savez"):
        read_all(open_file(file))


def test_the_samples_that_stage_sample_saves_are_read_and_known_by_their_run_folder(
    tmp_path: Path,
) -> None:
    saver = NpzFile(tmp_path / "samples.npz", IMAGES.shape)
    for first in (0, 4):
        saver.write(SampleBatch(first, as_batch(IMAGES[first : first + 4])))
    saver.finish()
    assert not open_file(tmp_path).is_own
    for stage, is_own in (("sample", True), ("prior", False)):
        (tmp_path / "config.yaml").write_text(f"stage: {stage}\n")
        opened = open_file(tmp_path)
        assert opened.is_own == is_own
        assert opened.path == tmp_path / "samples.npz"
    assert torch.equal(read_all(opened), as_batch(IMAGES))
    copied = tmp_path / "b.npz"
    copied.write_bytes(opened.path.read_bytes())
    (tmp_path / "config.yaml").write_text("stage: sample\n")
    assert not open_file(copied).is_own
    (tmp_path / "config.yaml").write_text("stage: [")
    assert not open_file(tmp_path).is_own
