"""Published sets of recordings, read by `tonic` from the folder that it downloads to.

    nmnist        N-MNIST         34x34     60000 + 10000    Orchard et al. 2015,
                                                             doi:10.3389/fnins.2015.00437
    cifar10dvs    CIFAR10-DVS     128x128   10000            Li et al. 2017,
                                                             doi:10.3389/fnins.2017.00309
    gesture       DVS-Gesture     128x128   1176 + 288       Amir et al. 2017, CVPR (cut into
                                                             gestures; times in ms)
    ncaltech101   N-Caltech101    180x240   8709             Orchard et al. 2015

N-MNIST and DVS-Gesture have a test set. The others have none. As in published results, the first
90 % of each class are the training set, in the order of the numbers in the file names. A sensor
that is not square is squeezed to a square frame.

tonic is GPL-3.0. It is imported only here, and only while a set is written: `pip install
'spiketrain[events]'`. Written sets are read without tonic. The recordings keep their own licences.
"""

# N events of a recording

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.core.errors import DataError, require_data
from pipeline.core.units import first_few
from pipeline.data.write.recordings import Stream, in_order
from pipeline.data.write.writer import Source

Name = Literal["nmnist", "cifar10dvs", "gesture", "ncaltech101"]
TRAIN_SHARE = 0.9  # of each class, if there is no test set


@dataclass(frozen=True)
class Published:
    """The layout of a set in tonic (1.7.0).

    Recordings are `<folder>/<class>/*`, or files named after their class.
    """

    dataset: str  # the name in tonic.datasets, and of its folder
    folders: tuple[str, ...]  # for train and val; a single one is split
    suffix: str
    sensor: tuple[int, int]  # height, width in pixels
    # classes of files that are named `<label>.npy`; None: the folder names
    classes: tuple[str, ...] | None = None


GESTURES = (
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter-clockwise",
    "left arm clockwise",
    "left arm counter-clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
)
PUBLISHED: dict[Name, Published] = {
    "nmnist": Published("NMNIST", ("Train", "Test"), ".bin", (34, 34)),
    "cifar10dvs": Published("CIFAR10DVS", (".",), ".aedat4", (128, 128)),
    "gesture": Published(
        "DVSGesture", ("ibmGestureTrain", "ibmGestureTest"), ".npy", (128, 128), GESTURES
    ),
    "ncaltech101": Published("NCALTECH101", ("Caltech101",), ".bin", (180, 240)),
}


@dataclass(frozen=True)
class PublishedRecording:
    """One recording in a file."""

    path: Path
    label: int
    sensor: tuple[int, int]

    def events(self) -> Stream:
        t_N, y_N, x_N, p_N = (
            np.asarray(values_N).astype(np.int64)
            for values_N in _READERS[self.path.suffix](self.path)
        )
        require_data(len(t_N), "it holds no event")
        return in_order(
            t_N, y_N, x_N, p_N, sensor=self.sensor, span=(int(t_N.min()), int(t_N.max()) + 1)
        )

    def __str__(self) -> str:
        return str(self.path)


def published_sets(name: Name, source: Path) -> list[Source]:
    """The training and the evaluation recordings of a set, by class and number.

    Raises:
        DataError: the recordings are not in `source` and cannot be downloaded, or their classes
            differ from those of the set.
    """
    known, root = PUBLISHED[name], Path(source).expanduser() / PUBLISHED[name].dataset
    found = [_files(name, root, folder) for folder in known.folders]
    classes = known.classes or sorted({path.parent.name for path in found[0]}, key=_natural)
    folders = map(str, range(len(classes))) if known.classes else classes
    labels = {folder: label for label, folder in enumerate(folders)}
    items = [[_recording(path, known, labels) for path in paths] for paths in found]
    if len(items) == 1:
        items = _first_share(items[0])
    return [
        Source(part, list(classes), each, str(root.absolute()))
        for part, each in zip(("train", "val"), items, strict=True)
    ]


