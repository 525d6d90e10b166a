"""Workers, drivers and machines under Ray that die, hang, drift, come and go, and a link that is
cut: the weights are those of a run that was told what to skip, and each sample is trained once an
epoch.
"""

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.launch.ray_cluster import NODE_SETTINGS
from pipeline.recipe.recipe import read_json, write_json
from pipeline.report.stores import open_store
from pipeline.track.journal import last
from pipeline.track.mlflow import sync
from pipeline.train import worker
from pipeline.train.checkpoint import step_name
from pipeline.train.job import Job, RankInfo
from tests.faults.test_security import holders, plant
from tests.helpers.driver import Driver
from tests.helpers.interruptions import newest as newest_of
from tests.helpers.lab import STEPS_PER_EPOCH, Driven, Lab, assert_trained_as
from tests.helpers.nodes import Nodes, nodes
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, recipes_of, same_weights, steps_of, without_stages
from tests.helpers.waiting import until

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SEED = 20261126  # of the steps at which something happens


# ------------------------------------------------------------------- two workers on one machine
# They meet one fault after another in one run, as every start of workers costs seconds; a test for
# each looks at what became of it. The last fault is the death of the run's driver, and the run is
# resumed by its name.

LAB = '''
import math, os, signal, time
from contextlib import contextmanager
from pathlib import Path
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.rules.sltt import SLTT

HERE = Path(__file__).parent
FAULTS = {faults!r}  # name: (rank, step)
SAVED = {saved!r}  # name: the newest checkpoint by then

def first_time(what):
    try:
        os.close(os.open(HERE / what, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def due(name, rank, step):
    return FAULTS.get(name) == (rank, step)

def strikes(name, rank, step):
    """Once, and not before that checkpoint, which training does not wait for, is whole."""
    if not due(name, rank, step) or (HERE / name).exists():
        return False
    while not (HERE / "runs" / "hit" / "checkpoints" / SAVED[name]).exists():
        time.sleep(0.01)
    return first_time(name)

class Faulty(SLTT):
    """SLTT on a machine that is not well."""

    def loss_terms(self, model, x_TB, loss_fn, *, step, rows):
        here = self.world.rank, step
        if due("not finite", *here):
            x_TB = x_TB * math.nan
        for name in ("killed 0", "killed 1"):
            if strikes(name, *here):
                os.kill(os.getpid(), signal.SIGKILL)
        if strikes("drift", *here):
            next(model.parameters()).data.flatten()[0] += 1e-4
        if strikes("driver", *here):
            time.sleep(1000)  # until whoever sees the file kills the driver, and Ray us
        return super().loss_terms(model, x_TB, loss_fn, step=step, rows=rows)

class FaultyData(Synthetic):
    """Synthetic on a disk that is not well."""

    def train(self, *, rank, **sizes):
        return FaultyLoader(super().train(rank=rank, **sizes), rank, sizes["batch_size"])

class FaultyLoader:
    def __init__(self, loader, rank, batch_size):
        self.loader, self.rank, self.batch_size = loader, rank, batch_size
        self.samples, self.steps_per_epoch = loader.samples, loader.steps_per_epoch
        self.close = loader.close

    @contextmanager
    def epoch(self, epoch, *, start=0):
        with self.loader.epoch(epoch, start=start) as batches:
            yield self.met(batches, epoch * self.steps_per_epoch + start // self.batch_size)

    def met(self, batches, step):
        for step, batch in enumerate(batches, step):
            if due("exception", self.rank, step) and first_time("exception"):
                raise RuntimeError("the cable fell out")
            if due("hang", self.rank, step) and first_time("hang"):
                time.sleep(1000)
            yield batch
'''
RECIPE = """
from dataclasses import replace
from pipeline.recipe.recipe import Policy, spec
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe
from faulty_lab import Faulty, FaultyData

def recipe():
    made = small_recipe(backend="deepspeed", epochs=6)
    often = {{"checkpoints.every": 5, "policy.replicas_every": 5, "evaluation.every": 6}}
    made = made.override(often)
    return replace(made, {change})
"""

OPTIONS = (
    *("--workers", "2", "--device", "cpu", "--trust", "faulty_lab"),
    *("--hang-minutes", "0.3", "--max-restarts", "4"),
)


# The checkpoint that a worker which fails in a batch leaves.
newest = partial(newest_of, every=5)


ALL = ("not finite", "exception", "hang", "killed 0", "killed 1", "drift", "driver")
FEW = ("not finite", "killed 0", "driver")  # a restart takes half a minute on two cores


