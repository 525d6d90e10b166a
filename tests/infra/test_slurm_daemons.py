"""The job script under Slurm's own daemons, one node on loopback, with stand-ins for Ray and the
driver.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.launch.schedulers import Order, render_sbatch, submit_sbatch
from tests.helpers.waiting import until

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        os.geteuid() != 0, reason="Slurm's daemons start jobs as their users, which root alone may"
    ),
]

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).parent / "stand_in"

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
def slurm() -> Iterator[Path]:
    """The folder of daemons that run, with SLURM_CONF set."""
    folder = Path(
        tempfile.mkdtemp(prefix="spiketrain-slurm-", dir="/run")
    )  # munge takes no folder that others may write into
    folder.chmod(0o755)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").touch(mode=0o600)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        ports = one.getsockname()[1], other.getsockname()[1]
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    munge = {
        name: f"--{name}={folder}/munge/{name.removesuffix('-file')}"
        for name in ("socket", "key-file", "pid-file")
    }
    logs = [f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"]
    commands = [
        [program("munged"), "--foreground", *munge.values(), *logs],
        [program("slurmctld"), "-D", "-f", f"{folder}/slurm.conf"],
        [program("slurmd"), "-D", "-f", f"{folder}/slurm.conf", "-N", host],
    ]
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        try:
            for command in commands:
                with (folder / f"{Path(command[0]).name}.said").open("w") as said:
                    daemons.append(
                        subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
                    )
                time.sleep(1)
            sinfo = ["sinfo", "--noheader", "--format=%T"]
            until(
                lambda: "idle" in subprocess.run(sinfo, capture_output=True, text=True).stdout,
                within=30,
                pause=0.5,
                said=lambda: "".join(
                    file.read_text()[-2000:]
                    for file in sorted(folder.glob("*.[ls]*"))
                    if file.is_file()
                ),
            )
            yield folder
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(20)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submitted(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Submitted]]:
    jobs: list[Submitted] = []

    def made(driver: str) -> Submitted:
        jobs.append(Submitted(tmp_path, monkeypatch, driver=driver))
        return jobs[-1]

    yield made
    for job in jobs:
        job.close()


class Submitted:
    """A job on the stand-ins, as `pipeline.launch.schedulers` submits it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, driver: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name in ("ray", "spiketrain"):
            (folder / "bin" / name).symlink_to(STAND_IN / name)
        for name, value in {
            "STAND_IN": str(folder),
            "STAND_IN_DRIVER": driver,
            "SPIKETRAIN_PATIENCE": "30",
        }.items():
            patch.setenv(name, value)
        patch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        patch.chdir(folder)
        order = Order(words=("r.py",), name="a-run", workers=1, runs=str(folder / "runs"))
        # A limit below the 120 s of --signal: Slurm announces the end as soon as it looks, every 30
        # s.
        asked = {"nodes": 1, "gpus_per_node": 0, "time": "2", "partition": None}
        self.number = submit_sbatch(render_sbatch(order, ROOT / "infra" / "slurm", **asked))

    def close(self) -> None:
        """Ray's folder of the job: numbers begin at 1 with every new Slurm."""
        shutil.rmtree(f"/tmp/spiketrain-{self.number}", ignore_errors=True)

    def told(self, field: str) -> str:
        shown = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(rf"\b{field}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    def said(self) -> str:
        file = self.folder / f"a-run-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def until(self, what: str, holds: Callable[[], bool], *, within: float = 150.0) -> None:
        until(
            holds,
            within=within,
            pause=0.3,
            said=lambda: f"{what}; {self.told('JobState')}:\n{self.said()}",
        )


def test_a_run_that_needs_two_limits_of_time(submitted: Callable[[str], Submitted], tmp_path: Path):
    job = submitted("slices")

    job.until("saving", (tmp_path / "driver.saved").exists)
    job.until("the end", lambda: job.told("JobState") == "COMPLETED")
    assert (job.told("Restarts"), job.told("ExitCode")) == ("1", "0:0")
    assert "queued again" in job.said() and "start 2 of a-run" in job.said()


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(
    submitted: Callable[[str], Submitted], tmp_path: Path
):
    job = submitted("train")

    job.until("its beginning", (tmp_path / "driver.began").exists)
    subprocess.run(["scancel", job.number], check=True)
    job.until("saving", (tmp_path / "driver.saved").exists, within=30)
    job.until("the end", lambda: job.told("JobState") == "CANCELLED")
    time.sleep(8)  # longer than cred_expire
    assert (job.told("JobState"), job.told("Restarts")) == ("CANCELLED", "0")


def test_a_failure_is_the_job_s(submitted: Callable[[str], Submitted], tmp_path: Path):
    job = submitted("fail")

    job.until("the end", lambda: job.told("JobState") == "FAILED")
    assert job.told("ExitCode") == "7:0"
