"""What a scheduler is handed: a RayJob, or a command line; each bad order is refused in one
line.
"""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import UserError
from pipeline.launch import schedulers
from pipeline.launch.schedulers import OWN, Order, answer_of, render_rayjob, submit_rayjob
from tests.helpers.crd import GOLDEN, misfits
from tests.infra.rules import EXPORTER, RULES, containers, require_kustomize

OVERLAYS = Path(__file__).parents[2] / "infra" / "k8s" / "overlays"
NAME = (
    "k8s: name must be lower-case letters, digits and inner -, begin with a letter, and be at most"
    " 47 long (RFC 1123, KubeRay)"
)
IMAGE = "k8s: image must be a name with a tag or a digest, other than latest"
SHARED = "must lie where every pod writes to a shared volume (/shared/runs), without .."
GROUPS = "/spec/rayClusterSpec/workerGroupSpecs"


ORDER = Order(
    words=("recipes/imagenet/nf_resnet34_sltt.py", "--cpus-per-worker", "8"),
    name="nf-resnet34",
    workers=32,
    image="registry.example.com/spiketrain:1",
    runs="/shared/runs",
)


def rendered(size: str | Path = "four-nodes-32-gpus", **changes: Any) -> str:
    require_kustomize()
    return render_rayjob(
        replace(ORDER, **changes), OVERLAYS / size / "job" if isinstance(size, str) else size
    )


