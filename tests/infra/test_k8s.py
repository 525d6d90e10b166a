"""The manifests of infra/k8s, as kustomize renders them, against KubeRay's fields and our rules;
and the very commands by which a pod is taken away, on processes of this test. No cluster is needed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
import yaml

from pipeline.cli.app import app
from pipeline.launch.schedulers import LaunchRequest, render_rayjob
from tests.helpers.crd import GOLDEN, misfits
from tests.helpers.driver import workers_below
from tests.helpers.lab import Driven, Lab
from tests.helpers.nodes import TOKEN, nodes
from tests.infra.rules import RULES, build, cluster_of, containers, groups, versions

ROOT = Path(__file__).parents[2]
K8S = ROOT / "infra" / "k8s"
GPUS = [f"{name}-gpus" for name in ("one-node-8", "four-nodes-32", "eight-nodes-64")]
SIZES = ("cpu", *GPUS, f"{GPUS[-1]}-infiniband")
FACTS = json.loads(GOLDEN.read_text())
FOLDERS = sorted(
    file.parent.relative_to(K8S).as_posix() for file in K8S.rglob("kustomization.yaml")
)
MANIFESTS = [(folder, index) for folder in FOLDERS for index in range(len(build(K8S / folder)))]
LOCKED = dict(
    re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
)
SPIKETRAIN = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(("folder", "index"), MANIFESTS)
def test_a_manifest_has_kuberays_fields_and_keeps_the_rules(folder: str, index: int) -> None:
    manifest = build(K8S / folder)[index]
    assert misfits(manifest, FACTS) == []
    assert [complaint for rule in RULES for complaint in rule(manifest)] == []
    assert [*versions(manifest, ray=LOCKED["ray"], spiketrain=SPIKETRAIN)] == []


def test_all_of_them_are_looked_at() -> None:
    assert [
        "base/cluster",
        "base/job",
        "monitoring",
        *sorted(f"overlays/{size}/{kind}" for size in SIZES for kind in ("cluster", "job")),
        "shared",
    ] == FOLDERS
    assert sorted(build(K8S / folder)[index]["kind"] for folder, index in MANIFESTS) == [
        "NetworkPolicy",
        *["PersistentVolumeClaim"] * 2,
        "PodMonitor",
        *["RayCluster"] * 6,
        *["RayJob"] * 6,
    ]
    built = set(K8S.rglob("kustomization.yaml"))
    for file in [*built]:
        built |= {
            path
            for name in yaml.safe_load(file.read_text())["resources"]
            if (path := (file.parent / name).resolve()).is_file()
        }
    assert built == set(K8S.rglob("*.yaml")), "a file that no kustomization.yaml names"


def test_the_image_has_what_ray_answers_kuberay_with() -> None:
    """Probes and jobs come through HTTP, which Ray serves only where all of ray[default] is
    installed (2.60).
    """
    of_default = re.compile(r"""([\w.-]+).*extra == ['"]default['"]""")
    found = [match for each in metadata.requires("ray") or () if (match := of_default.match(each))]
    names = {match[1].replace("_", "-").lower() for match in found}
    assert len(names) > 5 and names <= LOCKED.keys()


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{size}" for size in SIZES)])
def test_a_job_brings_the_cluster_that_one_may_keep(folder: str) -> None:
    """So that what was tried on the one holds for the other; only how many pods there are is each
    one's own.
    """
    job, kept = (cluster_of(build(K8S / folder / kind)[0]) for kind in ("job", "cluster"))
    for group in (*job["workerGroupSpecs"], *kept["workerGroupSpecs"]):
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
    order = LaunchRequest(
        words=tuple(words[2:named]),
        name=words[named + 1],
        sizes=(int(words[words.index("--workers") + 1]),),
        runs=words[words.index("--runs") + 1],
        options={
            "image": containers(job)[0]["image"],
            "infra": K8S / folder,
            "cpus_per_worker": int(dict(pairwise(words)).get("--cpus-per-worker", 1)),
        },
    )
    workers = groups(job)[1]
    workers["maxReplicas"] = workers["replicas"]
    assert yaml.safe_load(render_rayjob(order)) == job
    assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
    command: Any = typer.main.get_command(app)
    assert {word for word in words if word.startswith("--")} <= {
        name for each in command.commands["launch"].params for name in each.opts
    }


