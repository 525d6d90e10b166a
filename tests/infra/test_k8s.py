"""The manifests of infra/k8s, as kustomize renders them, against KubeRay's fields and our rules. No
cluster is needed.
"""

import copy
import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.cli.app import app
from pipeline.launch.schedulers import Order, render_rayjob
from tests.helpers.crd import GOLDEN, misfits
from tests.infra.rules import RULES, build, cluster_of, versions

ROOT = Path(__file__).parents[2]
K8S = ROOT / "infra" / "k8s"
SIZES = (
    "cpu",
    "one-node-8-gpus",
    "four-nodes-32-gpus",
    "eight-nodes-64-gpus",
    "eight-nodes-64-gpus-infiniband",
)
FACTS = json.loads(GOLDEN.read_text())
FOLDERS = sorted(
    file.parent.relative_to(K8S).as_posix() for file in K8S.rglob("kustomization.yaml")
)
MANIFESTS = [(folder, index) for folder in FOLDERS for index in range(len(build(K8S / folder)))]
RAY = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
SPIKETRAIN = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(params=MANIFESTS, ids=lambda each: f"{each[0]}-{each[1]}")
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    folder, index = request.param
    return build(K8S / folder)[index]


def test_all_of_them_are_looked_at() -> None:
    assert [
        "base/cluster",
        "base/job",
        "monitoring",
        *sorted(f"overlays/{size}/{kind}" for size in SIZES for kind in ("cluster", "job")),
        "shared",
    ] == FOLDERS
    kinds = [build(K8S / folder)[index]["kind"] for folder, index in MANIFESTS]
    others = ["NetworkPolicy", *["PersistentVolumeClaim"] * 2, "PodMonitor"]
    assert sorted(kinds) == [*others, *["RayCluster"] * 6, *["RayJob"] * 6]
    built = {path for folder in FOLDERS for path in _files(K8S / folder)}
    assert built == set(K8S.rglob("*.yaml")), "a file that no kustomization.yaml names"


def test_fields_are_those_of_kuberay(manifest: dict[str, Any]) -> None:
    found = misfits(manifest, FACTS)
    assert not found, "\n".join(found)


def test_rules_hold(manifest: dict[str, Any]) -> None:
    found = [complaint for rule in RULES for complaint in rule(manifest)]
    assert not found, "\n".join(found)


def test_versions_agree_with_requirements_lock(manifest: dict[str, Any]) -> None:
    assert len(RAY) == 1
    found = list(versions(manifest, ray=RAY[0], spiketrain=SPIKETRAIN))
    assert not found, "\n".join(found)


def test_the_manifests_say_which_kuberay_they_were_checked_with() -> None:
    for file in ("base/cluster/raycluster.yaml", "base/job/rayjob.yaml"):
        assert f"fields of {FACTS['version'].replace(' v', ' ')};" in (K8S / file).read_text()


