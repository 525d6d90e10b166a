"""Where FFCV cannot be imported, Pillow and OpenCV read the same samples in the same order."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.ffcv.format import JPG, read_tables
from pipeline.data.write import images
from pipeline.data.write.images import write_folder
from tests.helpers.loaders import read
from tests.test_installation import HIDE

LEVELS = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # values are levels


def batches(raw: str, photos: str, moving: str) -> dict[str, np.ndarray]:
    """All batches of an epoch, by name. Crops are shrunk and enlarged."""
    compiled_once = {"classes": 2, "colour": 9.0, "flip": "random"}
    data = {
        "raw": Beton(raw, size=32, erase=0.5, **compiled_once),
        "enlarged": Beton(raw, size=150, repeats=3, **compiled_once),
        "photos": Beton(
            photos, size=64, **compiled_once | {"colour": 0.0, "erase": 1e-9}, **LEVELS
        ),
        "moving": Events(moving, classes=16, steps=4, size=16, crop="shift", flip="random"),
    }
    found = {}
    for name, each in data.items():
        loaders = {
            "train": each.train(seed=5, batch_size=12, micro_batch=6),
            "val": each.val(micro_batch=5),
        }
        for part, loader in loaders.items():
            for field in ("x", "target", "index"):
                parts = [getattr(batch, field).numpy() for batch in read(loader, 3)]
                found[f"{name} {part} {field}"] = np.concatenate(parts)
    return found


WITHOUT = """
import warnings
import numpy as np
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    from tests.data.ffcv.test_without_ffcv import batches
    found = batches(*sys.argv[2:])
assert "ffcv" not in sys.modules
print(*(warning.message for warning in caught if "FFCV" in str(warning.message)), sep="\\n")
np.savez(sys.argv[1], **found)

from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
data = Beton(sys.argv[2], classes=2, size=32)
try:
    data.train(seed=5, batch_size=12, micro_batch=6, threads=2)
except DataError as error:
    print(error)
"""


pytestmark = pytest.mark.timeout(300)  # two processes compile


@pytest.fixture(scope="module")
def both(
    raw: tuple[Path, list[np.ndarray]],
    photos: Path,
    moving: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    file = tmp_path_factory.mktemp("without") / "batches.npz"
    folders = [str(folder) for folder in (raw[0], photos, moving)]
    code = f"HIDDEN = {{'ffcv'}}\n{HIDE}\n{WITHOUT}"
    words = [sys.executable, "-c", code, str(file), *folders]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "data: FFCV cannot be imported (No module named 'ffcv'): Pillow decodes images in one"
        " thread, which reads nothing ahead and is slower",
        "data: more than 1 loader thread needs FFCV; install it or set threads=1",
    ]
    with np.load(file) as found:
        return batches(*folders), dict(found)


@pytest.mark.full
def test_raw_images_and_recordings_have_the_same_bits(
    both: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
    with_ffcv, without = both
    assert with_ffcv.keys() == without.keys()
    for name, values in with_ffcv.items():
        if name not in ("photos train x", "photos val x"):
            assert np.array_equal(values, without[name]), name


@pytest.mark.full
def test_jpegs_differ_by_little(
    both: tuple[dict[str, np.ndarray], dict[str, np.ndarray]], photos: Path
) -> None:
    for part in ("train", "val"):
        values, others = (each[f"photos {part} x"] for each in both)
        index = both[0][f"photos {part} index"]
        is_jpg = read_tables(photos / f"{part}.beton").records["mode"][index] == JPG
        assert 0.3 < is_jpg.mean() < 0.7 and np.array_equal(values[~is_jpg], others[~is_jpg])
        assert 0 < np.abs(values[is_jpg] - others[is_jpg]).mean() < 1.5  # levels


def test_files_are_written_without_ffcv(
    photo_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "installed_version", lambda name: images.NOT_INSTALLED)
    monkeypatch.setattr(images, "_ffcv_imdecode", None)
    for manifest in write_folder(photo_folder, tmp_path, mode="mixed"):
        assert (tmp_path / manifest.file).read_bytes() == (photos / manifest.file).read_bytes()
