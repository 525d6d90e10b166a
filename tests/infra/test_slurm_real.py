"""The job script under Slurm's own daemons, one node on loopback, with stand-ins for Ray and the
driver; and on the real Ray and the real driver, with stand-ins for Slurm.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.launch.schedulers import Order, render_sbatch, submit_sbatch
from pipeline.track.journal import last
from tests.helpers.nodes import free_port
from tests.helpers.small import events
from tests.helpers.waiting import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
SLURM, STAND_IN = ROOT / "infra" / "slurm", Path(__file__).parent / "stand_in"

# cred_expire: how long a job that was queued again waits; 120 s by default. linuxproc: a container
# has no cgroups to write to.
CONFIGURATION = """
ClusterName=spiketrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def program(name: str) -> str:
    found = shutil.which(name, path=f"/usr/sbin:/usr/bin:{os.environ['PATH']}")
    assert found, f"this test needs {name}, which `infra/setup.sh --servers` installs"
    return found


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons start jobs as their users, which root alone may")
    # munge takes no folder that others may write into.
    folder = Path(tempfile.mkdtemp(prefix="spiketrain-slurm-", dir="/run"))
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "munge" / "key").touch(mode=0o600)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    host, ports = socket.gethostname().split(".")[0], (free_port(), free_port())
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    named = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
    munge = [f"--{option}={folder}/munge/{name}" for option, name in named.items()]
    commands = [
        [program("munged"), "--foreground", *munge, f"--seed-file={folder}/munge/seed"],
        [program("slurmctld"), "-D", "-f", f"{folder}/slurm.conf"],
        [program("slurmd"), "-D", "-f", f"{folder}/slurm.conf", "-N", host],
    ]
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        try:
            for command in commands:
                said = (folder / f"{Path(command[0]).name}.said").open("w")
                how = {"stdout": said, "stderr": said, "start_new_session": True}
                daemons.append(subprocess.Popen(command, **how))
                time.sleep(1)
            sinfo = ["sinfo", "--noheader", "--format=%T"]
            until(
                lambda: "idle" in subprocess.run(sinfo, capture_output=True, text=True).stdout,
                within=30,
                pause=0.5,
                said=lambda: "".join(each.read_text()[-2000:] for each in folder.glob("*.[ls]*")),
            )
            yield
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(20)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submitted(
    slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Submitted]]:
    jobs: list[Submitted] = []

    def made(driver: str) -> Submitted:
        jobs.append(Submitted(tmp_path, monkeypatch, driver=driver))
        return jobs[-1]

    yield made
    for job in jobs:  # Ray's folder: numbers begin at 1 with every new Slurm
        shutil.rmtree(f"/tmp/spiketrain-{job.number}", ignore_errors=True)