@pytest.fixture(scope="module", params=[FEW, pytest.param(ALL, marks=pytest.mark.full)], ids=len)
def faults(request: pytest.FixtureRequest) -> dict[str, tuple[int, int]]:
    """At steps of their own, in order, in the six epochs of eight batches; the driver dies once all
    others have been found. The place of a fault but the first is the number of its restart.
    """
    draw = random.Random(SEED)
    found = {
        name: (draw.randrange(2), 2 + 6 * place + draw.randrange(5))
        for place, name in enumerate(request.param)
    }
    found["driver"] = (draw.randrange(2), 41 + draw.randrange(5))
    killed = {f"killed {rank}": rank for rank in range(2)}
    return {name: (killed.get(name, rank), step) for name, (rank, step) in found.items()}


def in_mlflow(run: Path) -> str:
    [seen] = open_store(os.environ["MLFLOW_TRACKING_URI"]).runs()
    assert seen.name == run.name
    return seen.status


def hunted(file: Path, run: Path) -> list[psutil.Process]:
    """Launch the run, kill its driver where its turn comes, and resume it.

    Returns the workers that outlived the driver by 15 s.
    """
    first = Driver("launch", str(file), *OPTIONS, "--name", run.name, run=run, folder=file.parent)
    try:
        until(
            (file.parent / "driver").exists,
            process=first.process,
            within=400,
            said=first.log.read_text,
        )
        workers = first.workers()
        assert len(workers) == 2
        write_json(file.parent / "doors.json", doors(psutil.Process(first.process.pid)))
        first.process.kill()
        # Sooner than they would take themselves to hang.
        _, left = psutil.wait_procs(workers, timeout=15)
    finally:
        first.kill()
    sync(run, uri=os.environ["MLFLOW_TRACKING_URI"])
    assert in_mlflow(run) == "KILLED"
    second = Driver("resume", run.name, "--trust", "faulty_lab", run=run, folder=file.parent)
    try:
        assert second.end() == 0, second.log.read_text()[-3000:]
    finally:
        second.kill()
    return left