def job_of(*size: str | Path, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load(rendered(*size, **changes))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("words", (), "words must begin with a recipe; got none"),
        ("words", ("--set", "a=b"), "words must begin with a recipe; got --set a=b"),
        ("words", ("recipe.py", "a\nb"), "words must be free of control characters; got 'a\\nb'"),
        ("words", ("recipe.py", "\x7f"), "words must be free of control characters; got '\\x7f'"),
        (
            "runs",
            "/shared\nrm -rf /",
            "runs must be free of control characters; got '/shared\\nrm -rf /'",
        ),
        ("image", "a:1\x00", "image must be free of control characters; got 'a:1\\x00'"),
        ("workers", 0, "workers must be 1 or more; got 0"),
        ("workers", True, "workers must be 1 or more; got True"),
        ("workers", 2.0, "workers must be 1 or more; got 2.0"),
        ("workers", (), "workers must be 1 or more; got ()"),
        ("workers", (0, 1), "workers must be 1 or more; got (0, 1)"),
        *(
            ("words", (*ORDER.words, option), f"{option.partition('=')[0]} follows from the job;")
            for option in (*OWN, "--workers=4")
        ),
        (
            "words",
            (*ORDER.words, "--inline"),
            "a job trains with workers of Ray; got --inline",
        ),
    ],
)
def test_a_bad_field_is_refused_in_one_line(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        replace(ORDER, **{field: value})
    assert str(refused.value).startswith(f"order: {said}")


# ---------------------------------------------------------------------------- a scheduler's program


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / "sbatch"
    file.touch()
    file.chmod(0o755)
    return file


def test_it_is_given_the_order_and_answers(sbatch: Path) -> None:
    sbatch.write_text('#!/bin/sh\necho "$@"; cat\n')
    said = answer_of("sbatch", "--parsable", "a b", given="#!/bin/bash\n")
    assert said == "--parsable a b\n#!/bin/bash"


FAILED = "sbatch failed with exit code 3 and said: "


@pytest.mark.parametrize(
    ("script", "said"),
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
            "sbatch must answer within 1 s; it has not, and may have taken the job",
        ),
    ],
)
def test_one_that_fails_or_does_not_answer(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    sbatch.write_text(f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(schedulers, "PATIENCE_S", 1.0)
    with pytest.raises(UserError) as refused:
        answer_of("sbatch")
    assert str(refused.value) == f"submit: {said}"


def test_one_that_is_no_program_or_is_not_there(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch.write_bytes(b"\x7fELF")
    with pytest.raises(UserError, match=r"^submit: .*sbatch cannot be run: Exec format error$"):
        answer_of("sbatch")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"^submit: needs sbatch on the path; got none$"):
        answer_of("sbatch")


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
        schedulers, "answer_of", lambda *words: modes.append(os.environ.get("RAY_AUTH_MODE"))
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
    ("size", "workers", "words", "pods"),
    [
        ("four-nodes-32-gpus", 32, (), 4),
        ("four-nodes-32-gpus", 17, (), 3),
        ("eight-nodes-64-gpus", 64, (), 8),
        ("eight-nodes-64-gpus-infiniband", 40, (), 5),
        ("four-nodes-32-gpus", 1, (), 1),
        ("four-nodes-32-gpus", 8, ("--cpus-per-worker=16",), 2),  # 64 cores hold four such workers
        ("four-nodes-32-gpus", 64, ("--device", "cpu"), 1),  # one core each, and no GPU
        ("cpu", 8, (), 2),
        ("cpu", 8, ("--cpus-per-worker", "2"), 4),
        (
            "four-nodes-32-gpus",
            32,
            ("--cpus-per-worker", "auto"),
            4,
        ),  # as many as there are GPUs, however many cores
        ("cpu", 4, ("--side-by-side", "3"), 3),
        ("cpu", 4, ("--side-by-side=auto",), 1),  # which takes what room there is
    ],
)
def test_there_are_as_many_pods_as_the_workers_need(
    size: str, workers: int, words: tuple[str, ...], pods: int
) -> None:
    group = job_of(size, workers=workers, words=("recipe.py", *words))["spec"]["rayClusterSpec"][
        "workerGroupSpecs"
    ][0]
    assert [group[name] for name in ("minReplicas", "replicas", "maxReplicas")] == [pods] * 3


def test_workers_that_come_and_go_begin_with_the_pods_of_the_fewest() -> None:
    job = job_of(workers=(16, 24, 32))
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [group[name] for name in ("minReplicas", "replicas", "maxReplicas")] == [2, 2, 4]
    assert " --workers 16,24,32 " in job["spec"]["entrypoint"]
    assert [complaint for rule in RULES for complaint in rule(job)] == []


@pytest.mark.parametrize(("size", "device"), [("cpu", "cpu"), ("one-node-8-gpus", "gpu")])
def test_the_device_is_that_of_the_pods_unless_said(size: str, device: str) -> None:
    words = job_of(size, workers=1, words=("recipe.py",))["spec"]["entrypoint"].split()
    assert words[words.index("--device") + 1] == device
    words = job_of(size, workers=1, words=("recipe.py", "--device=cpu"))["spec"][
        "entrypoint"
    ].split()
    assert "--device" not in words and "--device=cpu" in words


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
    entrypoint = job_of(workers=1, words=words)["spec"]["entrypoint"]
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
        ({"image": ""}, f"{IMAGE}; got ''"),
        ({"image": "spiketrain"}, f"{IMAGE}; got 'spiketrain'"),
        ({"image": "a:latest"}, f"{IMAGE}; got 'a:latest'"),
        ({"image": "host:5000/a"}, f"{IMAGE}; got 'host:5000/a'"),
        ({"image": "a b:1"}, f"{IMAGE}; got 'a b:1'"),
        ({"image": "a@sha256:1"}, f"{IMAGE}; got 'a@sha256:1'"),
        ({"runs": "runs"}, f"k8s: runs {SHARED}; got 'runs'"),
        ({"runs": "/shared/runs/../../etc"}, f"k8s: runs {SHARED}; got '/shared/runs/../../etc'"),
        ({"workers": 33}, "must fit into pods of 64 cores and 8 GPUs, of which"),
        (
            {"workers": (8, 40)},
            "k8s: 40 workers x 8 cpus must fit into pods of 64 cores and 8 GPUs, of which",
        ),
        ({"words": ("a.py", "--cpus-per-worker", "65")}, "job has 4: room for 0 workers"),
        (
            {"words": ("a.py", "--cpus-per-worker", "x")},
            "order: --cpus-per-worker must be a whole number >= 1 or auto; got x",
        ),
        (
            {"words": ("a.py", "--side-by-side", "none")},
            "order: --side-by-side must be a whole number >= 1 or auto; got none",
        ),
        ({"runs": "/tmp/runs"}, f"k8s: runs {SHARED}; got '/tmp/runs'"),
        ({"runs": "/shared/runs2"}, f"k8s: runs {SHARED}; got '/shared/runs2'"),
        ({"runs": "/dev/shm/runs"}, f"k8s: runs {SHARED}; got '/dev/shm/runs'"),
        (
            {"runs": "/opt/spiketrain/data/runs"},
            f"k8s: runs {SHARED}; got '/opt/spiketrain/data/runs'",
        ),
        ({"size": OVERLAYS / "cpu" / "cluster"}, "cluster must hold one RayJob; got 0"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        rendered(**changes)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


PLACES = [
    *(
        (place, False)
        for place in (
            "/tmp/kept",
            "kept",
            "",
            "/opt/spiketrain/data/kept",
            "file:///tmp/kept",
            "local:///tmp/kept",
            "/shared/runs/../../tmp",
        )
    ),
    *(
        (place, True)
        for place in (
            "/shared/runs/kept",
            "file:///shared/runs/kept",
            "s3://bucket/kept",
            "gs://bucket",
        )
    ),
]


@pytest.mark.parametrize(("place", "lasts"), PLACES)
def test_checkpoints_that_a_pod_would_take_with_it_are_refused(place: str, lasts: bool) -> None:
    words = ("recipe.py", f"--checkpoints={place}")
    if lasts:
        entrypoint = job_of(words=words, workers=1)["spec"]["entrypoint"]
        assert f" --checkpoints={place} " in entrypoint
        return
    with pytest.raises(ValueError) as refused:
        rendered(words=words, workers=1)
    assert str(refused.value) == f"k8s: --checkpoints {SHARED}; got {place!r}"


@pytest.mark.parametrize(
    "image",
    [
        "a:1",
        "host:5000/a/b-c:0.1.0-ray2.60.0",
        f"a@sha256:{'0' * 64}",
        f"host.example/a:1@sha256:{'f' * 64}",
    ],
)
def test_images_that_stay_what_they_are(image: str) -> None:
    assert containers(job_of(image=image))[0]["image"] == image


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (
            "{op: remove, path: /spec/rayClusterSpec}",
            "must be one as in infra/k8s/base/job; not found: 'rayClusterSpec'",
        ),
        (f"{{op: replace, path: {GROUPS}/0, value: {{}}}}", "not found: 'template'"),
        (f"{{op: add, path: {GROUPS}/-, value: {{}}}}", "must have one group of workers; got 2"),
        (
            (
                f"{{op: replace, path: {GROUPS}/0/template/spec/containers/0/resources/limits/cpu,"
                " value: x}"
            ),
            "a worker's limit of cpu must be a number of cores, or of thousandths with m; got 'x'",
        ),
    ],
)
def test_a_folder_that_holds_another_kind_of_rayjob_is_refused(
    tmp_path: Path, patch: str, said: str
) -> None:
    with pytest.raises(ValueError) as refused:
        rendered(over(tmp_path, patch))
    assert said in str(refused.value)