def test_the_image_has_what_ray_answers_kuberay_with() -> None:
    """Probes and jobs come through HTTP, which Ray serves only where all of ray[default] is
    installed (2.60).
    """
    asked = [
        each
        for each in metadata.requires("ray") or ()
        if re.search(r"""extra == ['"]default['"]""", each)
    ]
    names = {re.split(r"[^\w.-]", each)[0].replace("_", "-").lower() for each in asked}
    assert len(names) > 5
    locked = set(
        re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    assert names <= locked


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{size}" for size in SIZES)])
def test_a_job_brings_the_cluster_that_one_may_keep(folder: str) -> None:
    """So that what was tried on the one holds for the other; only how many pods there are is each
    one's own.
    """
    job, kept = (cluster_of(build(K8S / folder / kind)[0]) for kind in ("job", "cluster"))
    for cluster in (job, kept):
        for group in cluster["workerGroupSpecs"]:
            for name in ("replicas", "minReplicas", "maxReplicas"):
                del group[name]
    assert job == kept


@pytest.mark.parametrize("folder", ["base/job", *(f"overlays/{size}/job" for size in SIZES)])
def test_an_example_is_what_its_order_gives(folder: str) -> None:
    """The entrypoint that stands in the folder, taken as an order, gives the RayJob that stands
    there.
    """
    job = build(K8S / folder)[0]
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["spiketrain", "launch"]
    named = words.index("--name")
    order = Order(
        words=tuple(words[2:named]),
        name=words[named + 1],
        workers=int(words[words.index("--workers") + 1]),
        image=job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
            "image"
        ],
        runs=words[words.index("--runs") + 1],
    )
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["maxReplicas"] = group["replicas"]
    assert yaml.safe_load(render_rayjob(order, K8S / folder)) == job
    assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    command = typer.main.get_command(app)
    group: Any = command
    options = {name for each in group.commands["launch"].params for name in each.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("kind", ["cluster", "job"])
def test_infiniband_is_asked_for_beside_what_the_same_size_has_without(kind: str) -> None:
    """In every pod that computes; none gets a capability, which the restricted profile would
    refuse.
    """
    plain, infiniband = (build(K8S / "overlays" / size / kind)[0] for size in SIZES[-2:])
    resources = cluster_of(infiniband)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
        "resources"
    ]
    assert [
        resources[name].pop("rdma/rdma_shared_device_a") for name in ("requests", "limits")
    ] == ["1", "1"]
    assert infiniband == plain


def test_the_image_has_what_nccl_loads_for_infiniband() -> None:
    """It takes TCP without an error where they are missing."""
    runtime = (
        (ROOT / "infra" / "setup.sh")
        .read_text()
        .partition("list_runtime_packages() {")[2]
        .partition("\n}")[0]
    )
    assert {"libibverbs1", "ibverbs-providers"} <= set(runtime.split())


def test_every_node_sees_the_claims() -> None:
    modes = {
        each["metadata"]["name"]: each["spec"]["accessModes"]
        for each in build(K8S / "shared")
        if each["kind"] == "PersistentVolumeClaim"
    }
    names = ("spiketrain-data", "spiketrain-runs")
    assert modes == {name: ["ReadWriteMany"] for name in names}


# -------------------------------------------------------------------------- what is broken is found

HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
GROUP = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
POD, CONTAINER = (*GROUP, "template", "spec"), (*GROUP, "template", "spec", "containers", 0)
GONE = object()
BROKEN_FIELDS = [
    (("spec", "backofLimit"), 3, "RayJob.spec.backofLimit: is unknown"),
    (("spec", "backoffLimit"), "3", "RayJob.spec.backoffLimit: must be integer; got '3'"),
    (("spec", "suspend"), 0, "RayJob.spec.suspend: must be boolean; got 0"),
    (
        ("spec", "entrypoint"),
        ["spiketrain"],
        "RayJob.spec.entrypoint: must be string; got ['spiketrain']",
    ),
    (("apiVersion",), "ray.io/v2", "RayJob.apiVersion: must be one of ray.io/v1; got 'ray.io/v2'"),
    (
        ("kind",),
        "RayJobs",
        (
            "kind: must be one of RayCluster, RayJob, NetworkPolicy, PersistentVolumeClaim,"
            " PodMonitor; got"
        ),
    ),
    (
        (*HEAD[:2], "authOptions", "mode"),
        "tokens",
        "RayJob.spec.rayClusterSpec.authOptions.mode: must be one of disabled|token",
    ),
    (
        (*HEAD, "rayStartParams", "num-cpus"),
        0,
        "RayJob.spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus: must be string; got 0",
    ),
    (
        (*GROUP, "groupName"),
        GONE,
        "RayJob.spec.rayClusterSpec.workerGroupSpecs[0].groupName: is missing",
    ),
    (
        (*GROUP, "template", "spec", "container"),
        [],
        "RayJob.spec.rayClusterSpec.workerGroupSpecs[0].template.spec.container: is unknown",
    ),
    (
        (*CONTAINER, "resources", "limits"),
        ["cpu"],
        "containers[0].resources.limits: must be an object; got ['cpu']",
    ),
    (
        (*CONTAINER, "lifecycle", "preStop", "exec", "command"),
        "ray",
        "preStop.exec.command: must be a list; got 'ray'",
    ),
    ((*CONTAINER, "lifecycle", "prestop"), {}, "containers[0].lifecycle.prestop: is unknown"),
    ((*CONTAINER, "volumeMounts"), {}, "containers[0].volumeMounts: must be a list; got {}"),
]
SECRET = {"name": "MLFLOW_TRACKING_PASSWORD", "value": "x"}
HEAD_CONTAINERS = (*HEAD, "template", "spec", "containers")
NODE_AFFINITY = (*HEAD, "template", "spec", "affinity", "nodeAffinity")
PREFERRED = (*NODE_AFFINITY, "preferredDuringSchedulingIgnoredDuringExecution")
PRE_STOP = (*CONTAINER, "lifecycle", "preStop", "exec")
DRAINED_LATE = [
    "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --deadline-remaining-seconds 300"
]
BROKEN_RULES = [
    (
        ("spec", "rayClusterSpec", "authOptions", "mode"),
        "disabled",
        "authOptions must be mode: token",
    ),
    (("spec", "rayClusterSpec", "authOptions"), GONE, "authOptions must be mode: token; got None"),
    (
        (*CONTAINER, "env", 0),
        SECRET,
        "ray-worker: MLFLOW_TRACKING_PASSWORD must come from a Secret",
    ),
    (
        (*CONTAINER, "env", 0),
        {"name": "X", "value": "http://me:word@mlflow:5000"},
        "a password must not stand in an address",
    ),
    (
        (*HEAD, "template", "spec", "containers", 0, "envFrom", 0, "secretRef", "optional"),
        False,
        "must be an optional secretRef",
    ),
    ((*POD, "securityContext", "runAsNonRoot"), False, "runAsNonRoot must be True; got False"),
    ((*POD, "securityContext", "runAsUser"), 0, "runAsUser must be 10001; got 0"),
    (
        (*POD, "securityContext", "seccompProfile"),
        GONE,
        "seccompProfile must be RuntimeDefault; got None",
    ),
    (
        (*CONTAINER, "securityContext", "capabilities"),
        {"add": ["IPC_LOCK"]},
        "ray-worker: must drop all capabilities",
    ),
    (
        (*CONTAINER, "securityContext", "allowPrivilegeEscalation"),
        True,
        "ray-worker: must drop all capabilities and allow no",
    ),
    (
        ("spec", "rayClusterSpec", "autoscalerOptions", "securityContext"),
        GONE,
        "autoscaler: must drop all capabilities",
    ),
    (
        (*HEAD, "rayStartParams", "dashboard-host"),
        "0.0.0.0",
        "dashboard-host: must not name every interface",
    ),
    (
        (*HEAD, "rayStartParams", "dashboard-host"),
        "::",
        "dashboard-host: must not name every interface",
    ),
    ((*HEAD, "serviceType"), "LoadBalancer", "serviceType must be ClusterIP; got LoadBalancer"),
    ((*HEAD, "enableIngress"), True, "the head must have no enableIngress"),
    (
        (*HEAD, "template", "spec", "containers", 0, "ports"),
        [],
        "the head's ports must be gcs-server, dashboard and",
    ),
    (
        (*GROUP, "template", "metadata", "labels"),
        {},
        "the label that the NetworkPolicy goes by; got {}",
    ),
    ((*POD, "hostNetwork"), True, "a pod must have no hostNetwork"),
    (("spec", "backoffLimit"), 9, "backoffLimit must be 10 or more; got 9"),
    (("spec", "backoffLimit"), GONE, "backoffLimit must be 10 or more; got None"),
    (
        ("spec", "entrypoint"),
        "spiketrain launch x.py --runs /shared/runs --name example",
        "must say --or-resume",
    ),
    (("metadata", "name"), "another", "the run must have the RayJob's name, another"),
    (("spec", "shutdownAfterJobFinishes"), False, "shutdownAfterJobFinishes must be true"),
    (("spec", "submissionMode"), "K8sJobMode", "submissionMode must be HTTPMode; got K8sJobMode"),
    ((*HEAD, "rayStartParams", "num-cpus"), "4", "the head must have num-cpus 0"),
    (
        (*HEAD, "template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu"),
        "1",
        "got nvidia.com/gpu",
    ),
    (
        (*HEAD, "template", "spec", "containers", 0, "env"),
        [],
        "the head's RAY_health_check_timeout_ms must be 2000; got None",
    ),
    (
        (*HEAD, "template", "spec", "affinity"),
        GONE,
        "the head must prefer nodes without any label of spot machines",
    ),
    (
        (*PREFERRED, 0, "preference", "matchExpressions", 0, "operator"),
        "In",
        "the head must prefer nodes without any label",
    ),
    (
        (*NODE_AFFINITY, "requiredDuringSchedulingIgnoredDuringExecution"),
        {},
        "the head must require no label of its node",
    ),
    ((*HEAD_CONTAINERS, 1), GONE, "the head must have quay.io/prometheus/node-exporter"),
    (
        (*HEAD_CONTAINERS, 1, "image"),
        "quay.io/prometheus/node-exporter:latest",
        "node-exporter:v1.9.1 beside Ray; got [",
    ),
    (
        (*HEAD_CONTAINERS, 1, "ports", 0, "containerPort"),
        9101,
        "run-metrics: must have the port metrics-runs, 9100; got [",
    ),
    (
        (*HEAD_CONTAINERS, 1, "volumeMounts", 0, "mountPath"),
        "/metrics",
        "SPIKETRAIN_METRICS must be an emptyDir of ray-head and",
    ),
    (
        (*HEAD, "template", "spec", "volumes", 3, "emptyDir"),
        GONE,
        "SPIKETRAIN_METRICS must be an emptyDir of ray-head and",
    ),
    (
        (*HEAD_CONTAINERS, 1, "args"),
        [],
        "run-metrics: must read /var/lib/spiketrain/metrics; got []",
    ),
    ((*CONTAINER, "ports"), GONE, "ray-worker: must have the port metrics, 8080; got None"),
    (("spec", "rayClusterSpec", "enableInTreeAutoscaling"), False, "the autoscaler must be on"),
    (
        (*GROUP, "maxReplicas"),
        0,
        "replicas must lie between minReplicas and maxReplicas; got 1 of 1 to 0",
    ),
    ((*GROUP, "minReplicas"), 0, "a RayJob's minReplicas must be its replicas, 1"),
    (
        (*GROUP, "minReplicas"),
        0,
        "a RayJob's minReplicas must hold 8 workers, 8 in each pod; got 0",
    ),
    (
        ("spec", "entrypoint"),
        "spiketrain launch x.py --workers 8:24 --device gpu",
        "maxReplicas must hold 24 workers, 8 in each",
    ),
    (
        (*POD, "terminationGracePeriodSeconds"),
        GONE,
        "terminationGracePeriodSeconds must be 120 or more; got 30",
    ),
    (
        (*CONTAINER, "lifecycle"),
        GONE,
        "ray-worker: preStop must drain the node for a preemption, with a deadline; got ''",
    ),
    (
        (*PRE_STOP, "command"),
        ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_IDLE_TERMINATION"],
        "must drain the node for",
    ),
    (
        (*PRE_STOP, "command"),
        DRAINED_LATE,
        "the deadline must lie before the end of the pod, 120 s; got 300",
    ),
    (
        (*HEAD, "template", "spec", "containers", 0, "lifecycle", "preStop"),
        GONE,
        "ray-head: preStop must ask the driver to save",
    ),
    (
        (*POD, "volumes", 2),
        {"name": "runs", "emptyDir": {}},
        "/shared/runs must be the claim spiketrain-runs",
    ),
    ((*POD, "volumes", 0, "emptyDir", "medium"), GONE, "/dev/shm must be an emptyDir of Memory"),
    (
        (*POD, "volumes", 0, "emptyDir", "sizeLimit"),
        "200Gi",
        "/dev/shm must take at most half of the memory",
    ),
    (
        (*HEAD, "rayStartParams", "object-store-memory"),
        GONE,
        "the head: object-store-memory must be said, and fit into /dev/shm",
    ),
    (
        (*GROUP, "rayStartParams", "object-store-memory"),
        "20000000000",
        "workers: object-store-memory must be said, and fit into",
    ),
    ((*CONTAINER, "resources", "requests"), GONE, "ray-worker: must request cpu and memory"),
]
POLICY = ("spec", "ingress")
BROKEN_POLICIES = [
    ((*POLICY, 0, "from"), [], "the policy must let in its own pods"),
    ((*POLICY, 0, "from", 0, "namespaceSelector"), {}, "the policy must let in its own pods"),
    (
        (*POLICY, 0, "from", 0),
        {"ipBlock": {"cidr": "10.0.0.0/8"}},
        "the policy must let in its own pods",
    ),
    ((*POLICY, 1, "ports"), GONE, "the operator at port 8265"),
    ((*POLICY, 2, "ports"), GONE, "and a Prometheus at figures"),
    ((*POLICY, 2, "ports", 0, "port"), 8265, "and a Prometheus at figures"),
    ((*POLICY, 2, "from", 0, "podSelector"), GONE, "and a Prometheus at figures"),
    ((*POLICY, 2, "from", 0, "namespaceSelector"), {}, "and a Prometheus at figures"),
    (("spec", "podSelector"), {"matchLabels": {}}, "the policy must be about what comes in"),
]