@pytest.mark.parametrize("kind", ["cluster", "job"])
def test_infiniband_is_asked_for_beside_what_the_same_size_has_without(kind: str) -> None:
    """In every pod that computes; none gets a capability, which the restricted profile would
    refuse.
    """
    plain, infiniband = (build(K8S / "overlays" / size / kind)[0] for size in SIZES[-2:])
    resources = containers(infiniband)[-1]["resources"]
    asked = [resources[name].pop("rdma/rdma_shared_device_a") for name in ("requests", "limits")]
    assert (asked, infiniband) == (["1", "1"], plain)


def test_the_image_has_what_nccl_loads_for_infiniband() -> None:
    """It takes TCP without an error where they are missing."""
    _, _, after = (ROOT / "infra/setup.sh").read_text().partition("list_runtime_packages() {")
    assert {"libibverbs1", "ibverbs-providers"} <= set(after.partition("\n}")[0].split())


def test_every_node_sees_the_claims() -> None:
    assert {
        each["metadata"]["name"]: each["spec"]["accessModes"]
        for each in build(K8S / "shared")
        if each["kind"] == "PersistentVolumeClaim"
    } == {f"spiketrain-{name}": ["ReadWriteMany"] for name in ("data", "runs")}


# -------------------------------------------------------------------------- what is broken is found

