"""What is shown of a codebook: how often its codes are used, and what each decodes to."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.images import to_uint8
from codegrid.data.pictures import draw_bars
from codegrid.evaluation.codebook import CodebookUse
from tests.helpers.parts import make
from tests.helpers.stage1 import fit, lightning_warnings, make_module, make_tokenizer
from vqgan.callbacks import codes
from vqgan.callbacks.codes import (
    MAX_CODES,
    CodebookPictures,
    count_shown,
    draw_atlas,
    draw_histogram,
    sort_by_colour,
)
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.none import Plain
from vqgan.quantizers.residual import Residual

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings


def test_both_pictures_are_made_after_each_validation_of_all_that_it_counted(
    tmp_path: Path,
) -> None:
    shown = CodebookPictures()
    fit(make_module(steps=8), [shown], default_root_dir=tmp_path)
    assert [file.name for file in sorted((tmp_path / "pictures").iterdir())] == [
        "atlas-000004.png", "atlas-000008.png", "histogram-000004.png", "histogram-000008.png",
    ]  # fmt: skip
    assert [file.name for file in shown.files] == ["histogram-000008.png", "atlas-000008.png"]


def test_a_bottleneck_without_codes_has_no_pictures_of_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.quantizer = Plain(8)
    module = make_module(steps=4, tokenizer=tokenizer)
    fit(module, [CodebookPictures()], default_root_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_atlas_holds_the_patch_of_each_code_that_its_grid_decodes_to() -> None:
    tokenizer = make_tokenizer().eval()
    K, side, f = tokenizer.K or 0, tokenizer.grid[0], tokenizer.f
    counts = torch.arange(1, K + 1)[None]
    with torch.no_grad():
        whole = to_uint8(
            tokenizer.decode_indices(torch.arange(K)[:, None, None].expand(K, side, side))
        )
    middle = side // 2 * f
    wanted = {
        whole[k, :, middle : middle + f, middle : middle + f].numpy().tobytes() for k in range(K)
    }
    sheet = draw_atlas(tokenizer, counts)
    columns = round(K**0.5)
    scale = sheet.shape[2] // (columns * (f + 1) - 1)
    small = sheet[:, ::scale, ::scale]
    cells = [
        small[:, r : r + f, c : c + f]
        for r in range(0, columns * (f + 1), f + 1)
        for c in range(0, columns * (f + 1), f + 1)
    ]
    assert {cell.contiguous().numpy().tobytes() for cell in cells} == wanted


def test_codes_out_of_use_come_last_and_are_faded() -> None:
    tokenizer = make_tokenizer().eval()
    counts = torch.zeros(1, tokenizer.K or 0, dtype=torch.int64)
    counts[0, :4] = 7
    last = draw_atlas(tokenizer, counts)[:, -1, -1].float()
    assert (last >= 191).all()  # 0.75 - 0.25 * 1 = 0.5 of [-1, 1]


def test_an_atlas_of_a_heavy_decoder_has_fewer_codes_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer()
    weights = sum(p.numel() for p in tokenizer.decoder.parameters())
    assert count_shown(tokenizer, 4) == MAX_CODES
    monkeypatch.setattr(f"{draw_atlas.__module__}.CPU_WORK", 5.5 * weights * 4**2)
    assert count_shown(tokenizer, 4) == 5
    assert count_shown(tokenizer.to("meta"), 4) == MAX_CODES


def test_a_large_codebooks_atlas_has_the_most_used_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "MAX_CODES", 4)
    tokenizer = make_tokenizer().eval()
    decoded: list[torch.Tensor] = []
    decode = tokenizer.decode_indices
    monkeypatch.setattr(
        tokenizer, "decode_indices", lambda indices: (decoded.append(indices), decode(indices))[1]
    )
    counts = torch.arange(tokenizer.K or 0)[None]
    draw_atlas(tokenizer, counts)
    assert {int(k) for part in decoded for k in part.unique()} == set(
        range((tokenizer.K or 0) - 4, tokenizer.K or 0)
    )


def test_of_several_codebooks_the_first_is_shown_beside_the_others_most_used_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer().eval()
    tokenizer.quantizer = make(Residual, partial(make, EMA), K=16, num_codebooks=3, dim=8).eval()
    decoded: list[torch.Tensor] = []
    decode = tokenizer.decode_indices
    monkeypatch.setattr(
        tokenizer, "decode_indices", lambda indices: (decoded.append(indices), decode(indices))[1]
    )
    counts = torch.ones(3, 16, dtype=torch.int64)
    counts[1, 5] = counts[2, 9] = 10
    draw_atlas(tokenizer, counts)
    indices = torch.cat(decoded)
    assert sorted(indices[:, 0, 0, 0].tolist()) == list(range(16))
    assert (indices[..., 1] == 5).all()
    assert (indices[..., 2] == 9).all()


def test_patches_lie_from_dark_to_bright_and_in_a_row_from_blue_to_red() -> None:
    patches = torch.rand(12, 3, 2, 2) * 2 - 1
    sheet = sort_by_colour(patches, 4)
    light = sheet.mean((1, 2, 3)).view(3, 4)
    assert (light[:-1].max(1).values <= light[1:].min(1).values).all()
    warmth = (sheet[:, 0] - sheet[:, 2]).mean((1, 2)).view(3, 4)
    assert (warmth.diff(dim=1) >= 0).all()
    assert sorted(sheet.sum((1, 2, 3)).tolist()) == sorted(patches.sum((1, 2, 3)).tolist())


INK, GROUND = [44, 82, 130], [254, 235, 235]


@pytest.mark.parametrize("n", [5, 700, 5000])
def test_each_count_is_a_bar_and_none_is_a_red_ground(n: int) -> None:
    counts = torch.cat([torch.full((n - n // 5,), 1), torch.zeros(n // 5, dtype=torch.int64)])
    counts[0] = 1000 * n
    sheet = draw_bars(counts, "a caption", width=760, height=100)[:, 24:]
    assert sheet.shape[1:] == (100, 760)
    bottom = sheet[:, -1].T.tolist()
    assert bottom[0] == INK
    assert bottom[300] == INK  # as little as was counted is seen
    assert bottom[-10] == GROUND
    assert sheet[:, 0, 0].tolist() == INK  # the most used reaches the top
    assert sheet[:, 0, 300].tolist() != INK


def test_a_histogram_of_codes_never_used_is_drawn() -> None:
    sheet = draw_bars(torch.zeros(8), "none", width=80)[:, 24:]
    assert sheet[:, 50].T.tolist() == [GROUND] * 80


def test_a_histogram_has_a_panel_for_each_codebook_and_one_scale() -> None:
    counts = torch.zeros(2, 768, dtype=torch.int64)
    counts[0, ::2] = 1000
    counts[1] = 10
    sheet, height = draw_histogram(counts), codes.HEIGHT
    assert sheet.shape == (3, 2 * (24 + height), 768)
    few, many = (sheet[:, 24 + top : 24 + top + height] for top in (0, 24 + height))
    assert (
        few[:, 0, 300].tolist() == INK
    )  # 384 codes are used, in whatever place of the codebook, and come first
    assert few[:, -1, 400].tolist() == GROUND
    assert many[:, -1, 767].tolist() == INK
    filled = height - int(
        (many[:, :, 300] == torch.tensor(INK, dtype=torch.uint8)[:, None]).all(0).int().argmax()
    )
    assert filled / height == pytest.approx(math.log1p(10) / math.log1p(1000), abs=0.02)
    assert draw_histogram(counts[:1]).shape == (3, 24 + height, 768)


def test_the_total_is_of_all_batches_and_changes_nothing() -> None:
    use = CodebookUse(4, num_codebooks=2)
    use.update(torch.tensor([[0, 1], [0, 3]]))
    use.update(torch.tensor([[2, 3]]))
    assert use.total().tolist() == [[2, 0, 1, 0], [0, 1, 0, 2]]
    assert use.compute()["codes_used"] == 2


def test_a_picture_of_codes_is_not_black(tmp_path: Path) -> None:
    shown = CodebookPictures()
    fit(make_module(steps=4), [shown], default_root_dir=tmp_path)
    assert all(np.asarray(Image.open(file)).std() > 5 for file in shown.files)
