"""`spiketrain doctor`: finds what would stop a training, before it begins.

Each check runs on the node that it is about. Versions and GPUs are also compared between nodes.
Arithmetic is checked by the tests, bandwidth by NVIDIA's nccl-tests.
"""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import distributed

from pipeline.core.code_version import code_digest
from pipeline.launch.base import LaunchError, NoAnswer
from pipeline.launch.preflight_services import (
    Finding,
    Store,
    error_line,
    marker_in_store,
    of_mlflow,
    of_token,
    try_store,
)
from pipeline.launch.ray import Ray
from pipeline.measure.driver import unusable_gpus
from pipeline.track.mlflow import tracking_uri
from pipeline.train.checkpoint import absolute

PACKAGES = ("spiketrain", "torch", "deepspeed", "ray", "ffcv", "mlflow", "numpy", "numba", "timm")
DEVICES = Path("/dev")
MOUNTS = Path("/proc/mounts")
NODE_S = 300.0
"""For the checks on a node. The first time, FFCV and numba compile."""
STORE_S = 120.0
MEETING_S = 300.0
"""For processes that meet (`Meeting.patience_s`) and their start, on up to about 100 GPUs."""


@dataclass(frozen=True)
class NodeReport:
    """The state of one node."""

    name: str
    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    """Their names. Findings name the GPUs that cannot be used."""
    trains: bool = True
    """Whether workers may run there. The head of a cluster may have no cores for them."""
    findings: tuple[Finding, ...] = ()


def preflight(
    runs: Path, *, address: str | None = None, checkpoints: str | None = None
) -> list[Finding]:
    """Examine this machine, or each node of the Ray cluster at `address` (unless it is `local`).

    Args:
        runs: the folder of runs, which all nodes must share.
        checkpoints: the address of checkpoints, if they are not kept in the folder of runs.

    Raises:
        UserError: no cluster let us in, or the address of checkpoints holds credentials.
        OSError: the folder of runs cannot be made.
    """
    place = None if checkpoints is None else absolute(checkpoints)
    runs = runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    kept = [] if place is None else [Store(place)]
    with marker_in_store(str(runs)) as marker:
        if isinstance(marker, Finding):
            return [replace(marker, text=f"{marker.text}; nothing else was examined")]
        folder = Store(str(runs), marker)
        with _locked(runs / marker.name):
            if address in (None, "local"):  # a launch starts a cluster here, with its own token
                report = examine(folder)
                found = [*compare([report]), *report.findings, *map(try_store, kept)]
            else:
                with Ray(workers=0, device="cpu", address=address) as cluster:
                    found = [*_nodes(cluster, folder), *_stores(cluster, kept), _network(cluster)]
                    at = cluster.address_for_others()
                found.append(of_token(at))
    return [*found, of_mlflow(tracking_uri(runs))]


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Lock a file as the driver of a run does."""
    with file.open("a") as handle:
        with suppress(OSError):  # storage without locks: each node reports it
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


# ---------------------------------------------------------------------------------- of a cluster


def _nodes(cluster: Ray, folder: Store) -> list[Finding]:
    answers = cluster.nodes.run_on_each(
        lambda resources: examine(folder, resources), lambda resources: resources, within_s=NODE_S
    )
    found = list(compare([each for each in answers if isinstance(each, NodeReport)]))
    for each in answers:
        found += [_silent("node", each)] if isinstance(each, NoAnswer) else each.findings
    return found


def _stores(cluster: Ray, stores: Sequence[Store]) -> Iterator[Finding]:
    for store in stores:
        with marker_in_store(store.address) as marker:
            if isinstance(marker, Finding):
                yield marker
                marker = None
            given = replace(store, marker=marker)
            for each in cluster.nodes.run_on_each(
                try_store, lambda has, g=given: g, within_s=STORE_S
            ):
                yield _silent("storage", each) if isinstance(each, NoAnswer) else each


def _silent(check: str, node: NoAnswer) -> Finding:
    advice = "see that it is up, has what the other nodes have installed, and reaches the store"
    return Finding(check, "bad", f"{node.address} cannot be examined: {node.why}", advice)


def _network(cluster: Ray) -> Finding:
    """Whether the processes of a training reach one another's ports."""
    try:
        met = cluster.nodes.run_together(meet, Meeting, within_s=MEETING_S)
    except LaunchError as error:
        advice = (
            "open all ports between the nodes, name the network's interface with "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and see that no GPU is in use"
        )
        text = f"the processes of a training do not reach one another: {error}"
        return Finding("network", "bad", text, advice)
    if not met:
        return Finding("network", "ok", "there is room for one process, which needs no other")
    return Finding("network", "ok", f"{len(met)} processes reach one another")