def test_a_container_beside_ray_keeps_its_image(tmp_path: Path) -> None:
    containers_ = "/spec/rayClusterSpec/headGroupSpec/template/spec/containers"
    added = over(
        tmp_path, f"{{op: add, path: {containers_}/-, value: {{name: logs, image: 'logs:1'}}}}"
    )
    assert [each["image"] for each in containers(job_of(added))] == [
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


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in, which says $STATUS of any RayJob, and writes down what it is told."""
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return program


# Without a status there is no such RayJob. KubeRay leaves one that has ended as it is: the launch
# would train nothing, and say nothing of it.
@pytest.mark.parametrize(
    "status", ["", "Initializing", "Running", "Retrying", "Complete", "Failed"]
)
def test_kubectl_gets_the_rayjob_unless_one_that_has_ended_is_to_be_deleted_first(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setenv("STATUS", status)
    manifest, words = rendered(), kubectl.with_name("kubectl.words")
    if status in ("Complete", "Failed"):
        with pytest.raises(UserError) as refused:
            submit_rayjob(manifest)
        assert str(refused.value) == (
            f"k8s: KubeRay starts no RayJob again that has ended; got nf-resnet34, {status}: first"
            " kubectl delete rayjob nf-resnet34"
        )
        assert words.read_text() == RENDERED + ASKED
    else:
        assert submit_rayjob(manifest) == "rayjob.ray.io/nf-resnet34 created"
        assert words.read_text() == RENDERED + ASKED + "apply -f -\n"
        assert kubectl.with_name("kubectl.stdin").read_text() == manifest