def doors(driver: psutil.Process) -> list[tuple[str, str]]:
    found = []
    for each in (driver, *driver.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [
                (each.name(), door.laddr.ip)
                for door in each.net_connections("inet")
                if door.status == psutil.CONN_LISTEN
            ]
    return found


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, faults: dict[str, tuple[int, int]], empty_store: Path
) -> Iterator[tuple[Path, Path]]:
    """The run that met them, and one of two plain processes that was told to skip what it
    skipped.
    """
    folder = tmp_path_factory.mktemp("faults")
    hit, told = folder / "runs" / "hit", folder / "runs" / "told"
    saved = {name: step_name(newest(step)) for name, (_, step) in faults.items()}
    (folder / "faulty_lab.py").write_text(LAB.format(faults=faults, saved=saved))
    step = faults["not finite"][1]
    for name, change in (
        ("hit.py", "rule=spec(Faulty), data=spec(FaultyData, **made.data.kwargs)"),
        ("told.py", f"rule=spec(SLTT), policy=Policy(skip=(({step}, {step + 1}),))"),
    ):
        (folder / name).write_text(RECIPE.format(change=change))
    store = shutil.copy(empty_store, folder / "mlflow.db")
    # Of a short name: sockets lie in it.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as logs:
        patch.syspath_prepend(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        patch.setenv("RAY_TMPDIR", logs)
        plant(patch)
        assert hunted(folder / "hit.py", hit) == []
        shutil.copytree(
            logs, folder / "ray", symlinks=True, ignore=shutil.ignore_patterns("sockets")
        )
        [recipe] = recipes_of(folder / "told.py")
        (folder / "meeting").mkdir()
        run_ranks(_train, 2, folder / "meeting", make_run(told, recipe))
        yield hit, told


def _train(rank: int, ranks: int, job: Job) -> None:
    worker.run(job, RankInfo(rank, ranks, "cpu", rank))


@pytest.fixture
def hit(runs: tuple[Path, Path]) -> Path:
    return runs[0]


def test_the_parameters_are_the_same_to_the_bit(
    runs: tuple[Path, Path], faults: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault but the first has all workers start again, from the newest checkpoint."""
    monkeypatch.syspath_prepend(runs[0].parent.parent)
    assert same_weights(*runs, trust=["faulty_lab"])
    (_, *restarts) = faults.values()
    assert steps_of(runs[0], "start") == [0, *(newest(step) for _, step in restarts)]
    assert steps_of(runs[1], "start") == [0]


def test_what_is_not_finite_on_one_worker_is_skipped_by_all(
    hit: Path, faults: dict[str, tuple[int, int]]
) -> None:
    assert {(event["step"], event["reason"]) for event in events(hit, "skipped")} == {
        (faults["not finite"][1], "its gradient is not finite on 1 of 2 workers")
    }


@pytest.mark.full
@pytest.mark.parametrize("faults", [ALL], ids=len, indirect=True)
def test_a_loader_that_hangs_is_written_down_and_its_worker_started_again(
    hit: Path, faults: dict[str, tuple[int, int]]
) -> None:
    rank, _ = faults["hang"]
    files = (hit / "stacks").glob(f"rank{rank}-*")
    stacks = "".join(file.read_text() for file in files)  # one that was killed leaves an empty one
    assert 'faulty_lab.py", line' in stacks and " in met" in stacks
    told = events(hit, "hung")
    assert {event["attempt"] for event in told} == {[*faults].index("hang")}
    assert rank in [event["worker"] for event in told]
    assert all((hit / event["stacks"]).read_text() for event in told)


def test_a_worker_that_is_killed_in_the_middle_of_a_step(
    hit: Path, faults: dict[str, tuple[int, int]]
) -> None:
    for number, (name, (rank, _)) in enumerate(faults.items()):
        if name.startswith("killed"):
            [died] = [event for event in events(hit, "died") if event["attempt"] == number]
            assert died["worker"] == rank and "process has died" in died["error"]


def test_a_cluster_of_our_own_listens_to_its_own_machine_alone(hit: Path) -> None:
    found = read_json(hit.parent.parent / "doors.json")
    assert {"gcs_server", "raylet"} <= {name for name, _ in found} and len(found) > 10
    assert {door.removeprefix("::ffff:") for _, door in found} <= {"127.0.0.1", "::1"}


def test_no_secret_of_the_driver_is_written_down_by_anybody(hit: Path) -> None:
    folder = hit.parent.parent
    logs = [file.name for file in (folder / "ray").rglob("*") if file.is_file()]
    assert "gcs_server.out" in logs and any(name.startswith("worker-") for name in logs)
    assert (folder / "mlflow.db").exists()
    assert holders(folder) == []


@pytest.mark.full
@pytest.mark.parametrize("faults", [ALL], ids=len, indirect=True)
def test_weights_that_come_apart_are_found_and_given_up(
    hit: Path, faults: dict[str, tuple[int, int]]
) -> None:
    [back] = events(hit, "rollback")
    step = faults["drift"][1]
    found = next(each for each in range(step + 1, 50) if newest(each) == each)
    assert (back["step"], back["to"]) == (found - 1, newest(step))
    # Of two, nobody can tell which.
    assert back["reason"].startswith(
        "weights or rule buffers of workers 1 differ from those of others"
    )


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_run_is_resumed(
    hit: Path, faults: dict[str, tuple[int, int]]
) -> None:
    """Within 15 s. MLflow hears of the death when the run is synced, see `hunted`."""
    assert events(hit, "start")[-1]["attempt"] == [*faults].index("driver")
    assert in_mlflow(hit) == "FINISHED"


# ------------------------------------------------------------------ nodes that die, come and leave

Begin = Callable[..., tuple[Driven, list[int]]]


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory: pytest.TempPathFactory) -> Driven:
    run = Driven(Lab(tmp_path_factory.mktemp("unhurt")), "--inline")
    run.finish()
    return run


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes(NODE_SETTINGS["fast"]) as there:
        yield there


@pytest.fixture
def begin(cluster: Nodes, driven: Callable[..., Driven], tmp_path: Path, own_store: str) -> Begin:
    """Starts a run on the head and on more nodes, at a pace that it can be met at, and waits until
    a step of it. The run, and the numbers of the other nodes.
    """

    def begun(sizes: str, *, seed: int, others: int = 1) -> tuple[Driven, list[int]]:
        added = [cluster.add() for _ in range(others)]
        lab = Lab(tmp_path / "lab")
        lab.pace(0.3)
        run = driven(lab, "--address", cluster.address, "--workers", sizes)
        run.start_of(1 + others)
        run.at_step(random.Random(SEED + seed).randrange(4, 9))
        return run, added

    return begun


def assert_as(unhurt: Driven, run: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    run.finish()
    monkeypatch.syspath_prepend(unhurt.lab.folder)
    assert_trained_as(
        unhurt.run,
        run.run,
        run.lab.samples(),
        unhurt.lab.samples(),
        steps_per_epoch=STEPS_PER_EPOCH,
        trust=["told_lab"],
    )


def assert_from_a_checkpoint(start: dict[str, Any], run: Driven) -> None:
    """From the newest that was told of, or from one that was whole just before its writer died."""
    checkpoint, step = (
        max(each["step"] for each in events(run.run, kind) if each["time"] < start["time"])
        for kind in ("checkpoint", "step")
    )
    assert checkpoint <= start["step"] <= step


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "others"),
    [("1:2", 1), ("2,3,4,6", 2)],  # 12 samples do not divide by 5
    ids=["2 -> 1", "3 -> 2"],
)
def test_a_node_dies(
    cluster: Nodes,
    begin: Begin,
    unhurt: Driven,
    monkeypatch: pytest.MonkeyPatch,
    sizes: str,
    others: int,
) -> None:
    run, added = begin(sizes, seed=others, others=others)
    cluster.kill(random.Random(SEED).choice(added))
    assert_from_a_checkpoint(run.start_of(others), run)
    assert_as(unhurt, run, monkeypatch)


@pytest.mark.full
def test_a_node_dies_and_another_comes(
    cluster: Nodes, begin: Begin, unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, [first] = begin("1:2", seed=3)
    cluster.kill(first)
    alone = run.start_of(1)
    run.lab.pace(2)  # until the other one is there
    cluster.add()
    # It saved before it grew.
    assert run.start_of(2)["step"] == max(steps_of(run.run, "checkpoint")) > alone["step"]
    assert_as(unhurt, run, monkeypatch)


@pytest.mark.full
def test_a_node_is_taken_away_after_a_notice(
    cluster: Nodes, begin: Begin, unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, [first] = begin("1:2", seed=4)
    run.lab.pace(1)
    began = time.time()
    cluster.drain(first, seconds=25)
    notice = run.wait_for(lambda event: event["event"] == "preempted")
    assert len(notice["machines"]) == 1 and 0 < notice["seconds_left"] < 25
    saved = run.wait_for(lambda event: event["event"] == "checkpoint")
    assert saved["step"] == notice["step"] and saved["time"] - began < 25
    assert run.start_of(1)["step"] >= notice["step"]
    assert_as(unhurt, run, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("sizes", ["2", "2,3"])
def test_whoever_stops_a_run_that_waits_for_a_node_is_told_so(
    cluster: Nodes, begin: Begin, monkeypatch: pytest.MonkeyPatch, sizes: str
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    run, [added] = begin(sizes, seed=5)
    cluster.kill(added)
    waiting = run.wait_for(lambda event: event["event"] == "waiting")  # the other one is ended too
    assert (waiting["what"], waiting["most_s"]) == ("resources for 2 workers", 3600.0)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    stopped = events(run.run)[-1]
    assert stopped["event"] == "stopped"
    assert stopped["step"] == max(steps_of(run.run, "checkpoint"), default=0)
    assert stopped["reason"] == "asked to stop by SIGINT while it waited for resources"
    assert f"--address {cluster.address}" in stopped["resume_command"]


# --------------------------------------------------------- two hosts, made of network namespaces

LINK = "st0"  # the name of the interface on either host
ADDRESS = {"a": "10.219.0.1", "b": "10.219.0.2"}
HEAD = f"{ADDRESS['a']}:6391"
CUT_S = 30
SLOW_LAB = """
import time
from pipeline.rules.sltt import SLTT

class Slow(SLTT):
    def loss_terms(self, model, x_TB, loss_fn, *, step, rows):
        time.sleep(0.1)
        return super().loss_terms(model, x_TB, loss_fn, step=step, rows=rows)
"""
SLOW_RECIPE = """
from dataclasses import replace
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe
from slow_lab import Slow

def recipe():
    return replace(small_recipe(backend="deepspeed", epochs=15), rule=spec(Slow)).override(
        {"checkpoints.every": 10}
    )
"""


class Hosts:
    """Two of them, `a` and `b`, and what a user does there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {host: f"spiketrain-{os.getpid()}-{host}" for host in ADDRESS}
        (token := folder / "token").write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
            **NODE_SETTINGS["patient"],
            "HOME": str(folder),  # where a token may lie
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), str(folder))),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        self.with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def on(
        self, host: str | None, *words: str, log: str, token: bool = True
    ) -> subprocess.Popen[bytes]:
        """A process there, in a session of its own; `host` None: outside of both."""
        place = () if host is None else ("ip", "netns", "exec", self.names[host])
        there = {} if host is None else {"GLOO_SOCKET_IFNAME": LINK}
        return subprocess.Popen(
            [*place, *words],
            env=self.environment | (self.with_token if token else {}) | there,
            cwd=self.folder,
            stdout=(self.folder / log).open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def launch(
        self, host: str | None, name: str, *words: str, token: bool = True
    ) -> subprocess.Popen[bytes]:
        told = ["spiketrain", "launch", "lab.py", "--workers", "2", "--device", "cpu", "--trust"]
        told += ["slow_lab", "--node-loss", "patient", "--runs", str(self.folder / "runs")]
        return self.on(host, *told, "--name", name, *words, token=token, log=f"{name}.log")

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def line(self, name: str) -> str:
        """All that it said, but the stages that it was waited for."""
        [line] = without_stages(self.said(name)).strip().splitlines()
        return line

    def link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.names["b"], "link", "set", LINK, state], check=True)


