"""What every manifest for KubeRay keeps to: each rule names what in a manifest breaks it, and
nothing of one that keeps it.
"""

import copy
import functools
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.ray_cluster import NODES
from pipeline.launch.schedulers import manifests_of

Manifest = dict[str, Any]
LABEL = {"app.kubernetes.io/part-of": "spiketrain"}
RAY = ("RayCluster", "RayJob")
LEAST_RETRIES = 10
EXPORTER = "quay.io/prometheus/node-exporter:v1.9.1"
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "cloud.google.com/gke-preemptible": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""a node's label, by whom machines are lent, where it may be taken back"""
MONITORING = {
    "namespaceSelector": {"matchLabels": {"spiketrain/monitoring": "allowed"}},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
}
METRICS = {"metrics": 8080, "metrics-runs": 9100}
"""ports that figures are read at: Ray's on every pod, node_exporter's on the head"""


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


@functools.cache
def _built(folder: Path) -> list[Manifest]:
    return manifests_of(folder)


def containers(node: Any) -> list[Manifest]:
    """Every container that a manifest names, whatever its kind."""
    found: list[Manifest] = []
    for key, value in _children(node):
        is_list = key in ("containers", "initContainers") and isinstance(value, list)
        found += value if is_list else containers(value)
    return found


def when(broken: object, complaint: str) -> Sequence[str]:
    """The complaint, where what it is about is broken."""
    return [complaint] if broken else []


def authentication(manifest: Manifest) -> Iterator[str]:
    for spec in _clusters(manifest):
        yield from when(
            spec.get("authOptions") != {"mode": "token"},
            f"authOptions must be mode: token; got {spec.get('authOptions')}",
        )


def secrets(manifest: Manifest) -> Iterator[str]:
    """By reference only, and optional: without MLflow's the runs keep their own store."""
    yield from when(manifest["kind"] == "Secret", "a Secret must not lie among the manifests")
    for container in containers(manifest):
        for variable in container.get("env", ()):
            yield from when(
                "value" in variable
                and re.search(
                    "TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY$|_URI$", variable["name"].upper()
                ),
                f"{container['name']}: {variable['name']} must come from a Secret; got a value",
            )
        for source in container.get("envFrom", ()):
            yield from when(
                set(source) != {"secretRef"} or source["secretRef"].get("optional") is not True,
                f"{container['name']}: envFrom must be an optional secretRef; got {source}",
            )
    for path, text in _texts(manifest):
        yield from when(
            re.search(r"\w+://[^/\s]*:[^/\s]*@", text),
            f"{path}: a password must not stand in an address",
        )


