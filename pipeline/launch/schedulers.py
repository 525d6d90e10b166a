"""Hand a launch to a scheduler: KubeRay, Slurm, or a running Ray cluster.

Each scheduler has `render_...`, which makes the text of a job, and `submit_...`, which gives the
text to the scheduler's own program. `kubectl` applies a RayJob, made from a folder such as
infra/k8s/overlays/cpu/job. `sbatch` gets infra/slurm/train.sbatch with options. `ray job submit`
gets a command line. Rendering a job needs neither the data nor the cluster.
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

MAX_RAYJOB_NAME = 47  # KubeRay (1.7.0) adds up to 16 characters, and a name has at most 63
PROGRAM_TIMEOUT_S = 120.0
SLURM_FOLDER = Path(__file__).parents[2] / "infra" / "slurm"
_NAME = r"[A-Za-z0-9][\w.-]{0,127}"
_NAME_RULE = (
    "1 to 128 letters, digits, dots, underscores and hyphens, and begin with a letter or digit"
)
# The name of a container image with its version, so that a retry trains with the same code:
# `[host[:port]/]path/name` with `:tag`, `@sha256:...` or both. The tag must not be latest.
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = (
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?/)?"
    rf"{_PART}(?:/{_PART})*"
    r"(?::(?!latest$)\w[\w.-]{0,127}|(?::\w[\w.-]{0,127})?@sha256:[0-9a-f]{64})"
)


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """One launch, for any scheduler.

    Args:
        words: the arguments of `spiketrain launch`: recipes, and the options that are not fields of
            this class.
        name: the name of the run or suite, and of the job.
        sizes: the numbers of workers that the run may have, ascending. Empty: Slurm's script
            computes the number of workers.
        runs: the folder of runs. It is a path on the machines that train.
        options: the options that the user gave to `spiketrain launch --cluster`, with their parsed
            values, by parameter name.
    """

    words: tuple[str, ...]
    name: str
    sizes: tuple[int, ...]
    runs: str
    options: Mapping[str, Any]

    @property
    def image(self) -> str:
        return self.options.get("image", "")

    def count(self, name: str) -> int:
        """The value of an option that is a count. 1 for `auto`, or if the option is missing."""
        value = self.options.get(name, "auto")
        return 1 if value == "auto" else value

    def describe(self, workers: int) -> str:
        """`4 workers`, or `2 runs side by side, each with 4 workers`."""
        runs = self.count("side_by_side")
        prefix = "" if runs == 1 else f"{runs} runs side by side, each with "
        return prefix + counted(workers, "worker")

    def launch_command(self, *options: str) -> list[str]:
        """The scheduler's command, which starts or continues the run."""
        return [
            *("spiketrain", "launch", *self.words, "--name", self.name, "--runs", self.runs),
            *("--address", "auto", "--workers", format_sizes(self.sizes), *options),
            "--or-resume",
        ]


