"""Published sets of recordings, downloaded by `tonic`.

    nmnist        N-MNIST         34x34     60000 + 10000    Orchard et al. 2015,
                                                             doi:10.3389/fnins.2015.00437
    cifar10dvs    CIFAR10-DVS     128x128   10000            Li et al. 2017,
                                                             doi:10.3389/fnins.2017.00309
    gesture       DVS-Gesture     128x128   1176 + 288       Amir et al. 2017, CVPR (cut into
                                                             gestures; times in ms)
    ncaltech101   N-Caltech101    180x240   8709             Orchard et al. 2015

numpy reads the files of DVS-Gesture. tonic reads all other files. N-MNIST and DVS-Gesture
have a test set. The others are split as in published results: the first 90 % of each class, in the
order of the numbers in the file names, are the training set. A sensor that is not square is scaled
to a square frame.

tonic has the licence GPL-3.0. It is imported only here, and only while a set is written: `pip
install 'spiketrain[events]'`. Written sets are read without tonic. The recordings keep their own
licences.
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
from pipeline.data.write.recordings import Stream, sorted_stream
from pipeline.data.write.writer import Source

PublishedSet = Literal["nmnist", "cifar10dvs", "gesture", "ncaltech101"]
TRAIN_SHARE = 0.9  # of each class, if there is no test set
MIN_RECORDINGS = 5  # of a class that is split: 4 for training and 1 for evaluation


@dataclass(frozen=True)
class Layout:
    """The files of a set that tonic (1.7.0) has downloaded.

    Recordings are `<folder>/.../<class>/*`, or `<folder>/.../<label>.npy` if `classes` is set.
    """

    dataset: str  # the name of the class in tonic.datasets, and of its folder
    folders: tuple[str, ...]  # of train and val; a single folder is split
    suffix: str
    sensor: tuple[int, int]  # height, width in pixels
    classes: tuple[str, ...] | None = None  # the class of each label; None: the folder names


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
PUBLISHED: dict[PublishedSet, Layout] = {
    "nmnist": Layout("NMNIST", ("Train", "Test"), ".bin", (34, 34)),
    "cifar10dvs": Layout("CIFAR10DVS", (".",), ".aedat4", (128, 128)),
    "gesture": Layout(
        "DVSGesture", ("ibmGestureTrain", "ibmGestureTest"), ".npy", (128, 128), GESTURES
    ),
    "ncaltech101": Layout("NCALTECH101", ("Caltech101",), ".bin", (180, 240)),
}


@dataclass(frozen=True)
class PublishedRecording:
    path: Path
    label: int
    sensor: tuple[int, int]  # height, width in pixels

    def events(self) -> Stream:
        columns = _READERS[self.path.suffix](self.path)
        t_N, y_N, x_N, p_N = (np.asarray(values_N).astype(np.int64) for values_N in columns)
        require_data(len(t_N), "it holds no event")
        span = (int(t_N.min()), int(t_N.max()) + 1)
        return sorted_stream(t_N, y_N, x_N, p_N, sensor=self.sensor, span=span)

    def __str__(self) -> str:
        return str(self.path)


def published_sets(name: PublishedSet, source: Path) -> list[Source]:
    """The training and the evaluation recordings of a set, sorted by class and number.

    Raises:
        DataError: the recordings are not in `source` and cannot be downloaded, their classes differ
            from those of the set, or a class has too few recordings to be split.
    """
    layout = PUBLISHED[name]
    root = Path(source).expanduser() / layout.dataset
    paths = [_find_files(name, root, folder) for folder in layout.folders]
    classes = layout.classes or sorted({path.parent.name for path in paths[0]}, key=_natural_key)
    # With known classes, a file is named after its label, else its folder is named after its class.
    names = map(str, range(len(classes))) if layout.classes else classes
    labels = {name: label for label, name in enumerate(names)}
    parts = [[_recording(path, layout, labels) for path in part] for part in paths]
    if len(parts) == 1:
        parts = _split(parts[0])
    return [
        Source(part, list(classes), recordings, str(root.absolute()))
        for part, recordings in zip(("train", "val"), parts, strict=True)
    ]


def _find_files(name: PublishedSet, root: Path, folder: str) -> list[Path]:
    """The recordings in a folder of the set. If there are none, tonic downloads them."""
    layout = PUBLISHED[name]
    find = lambda: sorted((root / folder).rglob(f"*{layout.suffix}"), key=_natural_key)
    if paths := find():
        return paths
    import tonic.datasets

    dataset = getattr(tonic.datasets, layout.dataset)
    is_train = folder == layout.folders[0]
    options = {"train": is_train} if len(layout.folders) == 2 else {}
    address = getattr(dataset, "url", None) or (dataset.train_url if is_train else dataset.test_url)
    try:
        dataset(str(root.parent), **options)
        paths = find()
        require_data(paths, f"the download holds no *{layout.suffix}")
    # No network, a full disk or a changed archive: the user has the same choice in each case.
    except Exception as error:
        raise DataError(
            f"write events: {name} is not in {root.absolute()}, and tonic cannot download it"
            f" ({type(error).__name__}: {error}); download {address} and unpack it there, or"
            " pass another --source"
        ) from error
    return paths


def _recording(path: Path, layout: Layout, labels: dict[str, int]) -> PublishedRecording:
    name = path.parent.name if layout.classes is None else path.stem
    require_data(
        name in labels,
        f"write events: {path} must name its class, one of {first_few(list(labels), 10)}; got"
        f" {name!r}",
    )
    return PublishedRecording(path, labels[name], layout.sensor)


def _split(recordings: list[PublishedRecording]) -> list[list[PublishedRecording]]:
    """Split into training, the first 90 % of each class, and evaluation, the rest."""
    train, val = [], []
    # The recordings are sorted by class.
    for _, group in groupby(recordings, key=lambda recording: recording.label):
        class_recordings = list(group)
        require_data(
            len(class_recordings) >= MIN_RECORDINGS,
            f"write events: a class must have {MIN_RECORDINGS} or more recordings to be split; got"
            f" {len(class_recordings)} like {class_recordings[0]}",
        )
        train_count = round(TRAIN_SHARE * len(class_recordings))
        train += class_recordings[:train_count]
        val += class_recordings[train_count:]
    return [train, val]


def _natural_key(path: "Path | str") -> list[Any]:
    """A sort key that places file 10 after file 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _read_bin(path: Path) -> tuple[Any, ...]:
    """Read N-MNIST's and N-Caltech101's format: 5 bytes per event."""
    import tonic.io

    size = path.stat().st_size
    require_data(
        size % 5 == 0,
        f"it is cut short: its size must be a multiple of 5 bytes, one event; got {size}",
    )
    columns = [(name, np.int64) for name in "xytp"]
    events_N = tonic.io.read_mnist_file(str(path), np.dtype(columns))
    # N-Caltech101 shows an image in a window of the sensor; the events are moved to the corner.
    if path.parent.parent.name == "Caltech101" and len(events_N):
        events_N["x"] -= events_N["x"].min()
        events_N["y"] -= events_N["y"].min()
    return tuple(events_N[name] for name in "tyxp")


def _read_aedat4(path: Path) -> tuple[Any, ...]:
    import tonic.io

    try:
        events_N: Any = tonic.io.read_aedat4(str(path))
    except ImportError:  # the package aedat is not installed
        raise
    except Exception as error:  # aedat 2.3.0 raises RuntimeError, tonic 1.7.0 a bare Exception
        raise DataError(f"it is cut short or damaged ({error})") from error
    t, x, y, p = (events_N[name] for name in events_N.dtype.names)
    return t, y, x, p


def _read_npy(path: Path) -> tuple[Any, ...]:
    """Read DVS-Gesture as tonic stores it: columns x, y, polarity, milliseconds."""
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