@dataclass(frozen=True)
class Meeting:
    """The address of the first of `size` processes, to which the others connect."""

    host: str
    port: int
    size: int
    gpus: bool
    """Whether each process has a GPU."""

    @property
    def patience_s(self) -> float:
        """The time in which all have to connect. Each loads torch, perhaps from shared storage."""
        return 30.0 + 2.0 * self.size


def meet(meeting: Meeting, rank: int) -> None:
    """Add up a number with all other processes.

    Workers with GPUs average gradients over NCCL and exchange everything else over gloo. gloo has
    ports of its own and may choose another network interface, so both are tried.

    Raises:
        RuntimeError: a process did not connect in time, or the sum is wrong.
    """
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if meeting.gpus else "gloo",
        init_method=f"tcp://{meeting.host}:{meeting.port}",
        rank=rank,
        world_size=meeting.size,
        timeout=timedelta(seconds=meeting.patience_s),
    )
    try:
        for device, over in (("cuda", "NCCL"), ("cpu", "gloo"))[not meeting.gpus :]:
            number = torch.tensor(rank + 1, device=device)
            try:
                distributed.all_reduce(number)
            except RuntimeError as error:
                raise RuntimeError(f"over {over}: {' '.join(str(error).split())}") from error
            if int(number) != (wanted := meeting.size * (meeting.size + 1) // 2):
                raise RuntimeError(f"the sum over {over} must be {wanted}; got {int(number)}")
    finally:
        distributed.destroy_process_group()


def compare(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Compare versions and GPUs, which must be the same on all nodes."""
    if not reports:
        return
    advice = "install the same on all nodes: `LOCKED=1 make setup`"
    first, bad = reports[0].versions, []
    for package in first:
        found = {each.name: each.versions[package] for each in reports}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{name} has {number}" for name, number in found.items())
            bad.append(Finding("versions", "bad", f"{package}: {text}", advice))
        elif first[package] == "not installed":
            bad.append(Finding("versions", "bad", f"{package} is not installed", "`make setup`"))
    text = ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "ray", "ffcv"))
    text += f", the same on {len(reports)} nodes" if len(reports) > 1 else ""
    yield from bad or [Finding("versions", "ok", text)]

    well = [each for each in reports if all(found.check != "gpus" for found in each.findings)]
    if well:
        text = "; ".join(f"{each.name}: {', '.join(each.gpus) or 'no GPU'}" for each in well)
        advice = "workers wait for the slowest GPU: train on nodes that have the same GPUs"
        are_alike = len({each.gpus for each in well if each.gpus or each.trains}) <= 1
        yield Finding("gpus", "ok", text) if are_alike else Finding("gpus", "warn", text, advice)


# ------------------------------------------------------------------------------------ on a node


def examine(folder: Store, resources: Mapping[str, float] | None = None) -> NodeReport:
    """Examine the machine that this runs on.

    Args:
        folder: the folder of runs.
        resources: of the node, as Ray counts them. None: this machine, without Ray.
    """
    name = socket.gethostname()
    gpus, findings = _gpus(resources)
    findings = [replace(each, text=f"{name}: {each.text}") for each in (*findings, *_reading())]
    findings.append(storage := try_store(folder))
    if storage.state == "ok" and folder.marker is not None:
        runs = Path(folder.address)
        findings += [*_run_lock(name, runs / folder.marker.name), *_nfs(name, runs)]
    versions = {package: _version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "spiketrain's code": code_digest()}
    trains = resources is None or resources.get("CPU", 0) > 0
    return NodeReport(name, versions, gpus, trains, tuple(findings))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus(resources: Mapping[str, float] | None) -> tuple[tuple[str, ...], list[Finding]]:
    """The names of the GPUs here, and what is wrong with them."""
    if (unusable := unusable_gpus()) is not None:
        return (), [Finding("gpus", "bad", unusable.problem, unusable.advice)]
    names, findings, count = [], [], torch.cuda.device_count()
    advice = "see nvidia-smi and the kernel's log there; mend the GPU, or leave the node out"
    for index in range(count):
        try:
            names.append(torch.cuda.get_device_name(index))
            if (total := torch.ones(1024, device=f"cuda:{index}").sum().item()) != 1024:
                raise RuntimeError(f"the sum of 1024 ones must be 1024; got {total:g}")
        except Exception as error:  # a broken GPU raises errors of many kinds
            text = f"GPU {index} fails: {error_line(error)}"
            findings.append(Finding("gpus", "bad", text, advice))
    promised = _device_files() if resources is None else int(resources.get("GPU", 0))
    if count < promised:
        advice += "; without Ray, CUDA_VISIBLE_DEVICES names the GPUs to use"
        findings.append(Finding("gpus", "bad", f"torch finds {count} of {promised} GPUs", advice))
    return tuple(names), findings


def _device_files() -> int:
    """How many GPUs NVIDIA's driver has made files for; 0 where the user has chosen some."""
    return 0 if "CUDA_VISIBLE_DEVICES" in os.environ else len(list(DEVICES.glob("nvidia[0-9]*")))


def _reading() -> Iterator[Finding]:
    """Write a few images and read them as a training does: with FFCV, its library and numba."""
    try:
        import numpy as np
        from PIL import Image

        from pipeline.data.datasets.beton import Beton
        from pipeline.data.ffcv.tbb import require_tbb
        from pipeline.data.write.images import write_folder

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for index, part in enumerate(("train", "val")):
                (folder / "pictures" / part / "grey").mkdir(parents=True)
                for shade in (40, 200):
                    pixels = np.full((8, 8, 3), shade + index, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"pictures/{part}/grey/{shade}.png")
            write_folder(folder / "pictures", folder / "written", mode="raw")
            mean, std = (0.0,) * 3, (1.0,) * 3
            data = Beton(folder / "written", classes=1, size=8, crop="shift", mean=mean, std=std)
            loader = data.val(rank=0, world=1, micro_batch=2, threads=1)
            with closing(loader), loader.epoch(0) as batches:
                shades = sorted(round(float(x.mean()) * 255) for batch in batches for x in batch.x)
        if shades != [41, 201]:
            raise ValueError(f"shades 41 and 201 were read as {shades}")
    except Exception as error:  # missing libraries raise errors of many kinds
        text = f"images cannot be written and read: {error_line(error)}"
        yield Finding("ffcv", "bad", text, "infra/setup.sh builds FFCV and what it needs")
        return
    yield Finding("ffcv", "ok", "images were written and read")
    try:
        require_tbb()
    except ValueError as error:
        text = f"--loader-threads must be 1 here: {error_line(error)}"
        yield Finding("threads", "warn", text, "`pip install tbb`, or `infra/setup.sh --system`")


def _run_lock(name: str, file: Path) -> Iterator[Finding]:
    """Whether this node sees the driver's lock, by which two drivers are kept off one run.

    Some storage keeps locks to each machine (Lustre mounted with localflock, NFS with local_lock,
    some of FUSE), and some has no locks.
    """
    try:
        with file.open("r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = f"could lock a file in {file.parent} that the driver has locked"
    except BlockingIOError:
        return
    except OSError as error:
        found = f"cannot lock a file in {file.parent}: {error_line(error)}"
    advice = (
        "two drivers could train one run at once: mount it with locks that all nodes share "
        "(Lustre: flock, not localflock; NFS: neither nolock nor local_lock), or launch and resume "
        "from one machine alone"
    )
    yield Finding("storage", "bad", f"{name} {found}", advice)


def _nfs(name: str, folder: Path) -> Iterator[Finding]:
    """Whether `folder` lies on an NFS whose client may hide a new file.

    A user asks a run to stop or to save by a file in its folder. The client may answer for up to a
    minute (acdirmax) that it is not there, unless it is mounted with lookupcache=positive (nfs(5)).
    """
    try:
        lines = [line.split() for line in MOUNTS.read_text().splitlines()]
    except OSError:  # not Linux
        return
    # A space in a path is written \040. Of two mounts at one place the later one counts.
    mounts = [(Path(at.encode().decode("unicode_escape")), *more) for _, at, *more in lines]
    above = [each for each in mounts if folder.resolve().is_relative_to(each[0])]
    at, kind, options, *_ = max(reversed(above), key=lambda each: len(each[0].parts))
    safe = {"lookupcache=pos", "lookupcache=positive", "lookupcache=none", "noac"}
    if kind.startswith("nfs") and not safe & set(options.split(",")):
        text = f"{name}: the NFS at {at} may hide a new file for a minute"
        advice = "mount it with lookupcache=positive, so that a run sees a request to stop at once"
        yield Finding("storage", "warn", text, advice)