def run_program(
    name: str, *arguments: str, stdin: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """Run a program from PATH or from the folder of this Python. Returns its output.

    Raises:
        UserError: the program is missing, cannot be run, fails, or does not end in time.
    """
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    program = shutil.which(name, path=os.pathsep.join(folders))
    if program is None:
        raise UserError(f"submit: {name} must be on the path; got none")
    try:
        process = subprocess.run(
            [program, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT_S,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"submit: {name} must end within {PROGRAM_TIMEOUT_S:.0f} s; it did not, and may have"
            " submitted the job"
        ) from None
    except OSError as error:
        raise UserError(f"submit: {program} cannot be run: {error.strerror}") from error
    if process.returncode != 0:
        lines = (process.stderr.strip() or process.stdout.strip() or "nothing").splitlines()
        # More than three lines are a traceback, whose last line has the error.
        text = " ".join(" ".join(lines[-1:] if len(lines) > 3 else lines).split())
        raise UserError(
            f"submit: {name} failed with exit code {process.returncode} and printed: {text}"
        )
    return process.stdout.strip()


# ----------------------------------------------------------------------------------------- KubeRay


def manifests_of(folder: Path) -> list[dict[str, Any]]:
    """The manifests that `kubectl kustomize` renders from a folder. If kubectl is missing,
    `kustomize build` renders them.

    Raises:
        UserError: both programs are missing, or the program fails.
    """
    only_kustomize = shutil.which("kustomize") and not shutil.which("kubectl")
    command = ("kustomize", "build") if only_kustomize else ("kubectl", "kustomize")
    return list(yaml.safe_load_all(run_program(*command, str(folder))))


def render_rayjob(request: LaunchRequest) -> str:
    """The RayJob of the kustomize folder in the option `infra`, as YAML. The name, the entrypoint,
    the image and the number of pods are those of the request.

    There are as many pods as the workers need, and never fewer: the driver counts the cores of the
    pods when it starts. With several numbers of workers, the job starts with the pods for the
    smallest number. Ray's autoscaler adds pods, up to those for the largest number.

    Raises:
        ValueError: Kubernetes would refuse the name or the image; the folder has no RayJob or
            several, another kind of RayJob, or too few pods for the workers; or runs or checkpoints
            would be on a pod's own disk.
        UserError: see `manifests_of`.
    """
    folder = request.options["infra"]
    require(
        len(request.name) <= MAX_RAYJOB_NAME
        and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", request.name),
        "k8s: name must be lower-case letters, digits and hyphens, begin with a letter, not end"
        f" with a hyphen, and be at most {MAX_RAYJOB_NAME} long (RFC 1123, KubeRay); got"
        f" {request.name!r}",
    )
    require(
        re.fullmatch(_IMAGE, request.image, re.ASCII),
        "k8s: image must be a name with a digest, or with a tag other than latest; got"
        f" {request.image!r}",
    )
    jobs = [each for each in manifests_of(folder) if each["kind"] == "RayJob"]
    require(len(jobs) == 1, f"k8s: {folder} must hold one RayJob; got {len(jobs)}")
    try:
        _fill_rayjob(jobs[0], request, folder)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"k8s: the RayJob of {folder} must have the fields of infra/k8s/base/job; missing:"
            f" {error}"
        ) from error
    return yaml.safe_dump(jobs[0], sort_keys=False, width=1000)


def submit_rayjob(manifest: str) -> str:
    """Apply a RayJob to kubectl's cluster and namespace. Returns kubectl's output.

    If a job of this name is running, it continues, and changes apply from its next attempt. KubeRay
    (1.7.0) does not start an ended job again, so an ended job of this name is refused.

    Raises:
        UserError: kubectl failed, or a RayJob of this name has ended.
    """
    name = yaml.safe_load(manifest)["metadata"]["name"]
    status = run_program(
        *("kubectl", "get", "rayjobs.ray.io", name, "--ignore-not-found"),
        *("--output", "jsonpath={.status.jobDeploymentStatus}"),
    )
    if status in ("Complete", "Failed"):
        raise UserError(
            f"k8s: a RayJob that has ended cannot start again; got {name}, {status}: first run"
            f" kubectl delete rayjob {name}"
        )
    return run_program("kubectl", "apply", "-f", "-", stdin=manifest)


def _fill_rayjob(job: dict[str, Any], request: LaunchRequest, folder: Path) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    require(
        len(groups) == 1,
        f"k8s: the RayJob of {folder} must have one group of workers; got {len(groups)}",
    )
    group = groups[0]
    pods = [part["template"]["spec"] for part in (cluster["headGroupSpec"], group)]
    _refuse_unless_shared(request, pods)  # a pod's own disk ends with the pod
    limits, max_pods = pods[1]["containers"][0]["resources"]["limits"], group["maxReplicas"]
    group["replicas"] = group["minReplicas"] = _count_pods(
        request, request.sizes[0], limits, max_pods, folder
    )
    group["maxReplicas"] = _count_pods(request, request.sizes[-1], limits, max_pods, folder)
    job["metadata"]["name"] = request.name
    # The driver runs on the head, which has no GPU, so the device is explicit.
    device = (
        []
        if "device" in request.options
        else ["--device", "gpu" if "nvidia.com/gpu" in limits else "cpu"]
    )
    # A shell in the head's pod parses the entrypoint.
    job["spec"]["entrypoint"] = shlex.join(request.launch_command(*device))
    for pod in pods:
        pod["containers"][0]["image"] = (
            request.image
        )  # the first container is Ray's (KubeRay 1.7.0)


def _count_pods(
    request: LaunchRequest, workers: int, limits: dict[str, Any], max_pods: int, folder: Path
) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(limits.get("cpu", "")))
    if match is None:
        raise ValueError(
            "k8s: the cpu limit of a worker must be a number of cores (2) or of millicores (2000m);"
            f" got {limits.get('cpu')!r}"
        )
    # KubeRay rounds up, too, when it reports the cores to Ray.
    cores = math.ceil(float(match[1]) / (1000 if match[2] else 1))
    gpus = int(limits.get("nvidia.com/gpu", 0))
    cpus_per_worker = request.count("cpus_per_worker")  # `auto` needs at least one
    workers_per_pod = cores // cpus_per_worker
    if gpus and request.options.get("device") != "cpu":
        workers_per_pod = min(workers_per_pod, gpus)
    needed = request.count("side_by_side") * workers
    max_workers = max_pods * workers_per_pod
    pod = counted(cores, "core") + (f" and {counted(gpus, 'GPU')}" if gpus else "")
    require(
        needed <= max_workers,
        f"k8s: {request.describe(workers)} x {counted(cpus_per_worker, 'cpu')} must fit into"
        f" {counted(max_pods, 'pod')} of {pod} ({folder}), which hold only"
        f" {counted(max_workers, 'worker')}",
    )
    return math.ceil(needed / workers_per_pod)


