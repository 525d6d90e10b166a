"""An order as a RayJob of KubeRay, and the RayJob to Kubernetes. `infra/k8s/` has the manifests that it starts from."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.address import folder_of
from pipeline.refused import Refused
from pipeline.submit.kustomize import build
from pipeline.submit.order import Order
from pipeline.submit.program import answer_of
from pipeline.units import counted

LONGEST_NAME = 47  # KubeRay 1.7.0: it makes longer names of it, which must fit into 63


def render(order: Order) -> str:
    """The RayJob of the order's folder with name, entrypoint, image and pods of the order, as YAML.

    There are as many pods as the workers need, and never fewer: the driver counts what is there when it starts. A range of
    workers begins with the pods that its least number needs; Ray's autoscaler adds some, up to those of its largest.

    Raises:
        ValueError: Kubernetes would not take the name or the image, the folder has no RayJob or is too small for so many workers,
            or the runs or their checkpoints would lie where a pod takes them with it.
    """
    _refuse_unless_kubernetes_takes(order)
    found = [each for each in build(order.infra) if each.get("kind") == "RayJob"]
    if len(found) != 1:
        raise ValueError(f"k8s: {order.infra} must hold one RayJob; got {len(found)}")
    try:
        _fill(found[0], order)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"k8s: the RayJob of {order.infra} must be one as in infra/k8s/base/job; not found: {error}") from error
    return yaml.safe_dump(found[0], sort_keys=False, width=1000)


def submit(rendered: str) -> str:
    """Hand it to the cluster and namespace that kubectl is set to; what kubectl says of it.

    One of that name that is at it goes on ("unchanged"; what is new, "configured", holds from its next attempt). One that has
    ended KubeRay (1.7.0) would leave as it is, whatever is applied.

    Raises:
        Refused: kubectl did not take it, or a RayJob of that name has ended.
    """
    name = yaml.safe_load(rendered)["metadata"]["name"]
    status = "jsonpath={.status.jobDeploymentStatus}"
    ended = answer_of("kubectl", "get", "rayjobs.ray.io", name, "--ignore-not-found", "--output", status)
    if ended in ("Complete", "Failed"):
        raise Refused(
            f"k8s: KubeRay starts no RayJob again that has ended; got {name}, {ended}: first kubectl delete rayjob {name}"
        )
    return answer_of("kubectl", "apply", "-f", "-", given=rendered)


def _fill(job: dict[str, Any], order: Order) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    groups = cluster["workerGroupSpecs"]
    if len(groups) != 1:
        raise ValueError(f"k8s: the RayJob of {order.infra} must have one group of workers; got {len(groups)}")
    group = groups[0]
    pods = [part["template"]["spec"] for part in (cluster["headGroupSpec"], group)]
    _refuse_unless_shared(order, pods)
    limits = pods[1]["containers"][0]["resources"]["limits"]
    least, most = (_pods(order, workers, limits, most=group["maxReplicas"]) for workers in (order.sizes[0], order.sizes[-1]))
    group["replicas"] = group["minReplicas"] = least
    group["maxReplicas"] = most
    job["metadata"]["name"] = order.name
    job["spec"]["entrypoint"] = shlex.join(_entrypoint(order, gpus=_gpus(limits) > 0))
    for pod in pods:
        pod["containers"][0]["image"] = order.image  # Ray's, for KubeRay (1.7.0); whatever stands beside it has its own


def _refuse_unless_kubernetes_takes(order: Order) -> None:
    if len(order.name) > LONGEST_NAME or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", order.name):
        rule = f"name must be lower-case letters, digits and inner -, begin with a letter, and be at most {LONGEST_NAME} long"
        raise ValueError(f"k8s: {rule} (RFC 1123, KubeRay); got {order.name!r}")
    if not _stays_what_it_is(order.image):
        raise ValueError(f"k8s: image must be a name with a tag or a digest, other than latest; got {order.image!r}")


def _stays_what_it_is(image: str) -> bool:
    """Whether a retry trains with the code of the first attempt: `[host[:port]/]path/name` and `:tag`, `@sha256:...` or both."""
    part = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
    host = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]+)?"
    whole = rf"(?:{host}/)?{part}(?:/{part})*(?::(?P<tag>\w[\w.-]{{0,127}}))?(?P<digest>@sha256:[0-9a-f]{{64}})?"
    found = re.fullmatch(whole, image, re.ASCII)
    return found is not None and (found["digest"] is not None or found["tag"] not in (None, "latest"))


def _entrypoint(order: Order, *, gpus: bool) -> list[str]:
    """One shell reads it, on the head, where there is no GPU to be found: so which device is said."""
    words = ["spiketrain", "launch", *order.words, "--name", order.name, "--runs", order.runs, "--address", "auto"]
    words += ["--workers", order.asked]
    if order.option("--device") is None:
        words += ["--device", "gpu" if gpus else "cpu"]
    return [*words, "--or-resume"]


def _pods(order: Order, workers: int, limits: dict[str, Any], *, most: int) -> int:
    """How many pods hold the order's runs of so many workers: each takes a GPU, if the pods have any, and its cores."""
    asked = order.option("--cpus-per-worker") or "auto"
    asked = "1" if asked == "auto" else asked  # where workers have a GPU each, as many as fit
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(f"k8s: --cpus-per-worker must be a whole number >= 1 or auto; got {asked!r}")
    room = _cpus(limits) // int(asked)
    if _gpus(limits) and order.option("--device") != "cpu":
        room = min(room, _gpus(limits))
    pods = math.ceil(order.side_by_side * workers / room) if room else None
    if pods is None or pods > most:
        each = counted(_cpus(limits), "core") + (f" and {counted(_gpus(limits), 'GPU')}" if _gpus(limits) else "")
        raise ValueError(
            f"k8s: {order.wanted(workers)} x {counted(int(asked), 'cpu')} must fit into pods of {each}, "
            f"of which {order.infra} has {most}: "
            f"room for {counted(most * room, 'worker')}"
        )
    return pods


def _cpus(limits: dict[str, Any]) -> int:
    """Whole cores: KubeRay rounds up what it tells Ray."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(limits.get("cpu", "")))
    if found is None:
        raise ValueError(
            f"k8s: a worker's limit of cpu must be a number of cores, or of thousandths with m; got {limits.get('cpu')!r}"
        )
    return math.ceil(float(found[1]) / (1000 if found[2] else 1))


def _gpus(limits: dict[str, Any]) -> int:
    return int(limits.get("nvidia.com/gpu", 0))


def _refuse_unless_shared(order: Order, pods: list[dict[str, Any]]) -> None:
    """A run on a pod's own disk would end with the pod; the driver and every worker write to its folder and its checkpoints."""
    shared = sorted(set.intersection(*map(_claimed, pods)))
    kept = order.option("--checkpoints")
    folders = (("runs", order.runs, Path(order.runs)), ("--checkpoints", kept, None if kept is None else folder_of(kept)))
    for name, told, folder in folders:
        if folder is not None and (".." in folder.parts or not any(folder.is_relative_to(mount) for mount in shared)):
            where = ", ".join(shared)
            raise ValueError(
                f"k8s: {name} must lie where every pod writes to a shared volume ({where}), without ..; got {told!r}"
            )


def _claimed(pod: dict[str, Any]) -> set[str]:
    """Where a pod's first container may write to a persistent volume."""
    claims = {volume["name"] for volume in pod.get("volumes", ()) if "persistentVolumeClaim" in volume}
    mounts = pod["containers"][0].get("volumeMounts", ())
    return {mount["mountPath"] for mount in mounts if mount["name"] in claims and not mount.get("readOnly")}
