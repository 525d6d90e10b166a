"""`launch --cluster`: what a scheduler is handed is what was typed; nothing begins here, and no
data are asked for.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from pipeline.cli.app import app
from tests.helpers.small import Command, Done
from tests.infra.rules import require_kustomize

RECIPE = "recipes/imagenet/nf_resnet34_sltt.py"  # whose data nobody has here
SMALL = "recipes/fashion/sltt.py"
CPU_PODS = "--image a.example/s:1 --infra infra/k8s/overlays/cpu/job"
TYPED = ("--tiny", "--set", "optimizer.lr=0.05", "--set", "seed=3", "--cpus-per-worker", "2")
TYPED_IN_ORDER = (
    "--cpus-per-worker",
    "2",
    "--set",
    "optimizer.lr=0.05",
    "--set",
    "seed=3",
    "--tiny",
)  # the command's own


@pytest.fixture
def launch(spiketrain: Command) -> Command:
    def run(*words: str) -> tuple[int, str, str]:
        if "k8s" in words:
            require_kustomize()
        return spiketrain("launch", *words)

    return run


def test_slurm(launch: Command) -> None:
    slurm = "--cluster slurm --nodes 2 --time 10 --gpus-per-node 2 --partition gpu --workers 4"
    printed = [
        *("env", "SPIKETRAIN_RUNS=runs", "SPIKETRAIN_WORKERS=4", "SPIKETRAIN_IMAGE=a b"),
        *("sbatch", "--parsable", "--export=ALL", "--job-name=mine", "--nodes=2", "--time=10"),
        *("--gpus-per-node=2", "--partition=gpu"),
        *(str(Path("infra/slurm/train.sbatch").absolute()), RECIPE, *TYPED_IN_ORDER),
    ]
    words = (*TYPED, RECIPE, *slurm.split(), "--name", "mine", "--image", "a b", "--dry-run")
    assert launch(*words) == (0, f"{shlex.join(printed)}\n", "")


def test_slurm_that_is_given_no_number_of_workers_counts_its_gpus(launch: Command) -> None:
    asked = "--cluster slurm --nodes 2 --time 10 --name mine --dry-run"
    code, out, _ = launch(SMALL, *asked.split(), "--gpus-per-node", "8")
    assert code == 0 and " SPIKETRAIN_WORKERS= " in out
    code, out, err = launch(SMALL, *asked.split(), "--gpus-per-node", "7")
    assert (code, out) == (2, "") and "be divisible by 14 workers" in err


def test_workers_that_come_and_go(launch: Command) -> None:
    asked = "--workers 2:4 --set batch_size=24 --name mine --dry-run"
    _, out, _ = launch(SMALL, *asked.split(), "--cluster", "ray://head.example:8265")
    assert " --workers 2:4 --or-resume" in out
    _, out, _ = launch(
        SMALL, *asked.split(), *f"--cluster k8s {CPU_PODS} --cpus-per-worker 4".split()
    )
    job = yaml.safe_load(out)
    assert " --workers 2:4 " in job["spec"]["entrypoint"]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [group[name] for name in ("minReplicas", "replicas", "maxReplicas")] == [2, 2, 4]


def test_weights_that_lie_on_the_cluster_alone_are_no_reason(done: Done) -> None:
    asked = "--set init=/shared/w.safetensors --cluster ray://h:1 --name a --dry-run"
    assert "init=/shared/w.safetensors" in done("launch", SMALL, *asked.split())


def test_kubernetes(launch: Command) -> None:
    pods = "--image a.example/s:1 --infra infra/k8s/overlays/one-node-8-gpus/job"
    code, out, _ = launch(
        RECIPE, *TYPED, *f"--workers 4 --cluster k8s --name mine {pods} --dry-run".split()
    )
    job = yaml.safe_load(out)
    assert (code, job["kind"], job["metadata"]["name"]) == (0, "RayJob", "mine")
    theirs = "--name mine --runs /shared/runs --address auto --workers 4 --device gpu --or-resume"
    assert (
        job["spec"]["entrypoint"]
        == f"spiketrain launch {RECIPE} {shlex.join(TYPED_IN_ORDER)} {theirs}"
    )


def test_a_ray_that_is_up(launch: Command) -> None:
    code, out, _ = launch(
        RECIPE,
        *TYPED,
        "--runs",
        "/r",
        "--cluster",
        "ray://head.example:8265",
        "--name",
        "mine",
        "--dry-run",
    )
    ray, launched = out.strip().split(" -- ")
    assert re.fullmatch(
        r"ray job submit --address http://head.example:8265 --submission-id mine-[0-9a-f]{8}"
        r" --no-wait",
        ray,
    )
    theirs = "--name mine --runs /r --address auto --workers 1 --or-resume"
    assert (code, launched) == (
        0,
        f"spiketrain launch {RECIPE} {shlex.join(TYPED_IN_ORDER)} {theirs}",
    )


def test_what_is_printed_is_what_is_submitted(
    launch: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" sbatch "$@" >{tmp_path}/taken\necho 77\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = (RECIPE, "--cluster", "slurm", "--nodes", "1", "--time", "10", "--name", "mine")
    _, printed, _ = launch(*words, "--dry-run")
    assert launch(*words) == (0, "77\n", "")
    words = shlex.split(printed)
    assert (tmp_path / "taken").read_text().splitlines() == words[words.index("sbatch") :]


def test_nobody_there_is_one_line(launch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    code, _, err = launch(RECIPE, "--cluster", "ray://127.0.0.1:9", "--name", "mine")
    assert code == 2 and len(err.splitlines()) == 1 and "Failed to connect to Ray" in err


LAB = """
from pipeline.models.nf_resnet import nf_resnet18_small