def _refuse_unless_shared(request: LaunchRequest, pods: Sequence[dict[str, Any]]) -> None:
    mounts = sorted(set.intersection(*map(_shared_mounts, pods)))
    checkpoints = request.options.get("checkpoints")
    for name, value, folder in (
        ("runs", request.runs, Path(request.runs)),
        ("--checkpoints", checkpoints, None if checkpoints is None else folder_of(checkpoints)),
    ):
        require(
            folder is None
            or (".." not in folder.parts and any(folder.is_relative_to(mount) for mount in mounts)),
            f"k8s: {name} must be in a shared volume that every pod can write"
            f" ({', '.join(mounts)}), without ..; got {value!r}",
        )


def _shared_mounts(pod: dict[str, Any]) -> set[str]:
    volumes = {each["name"] for each in pod.get("volumes", ()) if "persistentVolumeClaim" in each}
    return {
        each["mountPath"]
        for each in pod["containers"][0].get("volumeMounts", ())
        if each["name"] in volumes and not each.get("readOnly")
    }


# ------------------------------------------------------------------------------------------- Slurm


def render_sbatch(request: LaunchRequest) -> str:
    """The command line of sbatch for train.sbatch, from the folder in the option `infra` or from
    infra/slurm.

    Raises:
        ValueError: Slurm would refuse a value, there are too few GPUs, several numbers of workers,
            or no script in the folder.
    """
    nodes, gpus_per_node = request.options["nodes"], request.options.get("gpus_per_node", 0)
    sizes = (
        format_sizes(request.sizes) if request.sizes else ""
    )  # empty: a worker per GPU, or per node
    require(
        len(request.sizes) <= 1,
        "slurm: workers must be one number, because the number of nodes of a job is fixed; got"
        f" {sizes}",
    )
    gpus = nodes * gpus_per_node
    workers = request.sizes[0] if request.sizes else gpus  # as the script counts them
    require(
        not gpus
        or request.options.get("device") == "cpu"
        or request.count("side_by_side") * workers <= gpus,
        f"slurm: each worker must get a GPU; got {request.describe(workers)} on"
        f" {counted(nodes, 'node')} x {counted(gpus_per_node, 'GPU')}",
    )
    script = request.options.get("infra", SLURM_FOLDER) / "train.sbatch"
    require(script.is_file(), f"slurm: the job's script must be a file; got {script}")
    _require_match("slurm: name", request.name, _NAME, _NAME_RULE)
    _require_match(
        "slurm: time",
        request.options["time"],
        r"(\d{1,4}-)?\d{1,6}(:\d{1,2}){0,2}",
        "minutes, hours:minutes:seconds, or days-hours",
    )
    options = {"job-name": request.name, "nodes": str(nodes), "time": request.options["time"]}
    if gpus_per_node:
        options["gpus-per-node"] = str(gpus_per_node)
    if "partition" in request.options:
        options["partition"] = request.options["partition"]
        _require_match(
            "slurm: partition",
            options["partition"],
            r"[\w.-]+(,[\w.-]+)*",
            "names of partitions, separated by commas",
        )
    return shlex.join(
        [
            "env",
            f"SPIKETRAIN_RUNS={request.runs}",
            f"SPIKETRAIN_WORKERS={sizes}",
            f"SPIKETRAIN_IMAGE={request.image}",
            *("sbatch", "--parsable", "--export=ALL"),
            *(f"--{name}={value}" for name, value in options.items()),
            str(script.absolute()),
            *request.words,
        ]
    )


