"""`spiketrain doctor`: finds problems that would stop a training, before it begins.

Each check runs on the node that it examines: versions, GPUs and their driver, the shared folders
and their locks, reading images with FFCV. Versions and GPUs are also compared between nodes. Then
the nodes connect to one another, and a request is sent to MLflow.
"""

import fcntl
import os
import platform
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.text import Text
from torch import distributed

from pipeline.core.checks import require
from pipeline.core.code_version import code_digest
from pipeline.core.errors import DataError
from pipeline.core.files import Marker
from pipeline.core.printing import new_console, say
from pipeline.core.secrets import without_secrets
from pipeline.core.units import counted
from pipeline.launch.cluster import Cluster
from pipeline.launch.ray import Ray
from pipeline.launch.ray_cluster import (
    alive_nodes,
    innermost,
    worker_environment,
)
from pipeline.measure.unusable_gpus import unusable_gpus
from pipeline.track.mlflow import tracking_uri
from pipeline.track.mlflow_store import connect, is_server, reason, sqlite_file, without_password
from pipeline.train.checkpoint import absolute, folder_of

PACKAGES = ("spiketrain", "torch", "deepspeed", "ray", "ffcv", "mlflow", "numpy", "numba", "timm")
DEVICES = Path("/dev")
NODE_S = 300.0  # For the checks on a node. The first time, FFCV and numba compile.
MLFLOW_S = 10.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: Literal["ok", "warn", "bad"]  # `bad`: a training would fail
    text: str
    advice: str = ""


@dataclass(frozen=True)
class NodeReport:
    """The state of one node."""

    name: str
    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()  # Their names. Findings name the GPUs that cannot be used.
    trains: bool = True  # Whether workers may run there: the head of a cluster may have no cores.
    findings: tuple[Finding, ...] = ()


# Places for runs and checkpoints, the runs first: folders, or addresses such as s3://bucket/prefix.
# Each has the marker that the driver wrote there; None: it wrote none.
Stores = Mapping[str, Marker | None]

_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "bad": ("BAD", "bold red")}


def preflight(
    runs: Path, *, address: str | None = None, checkpoints: str | None = None
) -> list[Finding]:
    """Examine this machine, or each node of the Ray cluster at `address` (unless it is `local`).

    Args:
        runs: the folder of runs, which all nodes must share.
        checkpoints: the address of checkpoints, if they are not kept in the folder of runs.

    Raises:
        UserError: no cluster accepts this process, or the address of checkpoints has credentials.
        OSError: the folder of runs cannot be made.
    """
    places = [str(runs.absolute())] + ([] if checkpoints is None else [absolute(checkpoints)])
    runs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stores: dict[str, Marker | None] = {}
        for place in places:
            try:
                stores[place] = stack.enter_context(_marker_in(place))
            except Exception as error:
                bad = _unusable(place, "this machine", error)
                return [replace(bad, text=f"{bad.text}; nothing else was examined")]
        if address in (None, "local"):  # a launch starts a cluster here
            findings = [*_findings([examine(stores, None)])]
        else:
            stack.enter_context(Ray(Cluster(device="cpu", address=address), needs_room=False))
            findings = [*_findings(_examine_nodes(stores)), _network(runs.absolute())]
    return [*findings, check_mlflow(tracking_uri(runs))]


def print_findings(found: Sequence[Finding], console: Console | None = None) -> None:
    """Print a line for each finding, its advice on the next line, and a summary at the end."""
    console = console or new_console()
    for each in found:
        mark, style = _MARKS[each.state]
        label = Text.assemble((f"{mark:4}", style), f"  {each.check:9} ")
        say(console, each.text, label=label)
        if each.advice:
            say(console, each.advice, label=" " * label.cell_len)
    bad = sum(each.state == "bad" for each in found)
    say(console, "fit to train" if not bad else f"not fit to train: {bad} of the above to mend")


@contextmanager
def _marker_in(place: str) -> Iterator[Marker | None]:
    """A marker that nodes look for in a folder. It is locked as a driver locks its run.

    None for an address, which all nodes share.
    """
    folder = folder_of(place)
    if folder is None:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    marker = Marker(f".doctor-{secrets.token_hex(8)}", secrets.token_hex(16))
    file = folder / marker.name
    try:
        file.write_text(marker.content)
        with file.open("a") as handle:
            with suppress(OSError):  # storage without locks: each node reports it
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield marker
    finally:
        file.unlink(missing_ok=True)


def _bad(check: str, what: str, error: Exception, advice: str) -> Finding:
    text = without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Finding(check, "bad", f"{what}: {text}", advice)


# ---------------------------------------------------------------------------------- of a cluster