def network(classes):
    return nf_resnet18_small(classes=classes, in_channels=1, width=4, blocks=(1, 1))

def table(runs, console):
    pass
"""


@pytest.mark.parametrize(
    ("made", "untrusted"),
    [
        ("small_recipe(model=spec(network, classes=10))", "network"),
        ("Suite((small_recipe(),), table)", "table"),
    ],
)
def test_what_whoever_resumes_would_not_import_is_not_handed_over(
    launch: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, untrusted: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "handed_lab.py").write_text(LAB)
    imports = (
        "handed_lab import network, table",
        "pipeline.recipe.recipe import spec",
        "pipeline.recipe.suite import Suite",
        "tests.helpers.small import small_recipe",
    )
    lines = [f"from {each}" for each in imports] + ["def recipe():", f"    return {made}"]
    (tmp_path / "handed.py").write_text("\n".join(lines))
    words = (str(tmp_path / "handed.py"), "--cluster", "ray://h:1", "--name", "mine", "--dry-run")
    code, out, err = launch(*words)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert f"handed_lab.{untrusted} is not in a trusted package" in err
    code, out, err = launch(*words, "--trust", "handed_lab")
    assert code == 0 and " --trust handed_lab " in out, err


BOTH, MINE = f"{SMALL} recipes/fashion/bptt.py", "--name mine --dry-run"
NODES = "slurm --nodes 2 --time 1 --gpus-per-node 4"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nodes 2 --dry-run", "options that need --cluster: --dry-run, --nodes"),
        (
            "--cluster slurm --name a --nodes 1 --time 1 --workers 2:4",
            "workers must be one number, because the number of nodes of a job is fixed; got 2:4",
        ),
        (
            "--cluster ray://a:1 --name a --workers x",
            "--workers must be a number, a range such as 2:4",
        ),
        ("--cluster lsf", "--cluster must be k8s, slurm or ray://HOST:PORT; got lsf"),
        ("--cluster k8s --name a --nodes 2", "--cluster k8s does not accept --nodes"),
        ("--cluster k8s --name a --node-loss patient", "--cluster k8s does not accept --node-loss"),
        (
            "--cluster slurm --name a --node-loss fast",
            "--cluster slurm does not accept --node-loss",
        ),
        ("--cluster ray://a:1 --name a --time 3", "--cluster ray://a:1 does not accept --time"),
        (
            "--cluster ray://a:1 --name a --infra infra",
            "--cluster ray://a:1 does not accept --infra",
        ),
        ("--cluster ray://a:1 --name a --image b:1", "got --image b:1"),
        (
            "--cluster ray://a --name a",
            "ray://HOST:PORT, with the port of its dashboard; got 'ray://a'",
        ),
        ("--cluster ray://a:1 --name ../a", "--name must be a name in runs"),
        ("--cluster k8s --image a.example/s:1", "--cluster needs a --name"),
        (
            "--cluster k8s --name a",
            "--cluster k8s needs --image and --infra; got no --image, --infra",
        ),
        (
            "--cluster k8s --name a --image a.example/s:1",
            "--cluster k8s needs --image and --infra; got no --infra",
        ),
        (
            f"--cluster k8s --name a {CPU_PODS.replace('a.example/s:1', 'a')}",
            "image must be a name with a digest",
        ),
        (
            "--cluster slurm --name a",
            "--cluster slurm needs --nodes and --time; got no --nodes, --time",
        ),
        (
            "--cluster slurm --name a --nodes 1 --time 1 --infra /nowhere",
            "the job's script must be a file; got /nowhere",
        ),
        (
            f"--cluster k8s --name a {CPU_PODS} --inline",
            "launch: --cluster k8s does not accept --inline",
        ),
        (f"--cluster k8s --name a {CPU_PODS} --or-resume", "does not accept --or-resume"),
        (
            "--cluster ray://a:1 --name a --address b",
            "--cluster ray://a:1 does not accept --address",
        ),
        (f"--cluster k8s --name a {CPU_PODS} --set nothing=1", "nothing"),
        *(
            (
                f"--cluster {where} --name a --checkpoints s3://key:secret@bucket",
                "an address must hold no credentials",
            )
            for where in (f"k8s {CPU_PODS}", "slurm --nodes 1 --time 1", "ray://a:1")
        ),
        # What the launch would refuse is not handed over.
        *(
            (
                f"{recipe} --workers 7 {MINE} --cluster {cluster}",
                "be divisible by 7 workers",
            )
            for cluster in ("slurm --nodes 1 --time 1", "ray://h:8265", f"k8s {CPU_PODS}")
            for recipe in (SMALL, BOTH)
        ),
        (
            f"{SMALL} {MINE} --cluster ray://h:1 --side-by-side 2",
            "--side-by-side is for several runs; got 2 with fashion-sltt alone",
        ),
        (
            f"{BOTH} {MINE} --cluster k8s {CPU_PODS} --workers 4 --side-by-side 8",
            (
                "k8s: 8 runs side by side, each with 4 workers x 1 cpu must fit into 4 pods"
                " of 4 cores ("
            ),
        ),
        (
            (f"{BOTH} {MINE} --cluster {NODES} --workers 4 --side-by-side 3"),
            (
                "slurm: each worker must get a GPU; got 3 runs side by side, each with 4"
                " workers on 2"
                " nodes x 4 GPUs"
            ),
        ),
        (
            f"{BOTH} {MINE} --cluster {NODES} --side-by-side 2",
            (
                "slurm: each worker must get a GPU; got 2 runs side by side, each with 8"
                " workers on 2"
                " nodes x 4 GPUs"
            ),
        ),
        (
            f"{BOTH} {MINE} --cluster slurm --nodes 1 --time 1 --gpus-per-node 1 --workers 1"
            " --side-by-side 2",
            "slurm: each worker must get a GPU; got 2 runs side by side, each with 1 worker on"
            " 1 node x 1 GPU",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(launch: Command, words: str, said: str) -> None:
    recipe = () if words.startswith("recipes/") else (RECIPE,)
    code, out, err = launch(*recipe, *words.split())
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert said in err and "secret" not in err, err


@pytest.mark.parametrize(
    ("where", "others", "missing"),
    [
        ("k8s", "--infra infra", "image"),
        ("k8s", "--image a:1", "infra"),
        ("slurm", "--time 10", "nodes"),
        ("slurm", "--nodes 1", "time"),
    ],
)
def test_what_a_scheduler_requires_is_said_in_the_help(
    launch: Command, where: str, others: str, missing: str
) -> None:
    code, _, err = launch(SMALL, "--cluster", where, "--name", "mine", *others.split(), "--dry-run")
    assert code == 2 and missing in err
    group: Any = get_command(app)
    [option] = [each for each in group.commands["launch"].params if each.name == missing]
    assert option.help.startswith(f"{where}, required")