def user(manifest: Manifest) -> Iterator[str]:
    """Kubernetes' restricted profile, with the user of the image."""
    for pod in _pods(manifest):
        context = pod.get("securityContext", {})
        for name, value in (
            ("runAsNonRoot", True),
            ("runAsUser", 10001),
            ("runAsGroup", 10001),
            ("fsGroup", 10001),
        ):
            yield from when(
                context.get(name) != value,
                f"a pod's {name} must be {value}; got {context.get(name)}",
            )
        yield from when(
            context.get("seccompProfile") != {"type": "RuntimeDefault"},
            f"a pod's seccompProfile must be RuntimeDefault; got {context.get('seccompProfile')}",
        )
    own = [
        (container["name"], container.get("securityContext")) for container in containers(manifest)
    ]
    own += [
        ("autoscaler", spec.get("autoscalerOptions", {}).get("securityContext"))
        for spec in _clusters(manifest)
    ]
    for name, context in own:
        yield from when(
            context != {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            f"{name}: must drop all capabilities and allow no escalation; got {context}",
        )


def closed(manifest: Manifest) -> Iterator[str]:
    """No way in from outside the cluster."""
    yield from when(
        manifest["kind"] in ("Service", "Ingress", "Route", "Gateway"),
        f"a {manifest['kind']} must not lie among the manifests",
    )
    for path, text in _texts(manifest):
        # `ray::` begins the title of a process.
        yield from when(
            "0.0.0.0" in text or re.search(r"(^|\W)::", text),
            f"{path}: must not name every interface; got {text!r}",
        )
    for spec in _clusters(manifest):
        head = spec["headGroupSpec"]
        yield from when(
            head.get("serviceType") != "ClusterIP",
            f"the head's serviceType must be ClusterIP; got {head.get('serviceType')}",
        )
        for name in ("enableIngress", "ingressOptions", "headService"):
            yield from when(name in head, f"the head must have no {name}")
        ports = {
            port["name"] for port in head["template"]["spec"]["containers"][0].get("ports", ())
        }
        yield from when(
            ports != {"gcs-server", "dashboard", "metrics"},
            "the head's ports must be gcs-server, dashboard and metrics, or KubeRay opens"
            f" others; got {sorted(ports)}",
        )
    for pod, labels in zip(_pods(manifest), _labels(manifest), strict=True):
        yield from when(
            labels != LABEL,
            f"a pod must have the label that the NetworkPolicy goes by; got {labels}",
        )
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            yield from when(name in pod, f"a pod must have no {name}")


def retries(manifest: Manifest) -> Iterator[str]:
    """A retry is a new cluster, which finds the run by its name on storage that outlives the old
    one. Evictions count, too.
    """
    if manifest["kind"] != "RayJob":
        return
    spec, words = manifest["spec"], manifest["spec"]["entrypoint"].split()
    yield from when(
        spec.get("backoffLimit", 0) < LEAST_RETRIES,
        f"backoffLimit must be {LEAST_RETRIES} or more; got {spec.get('backoffLimit')}",
    )
    for option in ("--or-resume", "--name", "--runs"):
        yield from when(option not in words, f"the entrypoint must say {option}")
    yield from when(
        "--name" in words and words[words.index("--name") + 1] != manifest["metadata"]["name"],
        f"the run must have the RayJob's name, {manifest['metadata']['name']}",
    )
    yield from when(
        spec.get("shutdownAfterJobFinishes") is not True, "shutdownAfterJobFinishes must be true"
    )
    yield from when(
        spec.get("submissionMode") != "HTTPMode",
        f"submissionMode must be HTTPMode; got {spec.get('submissionMode')}",
    )


def head(manifest: Manifest) -> Iterator[str]:
    """Nothing trains on it."""
    for spec in _clusters(manifest):
        params = spec["headGroupSpec"].get("rayStartParams", {})
        yield from when(
            params.get("num-cpus") != "0" or "num-gpus" in params,
            f"the head must have num-cpus 0 and no num-gpus; got {params}",
        )
        for container in spec["headGroupSpec"]["template"]["spec"]["containers"]:
            for kind, amounts in container["resources"].items():
                for name in amounts:
                    yield from when(
                        name not in ("cpu", "memory"),
                        f"the head's {kind} must be of cpu and memory; got {name}",
                    )


def stays(manifest: Manifest) -> Iterator[str]:
    """The head prefers a machine that nobody takes back, and has any other where there is none, or
    where none is labelled.
    """
    wanted = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT.items()]
    for spec in _clusters(manifest):
        affinity = (
            spec["headGroupSpec"]["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
        )
        preferred = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
        yield from when(
            [each["preference"].get("matchExpressions") for each in preferred] != [wanted],
            f"the head must prefer nodes without any label of spot machines, {', '.join(SPOT)};"
            f" got {preferred}",
        )
        yield from when(
            "requiredDuringSchedulingIgnoredDuringExecution" in affinity,
            "the head must require no label of its node: there may be no such node",
        )


def loss_of_a_node(manifest: Manifest) -> Iterator[str]:
    """Found as fast as a launch without --node-loss expects it."""
    for spec in _clusters(manifest):
        container = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
        told = {each["name"]: each.get("value") for each in container.get("env", ())}
        for name, value in NODES["fast"].items():
            yield from when(
                told.get(name) != value, f"the head's {name} must be {value}; got {told.get(name)}"
            )


def scale(manifest: Manifest) -> Iterator[str]:
    for spec in _clusters(manifest):
        yield from when(
            spec.get("enableInTreeAutoscaling") is not True
            or spec.get("autoscalerOptions", {}).get("version") != "v2",
            "the autoscaler must be on, version v2",
        )
        for group in spec["workerGroupSpecs"]:
            least, now, most = (
                group.get(name) for name in ("minReplicas", "replicas", "maxReplicas")
            )
            yield from when(
                None in (least, now, most) or not 0 <= least <= now <= most or most < 1,
                f"replicas must lie between minReplicas and maxReplicas; got {now} of {least}"
                f" to {most}",
            )
            if manifest["kind"] == "RayJob" and None not in (least, now, most):
                yield from _room(manifest, group)


def _room(manifest: Manifest, group: Manifest) -> Iterator[str]:
    """The driver counts on its least number of workers when it starts, and never has more than its
    largest.
    """
    words = manifest["spec"]["entrypoint"].split()
    told = {
        name: words[words.index(name) + 1]
        for name in ("--workers", "--cpus-per-worker", "--device")
        if name in words
    }
    numbers = [int(each) for each in re.split("[:,]", told.get("--workers", "1"))]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    room = int(limits["cpu"]) // int(told.get("--cpus-per-worker", 1))
    if told.get("--device") == "gpu":
        room = min(room, int(limits["nvidia.com/gpu"]))
    for name, workers in (("minReplicas", numbers[0]), ("maxReplicas", numbers[-1])):
        yield from when(
            group[name] * room < workers,
            f"a RayJob's {name} must hold {workers} workers, {room} in each pod; got {group[name]}",
        )
    yield from when(
        len(numbers) == 1 and group["minReplicas"] != group["replicas"],
        f"a RayJob's minReplicas must be its replicas, {group['replicas']}, all of which train;"
        f" got {group['minReplicas']}",
    )


def departure(manifest: Manifest) -> Iterator[str]:
    """A pod that is taken away has what trains saved first, within the time that it is given."""
    for spec in _clusters(manifest):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod, is_head = group["template"]["spec"], group is spec["headGroupSpec"]
            grace = pod.get("terminationGracePeriodSeconds", 30)  # Kubernetes' own
            yield from when(
                grace < 120,
                f"a pod's terminationGracePeriodSeconds must be 120 or more; got {grace}",
            )
            container = pod["containers"][0]
            hook = " ".join(
                container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ())
            )
            yield from when(
                is_head and "kill -USR1" not in hook,
                f"{container['name']}: preStop must ask the driver to save with SIGUSR1; got"
                f" {hook!r}",
            )
            if not is_head:
                found = re.search(r"ray drain-node .*--deadline-remaining-seconds (\d+)", hook)
                if found is None or "--reason DRAIN_NODE_REASON_PREEMPTION" not in hook:
                    yield (
                        f"{container['name']}: preStop must drain the node for a preemption, with a"
                        f" deadline; got {hook!r}"
                    )
                elif int(found[1]) >= grace:
                    yield (
                        f"{container['name']}: the deadline must lie before the end of the pod,"
                        f" {grace} s; got {found[1]}"
                    )


