"""Small pictures in the places of the three packages: ellipses cut from scikit-learn's two
photographs, on pieces of these.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.data.write.stamp_pictures import BACKGROUNDS, CLASSES, PICTURES_FOLDER

EACH = 6  # objects of a class

STAMPS = PICTURES_FOLDER / "tuxpaint" / "stamps"
real = pytest.mark.skipif(
    not all(path.exists() for path in (STAMPS, *(PICTURES_FOLDER / name for name in BACKGROUNDS))),
    reason="looks at the real pictures, which `make pictures` installs",
)


def make(share: Path) -> Path:
    """A tree that stands for /usr/share; objects of 40 to 70 pixels, one of each class a palette
    image, one grey.
    """
    photos, rng = (
        [Image.fromarray(photo) for photo in load_sample_images().images],
        np.random.default_rng(0),
    )
    for folders in CLASSES.values():
        for folder in folders:
            (share / "tuxpaint" / "stamps" / folder).mkdir(parents=True, exist_ok=True)
        for number in range(EACH):
            picture = cut(photos[number % 2], rng).convert(
                ("RGBA", "P", "LA")[min(number, 2)] if number < 3 else "RGBA"
            )
            picture.save(
                share
                / "tuxpaint"
                / "stamps"
                / folders[number % len(folders)]
                / f"object_{number}.png"
            )
    for number, name in enumerate(BACKGROUNDS):
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        piece(photos[number % 2], rng, 200, 140).save(share / name)
    return share


def cut(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in rng.integers(40, 70, 2))
    picture = piece(photo, rng, width, height).convert("RGBA")
    y_h1, x_1w = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    alpha_hw = np.clip((1 - x_1w**2 - y_h1**2) * 1000, 0, 255)  # a soft edge
    picture.putalpha(Image.fromarray(alpha_hw.astype(np.uint8)))
    return picture


def piece(photo: Image.Image, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    left, top = (
        int(rng.integers(0, photo.width - width)),
        int(rng.integers(0, photo.height - height)),
    )
    return photo.crop((left, top, left + width, top + height))
