from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from vqgan.losses.augment import DiffAugment, cut_out, recolour, translate


def pictures(n: int = 64, channels: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(n, channels, height, width) * 1.8 - 0.9


def test_with_everything_off_the_image_stays_as_it_is() -> None:
    x = pictures()
    assert make(DiffAugment, colour=False, translation=0, cutout=0)(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_type_stay(channels: int, dtype: torch.dtype) -> None:
    x = pictures(3, channels).to(dtype)
    augmented = make(DiffAugment)(x)
    assert augmented.shape == x.shape
    assert augmented.dtype == dtype
    assert not torch.equal(augmented, x)


def test_every_image_is_drawn_for_itself_from_the_global_generator() -> None:
    x = pictures(1).expand(8, -1, -1, -1)
    torch.manual_seed(3)
    one = make(DiffAugment)(x)
    torch.manual_seed(3)
    assert torch.equal(make(DiffAugment)(x), one)
    assert len(one.flatten(1).unique(dim=0)) == 8


def test_a_translation_moves_the_image_by_whole_pixels_and_shows_grey_behind_it() -> None:
    x = pictures(128)
    moves = set()
    for image, moved in zip(x, translate(x, 0.125), strict=True):
        matches = []
        for dy in range(-2, 3):
            for dx in range(-3, 4):
                expected = F.pad(image, [3, 3, 2, 2])[:, 2 - dy : 18 - dy, 3 - dx : 27 - dx]
                if torch.equal(expected, moved):
                    matches.append((dy, dx))
        assert len(matches) == 1
        moves.add(matches[0])
    assert {dy for dy, _ in moves} == set(range(-2, 3))
    assert {dx for _, dx in moves} == set(range(-3, 4))


def test_a_cutout_makes_one_rectangle_grey_and_leaves_the_rest() -> None:
    x = pictures(256)
    cut = cut_out(x, 0.5)
    heights, widths = set(), set()
    for image, result in zip(x, cut, strict=True):
        grey = (result == 0).all(0)
        rows, columns = grey.any(1).nonzero().flatten(), grey.any(0).nonzero().flatten()
        height, width = int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)
        assert grey.sum() == height * width
        assert torch.equal(result[:, ~grey], image[:, ~grey])
        heights.add(height)
        widths.add(width)
    assert max(heights) == 8
    assert max(widths) == 12
    assert min(heights) == 4  # whose centre lies at the border


@pytest.mark.parametrize("share", [0.2, 0.5])  # of an odd and of an even size
def test_cutouts_treat_both_ends_of_a_side_alike(share: float) -> None:
    grey = (cut_out(torch.ones(20_000, 1, 15, 15), share) == 0).float().mean((0, 1))
    torch.testing.assert_close(grey, grey.flip(0), atol=0.02, rtol=0)
    torch.testing.assert_close(grey, grey.flip(1), atol=0.02, rtol=0)


def test_colours_change_by_the_published_amounts() -> None:
    """Brightness, saturation and contrast are read off an image by what each alone changes."""
    x = pictures(2_000, 3, 4, 4)
    recoloured = recolour(x)
    brightness = recoloured.mean((1, 2, 3)) - x.mean((1, 2, 3))  # the other two keep the mean
    grey, before = recoloured.mean(1), x.mean(1)
    contrast = grey.std((1, 2)) / before.std((1, 2))  # saturation does not move the grey image
    chroma = (recoloured - grey[:, None]).flatten(1).std(1) / (x - before[:, None]).flatten(1).std(
        1
    )
    saturation = chroma / contrast
    for drawn, least, most in ((brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0, 2)):
        assert least - 1e-3 <= drawn.min() < least + 0.01 * (most - least)
        assert most + 1e-3 >= drawn.max() > most - 0.01 * (most - least)
        assert drawn.mean().item() == pytest.approx((least + most) / 2, abs=0.05)


def test_grey_images_have_no_saturation_to_change() -> None:
    x = pictures(8, 1)
    recoloured = recolour(x)
    contrast = recoloured.std((2, 3)) / x.std((2, 3))
    assert ((contrast > 0.49) & (contrast < 1.51)).all()


def test_the_gradient_reaches_what_is_still_seen() -> None:
    x = pictures(16).requires_grad_()
    augmented = make(DiffAugment, colour=False)(x)
    augmented.sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == (augmented != 0).sum()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}


def test_the_gradient_of_colours_is_right() -> None:
    x = pictures(2, 3, 3, 3).double().requires_grad_()

    def fixed(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return make(DiffAugment)(x)

    assert torch.autograd.gradcheck(fixed, x)


@pytest.mark.parametrize("setting", [{"translation": -0.1}, {"translation": 1.5}, {"cutout": 2}])
def test_shares_outside_0_and_1_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"loss.augment\.\w+=.* must be a number from 0 to 1"):
        make(DiffAugment, **setting)


def test_its_config_has_the_papers_values() -> None:
    augment = instantiate(
        OmegaConf.load(Path(__file__).parents[2] / "conf" / "loss" / "augment" / "diffaugment.yaml")
    )
    assert (augment.colour, augment.translation, augment.cutout) == (True, 0.125, 0.5)