def storage(manifest: Manifest) -> Iterator[str]:
    """Runs and data on claims, shared memory as memory, and a request for all that a container may
    take.
    """
    for pod in _pods(manifest):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        container = pod["containers"][0]
        mounts = {
            mount["mountPath"]: volumes.get(mount["name"], {})
            for mount in container.get("volumeMounts", ())
        }
        for path, claim in (
            ("/shared/runs", "spiketrain-runs"),
            ("/opt/spiketrain/data", "spiketrain-data"),
        ):
            yield from when(
                mounts.get(path, {}).get("persistentVolumeClaim") != {"claimName": claim},
                f"{container['name']}: {path} must be the claim {claim}; got {mounts.get(path)}",
            )
        shm = mounts.get("/dev/shm", {}).get("emptyDir", {})
        if shm.get("medium") != "Memory" or "sizeLimit" not in shm:
            yield (
                f"{container['name']}: /dev/shm must be an emptyDir of Memory with a sizeLimit; got"
                f" {shm}"
            )
        elif _gibibytes(shm["sizeLimit"]) * 2 > _gibibytes(
            container["resources"]["limits"]["memory"]
        ):
            yield (
                f"{container['name']}: /dev/shm must take at most half of the memory; got"
                f" {shm['sizeLimit']}"
            )
    for spec in _clusters(manifest):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            asked = int(group.get("rayStartParams", {}).get("object-store-memory", 0))
            shm = next(
                each for each in group["template"]["spec"]["volumes"] if each["name"] == "shm"
            )["emptyDir"]
            if not 0 < asked <= _gibibytes(shm["sizeLimit"]) * 2**30:
                name = group.get("groupName", "the head")
                yield (
                    f"{name}: object-store-memory must be said, and fit into /dev/shm,"
                    f" {shm['sizeLimit']}; got {asked}"
                )
    amounts = [(each["name"], each.get("resources", {})) for each in containers(manifest)]
    amounts += [
        ("autoscaler", spec.get("autoscalerOptions", {}).get("resources", {}))
        for spec in _clusters(manifest)
    ]
    for name, resources in amounts:
        yield from when(
            resources.get("requests") != resources.get("limits")
            or not {"cpu", "memory"} <= set(resources.get("requests", {})),
            f"{name}: must request cpu and memory, and be limited to just that; got {resources}",
        )