def submit_sbatch(command: str) -> str:
    """Submit the script. Returns the job id.

    Raises:
        UserError: sbatch failed, or is missing: only login nodes have it.
    """
    _, *words = shlex.split(command)  # env NAME=VALUE ... sbatch ARGUMENT ...
    sbatch_index = words.index("sbatch")
    variables = dict(word.split("=", 1) for word in words[:sbatch_index])
    # sbatch prints JOB_ID[;CLUSTER].
    return run_program("sbatch", *words[sbatch_index + 1 :], environment=variables).split(";")[0]


def _require_match(subject: str, value: str, pattern: str, rule: str) -> None:
    require(re.fullmatch(pattern, value, re.ASCII), f"{subject} must be {rule}; got {value!r}")


# -------------------------------------------------------------------------- a running Ray cluster


def render_ray_job(request: LaunchRequest) -> str:
    """The `ray job submit` command for a running cluster. The option `cluster` is the address of
    the dashboard, ray://HOST:PORT.

    The driver runs on the cluster's head, in the folder where Ray was started. The paths of runs
    and recipes are relative to this folder.

    Raises:
        ValueError: the address or the name is refused, or an image is given. A running cluster
            cannot change its image.
    """
    address = request.options["cluster"]
    require(
        re.fullmatch(r"ray://[A-Za-z0-9.-]+:\d{1,5}", address, re.ASCII),
        f"ray: a cluster must be ray://HOST:PORT, with the port of its dashboard; got {address!r}",
    )
    _require_match("ray: name", request.name, _NAME, _NAME_RULE)
    require(
        not request.image,
        "ray: no image must be given, because a running cluster has its software; got --image"
        f" {request.image}",
    )
    return shlex.join(
        [
            *("ray", "job", "submit", "--address", address.replace("ray", "http", 1)),
            # A job's id can be used only once, while a run's name stays the same when it resumes.
            *("--submission-id", f"{request.name}-{uuid4().hex[:8]}", "--no-wait", "--"),
            *request.launch_command(),
        ]
    )


def submit_ray_job(command: str) -> str:
    """Submit the job. Returns its submission id.

    Raises:
        UserError: no cluster answers, or the cluster needs a token and neither RAY_AUTH_TOKEN nor
            RAY_AUTH_TOKEN_PATH has it.
    """
    arguments = shlex.split(command)
    offer_token()
    run_program(*arguments)
    return arguments[arguments.index("--submission-id") + 1]
