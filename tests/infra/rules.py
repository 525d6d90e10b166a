"""What every manifest for KubeRay keeps to: each rule names what in a manifest breaks it, and
nothing of one that keeps it.

rules.yaml has the rules that fix a value; the functions here compare two.
"""

import copy
import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.launch.ray_cluster import NODE_SETTINGS
from pipeline.launch.schedulers import manifests_of

Manifest = dict[str, Any]
# rules.yaml has it, too
EXPORTER = "quay.io/prometheus/node-exporter:v1.9.1"
SCHEMA = Draft202012Validator(yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text()))


def require_kustomize() -> None:
    """Skip the test, or the module that is being imported, where nothing renders a folder."""
    if not (shutil.which("kubectl") or shutil.which("kustomize")):
        pytest.skip(
            "needs kustomize: `infra/setup.sh --tools`, where apt has it", allow_module_level=True
        )


def build(folder: Path) -> list[Manifest]:
    """The manifests of a folder, as kustomize renders it."""
    require_kustomize()
    return copy.deepcopy(_built(folder))


_built = functools.cache(manifests_of)


def cluster_of(manifest: Manifest) -> Manifest:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def groups(manifest: Manifest) -> list[Manifest]:
    if manifest["kind"] not in ("RayCluster", "RayJob"):
        return []
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(manifest: Manifest) -> list[Manifest]:
    return [each for group in groups(manifest) for each in group["template"]["spec"]["containers"]]


def fixed_values(manifest: Manifest) -> Iterator[str]:
    yield from (f"{each.json_path}: {each.message}" for each in SCHEMA.iter_errors(manifest))


def name(manifest: Manifest) -> Iterator[str]:
    if manifest["kind"] == "RayJob":
        run, job = options(manifest).get("--name"), manifest["metadata"]["name"]
        if run != job:
            yield f"the run must have the RayJob's name, {job}; got {run}"


def options(job: Manifest) -> dict[str, str]:
    words = job["spec"]["entrypoint"].split()
    return dict(zip(words, [*words[1:], ""], strict=True))


def loss_of_a_node(manifest: Manifest) -> Iterator[str]:
    for head in groups(manifest)[:1]:
        told = {
            each["name"]: each.get("value")
            for each in head["template"]["spec"]["containers"][0].get("env", ())
        }
        if not told.items() >= NODE_SETTINGS["fast"].items():
            yield f"the head must have {NODE_SETTINGS['fast']}; got {told}"


def scale(manifest: Manifest) -> Iterator[str]:
    for group in groups(manifest)[1:]:
        least, now, most = (group[each] for each in ("minReplicas", "replicas", "maxReplicas"))
        if not least <= now <= most:
            yield f"replicas must lie between {least} and {most}; got {now}"
        if manifest["kind"] == "RayJob":
            yield from _room(options(manifest), group)


def _room(told: dict[str, str], group: Manifest) -> Iterator[str]:
    """The driver counts on its least number of workers when it starts, and never has more than its
    largest.
    """
    numbers = [int(each) for each in re.split("[:,]", told.get("--workers", "1"))]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    room = int(limits["cpu"]) // int(told.get("--cpus-per-worker", 1))
    if told.get("--device") == "gpu":
        room = min(room, int(limits["nvidia.com/gpu"]))
    for name, workers in (("minReplicas", numbers[0]), ("maxReplicas", numbers[-1])):
        if group[name] * room < workers:
            yield f"{name} must hold {workers} workers, {room} in each pod; got {group[name]}"
    if len(numbers) == 1 and group["minReplicas"] != group["replicas"]:
        yield f"minReplicas must be replicas, {group['replicas']}, all of which train"


def deadline(manifest: Manifest) -> Iterator[str]:
    for group in groups(manifest)[1:]:
        grace = group["template"]["spec"].get("terminationGracePeriodSeconds", 30)
        for timeout, seconds in re.findall(  # the command starts as late as its timeout allows
            r"timeout (\d+) .*--deadline-remaining-seconds (\d+)",
            str(group["template"]["spec"]["containers"][0].get("lifecycle")),
        ):
            if (latest := int(timeout) + int(seconds)) >= grace:
                yield f"the deadline must lie before the end of the pod, {grace} s; got {latest}"


def amounts(manifest: Manifest) -> Iterator[str]:
    """Each request is the limit, and shared memory takes at most half of the memory and holds the
    object store.
    """
    limited = {each["name"]: each["resources"] for each in containers(manifest)}
    if limited:
        limited["autoscaler"] = cluster_of(manifest)["autoscalerOptions"]["resources"]
    for name, resources in limited.items():
        if resources.get("requests") != resources["limits"]:
            yield f"{name}: must request what it is limited to; got {resources}"
    for group in groups(manifest):
        pod, store = group["template"]["spec"], group["rayStartParams"].get("object-store-memory")
        [shared] = [v["emptyDir"]["sizeLimit"] for v in pod["volumes"] if v["name"] == "shm"]
        # Another unit than Gi would be no number.
        shm, memory = (
            float(text.removesuffix("Gi"))
            for text in (shared, pod["containers"][0]["resources"]["limits"]["memory"])
        )
        if shm * 2 > memory:
            yield f"/dev/shm must take at most half of {memory} Gi; got {shm} Gi"
        if not 0 < int(store or 0) <= shm * 2**30:
            yield f"object-store-memory must be said and fit into /dev/shm, {shm} Gi; got {store}"


RULES = (fixed_values, name, loss_of_a_node, scale, deadline, amounts)


def versions(manifest: Manifest, *, ray: str, spiketrain: str) -> Iterator[str]:
    """The image holds the ray of requirements.lock, and KubeRay builds its commands for
    rayVersion.
    """
    for group in groups(manifest):
        version, image = (
            cluster_of(manifest).get("rayVersion"),
            group["template"]["spec"]["containers"][0]["image"],
        )
        if version != ray or not image.endswith(f"/spiketrain:{spiketrain}-ray{ray}"):
            yield f"must be of spiketrain {spiketrain} and ray {ray}; got {version} and {image}"
