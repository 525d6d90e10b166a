"""What a scheduler is handed: a RayJob, or a command line; each bad order is refused in one
line.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import UserError
from pipeline.launch import schedulers
from pipeline.launch.schedulers import LaunchRequest, render_rayjob, run_program, submit_rayjob
from pipeline.train.elastic import format_sizes
from tests.helpers.crd import GOLDEN, misfits
from tests.infra.rules import EXPORTER, RULES, containers, require_kustomize

OVERLAYS = Path(__file__).parents[2] / "infra" / "k8s" / "overlays"
NAME = (
    "k8s: name must be lower-case letters, digits and hyphens, begin with a letter, not end with a"
    " hyphen, and be at most 47 long (RFC 1123, KubeRay)"
)
IMAGE = "k8s: image must be a name with a digest, or with a tag other than latest"
SHARED = "must be in a shared volume that every pod can write (/shared/runs), without .."
GROUPS = "/spec/rayClusterSpec/workerGroupSpecs"


ORDER = LaunchRequest(
    words=("recipes/imagenet/nf_resnet34_sltt.py", "--cpus-per-worker", "8"),
    name="nf-resnet34",
    sizes=(32,),
    runs="/shared/runs",
    options={
        "cpus_per_worker": 8,
        "image": "registry.example.com/spiketrain:1",
        "infra": OVERLAYS / "four-nodes-32-gpus" / "job",
    },
)


def rendered(size: str | None = None, *, options: Mapping[str, Any] = {}, **changes: Any) -> str:
    require_kustomize()
    infra = {} if size is None else {"infra": OVERLAYS / size / "job"}
    changes["options"] = {**ORDER.options, **infra, **options}
    return render_rayjob(replace(ORDER, **changes))


def job_of(*size: str, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load(rendered(*size, **changes))


# ---------------------------------------------------------------------------- a scheduler's program


Script = Callable[[str, str | bytes], Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Writes a program of this name and text, which the PATH has."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, text: str | bytes) -> Path:
        (file := tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        file.chmod(0o755)
        return file

    return write


def test_it_is_given_the_order_and_answers(script: Script) -> None:
    script("sbatch", '#!/bin/sh\necho "$@"; cat\n')
    said = run_program("sbatch", "--parsable", "a b", stdin="#!/bin/bash\n")
    assert said == "--parsable a b\n#!/bin/bash"


FAILED = "sbatch failed with exit code 3 and printed: "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'echo "no kind RayJob" >&2; echo "  install the CRDs first" >&2; exit 3',
            f"{FAILED}no kind RayJob install the CRDs first",
        ),
        (
            "echo Traceback >&2; echo a >&2; echo b >&2; echo 'RuntimeError: nobody  there' >&2;"
            " exit 3",
            f"{FAILED}RuntimeError: nobody there",
        ),
        ("echo out; exit 3", f"{FAILED}out"),
        ("exit 3", f"{FAILED}nothing"),
        (
            "exec sleep 30",
            "sbatch must end within 1 s; it did not, and may have submitted the job",
        ),
        (b"\x7fELF", "PROGRAM cannot be run: Exec format error"),
        (None, "sbatch must be on the path; got none"),
    ],
)
def test_a_program_that_fails_or_does_not_answer_or_is_not_there(
    script: Script, monkeypatch: pytest.MonkeyPatch, text: str | bytes | None, said: str
) -> None:
    if text is None:
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        file = script("sbatch", text if isinstance(text, bytes) else f"#!/bin/sh\n{text}\n")
        said = said.replace("PROGRAM", str(file))
    monkeypatch.setattr(schedulers, "PROGRAM_TIMEOUT_S", 1.0)
    with pytest.raises(UserError, match=f"^submit: {re.escape(said)}$"):
        run_program("sbatch")


def test_the_token_of_a_file_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job submit` shows none unless it is asked to (2.60)."""
    (tmp_path / "token").write_text("t" * 32)
    monkeypatch.setattr(
        os,
        "environ",
        {
            **{
                name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
            },
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        },
    )
    modes = []
    monkeypatch.setattr(
        schedulers, "run_program", lambda *words: modes.append(os.environ.get("RAY_AUTH_MODE"))
    )
    assert (
        schedulers.submit_ray_job("ray job submit --submission-id a -- spiketrain launch x.py")
        == "a"
    )
    assert modes == ["token"]


