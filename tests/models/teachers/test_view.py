"""The teacher's view: a normalisation undone exactly, cut and resized as Pillow does it."""

# B batch, C channels, H W pixels

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.datasets.beton import IMAGENET_MEAN, IMAGENET_STD
from pipeline.data.ffcv.augment import lookup
from pipeline.models.teachers.timm import LEVELS, TeacherView

HALF = (0.5, 0.5, 0.5)


def view(
    *, mean=IMAGENET_MEAN, std=IMAGENET_STD, size=8, own_mean=(0.0,) * 3, own_std=(1.0,) * 3, **more
) -> TeacherView:
    return TeacherView(
        mean=mean, std=std, size=(size, size), own_mean=own_mean, own_std=own_std, **more
    )


def pictures(side: int, *, seed: int = 0) -> Tensor:
    """Smooth ones, as levels of 8 bits: [2,3,H,W]."""
    coarse = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    return (
        torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255
    ).round()


def normalised(levels_BCHW: Tensor, mean, std) -> Tensor:
    """By the data set's own table."""
    table = torch.from_numpy(lookup(mean, std))
    return torch.stack([table[c][levels_BCHW[:, c].long()] for c in range(len(mean))], 1)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (IMAGENET_MEAN, IMAGENET_STD),
        (HALF, HALF),
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),
        ((0.0, 1.0, 0.3), (1.0, 0.01, 3.0)),
    ],
)
def test_every_level_comes_back_to_the_bit(mean, std) -> None:
    levels = torch.arange(256.0).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = view(mean=mean, std=std).pixels(normalised(levels, mean, std))
    assert torch.equal(found, levels / 255)


def test_what_lies_between_levels_moves_by_half_a_step_at_most() -> None:
    mixed = 0.37 * pictures(16) + 0.63 * pictures(16, seed=1)
    x = ((mixed / 255).double() - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(
        IMAGENET_STD
    )[:, None, None]
    gap = (view().pixels(x.float()) - mixed / 255).abs().max()
    assert float(gap) < 0.5 / LEVELS + 2e-7


def test_grey_is_three_equal_channels() -> None:
    levels = pictures(8)[:, :1]
    found = view(mean=(0.3,), std=(0.4,))(normalised(levels, (0.3,), (0.4,)))
    assert torch.equal(found, (levels / 255).expand(-1, 3, -1, -1))


def test_in_its_own_size_the_teacher_sees_the_pixels_in_its_own_normalisation() -> None:
    levels = pictures(8)
    found = view(own_mean=HALF, own_std=HALF)(normalised(levels, IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(found, (levels / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "size", "crop"), [(24, 40, 1.0), (40, 24, 1.0), (40, 24, 0.8)])
def test_it_is_cut_and_resized_as_pillow_does_it(
    side: int, size: int, crop: float, interpolation: str
) -> None:
    levels = (
        50 + 0.6 * pictures(side)
    ).round()  # away from black and white, where bicubic is clipped
    found = view(size=size, crop=crop, interpolation=interpolation)(
        normalised(levels, IMAGENET_MEAN, IMAGENET_STD)
    )
    kept = round(side * crop)
    first = (side - kept) // 2
    how = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[
        interpolation
    ]
    for picture_HW, found_HW in zip(levels.flatten(0, 1), found.flatten(0, 1), strict=True):
        cut = Image.fromarray(
            picture_HW[first : first + kept, first : first + kept].numpy()
        )  # of float32, so nothing is rounded
        wanted_HW = np.asarray(cut.resize((size, size), how))
        assert np.abs(found_HW.numpy() * 255 - wanted_HW).max() < 1e-3


def test_of_a_picture_that_is_not_square_it_sees_the_middle() -> None:
    levels = pictures(12)[..., :8]
    found = view()(normalised(levels, IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(found, levels[:, :, 2:10] / 255)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [({"crop": 0.0}, "crop must be a share"), ({"interpolation": "lanczos"}, "bilinear")],
)
def test_refuses(kwargs: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        view(**kwargs)