def _findings(answers: Sequence[NodeReport | Finding]) -> Iterator[Finding]:
    yield from compare([each for each in answers if isinstance(each, NodeReport)])
    for each in answers:
        yield from each.findings if isinstance(each, NodeReport) else [each]


def _examine_nodes(stores: Stores) -> list[NodeReport | Finding]:
    """The report of each node that is up, the head first, or why it cannot be examined."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run, nodes = ray.remote(examine), alive_nodes()
    tasks = [
        run.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(stores, node["Resources"])
        for node in nodes
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=NODE_S)
    answers: list[NodeReport | Finding] = []
    for task, node in zip(tasks, nodes, strict=True):
        try:
            answers.append(ray.get(task, timeout=0))
        except RayError as error:
            why = innermost(getattr(error, "cause", None) or error)
            if isinstance(error, GetTimeoutError):
                ray.cancel(task, force=True)
                why = "it does not answer in time"
            answers.append(
                Finding(
                    "node",
                    "bad",
                    f"{node['NodeManagerAddress']} cannot be examined: {why}",
                    "see that it is up, has what the other nodes have installed, and reaches the"
                    " storage",
                )
            )
    return answers


def _network(runs: Path) -> Finding:
    """Whether the processes of a training reach one another's ports.

    There is one process for each GPU of the cluster; in a cluster without GPUs, one for each node
    with cores.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    nodes = [node["Resources"] for node in alive_nodes()]
    gpus = sum(int(has.get("GPU", 0)) for has in nodes)
    count = gpus or sum(has.get("CPU", 0) > 0 for has in nodes)
    with tempfile.TemporaryDirectory(
        dir=runs, prefix=".doctor-", ignore_cleanup_errors=True
    ) as storage:
        trainer = TorchTrainer(
            check_sums,
            torch_config=TorchConfig("nccl" if gpus else "gloo", timeout_s=30 + 2 * count),
            scaling_config=ScalingConfig(
                num_workers=count, use_gpu=gpus > 0, placement_strategy="SPREAD"
            ),
            run_config=RunConfig(
                storage_path=storage,
                failure_config=FailureConfig(controller_failure_limit=0),
                worker_runtime_env={
                    "env_vars": worker_environment(
                        threads=1, loader_threads=1, gpus=gpus > 0, alone=False
                    )
                },
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what a process raised in several layers
            return Finding(
                "network",
                "bad",
                f"the processes of a training do not reach one another: {innermost(error)}",
                "open all ports between the nodes, name the network's interface with"
                " GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and see that no GPU is in use",
            )
    return Finding("network", "ok", f"{counted(count, 'process')} reached one another")


def check_sums() -> None:
    """Add up a number with all other processes.

    Workers with GPUs average gradients over NCCL and exchange everything else over gloo. gloo has
    ports of its own and may choose another network interface, so both are tried.

    Raises:
        RuntimeError: a process did not answer in time, or a sum is wrong.
    """
    size = distributed.get_world_size()
    gloo = distributed.new_group(backend="gloo")
    on_gpu = [("cuda", None)] if distributed.get_backend() == "nccl" else []
    for device, group in [*on_gpu, ("cpu", gloo)]:
        number = torch.tensor(distributed.get_rank() + 1, device=device)
        distributed.all_reduce(number, group=group)
        if int(number) != (wanted := size * (size + 1) // 2):
            raise RuntimeError(f"the sum on {device} must be {wanted}; got {int(number)}")


def compare(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Compare versions and GPUs, which must be the same on all nodes."""
    if not reports:
        return
    first, bad = reports[0].versions, []
    for package in first:
        if len({each.versions[package] for each in reports}) > 1:
            text = ", ".join(f"{each.name} has {each.versions[package]}" for each in reports)
            bad.append(
                Finding(
                    "versions",
                    "bad",
                    f"{package}: {text}",
                    "install the same on all nodes: `LOCKED=1 make setup`",
                )
            )
        elif first[package] == "not installed":
            bad.append(Finding("versions", "bad", f"{package} is not installed", "`make setup`"))
    text = ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "ray", "ffcv"))
    text += f", the same on {len(reports)} nodes" if len(reports) > 1 else ""
    yield from bad or [Finding("versions", "ok", text)]

    healthy = [each for each in reports if all(found.check != "gpus" for found in each.findings)]
    if healthy:
        text = "; ".join(f"{each.name}: {', '.join(each.gpus) or 'no GPU'}" for each in healthy)
        if len({each.gpus for each in healthy if each.gpus or each.trains}) <= 1:
            yield Finding("gpus", "ok", text)
        else:
            advice = "workers wait for the slowest GPU: train on nodes that have the same GPUs"
            yield Finding("gpus", "warn", text, advice)


# ------------------------------------------------------------------------------------ on a node


def examine(stores: Stores, resources: Mapping[str, float] | None) -> NodeReport:
    """Examine the machine that this runs on.

    Args:
        resources: of the node, as Ray counts them. None: this machine, without Ray.
    """
    name = socket.gethostname()
    gpus, findings = _gpus(resources)
    findings = [replace(each, text=f"{name}: {each.text}") for each in (*findings, *_try_reading())]
    tried = [try_store(address, marker) for address, marker in stores.items()]
    findings += tried
    runs, marker = next(iter(stores.items()))
    if tried[0].state == "ok" and marker is not None:
        findings += [*_run_lock(name, Path(runs) / marker.name), *_nfs(name, Path(runs))]
    versions = {package: _version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "spiketrain's code": code_digest()}
    return NodeReport(
        name,
        versions,
        gpus,
        trains=resources is None or resources.get("CPU", 0) > 0,
        findings=tuple(findings),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus(resources: Mapping[str, float] | None) -> tuple[tuple[str, ...], list[Finding]]:
    if (unusable := unusable_gpus()) is not None:
        return (), [Finding("gpus", "bad", unusable.problem, unusable.advice)]
    advice = "see nvidia-smi and the kernel's log there; repair the GPU, or leave the node out"
    names: list[str] = []
    findings: list[Finding] = []
    for index in range(count := torch.cuda.device_count()):
        try:
            total = torch.ones(1024, device=f"cuda:{index}").sum().item()
            require(total == 1024, f"the sum of 1024 ones must be 1024; got {total:g}")
            names.append(torch.cuda.get_device_name(index))
        except Exception as error:  # of many types
            findings.append(_bad("gpus", f"GPU {index} fails", error, advice))
    # Without Ray, NVIDIA's driver has a file for each GPU. The user may have chosen some GPUs.
    files = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else len(list(DEVICES.glob("nvidia[0-9]*")))
    promised = files if resources is None else int(resources.get("GPU", 0))
    if count < promised:
        advice += "; without Ray, CUDA_VISIBLE_DEVICES names the GPUs to use"
        findings.append(Finding("gpus", "bad", f"torch finds {count} of {promised} GPUs", advice))
    return tuple(names), findings


def _try_reading() -> Iterator[Finding]:
    """Write a few images and read them as a training does: with FFCV, its library and numba."""
    try:
        shades = _read_written((41, 201))
        require(shades == [41, 201], f"shades 41 and 201 were read as {shades}")
        yield Finding("ffcv", "ok", "images were written and read")
    except Exception as error:
        yield _bad(
            "ffcv",
            "images cannot be written and read",
            error,
            "infra/setup.sh builds FFCV and what it needs",
        )
        return
    from pipeline.data.ffcv.numba_threads import require_tbb

    try:
        require_tbb()
    except DataError as error:
        bad = _bad(
            "threads",
            "--loader-threads must be 1 here",
            error,
            "`pip install tbb`, or `infra/setup.sh --system`",
        )
        yield replace(bad, state="warn")


def _read_written(shades: Sequence[int]) -> list[int]:
    from PIL import Image

    from pipeline.data.datasets.beton import Beton
    from pipeline.data.write.images import write_folder

    with tempfile.TemporaryDirectory() as name:
        pictures, written = Path(name) / "pictures", Path(name) / "written"
        for part in ("train", "val"):
            (folder := pictures / part / "grey").mkdir(parents=True)
            for shade in shades:
                Image.new("RGB", (8, 8), (shade,) * 3).save(folder / f"{shade}.png")
        write_folder(pictures, written, mode="raw")
        mean, std = (0.0,) * 3, (1.0,) * 3
        loader = Beton(written, classes=1, size=8, crop="shift", mean=mean, std=std).val(
            rank=0, world=1, micro_batch=2, threads=1
        )
        with closing(loader), loader.epoch(0) as batches:
            return sorted(round(float(x.mean()) * 255) for batch in batches for x in batch.x)


def _run_lock(name: str, file: Path) -> Iterator[Finding]:
    """Whether this node sees the driver's lock, which excludes a second driver from a run.

    Some storage keeps locks local to each machine (Lustre mounted with localflock, NFS with
    local_lock, some FUSE file systems), and some storage has no locks.
    """
    try:
        with file.open("r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise OSError("a second lock was granted")
    except BlockingIOError:
        return
    except OSError as error:
        yield _bad(
            "storage",
            f"{name} does not see the driver's lock in {file.parent}",
            error,
            "two drivers could train one run at once: mount it with locks that all nodes share"
            " (Lustre: flock, not localflock; NFS: neither nolock nor local_lock), or launch and"
            " resume from one machine alone",
        )


def _nfs(name: str, folder: Path) -> Iterator[Finding]:
    """Whether `folder` lies on an NFS whose client may hide a new file.

    A user asks a run to stop or to save by a file in its folder. The client may report for up to a
    minute (acdirmax) that the file does not exist, unless the NFS is mounted with
    lookupcache=positive (nfs(5)).
    """
    above = [
        each
        for each in psutil.disk_partitions(all=True)
        if folder.resolve().is_relative_to(each.mountpoint)
    ]
    # Of two mounts at one place the later one counts.
    mount = max(reversed(above), key=lambda each: len(Path(each.mountpoint).parts))
    safe = {"lookupcache=pos", "lookupcache=positive", "lookupcache=none", "noac"}
    if mount.fstype.startswith("nfs") and not safe & set(mount.opts.split(",")):
        yield Finding(
            "storage",
            "warn",
            f"{name}: the NFS at {mount.mountpoint} may hide a new file for a minute",
            "mount it with lookupcache=positive, so that a run sees a request to stop at once",
        )


# --------------------------------------------------------------------------------------- storage


def try_store(address: str, marker: Marker | None = None) -> Finding:
    """Find the driver's marker. Write, list, read and delete an object of this node."""
    node, folder = socket.gethostname(), folder_of(address)
    if folder is not None and marker is not None and not marker.is_in(folder):
        return Finding(
            "storage",
            "bad",
            f"{node} does not see {address} as the driver does",
            "mount the same storage at the same path on every node, or name such storage with"
            " --runs or --checkpoints",
        )
    try:
        import fsspec

        url = address.rstrip("/") if folder is None else f"file://{folder}"
        fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        name, content = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(16)
        fs.pipe_file(f"{root}/{name}", content)
        try:
            is_whole = (
                name in {PurePosixPath(each).name for each in fs.ls(root, detail=False)}
                and fs.cat_file(f"{root}/{name}") == content
            )
        finally:
            fs.rm_file(f"{root}/{name}")
        require(is_whole, "it does not give back what was written")
    except Exception as error:
        return _unusable(address, node, error)
    free = "" if folder is None else f"; {shutil.disk_usage(folder).free / 1e9:.1f} GB are free"
    return Finding(
        "storage", "ok", f"{node}: an object was written to {address}, read and deleted{free}"
    )


def _unusable(address: str, node: str, error: Exception) -> Finding:
    return _bad(
        "storage",
        f"{node} cannot use {address}",
        error,
        "see its owner, rights and mount, and make room if the disk or a quota is full"
        if folder_of(address) is not None
        else "see its rights, and the keys in the environment there (AWS_ACCESS_KEY_ID; for"
        " another store than Amazon's also AWS_ENDPOINT_URL)",
    )


# ---------------------------------------------------------------------------------------- MLflow


def check_mlflow(uri: str) -> Finding:
    """The finding about MLflow. A file must be writable. A server must answer, and should ask for a
    password.
    """
    if (file := sqlite_file(uri)) is not None:
        try:  # MLflow makes the file and its folder. SQLite keeps a journal beside the file.
            tempfile.TemporaryFile(dir=next(each for each in file.parents if each.exists())).close()
            if file.exists():
                file.open("r+b").close()
        except OSError as error:
            return _bad(
                "mlflow",
                f"the store {file} cannot be written",
                error,
                "see its owner and rights, or MLFLOW_TRACKING_URI",
            )
        return Finding("mlflow", "ok", f"the store is the file {file}")
    if not is_server(uri):
        return Finding(
            "mlflow",
            "bad",
            "MLFLOW_TRACKING_URI must be http://HOST:PORT, https://HOST or sqlite:///FILE; got"
            " another kind of store",
            "unset it to use mlflow.db in the folder of runs",
        )
    shown = without_password(uri).rstrip("/")
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # an error of MLflow or of its transport
        return Finding(
            "mlflow",
            "bad",
            f"{shown}: {reason(uri, error)}",
            "see MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, or _TOKEN; a training goes on"
            " without the server, and `spiketrain sync` delivers later",
        )
    import requests

    with suppress(requests.RequestException):
        answer = requests.get(
            f"{shown}/api/2.0/mlflow/experiments/search?max_results=1",
            auth=lambda request: request,  # else a login in ~/.netrc would be used
            timeout=MLFLOW_S,
            allow_redirects=False,
        )
        if answer.status_code == 200:
            return Finding(
                "mlflow",
                "warn",
                f"{shown} answers without a password",
                "let it ask for a password: `mlflow server --app-name basic-auth` (infra/mlflow)",
            )
    return Finding("mlflow", "ok", f"{shown} answers, and asks for a password")