# ---------------------------------------------------------------------------------------- KubeRay


def test_an_order_becomes_a_rayjob_that_fits_the_fields() -> None:
    job = job_of()
    assert misfits(job, json.loads(GOLDEN.read_text())) == []
    assert job["metadata"]["name"] == "nf-resnet34"
    assert (
        job["spec"]["entrypoint"]
        == "spiketrain launch recipes/imagenet/nf_resnet34_sltt.py --cpus-per-worker 8 --name"
        " nf-resnet34 --runs /shared/runs --address auto --workers 32 --device gpu --or-resume"
    )
    ray = "registry.example.com/spiketrain:1"
    assert [each["image"] for each in containers(job)] == [ray, EXPORTER, ray]


@pytest.mark.parametrize(
    ("size", "sizes", "options", "pods"),
    [
        ("four-nodes-32-gpus", (32,), {}, [4, 4, 4]),
        ("four-nodes-32-gpus", (17,), {}, [3, 3, 3]),
        ("eight-nodes-64-gpus", (64,), {}, [8, 8, 8]),
        ("eight-nodes-64-gpus-infiniband", (40,), {}, [5, 5, 5]),
        ("four-nodes-32-gpus", (1,), {}, [1, 1, 1]),
        # 64 cores hold four such workers
        ("four-nodes-32-gpus", (8,), {"cpus_per_worker": 16}, [2, 2, 2]),
        # one core each, and no GPU
        ("four-nodes-32-gpus", (64,), {"device": "cpu", "cpus_per_worker": "auto"}, [1, 1, 1]),
        ("cpu", (8,), {"cpus_per_worker": "auto"}, [2, 2, 2]),
        ("cpu", (8,), {"cpus_per_worker": 2}, [4, 4, 4]),
        # as many as there are GPUs, however many cores
        ("four-nodes-32-gpus", (32,), {"cpus_per_worker": "auto"}, [4, 4, 4]),
        ("cpu", (4,), {"cpus_per_worker": 1, "side_by_side": 3}, [3, 3, 3]),
        # which takes what room there is
        ("cpu", (4,), {"cpus_per_worker": 1, "side_by_side": "auto"}, [1, 1, 1]),
        # workers that come and go begin with the pods of the fewest
        ("four-nodes-32-gpus", (16, 24, 32), {}, [2, 2, 4]),
    ],
)
def test_there_are_as_many_pods_as_the_workers_need(
    size: str, sizes: tuple[int, ...], options: dict[str, Any], pods: list[int]
) -> None:
    job = job_of(size, sizes=sizes, options=options)
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [group[name] for name in ("minReplicas", "replicas", "maxReplicas")] == pods
    assert f" --workers {format_sizes(sizes)} " in job["spec"]["entrypoint"]
    assert len(sizes) == 1 or not [text for rule in RULES for text in rule(job)]


@pytest.mark.parametrize(("size", "device"), [("cpu", "cpu"), ("one-node-8-gpus", "gpu")])
def test_the_device_is_that_of_the_pods_unless_said(size: str, device: str) -> None:
    for options, said in (({}, f"--device {device} "), ({"device": "cpu"}, "")):
        job = job_of(size, sizes=(1,), options={"cpus_per_worker": "auto", **options})
        assert job["spec"]["entrypoint"].endswith(f" --workers 1 {said}--or-resume")


