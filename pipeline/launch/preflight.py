"""`spiketrain doctor`: finds problems of a training before it starts.

Each node checks its versions, its GPUs and their driver, the shared folders and their locks, and
whether FFCV can read images. Versions and GPUs are also compared between nodes. Then the nodes of a
cluster connect to one another, and this machine checks MLflow.
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
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text
from torch import distributed

from pipeline.core.checks import require
from pipeline.core.code_version import NOT_INSTALLED, code_digest, installed_version
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
from pipeline.measure.memory import DEVICES, unusable_gpus
from pipeline.track.mlflow import tracking_uri
from pipeline.track.mlflow_store import connect, is_server, reason, sqlite_file, without_password
from pipeline.train.checkpoint import absolute, folder_of

PACKAGES = ("spiketrain", "torch", "deepspeed", "ray", "ffcv", "mlflow", "numpy", "numba", "timm")
NODE_TIMEOUT_S = 300.0  # For the checks on a node. The first time, FFCV and numba compile.


@dataclass(frozen=True)
class Finding:
    check: str
    state: Literal["ok", "warn", "bad"]  # `bad`: to be solved before a training
    text: str
    advice: str = ""


@dataclass(frozen=True)
class NodeReport:
    name: str
    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()  # Names of the usable GPUs. Findings name the unusable ones.
    can_train: bool = True  # False for a node without cores, such as the head of some clusters.
    findings: tuple[Finding, ...] = ()


# The keys: the folder of runs, and then the folder or the address (s3://bucket/prefix) of
# checkpoints. The value for a folder is the marker that the driver wrote there. The value for an
# address is None.
Stores = Mapping[str, Marker | None]

_LABELS = {"ok": ("ok", ""), "warn": ("warn", "bold"), "bad": ("BAD", "bold red")}


def preflight(
    runs: Path, *, address: str | None = None, checkpoints: str | None = None
) -> list[Finding]:
    """Examine this machine, or each node of the Ray cluster at `address`.

    Args:
        runs: the folder of runs, which all nodes must share.
        address: the address of a Ray cluster. None or `local`: this machine.
        checkpoints: the folder or the address of checkpoints, if they are not in `runs`.

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
        if address in (None, "local"):
            findings = [*_findings([examine(stores, None)])]
        else:
            stack.enter_context(Ray(Cluster(device="cpu", address=address), needs_cores=False))
            findings = [*_findings(_examine_nodes(stores)), _check_network(runs.absolute())]
    return [*findings, check_mlflow(tracking_uri(runs))]


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print a line for each finding, its advice on the next line, and a summary at the end."""
    console = console or new_console()
    for finding in findings:
        text, style = _LABELS[finding.state]
        label = Text.assemble((f"{text:4}", style), f"  {finding.check:9} ")
        say(console, finding.text, label=label)
        if finding.advice:
            say(console, finding.advice, label=" " * label.cell_len)
    problems = sum(finding.state == "bad" for finding in findings)
    say(
        console,
        f"not ready to train: {counted(problems, 'problem')} to solve"
        if problems
        else "ready to train",
    )


@contextmanager
def _marker_in(place: str) -> Iterator[Marker | None]:
    """During the block, the folder `place` has a file that the nodes look for. The file is locked
    as a driver locks its run.

    Yields None if `place` is an address, which all nodes share.
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
            with suppress(OSError):  # each node reports a storage without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield marker
    finally:
        file.unlink(missing_ok=True)


def _bad(check: str, what: str, error: Exception, advice: str) -> Finding:
    text = without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Finding(check, "bad", f"{what}: {text}", advice)


# ----------------------------------------------------------------------------------- the cluster


def _findings(results: Sequence[NodeReport | Finding]) -> Iterator[Finding]:
    yield from compare([each for each in results if isinstance(each, NodeReport)])
    for each in results:
        yield from each.findings if isinstance(each, NodeReport) else [each]


def _examine_nodes(stores: Stores) -> list[NodeReport | Finding]:
    """The report of each node that is up, the head first. A node that cannot be examined has a
    finding with the reason instead.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote_examine, nodes = ray.remote(examine), alive_nodes()
    tasks = [
        remote_examine.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(stores, node["Resources"])
        for node in nodes
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
    results: list[NodeReport | Finding] = []
    for task, node in zip(tasks, nodes, strict=True):
        try:
            results.append(ray.get(task, timeout=0))
        except RayError as error:
            problem = innermost(getattr(error, "cause", None) or error)
            if isinstance(error, GetTimeoutError):
                ray.cancel(task, force=True)
                problem = "it does not answer in time"
            results.append(
                Finding(
                    "node",
                    "bad",
                    f"{node['NodeManagerAddress']} cannot be examined: {problem}",
                    "check that the node is up, has the same software as the other nodes, and"
                    " reaches the storage",
                )
            )
    return results


def _check_network(runs: Path) -> Finding:
    """The finding about the network: whether the processes of a training reach one another's ports.

    There is one process for each GPU of the cluster. In a cluster without GPUs, there is one for
    each node with cores.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = [node["Resources"] for node in alive_nodes()]
    gpus = sum(int(each.get("GPU", 0)) for each in resources)
    count = gpus or sum(each.get("CPU", 0) > 0 for each in resources)
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
                        threads=1, loader_threads=1, uses_gpus=gpus > 0, on_loopback=False
                    )
                },
            ),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps the error of a process in several layers
            return Finding(
                "network",
                "bad",
                f"the processes of a training do not reach one another: {innermost(error)}",
                "open all ports between the nodes, set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to"
                " the network's interface, and check that no other process uses the GPUs",
            )
    return Finding("network", "ok", f"{counted(count, 'process')} reached one another")