@contextmanager
def namespaces(names: dict[str, str]) -> Iterator[None]:
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with ExitStack() as ends:
        for name in names.values():
            ip("netns", "add", name)
            ends.callback(ip, "netns", "del", name)
        pair = (LINK, "netns", names["a"], "type", "veth", "peer", "name", LINK)
        ip("link", "add", *pair, "netns", names["b"])
        for host, name in names.items():
            ip("-n", name, "addr", "add", f"{ADDRESS[host]}/24", "dev", LINK)
            for device in ("lo", LINK):
                ip("-n", name, "link", "set", device, "up")
        yield


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.fail(
            "these tests need root, and iproute2, which `infra/setup.sh --servers` installs",
            pytrace=False,
        )
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    (made.folder / "slow_lab.py").write_text(SLOW_LAB)
    (made.folder / "lab.py").write_text(SLOW_RECIPE)
    port = HEAD.rpartition(":")[2]
    with namespaces(made.names), ExitStack() as ends:
        for host, how in (
            ("a", ("--head", "--port", port, "--include-dashboard", "false")),
            ("b", ("--address", HEAD)),
        ):
            short = Path(f"/tmp/st-{os.getpid()}-{host}")  # a socket's name has at most 107 bytes
            ends.callback(shutil.rmtree, short, ignore_errors=True)
            where = ("--node-ip-address", ADDRESS[host], "--num-cpus", "1", "--block")
            made.environment["RAY_TMPDIR"] = str(short)
            ray = made.on(host, "ray", "start", *how, *where, log=f"ray-{host}.log")
            ends.callback(_end, ray)
            said = partial(made.said, f"ray-{host}")
            runs = lambda said=said: "Ray runtime started" in said()
            until(runs, process=ray, within=90, said=said)
        del made.environment["RAY_TMPDIR"]
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.full
def test_a_client_without_the_token_is_told_so(hosts: Hosts) -> None:
    assert hosts.launch("b", "nobody", "--address", HEAD, token=False).wait(120) == 2
    line = hosts.line("nobody")
    assert f"the cluster at {HEAD} must run and accept this process" in line
    assert "if it runs, set RAY_AUTH_TOKEN to its token" in line


