"""Two hosts, made of network namespaces: a training over both, who is let in, and a link that is
cut and mended.
"""

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.launch.ray_cluster import NODES
from pipeline.track.journal import last
from tests.helpers.small import events, same_weights, without_stages
from tests.helpers.waiting import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

SEED = 20261126  # of the step at which the link is cut
BIN = Path(sys.executable).parent
LINK = "st0"  # the name of the interface on either host
ADDRESS = {"a": "10.219.0.1", "b": "10.219.0.2"}
HEAD = f"{ADDRESS['a']}:6391"
CUT_S = 30
LAB = """
import time
from pipeline.rules.sltt import SLTT

class Slow(SLTT):
    def loss_terms(self, model, x_TB, loss_of, *, step, rows):
        time.sleep(0.1)
        return super().loss_terms(model, x_TB, loss_of, step=step, rows=rows)
"""
RECIPE = """
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
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("RAY_", "MLFLOW_"))
            },
            **NODES["patient"],
            "HOME": str(folder),  # where a token may lie
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), str(folder))),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        self.with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def on(
        self, host: str | None, *words: str, token: bool = True, log: str | None = None
    ) -> subprocess.Popen[str]:
        """A process there, in a session of its own; `host` None: outside of both."""
        place = () if host is None else ("ip", "netns", "exec", self.names[host])
        out = subprocess.PIPE if log is None else (self.folder / log).open("w")
        return subprocess.Popen(
            [*place, *words],
            env=self.environment
            | (self.with_token if token else {})
            | ({} if host is None else {"GLOO_SOCKET_IFNAME": LINK}),
            cwd=self.folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def launch(
        self, host: str | None, name: str, *words: str, token: bool = True
    ) -> subprocess.Popen[str]:
        told = ["--workers", "2", "--device", "cpu", "--node-loss", "patient"]
        told += ["--trust", "slow_lab", "--runs", str(self.folder / "runs"), "--name", name]
        return self.on(
            host, "spiketrain", "launch", "lab.py", *told, *words, token=token, log=f"{name}.log"
        )

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
    """With Ray on both, one core each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.fail(
            "these tests need root, and iproute2, which `infra/setup.sh --servers` installs",
            pytrace=False,
        )
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    (made.folder / "slow_lab.py").write_text(LAB)
    (made.folder / "lab.py").write_text(RECIPE)
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
            log = made.folder / f"ray-{host}.log"
            until(
                lambda log=log: "Ray runtime started" in log.read_text(),
                process=ray,
                within=90,
                said=log.read_text,
            )
        del made.environment["RAY_TMPDIR"]
        yield made


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_client_without_the_token_is_told_so(hosts: Hosts) -> None:
    refused = hosts.launch("b", "nobody", "--address", HEAD, token=False)
    assert refused.wait(120) == 2
    (line,) = without_stages((hosts.folder / "nobody.log").read_text()).strip().splitlines()
    assert (
        f"no cluster let us in at '{HEAD}'" in line
        and "wants its token and this client shows none" in line
    )


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"RAY_AUTH_MODE": "token"}, "no authentication token was found"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "cannot be opened or is empty: /nowhere/token"),
    ],
)
def test_a_client_that_has_lost_its_token_is_told_so(
    hosts: Hosts, told: dict[str, str], said: str
) -> None:
    log = hosts.folder / "lost.log"
    log.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "environment", {**hosts.environment, **told})
        refused = hosts.launch("b", "lost", "--address", HEAD, token=False)
    assert refused.wait(120) == 2
    (line,) = without_stages(log.read_text()).strip().splitlines()
    assert line.startswith("ray: a token must be at hand; got none: ") and said in line


def test_the_doctor_finds_both_hosts_well(hosts: Hosts) -> None:
    where = ("--address", HEAD, "--runs", str(hosts.folder / "runs"))
    doctor = hosts.on("a", "spiketrain", "doctor", *where, log="doctor.log")
    status, said = doctor.wait(300), (hosts.folder / "doctor.log").read_text()
    assert status == 0, said
    assert "the same on 2 nodes" in said and said.count("images were written and read") == 2
    assert "2 processes reached one another" in said


def test_a_link_that_was_cut_and_mended_costs_no_bit(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, alone = hosts.folder / "runs" / "cut", hosts.folder / "runs" / "alone"
    uninterrupted = hosts.launch(None, "alone")
    assert uninterrupted.wait(200) == 0, (hosts.folder / "alone.log").read_text()
    at = random.Random(SEED).randrange(20, 60)
    training = hosts.launch("a", "cut", "--address", HEAD)

    def has_come() -> bool:
        step = last(run / "journal.jsonl", "step") if (run / "journal.jsonl").exists() else None
        return step is not None and step["step"] >= at

    until(has_come, process=training, within=120)
    hosts.link("down")
    time.sleep(CUT_S)
    before = last(run / "journal.jsonl", "step")
    hosts.link("up")
    assert training.wait(200) == 0, (hosts.folder / "cut.log").read_text()
    assert before is not None and before["step"] < 120, (
        "the training had ended before the link was cut"
    )
    assert {start["world_size"] for start in events(run, "start")} == {2}
    monkeypatch.syspath_prepend(hosts.folder)
    assert same_weights(run, alone, trust=("slow_lab",))