def metrics(manifest: Manifest) -> Iterator[str]:
    """What machines do is read at a named port of every pod; what runs do at one of the head's, out
    of what the driver writes.
    """
    for spec in _clusters(manifest):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield from _port(group["template"]["spec"]["containers"][0], "metrics")
        pod = spec["headGroupSpec"]["template"]["spec"]
        driver, *beside = pod["containers"]
        exporter = next((each for each in beside if each["image"] == EXPORTER), None)
        if exporter is None:
            yield (
                f"the head must have {EXPORTER} beside Ray; got"
                f" {[each['image'] for each in beside]}"
            )
            continue
        yield from _port(exporter, "metrics-runs")
        folder = {each["name"]: each.get("value") for each in driver.get("env", ())}.get(
            "SPIKETRAIN_METRICS"
        )
        written, read = (_volume_at(each, folder) for each in (driver, exporter))
        yield from when(
            written != read
            or written not in {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume},
            f"SPIKETRAIN_METRICS must be an emptyDir of {driver['name']} and"
            f" {exporter['name']}; got {folder}",
        )
        yield from when(
            f"--collector.textfile.directory={folder}" not in exporter.get("args", ()),
            f"{exporter['name']}: must read {folder}; got {exporter.get('args')}",
        )


def _port(container: Manifest, name: str) -> Iterator[str]:
    yield from when(
        {"name": name, "containerPort": METRICS[name]} not in container.get("ports", ()),
        f"{container['name']}: must have the port {name}, {METRICS[name]}; got"
        f" {container.get('ports')}",
    )


def _volume_at(container: Manifest, path: str | None) -> str | None:
    return next(
        (
            mount["name"]
            for mount in container.get("volumeMounts", ())
            if mount["mountPath"] == path
        ),
        None,
    )


def policy(manifest: Manifest) -> Iterator[str]:
    """Whom a NetworkPolicy lets in: the pods everywhere, the operator at the dashboard, a
    Prometheus at figures, nobody else.
    """
    if manifest["kind"] != "NetworkPolicy":
        return
    spec = manifest["spec"]
    yield from when(
        spec["podSelector"] != {"matchLabels": LABEL} or spec.get("policyTypes") != ["Ingress"],
        f"the policy must be about what comes in to {LABEL}; got {spec['podSelector']},"
        f" {spec.get('policyTypes')}",
    )
    for rule in spec.get("ingress", ()):
        sources = rule.get("from") or [{}]
        own = sources == [{"podSelector": {"matchLabels": LABEL}}]
        of_operator = [
            source.get("podSelector")
            == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
            and "namespaceSelector" in source
            for source in sources
        ]
        at_dashboard = all(of_operator) and rule.get("ports") == [{"protocol": "TCP", "port": 8265}]
        figures = [{"protocol": "TCP", "port": port} for port in METRICS.values()]
        yield from when(
            not own
            and not at_dashboard
            and not (sources == [MONITORING] and rule.get("ports") == figures),
            "the policy must let in its own pods, the operator at port 8265, and a Prometheus"
            f" at figures; got {rule}",
        )


RULES = (
    *(authentication, secrets, user, closed, retries, head, stays, loss_of_a_node),
    *(scale, departure, storage, metrics, policy),
)


def versions(manifest: Manifest, *, ray: str, spiketrain: str) -> Iterator[str]:
    """The image holds the ray of requirements.lock, and KubeRay builds its commands for
    rayVersion.
    """
    for spec in _clusters(manifest):
        yield from when(
            spec.get("rayVersion") != ray,
            f"rayVersion must be that of requirements.lock, {ray}; got {spec.get('rayVersion')}",
        )
    for pod in _pods(manifest):
        container = pod["containers"][0]  # Ray's; whatever stands beside it has its own
        yield from when(
            not container["image"].endswith(f"/spiketrain:{spiketrain}-ray{ray}"),
            f"{container['name']}: the image must be spiketrain:{spiketrain}-ray{ray}; got"
            f" {container['image']}",
        )


# ------------------------------------------------------------------------------ parts of a manifest


def cluster_of(manifest: Manifest) -> Manifest:
    return manifest["spec"]["rayClusterSpec"] if manifest["kind"] == "RayJob" else manifest["spec"]


def _clusters(manifest: Manifest) -> list[Manifest]:
    return [cluster_of(manifest)] if manifest["kind"] in RAY else []


def _templates(manifest: Manifest) -> list[Manifest]:
    groups = [
        group
        for spec in _clusters(manifest)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    own = (
        [manifest["spec"]["submitterPodTemplate"]]
        if "submitterPodTemplate" in manifest["spec"]
        else []
    )
    return [group["template"] for group in groups] + own


def _pods(manifest: Manifest) -> list[Manifest]:
    return [template["spec"] for template in _templates(manifest)]


def _labels(manifest: Manifest) -> list[dict[str, str]]:
    return [template.get("metadata", {}).get("labels", {}) for template in _templates(manifest)]


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    """Key and value of each; none of a value that holds no others."""
    if isinstance(node, dict):
        return node.items()
    return enumerate(node) if isinstance(node, list) else ()


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    for key, value in _children(node):
        yield from _texts(value, f"{path}.{key}" if path else str(key))


def _gibibytes(text: str) -> float:
    assert text.endswith("Gi"), text
    return float(text[:-2])