def test_words_reach_the_command_as_they_are() -> None:
    """Ray runs the entrypoint in a shell of the head."""
    words = (
        "my recipe.py",
        "--set",
        "data.mean=(0.1, 0.2)",
        "--set",
        "name='$HOME; `id`'",
        "--trust",
        "a*b",
    )
    entrypoint = job_of(sizes=(1,), words=words)["spec"]["entrypoint"]
    assert tuple(shlex.split(entrypoint)[2 : 2 + len(words)]) == words
    assert "\n" not in entrypoint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Fashion"}, f"{NAME}; got 'Fashion'"),
        ({"name": "fashion_sltt"}, f"{NAME}; got 'fashion_sltt'"),
        ({"name": "1st"}, f"{NAME}; got '1st'"),
        ({"name": "a-"}, f"{NAME}; got 'a-'"),
        ({"name": "a\n"}, f"{NAME}; got 'a\\n'"),
        ({"name": ""}, f"{NAME}; got ''"),
        ({"name": "a" * 48}, f"{NAME}; got '{'a' * 48}'"),
        ({"options": {"image": ""}}, f"{IMAGE}; got ''"),
        ({"options": {"image": "spiketrain"}}, f"{IMAGE}; got 'spiketrain'"),
        ({"options": {"image": "a:latest"}}, f"{IMAGE}; got 'a:latest'"),
        ({"options": {"image": "host:5000/a"}}, f"{IMAGE}; got 'host:5000/a'"),
        ({"options": {"image": "a b:1"}}, f"{IMAGE}; got 'a b:1'"),
        ({"options": {"image": "a@sha256:1"}}, f"{IMAGE}; got 'a@sha256:1'"),
        ({"runs": "runs"}, f"k8s: runs {SHARED}; got 'runs'"),
        ({"runs": "/shared/runs/../../etc"}, f"k8s: runs {SHARED}; got '/shared/runs/../../etc'"),
        ({"sizes": (33,)}, "must fit into 4 pods of 64 cores and 8 GPUs ("),
        (
            {"sizes": (8, 40)},
            "k8s: 40 workers x 8 cpus must fit into 4 pods of 64 cores and 8 GPUs (",
        ),
        ({"options": {"cpus_per_worker": 65}}, "job), which hold only 0 workers"),
        ({"runs": "s3://b/x"}, f"k8s: runs {SHARED}; got 's3://b/x'"),
        ({"runs": "/tmp/runs"}, f"k8s: runs {SHARED}; got '/tmp/runs'"),
        ({"runs": "/shared/runs2"}, f"k8s: runs {SHARED}; got '/shared/runs2'"),
        ({"runs": "/dev/shm/runs"}, f"k8s: runs {SHARED}; got '/dev/shm/runs'"),
        (
            {"runs": "/opt/spiketrain/data/runs"},
            f"k8s: runs {SHARED}; got '/opt/spiketrain/data/runs'",
        ),
        (
            {"options": {"infra": OVERLAYS / "cpu" / "cluster"}},
            "cluster must hold one RayJob; got 0",
        ),
    ],
)
def test_an_order_that_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        rendered(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("place", "lasts"),
    [
        ("/tmp/kept", False),
        ("kept", False),
        ("", False),
        ("/opt/spiketrain/data/kept", False),
        ("file:///tmp/kept", False),
        ("local:///tmp/kept", False),
        ("/shared/runs/../../tmp", False),
        ("/shared/runs/kept", True),
        ("file:///shared/runs/kept", True),
        ("s3://bucket/kept", True),
        ("gs://bucket", True),
    ],
)
def test_checkpoints_that_a_pod_would_take_with_it_are_refused(place: str, lasts: bool) -> None:
    said = re.escape(f"k8s: --checkpoints {SHARED}; got {place!r}")
    with nullcontext() if lasts else pytest.raises(ValueError, match=f"^{said}$"):
        rendered(options={"checkpoints": place}, sizes=(1,))