@pytest.mark.parametrize(("path", "value", "said"), BROKEN_FIELDS)
def test_a_wrong_field_is_named_with_its_path(
    path: tuple[str | int, ...], value: object, said: str
) -> None:
    found = misfits(_broken("overlays/one-node-8-gpus/job", 0, path, value), FACTS)
    assert len(found) == 1
    assert said in found[0]


JOB, POLICY_FILE = ("overlays/one-node-8-gpus/job", 0), ("shared", 2)


@pytest.mark.parametrize(
    ("place", "path", "value", "said"),
    [
        *((JOB, *broken) for broken in BROKEN_RULES),
        *((POLICY_FILE, *broken) for broken in BROKEN_POLICIES),
        *((JOB, ("kind",), kind, kind) for kind in ("Secret", "Service", "Ingress")),
    ],
)
def test_a_broken_rule_is_found(
    place: tuple[str, int], path: tuple[str | int, ...], value: object, said: str
) -> None:
    """So are a policy that lets others in, and a manifest that must not be there."""
    manifest = _broken(*place, path, value)
    assert any(said in complaint for rule in RULES for complaint in rule(manifest))


def test_another_ray_is_found() -> None:
    job = build(K8S / "base" / "job")[0]
    found = list(versions(job, ray="2.61.0", spiketrain=SPIKETRAIN))
    assert found[0] == f"rayVersion must be that of requirements.lock, 2.61.0; got {RAY[0]}"
    assert len(found) == 3 and "ray-head: the image must be" in found[1]


def _broken(folder: str, index: int, path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    manifest = copy.deepcopy(build(K8S / folder)[index])
    holder: Any = manifest
    for key in path[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return manifest


def _files(folder: Path) -> set[Path]:
    file = folder / "kustomization.yaml"
    named = [(folder / name).resolve() for name in yaml.safe_load(file.read_text())["resources"]]
    return {file, *(path for path in named if path.is_file())}