def check_sums() -> None:
    """Sum a number over all processes.

    Workers with GPUs sum tensors over NCCL, and exchange decisions and objects over gloo. gloo has
    its own ports and may choose another network interface, so both are checked.

    Raises:
        RuntimeError: a process did not answer in time, or a sum is wrong.
    """
    world_size = distributed.get_world_size()
    gloo = distributed.new_group(backend="gloo")
    on_gpu = [("cuda", None)] if distributed.get_backend() == "nccl" else []
    for device, group in [*on_gpu, ("cpu", gloo)]:
        number = torch.tensor(distributed.get_rank() + 1, device=device)
        distributed.all_reduce(number, group=group)
        if int(number) != (expected := world_size * (world_size + 1) // 2):
            raise RuntimeError(f"the sum on {device} must be {expected}; got {int(number)}")


def compare(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """The findings about versions and GPUs, which should be the same on all nodes."""
    if not reports:
        return
    first, problems = reports[0].versions, list[Finding]()
    for package in first:
        if len({each.versions[package] for each in reports}) > 1:
            text = ", ".join(f"{each.name} has {each.versions[package]}" for each in reports)
            problems.append(
                Finding(
                    "versions",
                    "bad",
                    f"{package}: {text}",
                    "install the same version on all nodes: `LOCKED=1 make setup`",
                )
            )
        elif first[package] == NOT_INSTALLED:
            problems.append(
                Finding(
                    "versions",
                    "warn" if package == "ffcv" else "bad",  # Pillow takes the place of FFCV
                    f"{package} is not installed",
                    "`make setup`",
                )
            )
    text = ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "ray", "ffcv"))
    text += f", the same on {len(reports)} nodes" if len(reports) > 1 else ""
    yield from problems or [Finding("versions", "ok", text)]

    healthy = [
        each for each in reports if all(finding.check != "gpus" for finding in each.findings)
    ]
    if healthy:
        text = "; ".join(f"{each.name}: {', '.join(each.gpus) or 'no GPU'}" for each in healthy)
        if len({each.gpus for each in healthy if each.gpus or each.can_train}) <= 1:
            yield Finding("gpus", "ok", text)
        else:
            yield Finding(
                "gpus",
                "warn",
                text,
                "workers wait for the slowest GPU: train on nodes that have the same GPUs",
            )


# ------------------------------------------------------------------------------------ on a node


def examine(stores: Stores, resources: Mapping[str, float] | None) -> NodeReport:
    """Examine the machine on which this function runs.

    Args:
        resources: the resources of the node, as Ray counts them. None: this machine, without Ray.
    """
    name = socket.gethostname()
    gpus, findings = _check_gpus(resources)
    findings = [
        replace(each, text=f"{name}: {each.text}") for each in (*findings, *_check_reading())
    ]
    store_findings = [check_store(address, marker) for address, marker in stores.items()]
    findings += store_findings
    runs, marker = next(iter(stores.items()))
    if store_findings[0].state == "ok" and marker is not None:
        findings += _check_lock(name, Path(runs) / marker.name)
    versions = {package: installed_version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "spiketrain's code": code_digest()}
    return NodeReport(
        name,
        versions,
        gpus,
        can_train=resources is None or resources.get("CPU", 0) > 0,
        findings=tuple(findings),
    )