def _files(name: Name, root: Path, folder: str) -> list[Path]:
    """The recordings in a folder of the set, downloaded if there are none."""
    known = PUBLISHED[name]
    find = lambda: sorted((root / folder).rglob(f"*{known.suffix}"), key=_natural)
    if paths := find():
        return paths
    import tonic.datasets

    dataset, is_train = getattr(tonic.datasets, known.dataset), folder == known.folders[0]
    address = getattr(dataset, "url", None) or (dataset.train_url if is_train else dataset.test_url)
    try:
        dataset(str(root.parent), **({"train": is_train} if len(known.folders) == 2 else {}))
        paths = find()
        require_data(paths, f"the download holds no *{known.suffix}")
    # No network, a full disk or a changed archive: the user has the same choice in each case.
    except Exception as error:
        raise DataError(
            f"write events: {name} is neither in {root.absolute()} nor could tonic download it"
            f" ({type(error).__name__}: {error}); download {address} and unpack it there, or"
            " pass another --source"
        ) from error
    return paths


def _recording(path: Path, known: Published, labels: dict[str, int]) -> PublishedRecording:
    name = path.stem if known.classes else path.parent.name
    require_data(
        name in labels,
        f"write events: {path} must name its class, one of {first_few(list(labels), 10)}; got"
        f" {name!r}",
    )
    return PublishedRecording(path, labels[name], known.sensor)


def _first_share(items: list[PublishedRecording]) -> list[list[PublishedRecording]]:
    """Split into training, the first 90 % of each class, and evaluation, the rest."""
    train: list[PublishedRecording] = []
    val: list[PublishedRecording] = []
    for _, group in groupby(items, key=lambda item: item.label):  # they are in order of class
        of_class = list(group)
        cut = round(TRAIN_SHARE * len(of_class))
        train += of_class[:cut]
        val += of_class[cut:]
    require_data(
        train and val,
        f"write events: a class must have about 10 recordings to be split; got {len(items)} in all",
    )
    return [train, val]


def _natural(path: "Path | str") -> list[Any]:
    """A sort key that places file 10 after file 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _read_bin(path: Path) -> tuple[Any, ...]:
    """Read N-MNIST's and N-Caltech101's format: 5 bytes per event."""
    import tonic.io

    size = path.stat().st_size
    require_data(
        size % 5 == 0,
        f"it is cut short: {size} bytes are no whole number of events of 5 bytes",
    )
    kind = np.dtype([("x", np.int64), ("y", np.int64), ("t", np.int64), ("p", np.int64)])
    events_N = tonic.io.read_mnist_file(str(path), kind)
    # The coordinates of N-Caltech101 begin at the window of the sensor.
    if path.parent.parent.name == "Caltech101" and len(events_N):
        events_N["x"] -= events_N["x"].min()
        events_N["y"] -= events_N["y"].min()
    return tuple(events_N[name] for name in "tyxp")


def _read_aedat4(path: Path) -> tuple[Any, ...]:
    import tonic.io

    try:
        events_N: Any = tonic.io.read_aedat4(str(path))
    except ImportError:  # of the package aedat
        raise
    except Exception as error:  # aedat 2.3.0 raises RuntimeError, tonic 1.7.0 a bare Exception
        raise DataError(f"it is cut short or damaged ({error})") from error
    t, x, y, p = events_N.dtype.names
    return events_N[t], events_N[y], events_N[x], events_N[p]


def _read_npy(path: Path) -> tuple[Any, ...]:
    """Read DVS-Gesture in tonic's format: columns x, y, polarity, milliseconds."""
    try:
        events_N4 = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"it is cut short or damaged ({error})") from error
    require_data(
        events_N4.ndim == 2 and events_N4.shape[1] == 4,
        f"it must hold events of 4 numbers; got shape {events_N4.shape}",
    )
    x_N, y_N, p_N, ms_N = events_N4.T
    return ms_N.astype(np.int64) * 1000, y_N, x_N, p_N


_READERS = {".bin": _read_bin, ".aedat4": _read_aedat4, ".npy": _read_npy}
