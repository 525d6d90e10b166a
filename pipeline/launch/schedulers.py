"""Hand a launch to a scheduler: KubeRay, Slurm, or a running Ray cluster.

The scheduler's own program does the work. `kubectl` renders a RayJob from a folder such as
infra/k8s/overlays/cpu/job and applies it, `sbatch` takes infra/slurm/train.sbatch with options, and
`ray job submit` takes a command line. This module needs neither the data nor the cluster.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from pipeline.core.checks import require
from pipeline.core.errors import UserError
from pipeline.core.units import counted
from pipeline.launch.ray_cluster import offer_token
from pipeline.train.checkpoint import folder_of
from pipeline.train.elastic import format_sizes

LONGEST_NAME = 47  # KubeRay (1.7.0) adds up to 16 characters, and a name has at most 63
PATIENCE_S = 120.0
SLURM = Path(__file__).parents[2] / "infra" / "slurm"
_NAME = r"[A-Za-z0-9][\w.-]{0,127}"
# The name of an image that fixes its content, so that a retry trains with the same code:
# `[host[:port]/]path/name` with `:tag`, `@sha256:...` or both.
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = (
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?/)?"
    rf"{_PART}(?:/{_PART})*"
    r"(?::(?!latest$)\w[\w.-]{0,127}|(?::\w[\w.-]{0,127})?@sha256:[0-9a-f]{64})"
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """One launch, for any scheduler.

    Args:
        words: the arguments of `spiketrain launch`: recipes, and the options that the order does
            not set.
        name: of the run or suite, and of the job.
        sizes: every number of workers that the run may have, ascending; none: the scheduler's
            template counts the workers.
        runs: the folder of runs, as the machines that train see it.
        options: the typed options of `spiketrain launch --cluster` by their names, as parsed.
    """

    words: tuple[str, ...]
    name: str
    sizes: tuple[int, ...]
    runs: str
    options: Mapping[str, Any]

    @property
    def image(self) -> str:
        """The container image that the machines use; empty: none."""
        return self.options.get("image", "")

    def count(self, name: str) -> int:
        """The value of an option that is a count; 1 for `auto` or if the option is missing."""
        value = self.options.get(name, "auto")
        return 1 if value == "auto" else value

    def describe(self, workers: int) -> str:
        """`4 workers`, or `2 runs side by side of 4 workers`."""
        runs = self.count("side_by_side")
        return ("" if runs == 1 else f"{runs} runs side by side of ") + counted(workers, "worker")

    def launch(self, *options: str) -> list[str]:
        """The command that the machines run. It starts the run or continues it."""
        words = ["spiketrain", "launch", *self.words, "--name", self.name, "--runs", self.runs]
        words += ["--address", "auto", "--workers", format_sizes(self.sizes), *options]
        return [*words, "--or-resume"]


def answer_of(
    name: str, *words: str, given: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """Run a program and return its output. It is searched on PATH and beside this Python.

    Raises:
        UserError: the program is missing, fails, or does not answer in time.
    """
    paths = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent))
    program = shutil.which(name, path=os.pathsep.join(paths))
    if program is None:
        raise UserError(f"submit: needs {name} on the path; got none")
    try:
        done = subprocess.run(
            [program, *words],
            input=given,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"submit: {name} must answer within {PATIENCE_S:.0f} s; it has not, and may have taken"
            " the job"
        ) from None
    except OSError as error:
        raise UserError(f"submit: {program} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        text = " ".join(" ".join(lines if len(lines) < 4 else lines[-1:]).split())  # no traceback
        raise UserError(f"submit: {name} failed with exit code {done.returncode} and said: {text}")
    return done.stdout.strip()


# ----------------------------------------------------------------------------------------- KubeRay


def manifests_of(folder: Path) -> list[dict[str, Any]]:
    """The manifests that `kubectl kustomize`, or else `kustomize build`, makes of a folder.

    Raises:
        UserError: both programs are missing, or the folder is refused.
    """
    only_kustomize = shutil.which("kustomize") and not shutil.which("kubectl")
    command = ("kustomize", "build") if only_kustomize else ("kubectl", "kustomize")
    return list(yaml.safe_load_all(answer_of(*command, str(folder))))


def render_rayjob(order: Order) -> str:
    """The RayJob of the order's kustomize folder, its option `infra`, with the order's name,
    entrypoint, image and pods, as YAML.

    There are as many pods as the workers need, and never fewer: the driver counts them when it
    starts. With several numbers of workers, the job begins with the pods for the smallest number.
    Ray's autoscaler adds pods, up to those for the largest number.

    Raises:
        ValueError: Kubernetes would not take the name or image; the folder has no RayJob, or is too
            small for so many workers; runs or checkpoints would lie on a pod's own disk.
    """
    folder = order.options["infra"]
    require(
        len(order.name) <= LONGEST_NAME and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", order.name),
        "k8s: name must be lower-case letters, digits and inner -, begin with a letter, and be "
        f"at most {LONGEST_NAME} long (RFC 1123, KubeRay); got {order.name!r}",
    )
    require(
        re.fullmatch(_IMAGE, order.image, re.ASCII),
        f"k8s: image must be a name with a tag or a digest, other than latest; got {order.image!r}",
    )
    jobs = [each for each in manifests_of(folder) if each["kind"] == "RayJob"]
    require(len(jobs) == 1, f"k8s: {folder} must hold one RayJob; got {len(jobs)}")
    try:
        _fill_rayjob(jobs[0], order, folder)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"k8s: the RayJob of {folder} must be one as in infra/k8s/base/job; not found: {error}"
        ) from error
    return yaml.safe_dump(jobs[0], sort_keys=False, width=1000)


def submit_rayjob(manifest: str) -> str:
    """Apply a RayJob to kubectl's cluster and namespace. Returns kubectl's output.

    A running job of that name continues, and changes apply from its next attempt. A job that has
    ended would not change (KubeRay 1.7.0), so it is refused.

    Raises:
        UserError: kubectl did not take it, or a RayJob of that name has ended.
    """
    name = yaml.safe_load(manifest)["metadata"]["name"]
    ended = answer_of(
        *("kubectl", "get", "rayjobs.ray.io", name, "--ignore-not-found"),
        *("--output", "jsonpath={.status.jobDeploymentStatus}"),
    )
    if ended in ("Complete", "Failed"):
        raise UserError(
            f"k8s: KubeRay starts no RayJob again that has ended; got {name}, {ended}: first"
            f" kubectl delete rayjob {name}"
        )
    return answer_of("kubectl", "apply", "-f", "-", given=manifest)


def _fill_rayjob(job: dict[str, Any], order: Order, folder: Path) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    require(
        len(groups) == 1,
        f"k8s: the RayJob of {folder} must have one group of workers; got {len(groups)}",
    )
    group = groups[0]
    pods = [part["template"]["spec"] for part in (cluster["headGroupSpec"], group)]
    _refuse_unless_shared(order, pods)  # a pod's own disk ends with the pod
    limits, most = pods[1]["containers"][0]["resources"]["limits"], group["maxReplicas"]
    group["replicas"] = group["minReplicas"] = _pods(order, order.sizes[0], limits, most, folder)
    group["maxReplicas"] = _pods(order, order.sizes[-1], limits, most, folder)
    job["metadata"]["name"] = order.name
    # The driver runs on the head, which has no GPU, so the device is named.
    device = ["--device", "gpu" if "nvidia.com/gpu" in limits else "cpu"]
    # A shell of the head reads the entrypoint.
    job["spec"]["entrypoint"] = shlex.join(
        order.launch(*([] if "device" in order.options else device))
    )
    for pod in pods:
        pod["containers"][0]["image"] = order.image  # the first container is Ray's (KubeRay 1.7.0)


def _pods(order: Order, workers: int, limits: dict[str, Any], most: int, folder: Path) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(limits.get("cpu", "")))
    if match is None:
        raise ValueError(
            "k8s: a worker's limit of cpu must be a number of cores, or of thousandths with m; got"
            f" {limits.get('cpu')!r}"
        )
    # Rounded up as KubeRay does for Ray.
    cores = math.ceil(float(match[1]) / (1000 if match[2] else 1))
    gpus = int(limits.get("nvidia.com/gpu", 0))
    asked = order.count("cpus_per_worker")  # auto: with a GPU for each worker, as many as fit
    takes_gpus = gpus and order.options.get("device") != "cpu"
    room = min(cores // asked, gpus) if takes_gpus else cores // asked
    pods = math.ceil(order.count("side_by_side") * workers / room) if room else None
    if pods is None or pods > most:
        each = counted(cores, "core") + (f" and {counted(gpus, 'GPU')}" if gpus else "")
        raise ValueError(
            f"k8s: {order.describe(workers)} x {counted(asked, 'cpu')} must fit into pods of "
            f"{each}, of which {folder} has {most}: room for {counted(most * room, 'worker')}"
        )
    return pods


def _refuse_unless_shared(order: Order, pods: Sequence[dict[str, Any]]) -> None:
    shared = sorted(set.intersection(*map(_shared_mounts, pods)))
    kept = order.options.get("checkpoints")
    for name, given, folder in (
        ("runs", order.runs, Path(order.runs)),
        ("--checkpoints", kept, None if kept is None else folder_of(kept)),
    ):
        require(
            folder is None
            or (".." not in folder.parts and any(folder.is_relative_to(mount) for mount in shared)),
            f"k8s: {name} must lie where every pod writes to a shared volume"
            f" ({', '.join(shared)}), without ..; got {given!r}",
        )


def _shared_mounts(pod: dict[str, Any]) -> set[str]:
    claims = {each["name"] for each in pod.get("volumes", ()) if "persistentVolumeClaim" in each}
    return {
        each["mountPath"]
        for each in pod["containers"][0].get("volumeMounts", ())
        if each["name"] in claims and not each.get("readOnly")
    }


# ------------------------------------------------------------------------------------------- Slurm


def render_sbatch(order: Order) -> str:
    """The command line of sbatch for the order's train.sbatch, by default that of infra/slurm.

    The option `time` is Slurm's: minutes, hours:minutes:seconds, or days-hours.

    Raises:
        ValueError: a value that Slurm would not take, too few GPUs, or no script in the folder.
    """
    nodes, gpus_per_node = order.options["nodes"], order.options.get("gpus_per_node", 0)
    sizes = format_sizes(order.sizes) if order.sizes else ""  # empty: one for each GPU, or node
    require(
        len(order.sizes) <= 1,
        f"slurm: the number of nodes of a job is fixed, so workers must be one number; got {sizes}",
    )
    gpus = nodes * gpus_per_node
    workers = order.sizes[0] if order.sizes else gpus  # as the script counts them
    require(
        not gpus
        or order.options.get("device") == "cpu"
        or order.count("side_by_side") * workers <= gpus,
        f"slurm: each worker takes a GPU; got {order.describe(workers)} on"
        f" {counted(nodes, 'node')} x {counted(gpus_per_node, 'GPU')}",
    )
    script = order.options.get("infra", SLURM) / "train.sbatch"
    require(script.is_file(), f"slurm: the script of the job must be a file; got {script}")
    options = {
        "job-name": _matching("name", order.name, _NAME),
        "nodes": str(nodes),
        "time": _matching("time", order.options["time"], r"(\d{1,4}-)?\d{1,6}(:\d{1,2}){0,2}"),
    }
    if gpus_per_node:
        options["gpus-per-node"] = str(gpus_per_node)
    if "partition" in order.options:
        names = r"[\w.-]+(,[\w.-]+)*"
        options["partition"] = _matching("partition", order.options["partition"], names)
    return shlex.join(
        [
            "env",
            f"SPIKETRAIN_RUNS={order.runs}",
            f"SPIKETRAIN_WORKERS={sizes}",
            f"SPIKETRAIN_IMAGE={order.image}",
            *("sbatch", "--parsable", "--export=ALL"),
            *(f"--{name}={value}" for name, value in options.items()),
            str(script.absolute()),
            *order.words,
        ]
    )


def submit_sbatch(command: str) -> str:
    """Submit the script. Returns the number of the job.

    Raises:
        UserError: sbatch refused the script, or is missing: it exists on login nodes only.
    """
    _, *words = shlex.split(command)
    at = words.index("sbatch")
    variables = dict(word.split("=", 1) for word in words[:at])
    return answer_of("sbatch", *words[at + 1 :], environment=variables).split(";")[0]


def _matching(name: str, value: str, pattern: str) -> str:
    require(
        re.fullmatch(pattern, value, re.ASCII), f"slurm: {name} must match {pattern}; got {value!r}"
    )
    return value


# -------------------------------------------------------------------------- a running Ray cluster


def render_ray_job(order: Order) -> str:
    """The command line that submits the order to its option `cluster`, ray://HOST:PORT of the
    dashboard.

    The driver runs on the head, in the folder where Ray was started. `runs` and recipes are paths
    there.

    Raises:
        ValueError: another address, a name that a run cannot have, or an image, which a cluster
            that is up has already.
    """
    address = order.options["cluster"]
    require(
        re.fullmatch(r"ray://[A-Za-z0-9.-]+:\d{1,5}", address, re.ASCII),
        f"ray: a cluster must be ray://HOST:PORT, with the port of its dashboard; got {address!r}",
    )
    require(
        re.fullmatch(_NAME, order.name, re.ASCII),
        f"ray: name must be letters, digits and inner . _ -; got {order.name!r}",
    )
    require(
        not order.image,
        f"ray: a cluster that is up trains with what is installed there; got --image {order.image}",
    )
    return shlex.join(
        [
            *("ray", "job", "submit", "--address", address.replace("ray", "http", 1)),
            # The name of a job can be used once, the name of a run many times.
            *("--submission-id", f"{order.name}-{uuid4().hex[:8]}", "--no-wait", "--"),
            *order.launch(),
        ]
    )


def submit_ray_job(command: str) -> str:
    """Submit the job. Returns its name.

    Raises:
        UserError: there is no cluster, or it wants a token that RAY_AUTH_TOKEN and
            RAY_AUTH_TOKEN_PATH do not name.
    """
    words = shlex.split(command)
    offer_token()
    answer_of(*words)
    return words[words.index("--submission-id") + 1]