class Submitted:
    """A job on the stand-ins, as `pipeline.launch.schedulers` submits it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, driver: str) -> None:
        self.folder = folder
        commands_at(folder / "bin", STAND_IN / "ray", STAND_IN / "spiketrain")
        patch.setenv("STAND_IN", str(folder))
        patch.setenv("STAND_IN_DRIVER", driver)
        patch.setenv("SPIKETRAIN_PATIENCE", "30")
        patch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        patch.chdir(folder)
        order = Order(words=("r.py",), name="a-run", workers=1, runs=str(folder / "runs"))
        # A limit below the 120 s of --signal: Slurm announces the end as soon as it looks, every 30
        # s.
        asked = {"nodes": 1, "gpus_per_node": 0, "time": "2", "partition": None}
        self.number = submit_sbatch(render_sbatch(order, SLURM, **asked))

    def told(self, field: str) -> str:
        command = ["scontrol", "show", "job", self.number]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        [found] = re.findall(rf"\b{field}=(\S*)", shown)
        return found

    def said(self) -> str:
        file = self.folder / f"a-run-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def until(self, holds: Callable[[], bool], *, within: float = 150.0) -> None:
        said = lambda: f"{self.told('JobState')}:\n{self.said()}"
        until(holds, within=within, pause=0.3, said=said)

    def ends(self, state: str) -> None:
        self.until(lambda: self.told("JobState") == state)


def commands_at(folder: Path, *programs: Path) -> None:
    folder.mkdir()
    for each in programs:
        (folder / each.name).symlink_to(each)


def test_a_run_that_needs_two_limits_of_time(submitted: Callable[[str], Submitted], tmp_path: Path):
    job = submitted("slices")
    job.until((tmp_path / "driver.saved").exists)
    job.ends("COMPLETED")
    assert (job.told("Restarts"), job.told("ExitCode")) == ("1", "0:0")
    assert "queued again" in job.said() and "start 2 of a-run" in job.said()


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(
    submitted: Callable[[str], Submitted], tmp_path: Path
):
    job = submitted("train")
    job.until((tmp_path / "driver.began").exists)
    subprocess.run(["scancel", job.number], check=True)
    job.until((tmp_path / "driver.saved").exists, within=30)
    job.ends("CANCELLED")
    time.sleep(8)  # longer than cred_expire
    assert (job.told("JobState"), job.told("Restarts")) == ("CANCELLED", "0")


def test_a_failure_is_the_job_s(submitted: Callable[[str], Submitted]):
    job = submitted("fail")
    job.ends("FAILED")
    assert job.told("ExitCode") == "7:0"


# --------------------------------------------------------------------------------- on the real Ray

PROGRAMS = Path(sys.executable).parent
RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(name="sliced", epochs=40)
"""


@pytest.mark.parametrize("way", ["symmetric", "manual"])
def test_a_run_in_two_slices_of_time(tmp_path: Path, way: str):
    runs, number = tmp_path / "runs", str(8_000_000 + os.getpid())
    run, log, of_ray = runs / "in-slices", tmp_path / "said", f"/tmp/spiketrain-{number}"
    (tmp_path / "sliced.py").write_text(RECIPE)
    stand_ins = (STAND_IN / "srun", STAND_IN / "scontrol", STAND_IN / "on_ray" / "ray")
    commands_at(tmp_path / "bin", *stand_ins)
    foreign = ("RAY_", "SLURM_", "MLFLOW_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | {
        "PATH": f"{tmp_path / 'bin'}:{PROGRAMS}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "STAND_IN": str(tmp_path),
        "STAND_IN_RAY": str(PROGRAMS / "ray"),
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NAME": "in-slices",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "SPIKETRAIN_RAY": way,
        "SPIKETRAIN_PATIENCE": "90",
        "SPIKETRAIN_RUNS": str(runs),
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(**more: str) -> subprocess.Popen[bytes]:
        command = ["bash", str(SLURM / "train.sbatch"), "sliced.py", "--device", "cpu"]
        said = log.open("a")
        how = {"cwd": tmp_path, "stdout": said, "stderr": said, "start_new_session": True}
        started.append(subprocess.Popen(command, env=environment | more, **how))
        return started[-1]

    try:
        first = start()
        until(
            lambda: (last(run / "journal.jsonl", "step") or {"step": 0})["step"] >= 3,
            process=first,
            within=150,
            said=log.read_text,
        )
        first.send_signal(signal.SIGUSR1)
        assert first.wait(60) == 130, log.read_text()
        assert (tmp_path / "scontrol").read_text() == f"requeue {number}\n"
        assert events(run)[-1]["event"] == "stopped" and events(run, "finish") == []
        assert start(SLURM_RESTART_COUNT="1").wait(150) == 0, log.read_text()
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["restarts"]) == (320, 1)
        assert len((tmp_path / "scontrol").read_text().splitlines()) == 1
        assert not list(runs.glob(".slurm-*"))
        again = r"start 2 of in-slices: workers: 1, nodes: 1, Ray at [\d.]+:2\d{4}"
        assert re.search(again, log.read_text())
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        stop = [tmp_path / "bin" / "ray", "stop"]
        subprocess.run(stop, env=environment | {"RAY_TMPDIR": of_ray}, check=True)
        shutil.rmtree(of_ray, ignore_errors=True)