@pytest.mark.parametrize(
    "image",
    [
        "a:1",
        "host:5000/a/b-c:0.2.0-ray2.60.0",
        f"a@sha256:{'0' * 64}",
        f"host.example/a:1@sha256:{'f' * 64}",
    ],
)
def test_images_that_stay_what_they_are(image: str) -> None:
    assert containers(job_of(options={"image": image}))[0]["image"] == image


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (
            "{op: remove, path: /spec/rayClusterSpec}",
            "must have the fields of infra/k8s/base/job; missing: 'rayClusterSpec'",
        ),
        (f"{{op: replace, path: {GROUPS}/0, value: {{}}}}", "missing: 'template'"),
        (f"{{op: add, path: {GROUPS}/-, value: {{}}}}", "must have one group of workers; got 2"),
        (
            (
                f"{{op: replace, path: {GROUPS}/0/template/spec/containers/0/resources/limits/cpu,"
                " value: x}"
            ),
            "the cpu limit of a worker must be a number of cores (2) or of millicores (2000m);"
            " got 'x'",
        ),
    ],
)
def test_a_folder_that_holds_another_kind_of_rayjob_is_refused(
    tmp_path: Path, patch: str, said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        rendered(options={"infra": over(tmp_path, patch)})


def test_a_container_beside_ray_keeps_its_image(tmp_path: Path) -> None:
    containers_ = "/spec/rayClusterSpec/headGroupSpec/template/spec/containers"
    added = over(
        tmp_path, f"{{op: add, path: {containers_}/-, value: {{name: logs, image: 'logs:1'}}}}"
    )
    assert [each["image"] for each in containers(job_of(options={"infra": added}))] == [
        ORDER.image,
        EXPORTER,
        "logs:1",
        ORDER.image,
    ]


def over(folder: Path, operation: str) -> Path:
    base = os.path.relpath(OVERLAYS / "four-nodes-32-gpus" / "job", folder)
    patch = f"patches:\n  - target: {{kind: RayJob}}\n    patch: |-\n      - {operation}\n"
    (folder / "kustomization.yaml").write_text(f"resources: [{base}]\n{patch}")
    return folder


KUBECTL = """#!/bin/sh
echo "$@" >>"$0.words"
case $1 in
    kustomize) exec kustomize build "$2" ;;
    get) printf %s "$STATUS" ;;
    apply) cat >"$0.stdin"; echo rayjob.ray.io/nf-resnet34 created ;;
esac
"""
RENDERED = f"kustomize {OVERLAYS / 'four-nodes-32-gpus' / 'job'}\n"
ASKED = (
    "get rayjobs.ray.io nf-resnet34 --ignore-not-found --output"
    " jsonpath={.status.jobDeploymentStatus}\n"
)


# Without a status there is no such RayJob. KubeRay leaves one that has ended as it is: the launch
# would train nothing, and say nothing of it.
@pytest.mark.parametrize(
    "status", ["", "Initializing", "Running", "Retrying", "Complete", "Failed"]
)
def test_kubectl_gets_the_rayjob_unless_one_that_has_ended_is_to_be_deleted_first(
    script: Script, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """The stand-in for kubectl says $STATUS of any RayJob, and writes down its words."""
    kubectl = script("kubectl", KUBECTL)
    monkeypatch.setenv("STATUS", status)
    manifest, words = rendered(), kubectl.with_name("kubectl.words")
    if status in ("Complete", "Failed"):
        with pytest.raises(UserError) as refused:
            submit_rayjob(manifest)
        assert str(refused.value) == (
            f"k8s: a RayJob that has ended cannot start again; got nf-resnet34, {status}: first run"
            " kubectl delete rayjob nf-resnet34"
        )
        assert words.read_text() == RENDERED + ASKED
    else:
        assert submit_rayjob(manifest) == "rayjob.ray.io/nf-resnet34 created"
        assert words.read_text() == RENDERED + ASKED + "apply -f -\n"
        assert kubectl.with_name("kubectl.stdin").read_text() == manifest