def _check_gpus(resources: Mapping[str, float] | None) -> tuple[tuple[str, ...], list[Finding]]:

    if (unusable := unusable_gpus()) is not None:
        return (), [Finding("gpus", "bad", unusable)]
    advice = (
        "read nvidia-smi and the kernel's log on the node; repair the GPU, or train without the"
        " node"
    )
    names: list[str] = []
    findings: list[Finding] = []
    for index in range(count := torch.cuda.device_count()):
        try:
            total = torch.ones(1024, device=f"cuda:{index}").sum().item()
            require(total == 1024, f"the sum of 1024 ones must be 1024; got {total:g}")
            names.append(torch.cuda.get_device_name(index))
        except Exception as error:  # torch raises errors of many types
            findings.append(_bad("gpus", f"GPU {index} fails", error, advice))
    # Without Ray, the device files of NVIDIA's driver are counted, one for each GPU. They are not
    # counted if the user has chosen some of the GPUs.
    files = 0 if "CUDA_VISIBLE_DEVICES" in os.environ else len(list(DEVICES.glob("nvidia[0-9]*")))
    expected = files if resources is None else int(resources.get("GPU", 0))
    if count < expected:
        advice += "; to train on some of the GPUs without Ray, set CUDA_VISIBLE_DEVICES"
        findings.append(Finding("gpus", "bad", f"torch finds {count} of {expected} GPUs", advice))
    return tuple(names), findings


def _check_reading() -> Iterator[Finding]:
    """Write a few images, and read them as a training does, with FFCV and numba."""
    try:
        values = _write_and_read((41, 201))
        require(values == [41, 201], f"pixels 41 and 201 were read as {values}")
        yield Finding("ffcv", "ok", "images were written and read")
    except Exception as error:
        yield _bad(
            "ffcv",
            "images cannot be written and read",
            error,
            "infra/setup.sh builds FFCV and its libraries",
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


def _write_and_read(pixels: Sequence[int]) -> list[int]:

    from PIL import Image

    from pipeline.data.datasets.beton import Beton
    from pipeline.data.write.images import write_folder

    with tempfile.TemporaryDirectory() as name:
        images, beton_files = Path(name) / "images", Path(name) / "beton_files"
        for part in ("train", "val"):
            (class_folder := images / part / "grey").mkdir(parents=True)
            for pixel in pixels:
                Image.new("RGB", (8, 8), (pixel,) * 3).save(class_folder / f"{pixel}.png")
        write_folder(images, beton_files, mode="raw")
        loader = Beton(
            beton_files, classes=1, size=8, crop="shift", mean=(0.0,) * 3, std=(1.0,) * 3
        ).val(rank=0, world=1, micro_batch=2, threads=1)
        with closing(loader), loader.epoch(0) as batches:
            return sorted(round(float(x.mean()) * 255) for batch in batches for x in batch.x)


def _check_lock(name: str, file: Path) -> Iterator[Finding]:
    """A finding if this node does not see the driver's lock. The lock stops a second driver of a
    run.

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
            "two drivers could train the same run: mount the storage with locks that all nodes"
            " share (Lustre: flock, not localflock; NFS: neither nolock nor local_lock), or always"
            " launch and resume on the same machine",
        )


# --------------------------------------------------------------------------------------- storage


def check_store(address: str, marker: Marker | None = None) -> Finding:
    """The finding about a store: look for the driver's marker, and write, list, read and delete an
    object.
    """
    node, folder = socket.gethostname(), folder_of(address)
    if folder is not None and marker is not None and not marker.is_in(folder):
        return Finding(
            "storage",
            "bad",
            f"{address} on {node} is not the folder of this name on the driver's machine",
            "mount the same storage at the same path on every node, or choose such storage with"
            " --runs or --checkpoints",
        )
    try:
        import fsspec

        url = address.rstrip("/") if folder is None else f"file://{folder}"
        fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
        name, content = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(16)
        fs.pipe_file(f"{root}/{name}", content)
        try:
            is_intact = (
                name in {PurePosixPath(each).name for each in fs.ls(root, detail=False)}
                and fs.cat_file(f"{root}/{name}") == content
            )
        finally:
            fs.rm_file(f"{root}/{name}")
        require(is_intact, "the object that was written is not listed, or differs")
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
        "check its owner, permissions and mount; free space if the disk or a quota is full"
        if folder_of(address) is not None
        else "check its permissions, and the keys in the node's environment (AWS_ACCESS_KEY_ID;"
        " AWS_ENDPOINT_URL if the store is not Amazon's)",
    )


# ---------------------------------------------------------------------------------------- MLflow


def check_mlflow(uri: str) -> Finding:
    """The finding about MLflow. A file must be writable. A server must answer."""
    if (file := sqlite_file(uri)) is not None:
        try:  # MLflow may make the file and its folder. SQLite makes a journal there.
            tempfile.TemporaryFile(dir=next(each for each in file.parents if each.exists())).close()
            if file.exists():
                file.open("r+b").close()
        except OSError as error:
            return _bad(
                "mlflow",
                f"the store {file} cannot be written",
                error,
                "check its owner and permissions, or MLFLOW_TRACKING_URI",
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
    url = without_password(uri).rstrip("/")
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # an error of MLflow or of its transport
        return Finding(
            "mlflow",
            "bad",
            f"{url}: {reason(uri, error)}",
            "check MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, or _TOKEN; a training continues"
            " without the server, and `spiketrain sync` delivers its events later",
        )
    return Finding("mlflow", "ok", f"{url} answers")
