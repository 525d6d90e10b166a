"""Real JPEGs of many sizes, cut at test time from scikit-learn's two photographs; the .beton files
made of them.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers.made_pictures import make

TRAIN, VAL = 61, 13  # images: no multiple of any batch size used here


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with the classes china and flower; JPEGs from 40x40 to 200x200 pixels, a
    progressive and a grey one too.
    """
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    photos = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    for name, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            kind = ("china", "flower")[i % 2]
            photo = Image.fromarray(photos[kind])
            width, height = (int(side) for side in rng.integers(40, 200, 2))
            left, top = (
                int(rng.integers(0, photo.width - width)),
                int(rng.integers(0, photo.height - height)),
            )
            cut = photo.crop((left, top, left + width, top + height))
            path = root / name / kind / f"{i:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cut.convert("L" if i == 6 else "RGB").save(path, quality=85, progressive=i == 5)
    return root


@pytest.fixture(scope="session")
def photos(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as .beton: half of the images as JPEG, half raw."""
    from pipeline.data.write.images import write_folder

    out = tmp_path_factory.mktemp("beton")
    write_folder(photo_folder, out, mode="mixed")
    return out


@pytest.fixture(scope="session")
def raw(
    photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[np.ndarray]]:
    """The photographs stored raw, and their pixels in order: a folder and a list of uint8
    [h,w,3].
    """
    from pipeline.data.write.images import write_folder

    out = tmp_path_factory.mktemp("raw")
    write_folder(photo_folder, out, mode="raw")
    paths = [
        path
        for kind in ("china", "flower")
        for path in sorted((photo_folder / "train" / kind).iterdir())
    ]
    return out, [np.asarray(Image.open(path).convert("RGB")) for path in paths]


@pytest.fixture(scope="session")
def small_fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 + 30 random grey images in Fashion-MNIST's file format: a folder to pass as `source`."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("idx")
    for prefix, count in (("train", 100), ("t10k", 30)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        for array, name in (
            (images, "images-idx3-ubyte"),
            ((np.arange(count) % 10).astype(np.uint8), "labels-idx1-ubyte"),
        ):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{name}").write_bytes(head + array.tobytes())
    return folder


@pytest.fixture(scope="session")
def fashion(small_fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_fashion` as .beton."""
    from pipeline.data.write.images import write_fashion

    out = tmp_path_factory.mktemp("fashion")
    write_fashion(out, source=small_fashion)
    return out


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of small pictures in place of /usr/share; a test that changes it takes a copy."""
    return make(tmp_path_factory.mktemp("share"))


@pytest.fixture(scope="session")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of moving shapes in 12 slices of 16 x 16 pixels."""
    from pipeline.data.write.events import write_events

    out = tmp_path_factory.mktemp("moving")
    write_events("moving", out, size=16, slices=12, samples=TRAIN, val_samples=VAL)
    return out


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A copy of `photos` that a test may damage."""
    return shutil.copytree(photos, tmp_path / "copy")


@pytest.fixture
def copy(moving: Path, tmp_path: Path) -> Path:
    """A copy of `moving` that a test may damage."""
    return shutil.copytree(moving, tmp_path / "moving")