CLUSTER = ("spec", "rayClusterSpec")
HEAD, GROUP = (*CLUSTER, "headGroupSpec"), (*CLUSTER, "workerGroupSpecs", 0)
POD, HEAD_POD = ((*group, "template", "spec") for group in (GROUP, HEAD))
CONTAINER, RAY, EXPORTER = (
    (*POD, "containers", 0),
    (*HEAD_POD, "containers", 0),
    (*HEAD_POD, "containers", 1),
)
NODE_AFFINITY = (*HEAD_POD, "affinity", "nodeAffinity")
PREFERRED = (*NODE_AFFINITY, "preferredDuringSchedulingIgnoredDuringExecution")
DRAIN = (*CONTAINER, "lifecycle", "preStop", "exec", "command")
DRAINED_LATE = [
    "timeout 90 ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION"
    " --deadline-remaining-seconds 100"
]
GONE = object()
BROKEN_FIELDS = [
    (("spec", "backofLimit"), 3, r"\$.spec: .*'backofLimit' was unexpected"),
    (("spec", "backoffLimit"), "3", r"\$.spec.backoffLimit: '3' is not of type 'integer'"),
    (("spec", "suspend"), 0, "spec.suspend: 0 is not of type 'boolean'"),
    (("spec", "entrypoint"), ["a"], r"spec.entrypoint: \['a'\] is not of type 'string'"),
    (("apiVersion",), "ray.io/v2", r"apiVersion: 'ray.io/v2' is not one of \['ray.io/v1'\]"),
    (("kind",), "RayJobs", "kind: must be one of RayCluster, RayJob, .*; got 'RayJobs'"),
    ((*CLUSTER, "authOptions", "mode"), "tokens", "mode: 'tokens' is not one of"),
    ((*HEAD, "rayStartParams", "num-cpus"), 0, "'num-cpus'].*: 0 is not of type 'string'"),
    ((*GROUP, "groupName"), GONE, r"workerGroupSpecs\[0\]: 'groupName' is a required property"),
    ((*POD, "container"), [], "template.spec: .*'container' was unexpected"),
    ((*CONTAINER, "resources", "limits"), ["cpu"], r"limits: \['cpu'\] is not of type 'object'"),
    (DRAIN, "ray", "preStop.exec.command: 'ray' is not of type 'array'"),
    ((*CONTAINER, "lifecycle", "prestop"), {}, "lifecycle: .*'prestop' was unexpected"),
    ((*CONTAINER, "volumeMounts"), {}, "volumeMounts: {} is not of type 'array'"),
]
BROKEN_RULES = [
    ((*CLUSTER, "authOptions", "mode"), "disabled", "authOptions: {'mode': 'token'} was expected"),
    ((*CLUSTER, "authOptions"), GONE, "'authOptions' is a required property"),
    ((*CONTAINER, "env", 0), {"name": "PASSWORD", "value": "x"}, "env[0]: False schema"),
    ((*CONTAINER, "env", 0), {"name": "X", "value": "http://me:word@mlflow"}, "env[0].value: "),
    ((*RAY, "envFrom", 0, "secretRef", "optional"), False, "secretRef.optional: True was expected"),
    ((*POD, "securityContext", "runAsNonRoot"), False, "runAsNonRoot: True was expected"),
    ((*POD, "securityContext", "runAsUser"), 0, "runAsUser: 10001 was expected"),
    ((*POD, "securityContext", "seccompProfile"), GONE, "'seccompProfile' is a required property"),
    (
        (*CONTAINER, "securityContext", "capabilities"),
        {"add": ["IPC_LOCK"]},
        "containers[0].securityContext: {'allowPrivilegeEscalation': False",
    ),
    (
        (*CONTAINER, "securityContext", "allowPrivilegeEscalation"),
        True,
        "containers[0].securityContext: {'allowPrivilegeEscalation': False",
    ),
    ((*CLUSTER, "autoscalerOptions", "securityContext"), GONE, "'securityContext' is a required"),
    ((*HEAD, "rayStartParams", "dashboard-host"), "0.0.0.0", "['dashboard-host']: '0.0.0.0'"),
    ((*HEAD, "rayStartParams", "dashboard-host"), "::", "['dashboard-host']: '::' should not"),
    ((*HEAD, "serviceType"), "LoadBalancer", "serviceType: 'ClusterIP' was expected"),
    ((*HEAD, "enableIngress"), True, "headGroupSpec: False schema"),
    ((*RAY, "ports"), [], "containers[0].ports: [] is too short"),
    ((*GROUP, "template", "metadata", "labels"), {}, "labels: {'app.kubernetes.io/part-of'"),
    ((*POD, "hostNetwork"), True, "template.spec: False schema"),
    (("spec", "backoffLimit"), 9, "backoffLimit: 9 is less than the minimum of 10"),
    (("spec", "backoffLimit"), GONE, "'backoffLimit' is a required property"),
    (("spec", "entrypoint"), "a --runs x --name example", "does not match ' --or-resume"),
    (("metadata", "name"), "another", "the run must have the RayJob's name, another; got example"),
    (("spec", "shutdownAfterJobFinishes"), False, "shutdownAfterJobFinishes: True was expected"),
    (("spec", "submissionMode"), "K8sJobMode", "submissionMode: 'HTTPMode' was expected"),
    ((*HEAD, "rayStartParams", "num-cpus"), "4", "['num-cpus']: '0' was expected"),
    ((*RAY, "resources", "limits", "nvidia.com/gpu"), "1", "'nvidia.com/gpu' is not one of"),
    ((*RAY, "env"), [], "the head must have {'RAY_health_check_initial_delay_ms': "),
    ((*HEAD_POD, "affinity"), GONE, "'affinity' is a required property"),
    ((*PREFERRED, 0, "preference", "matchExpressions", 0, "operator"), "In", "[0].preference: "),
    (
        (*NODE_AFFINITY, "requiredDuringSchedulingIgnoredDuringExecution"),
        {},
        "nodeAffinity: False schema",
    ),
    (EXPORTER, GONE, "headGroupSpec.template.spec.containers: "),
    ((*EXPORTER, "image"), "node-exporter:latest", "headGroupSpec.template.spec.containers: "),
    ((*EXPORTER, "ports", 0, "containerPort"), 9101, "headGroupSpec.template.spec.containers: "),
    ((*EXPORTER, "volumeMounts", 0, "mountPath"), "/m", "headGroupSpec.template.spec.containers: "),
    ((*EXPORTER, "args"), [], "headGroupSpec.template.spec.containers: "),
    ((*HEAD_POD, "volumes", 3, "emptyDir"), GONE, "headGroupSpec.template.spec.volumes: "),
    ((*CONTAINER, "ports"), GONE, "'ports' is a required property"),
    ((*CLUSTER, "enableInTreeAutoscaling"), False, "enableInTreeAutoscaling: True was expected"),
    ((*GROUP, "maxReplicas"), 0, "replicas must lie between 1 and 0; got 1"),
    ((*GROUP, "minReplicas"), 0, "minReplicas must be replicas, 1"),
    ((*GROUP, "minReplicas"), 0, "minReplicas must hold 8 workers, 8 in each pod; got 0"),
    (("spec", "entrypoint"), "a --workers 8:24 --device gpu", "maxReplicas must hold 24 workers"),
    ((*POD, "terminationGracePeriodSeconds"), GONE, "'terminationGracePeriodSeconds' is a"),
    ((*CONTAINER, "lifecycle"), GONE, "'lifecycle' is a required property"),
    (DRAIN, ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_IDLE_TERMINATION"], "command: "),
    (DRAIN, DRAINED_LATE, "the deadline must lie before the end of the pod, 170 s; got 190"),
    ((*RAY, "lifecycle", "preStop"), GONE, "'preStop' is a required property"),
    ((*POD, "volumes", 2), {"name": "runs", "emptyDir": {}}, "template.spec.volumes: "),
    ((*POD, "volumes", 0, "emptyDir", "medium"), GONE, "template.spec.volumes: "),
    ((*POD, "volumes", 0, "emptyDir", "sizeLimit"), "200Gi", "/dev/shm must take at most half"),
    ((*HEAD, "rayStartParams", "object-store-memory"), GONE, "must be said and fit into /dev/shm"),
    ((*GROUP, "rayStartParams", "object-store-memory"), "20000000000", "fit into /dev/shm, 16.0"),
    ((*CONTAINER, "resources", "requests"), GONE, "ray-worker: must request what it is limited to"),
    *((("kind",), kind, f"kind: {kind!r} is not one of") for kind in ("Secret", "Service")),
]
POLICY = ("spec", "ingress")
BROKEN_POLICIES = [
    ((*POLICY, 0, "from"), [], "ingress[0]: "),
    ((*POLICY, 0, "from", 0, "namespaceSelector"), {}, "ingress[0]: "),
    ((*POLICY, 0, "from", 0), {"ipBlock": {"cidr": "10.0.0.0/8"}}, "ingress[0]: "),
    ((*POLICY, 1, "ports"), GONE, "ingress[1]: "),
    ((*POLICY, 2, "ports"), GONE, "ingress[2]: "),
    ((*POLICY, 2, "ports", 0, "port"), 8265, "ingress[2]: "),
    ((*POLICY, 2, "from", 0, "podSelector"), GONE, "ingress[2]: "),
    ((*POLICY, 2, "from", 0, "namespaceSelector"), {}, "ingress[2]: "),
    (("spec", "podSelector"), {"matchLabels": {}}, "podSelector: {'matchLabels': {'app"),
]
JOB = "overlays/one-node-8-gpus/job"


@pytest.mark.parametrize(("path", "value", "said"), BROKEN_FIELDS)
def test_a_wrong_field_is_named_with_its_path(
    path: tuple[str | int, ...], value: object, said: str
) -> None:
    [found] = misfits(_broken(JOB, 0, path, value), FACTS)
    assert re.search(said, found)


@pytest.mark.parametrize(
    ("folder", "index", "path", "value", "said"),
    [
        *((JOB, 0, *broken) for broken in BROKEN_RULES),
        *(("shared", 2, *broken) for broken in BROKEN_POLICIES),
    ],
)
def test_a_broken_rule_is_found(
    folder: str, index: int, path: tuple[str | int, ...], value: object, said: str
) -> None:
    """So are a policy that lets others in, and a manifest that must not be there."""
    manifest = _broken(folder, index, path, value)
    assert any(said in complaint for rule in RULES for complaint in rule(manifest))


def test_another_ray_is_found() -> None:
    assert (
        len([*versions(build(K8S / "base" / "job")[0], ray="2.61.0", spiketrain=SPIKETRAIN)]) == 2
    )


def _broken(folder: str, index: int, path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    manifest = holder = build(K8S / folder)[index]
    for key in path[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return manifest


# -------------------------------------------------------------------------- a pod is taken away


def hook(group: int, *processes: int, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Of the head, 0, or of a worker, with these processes for all that there are."""
    pod = groups(build(K8S / "base" / "job")[0])[group]["template"]["spec"]
    (folder / "proc").mkdir()
    for process in processes:
        (folder / "proc" / str(process)).symlink_to(f"/proc/{process}")
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    mine = [word.replace(" /proc/", f" {folder}/proc/") for word in command]
    assert mine != command
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.Popen(mine, env={**path, **environment}, stderr=subprocess.PIPE, text=True)


# What pip's script of that name is to the kernel; a stop takes it a while.
DRIVER = f"""#!{sys.executable}
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(2), sys.exit(130)))
print('drives', flush=True)
time.sleep(60)
"""


def test_a_head_that_leaves_has_its_driver_save_and_waits_for_it(tmp_path: Path) -> None:
    (script := tmp_path / "spiketrain").write_text(DRIVER)
    script.chmod(0o755)
    driver = subprocess.Popen([script, "launch", "r.py"], stdout=subprocess.PIPE)
    beside = subprocess.Popen(["sleep", "60"])
    try:
        assert driver.stdout is not None and driver.stdout.readline()
        began = time.monotonic()
        leaving = hook(0, driver.pid, beside.pid, folder=tmp_path)
        # And so it is a zombie no longer, as Ray's supervisor sees to.
        assert driver.wait(20) == 130
        assert leaving.wait(20) == 0 and time.monotonic() - began > 2
        assert beside.poll() is None
    finally:
        for each in (driver, beside):
            each.kill()
            each.wait()


def test_a_worker_that_trains_nothing_leaves_at_once(tmp_path: Path) -> None:
    assert hook(1, os.getpid(), folder=tmp_path).wait(5) == 0


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_a_worker_that_leaves_has_its_run_save(
    tmp_path: Path, driven: Callable[..., Driven]
) -> None:
    lab = Lab(tmp_path / "lab")
    lab.pace(2)  # 80 s: on a busy machine the command starts late
    with nodes({}) as cluster:
        run = driven(lab, "--address", cluster.address, "--workers", "1")
        run.start_of(1)
        run.at_step(3)
        leaving = hook(
            1,
            *(each.pid for each in workers_below(psutil.Process())),
            folder=tmp_path,
            RAY_ADDRESS=cluster.address,
            **TOKEN,
        )
        notice = run.wait_for(lambda event: event["event"] == "preempted")
        assert len(notice["machines"]) == 1 and 60 < notice["seconds_left"] <= 100
        assert run.wait_for(lambda event: event["event"] == "checkpoint")["step"] == notice["step"]
        assert leaving.poll() is None  # something trains here still
        run.process.send_signal(signal.SIGUSR1)
        assert run.end() == 130
        assert leaving.wait(60) == 0, leaving.communicate()[1]