@pytest.mark.full
def test_the_doctor_finds_both_hosts_well(hosts: Hosts) -> None:
    status = hosts.on(
        "a",
        *("spiketrain", "doctor", "--address", HEAD, "--runs", str(hosts.folder / "runs")),
        log="doctor.log",
    ).wait(300)
    said = hosts.said("doctor")
    assert status == 0, said
    assert "the same on 2 nodes" in said and said.count("images were written and read") == 2
    assert "2 processes reached one another" in said


@pytest.mark.full
def test_a_link_that_was_cut_and_mended_costs_no_bit(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = hosts.folder / "runs" / "cut", hosts.folder / "runs" / "alone"
    assert hosts.launch(None, "alone").wait(200) == 0, hosts.said("alone")
    at = random.Random(SEED).randrange(20, 60)
    training = hosts.launch("a", "cut", "--address", HEAD)

    def newest_step() -> int:
        step = last(run / "journal.jsonl", "step") if (run / "journal.jsonl").exists() else None
        return 0 if step is None else step["step"]

    until(lambda: newest_step() >= at, process=training, within=120)
    hosts.link("down")
    time.sleep(CUT_S)
    assert newest_step() < 120, "the training had ended before the link was cut"
    hosts.link("up")
    assert training.wait(200) == 0, hosts.said("cut")
    assert {start["world_size"] for start in events(run, "start")} == {2}
    monkeypatch.syspath_prepend(hosts.folder)
    assert same_weights(run, alone, trust=("slow_lab",))
