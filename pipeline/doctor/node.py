"""What one machine is like. Runs on every node of a cluster, and takes nothing for granted but the package itself."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.code import code_digest
from pipeline.doctor.card import Card, cards
from pipeline.doctor.failed import failed
from pipeline.doctor.mounts import remembers_absence
from pipeline.doctor.run_lock import tried
from pipeline.marker import Marker
from pipeline.measure.driver import Unusable, unusable_cards

PACKAGES = ("spiketrain", "torch", "deepspeed", "ray", "ffcv", "mlflow", "numpy", "numba", "timm")
DEVICES = Path("/dev")
WRITTEN = 32 << 20
"""bytes that are written to see how fast a folder is"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the driver wants to know of each node."""

    runs: str
    """the folder that all must see"""
    marker: Marker
    """which is in it, where the folder is the driver's"""
    resources: Mapping[str, float] | None = None
    """of the node, as Ray counts them; None: no Ray is asked for this machine"""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine as it was found. What could not be found out is told as text, beginning with `failed`."""

    name: str
    versions: dict[str, str]
    gpus: tuple[Card, ...]
    promised_gpus: int
    """how many there are to be at least: those that Ray gives to workers, or that NVIDIA's driver has made files for"""
    unusable: Unusable | None
    """what keeps torch from all of them"""
    trains: bool
    """whether workers may come here; the head of a cluster may have no cores for them"""
    sees_runs: bool
    """the driver's marker is in the folder of runs"""
    run_lock: str
    """`held`, where this node sees that the driver has locked its marker; `free`, where it could lock it as well"""
    written_bytes_per_s: float | str
    """to the folder of runs, down to the disk"""
    free_bytes: int | str
    """there"""
    remembers_absence: str | None
    """the NFS mount of the folder of runs, where its client may not see a new file at once"""
    threading_layer: str
    """of numba, which decodes images, where it may choose: tbb, if there is any"""
    ffcv: str
    """`ok`, where a file was written and read again"""
    device: str
    """that this was tried on: cuda, where there is one"""
    off: dict[str, float | str]
    """our ops against their reference: by how much they are off, in parts of the largest number"""
    locks: dict[str, float]
    """of compilations that have begun and not ended: path, and age in seconds"""


def examine(asked: Asked) -> Node:
    runs, unusable = Path(asked.runs), unusable_cards()
    gpus = cards() if unusable is None else ()  # each would only say the same
    device = "cuda" if gpus else "cpu"
    promised = _device_files() if asked.resources is None else int(asked.resources.get("GPU", 0))
    return Node(
        name=socket.gethostname(),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "spiketrain's code": code_digest(),
        },
        gpus=gpus,
        promised_gpus=promised,
        unusable=unusable,
        trains=asked.resources is None or asked.resources.get("CPU", 0) > 0,
        sees_runs=asked.marker.is_in(runs),
        run_lock=tried(runs / asked.marker.name),
        written_bytes_per_s=_speed(runs),
        free_bytes=_free(runs),
        remembers_absence=remembers_absence(runs),
        threading_layer=_threading_layer(),
        ffcv=_ffcv(),
        device=device,
        off=_off(device),
        locks=compilation_locks(),
    )


def compilation_locks() -> dict[str, float]:
    """torch waits for a lock file of an extension until it is gone, and whoever was killed while compiling left his."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    found: dict[str, float] = {}
    for folder, _, files in os.walk(root):  # passes over what goes meanwhile
        if "lock" in files:
            file = Path(folder) / "lock"
            with suppress(FileNotFoundError):  # whoever compiled has ended
                found[str(file)] = max(0.0, time.time() - file.stat().st_mtime)
    return dict(sorted(found.items()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_files() -> int:
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # whoever has said which to use may mean none
        return 0
    return len(list(DEVICES.glob("nvidia[0-9]*")))


def _off(device: str) -> dict[str, float | str]:
    from pipeline.doctor.arithmetic import differences

    return differences(device)


def _speed(folder: Path) -> float | str:
    data = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            for _ in range(WRITTEN // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - begun)
    except OSError as error:
        return failed(error)


def _free(folder: Path) -> int | str:
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        return failed(error)


def _threading_layer() -> str:
    try:
        import numba

        from pipeline.data.tbb import demand_tbb

        demand_tbb()

        @numba.njit(parallel=True)
        def total(count: int) -> int:
            found = 0
            for one in numba.prange(count):
                found += one
            return found

        total(8)
        return str(numba.threading_layer())
    except (ImportError, ValueError, RuntimeError) as error:
        return failed(error)


def _ffcv() -> str:
    """Writes a few images and reads them as training does: the library, its compiled part and its just-in-time compiler."""
    try:
        import numpy as np
        from PIL import Image

        from pipeline.data.beton import Beton
        from pipeline.data.write import write_folder

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for place, part in enumerate(("train", "val")):
                (folder / "pictures" / part / "grey").mkdir(parents=True)
                for shade in (40, 200):
                    pixels = np.full((8, 8, 3), shade + place, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / "pictures" / part / "grey" / f"{shade}.png")
            write_folder(folder / "pictures", folder / "written", mode="raw")
            data = Beton(folder / "written", classes=1, size=8, crop="shift", mean=(0.0,) * 3, std=(1.0,) * 3)
            with closing(data.val(rank=0, world=1, micro_batch=2, threads=1)) as loader, loader.epoch(0) as batches:
                shades = sorted(round(float(x.mean()) * 255) for batch in batches for x in batch.x)
        return "ok" if shades == [41, 201] else f"failed: shades 41 and 201 were read as {shades}"
    except Exception as error:  # whatever it is, it is what this machine has to tell
        return failed(error)
