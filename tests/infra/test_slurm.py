"""The job script runs as it is, on stand-ins for Slurm's, Ray's and our own commands
(tests/infra/stand_in); under Slurm's own daemons, with stand-ins for Ray and the driver; and on the
real Ray and the real driver, with stand-ins for Slurm.
"""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.launch.ray_cluster import NODE_SETTINGS
from pipeline.launch.schedulers import LaunchRequest, render_sbatch, submit_sbatch
from pipeline.track.journal import last
from tests.helpers.nodes import free_port
from tests.helpers.programs import program
from tests.helpers.small import events
from tests.helpers.waiting import until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"
STAND_IN = Path(__file__).parent / "stand_in"


class Slurm:
    """One job on two nodes: what Slurm does to it, and what it left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.number = str(9_000_000 + os.getpid())
        self.of_ray = Path(f"/tmp/spiketrain-{self.number}")
        self.environment = {
            "PATH": f"{STAND_IN}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(STAND_IN / "python"),
            "HOME": str(folder),
            "STAND_IN": str(folder),
            "STAND_IN_DRIVER": "finish",
            "SLURM_JOB_ID": self.number,
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_ON_NODE": "16",
            "SLURM_GPUS_ON_NODE": "8",
            "SPIKETRAIN_PATIENCE": "30",
            "SPIKETRAIN_RUNS": str(self.runs),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, script: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """As Slurm would on the first node: with the job's name and number, in the folder of
        submission.
        """
        [name] = re.findall(r"^#SBATCH --job-name=(.*)$", script.read_text(), re.MULTILINE)
        self.process = subprocess.Popen(
            # The limit of memory that may be locked is that of the shell of the submission, as
            # Slurm passes it on.
            ["bash", "-c", 'ulimit -S -l 64 && exec bash "$@"', "bash", str(script), *words],
            env={"SLURM_JOB_NAME": name} | self.environment | environment,
            cwd=self.folder,
            # No pipe, which would stay open as long as any process of the job.
            stdout=(self.folder / "said").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self.process

    def end(self, status: int = 0, *, within: float = 30) -> str:
        """With that exit status; what was said."""
        assert self.process is not None
        assert self.process.wait(within) == status, self.left("said")
        return self.left("said")

    def run(self, *words: str, status: int = 0, **environment: str) -> str:
        self.start(SCRIPT, *words, **environment)
        return self.end(status)

    def left(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def until(self, name: str) -> str:
        return until(lambda: self.left(name), within=20, said=lambda: name)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    job = Slurm(tmp_path)
    yield job
    if job.process is not None:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
    if job.of_ray.is_symlink():
        job.of_ray.unlink()
    shutil.rmtree(job.of_ray, ignore_errors=True)


# ---------------------------------------------------------------------------------- a job that ends


def test_the_launch_is_told_where_and_on_how_much_to_train(slurm: Slurm):
    slurm.run("recipes/fashion/sltt.py", "--set", "optimizer.lr=0.05")
    expected = (
        "launch recipes/fashion/sltt.py --set optimizer.lr=0.05 --name spiketrain --runs"
        f" {slurm.runs} --address auto --workers 16 --or-resume --node-loss patient"
    )
    assert slurm.left("driver.words").split() == expected.split()
    head = slurm.left("driver.ray").strip()
    assert re.fullmatch(r"[\d.]+:2\d{4}", head) and not head.startswith("127.")
    patience = dict(line.split("=") for line in slurm.left("driver.patience").splitlines())
    assert patience == NODE_SETTINGS["patient"]
    soft, hard = slurm.left("driver.memlock").split()
    assert soft == hard != "64"  # InfiniBand needs more than a shell commonly has
    started = f"symmetric-run --address {head} --min-nodes 2 --num-cpus=16 --num-gpus=8 "
    assert all(slurm.left(f"ray.{node}").startswith(started) for node in "01")
    assert not slurm.left("scontrol") and not list(slurm.runs.glob(".slurm-*"))
    # Logs of Ray, in a folder that all may write to.
    assert stat.S_IMODE(slurm.of_ray.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("environment", "status", "said", "started"),
    [
        ({"STAND_IN_DRIVER": "fail"}, 7, "", ["symmetric-run --address "] * 2),
        pytest.param(
            {"STAND_IN_DRIVER": "fail", "STAND_IN_RAY": "2.48"},
            *(7, "", ["start --head --node-ip-address=", "start --address="]),
            marks=pytest.mark.full,
            id="no symmetric-run",
        ),
        (
            {"SPIKETRAIN_RAY": "clever"},
            *(1, "SPIKETRAIN_RAY must be symmetric or manual; got clever", []),
        ),
        ({"STAND_IN_RAY": "broken"}, 1, "never began", []),  # a Ray that did not start ends with 0
    ],
)
def test_a_failure_keeps_its_exit_status_and_is_not_queued_again(
    slurm: Slurm, environment: dict[str, str], status: int, said: str, started: list[str]
):
    assert said in slurm.run("r.py", status=status, **environment)
    assert not slurm.left("scontrol")
    for node, words in enumerate(started):
        assert slurm.left(f"ray.{node}").startswith(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--workers", "3"),
            "--workers must be said by SPIKETRAIN_WORKERS; got it among the words of the launch",
        ),
        (("--runs=elsewhere",), "--runs must be said by SPIKETRAIN_RUNS; got it"),
        (("--name", "a"), "--name must be said by sbatch --job-name; got it"),
        (("--node-loss", "fast"), "--node-loss must be said by this script alone; got it"),
    ],
)
def test_an_option_that_the_script_says_itself_is_refused(
    slurm: Slurm, words: tuple[str, ...], said: str
):
    [line] = slurm.run("r.py", "--set", "seed=3", *words, status=2).splitlines()
    assert said in line
    assert not slurm.runs.exists() and not slurm.left("srun.options")


@pytest.mark.parametrize(
    "found",
    [
        "symbolic link",
        pytest.param(
            "directory",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away"),
        ),
    ],
)
def test_a_folder_that_somebody_else_has_put_in_its_place_is_refused(slurm: Slurm, found: str):
    if found == "directory":
        (theirs := slurm.of_ray).mkdir()
        os.chown(theirs, 65534, -1)
    else:
        (theirs := slurm.folder / "theirs").mkdir()
        slurm.of_ray.symlink_to(theirs)
    said = slurm.run("r.py", status=1)
    assert list(theirs.iterdir()) == []
    refused = (
        f"{slurm.of_ray} on {socket.gethostname()} must be a directory of user {os.geteuid()}; got"
        f" {found} of user "
    )
    assert said.count(refused) == 2  # on each node
    assert not slurm.left("driver.words") and not slurm.left("ray.0")


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("environment", "is_saved", "said"),
    [
        ({"STAND_IN_DRIVER": "train"}, True, ""),
        pytest.param(
            {"STAND_IN_DRIVER": "train", "STAND_IN_RAY": "2.48"}, True, "", marks=pytest.mark.full
        ),
        ({"STAND_IN_DRIVER": "asleep"}, False, "status 138"),  # it did not listen yet
        ({"STAND_IN_DRIVER": "deaf", "SPIKETRAIN_SAVE_WITHIN": "1"}, False, "status none"),
        ({"STAND_IN_DRIVER": "train", "STAND_IN_SCONTROL": "1"}, True, "submit it again"),
    ],
    ids=["saves", "with an old Ray", "asleep", "cannot save in time", "requeue is refused"],
)
def test_a_time_limit_that_nears_saves_and_queues_the_job_again(
    slurm: Slurm, environment: dict[str, str], is_saved: bool, said: str
):
    batch = slurm.start(SCRIPT, "r.py", **environment)
    slurm.until("driver.began")
    batch.send_signal(signal.SIGUSR1)  # --signal=B: the script alone
    assert said in slurm.end(130)
    assert (slurm.folder / "driver.saved").exists() is is_saved
    assert slurm.left("scontrol") == f"requeue {slurm.number}\n"


@pytest.mark.parametrize(
    ("to", "number", "is_queued_again"),
    [
        ("tasks", signal.SIGTERM, True),  # a preemption that tells them alone
        ("script", signal.SIGTERM, False),  # the job is cancelled
        ("driver", signal.SIGUSR1, False),  # somebody stopped the run, as by `touch RUN/stop`
    ],
)
def test_a_run_that_is_asked_to_stop_saves(
    slurm: Slurm, to: str, number: signal.Signals, is_queued_again: bool
):
    batch = slurm.start(SCRIPT, "r.py", STAND_IN_DRIVER="train")
    pids = {
        "tasks": slurm.until("srun.tasks"),
        "script": str(batch.pid),
        "driver": slurm.until("driver.began"),
    }
    for pid in pids[to].split():
        os.kill(int(pid), number)
    slurm.end(130)
    assert (slurm.folder / "driver.saved").exists()
    assert (slurm.left("scontrol") != "") is is_queued_again


# -------------------------------------------------------------------------------------------- token


@pytest.mark.parametrize(
    ("way", "started"),
    [("symmetric", "symmetric-run"), pytest.param("manual", "start", marks=pytest.mark.full)],
)
def test_the_token_is_in_a_file_of_its_owner_and_in_no_command_line(
    slurm: Slurm, way: str, started: str
):
    batch = slurm.start(
        SCRIPT, "r.py", STAND_IN_DRIVER="train", SPIKETRAIN_RAY=way, RAY_AUTH_TOKEN="one-of-before"
    )
    slurm.until("driver.began")
    token = slurm.runs / f".slurm-{slurm.number}" / "token"
    secret = token.read_text().strip()
    assert re.fullmatch("[0-9a-f]{64}", secret)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (token, token.parent)] == [0o600, 0o700]
    lines = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    # The script, srun, its tasks, Ray, the driver: those that could have had it.
    assert sum(slurm.number in words or "r.py" in words for words in lines) >= 4
    assert not [words for words in lines if secret in words]
    assert slurm.left("ray.0").startswith(started)
    batch.send_signal(signal.SIGTERM)
    slurm.end(130)
    assert not token.exists()


def test_another_start_has_another_token(slurm: Slurm):
    secrets = {""}
    for _ in range(2):
        slurm.run("r.py")
        secrets.add(slurm.left("driver.token"))
        (slurm.folder / "over").unlink()
    assert len(secrets) == 3


# -------------------------------------------------------------------------------- render and submit


def command(
    *words: str,
    name: str = "my-run",
    sizes: tuple[int, ...] = (16,),
    runs: str = "/shared/runs",
    **options: Any,
) -> str:
    return render_sbatch(
        LaunchRequest(
            words=words or ("recipes/fashion/sltt.py",),
            name=name,
            sizes=sizes,
            runs=runs,
            options={"nodes": 2, "gpus_per_node": 8, "time": "10", **options},
        )
    )


@pytest.fixture
def submit(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Submit a command line to the stand-in for sbatch, and start the job as Slurm would."""
    for name in ("PATH", "STAND_IN"):
        monkeypatch.setenv(name, slurm.environment[name])

    def made(line: str) -> str:
        number = submit_sbatch(line)
        environment = dict(
            each.split("=", 1) for each in slurm.left("sbatch.environment").splitlines()
        )
        script, *words = slurm.left("sbatch.words").splitlines()
        slurm.start(Path(script), *words, SLURM_JOB_NAME="my-run", **environment)
        return number

    return made


def test_what_is_submitted_runs_as_ordered(slurm: Slurm, submit: Callable[[str], str]):
    words = ("recipes/it's mine.py", "--set", 'data.folder="$(touch owned)"; `touch owned` & #')
    runs = str(slurm.folder / "its runs")
    options = {"time": "1-00:00:00", "partition": "gpu,long", "image": "a b:1"}
    assert submit(command(*words, runs=runs, **options)) == "4711"
    slurm.end()
    assert slurm.left("sbatch.options").splitlines() == [
        *("--parsable", "--export=ALL", "--job-name=my-run", "--nodes=2", "--time=1-00:00:00"),
        *("--gpus-per-node=8", "--partition=gpu,long"),
    ]
    assert slurm.left("driver.words").splitlines()[1:] == [
        *(*words, "--name", "my-run", "--runs", runs),
        *("--address", "auto", "--workers", "16", "--or-resume", "--node-loss", "patient"),
    ]
    assert "--container-image=a b:1" in slurm.left("srun.options").splitlines()
    assert not list(slurm.folder.rglob("owned"))


def test_the_script_asks_for_what_no_option_says():
    head, _, body = SCRIPT.read_text().partition("set -euo pipefail")
    assert set(re.findall(r"^#SBATCH --([a-z-]+)", head, re.MULTILINE)) == {
        *("requeue", "signal", "open-mode", "ntasks-per-node", "exclusive", "mem", "dependency"),
        *("output", "job-name"),
    }
    assert "#SBATCH" not in body


def test_what_is_not_asked_for_is_not_in_the_command():
    line = command(gpus_per_node=0, time="10:00", sizes=(2,))
    assert "gpus-per-node=" not in line and "partition=" not in line
    # Workers that leave GPUs alone may be more than these.
    assert " SPIKETRAIN_WORKERS=17 " in command("r.py", device="cpu", sizes=(17,))


def test_workers_that_nobody_counted_are_one_for_each_gpu(
    slurm: Slurm, submit: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
):
    """Whatever the environment of the submission says, which Slurm passes on."""
    monkeypatch.setenv("SPIKETRAIN_WORKERS", "3")
    submit(command(sizes=(), runs=str(slurm.runs)))
    slurm.end()
    assert " --workers 16 " in slurm.left("driver.words").replace("\n", " ")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(
            ({field: value}, f"slurm: {field} must be ")
            for field, values in {
                "name": ("a\n#SBATCH --uid=0", "a b", "../a", ""),
                "time": (
                    *("", "soon", "1:2:3:4", "UNLIMITED", "10\n#SBATCH --uid=0", "10 --uid=0"),
                    "-5",
                ),
                "partition": ("", "a b", "gpu\n", "--uid=0", "gpu,"),
            }.items()
            for value in values
        ),
        ({"sizes": (17,)}, "got 17 workers on 2 nodes x 8 GPUs"),
        (
            {"sizes": (2, 3, 4)},
            "workers must be one number, because the number of nodes of a job is fixed; got 2:4",
        ),
    ],
)
def test_an_order_that_does_not_fit_is_refused(fields: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said) as error:
        command(**fields)
    assert "\n" not in str(error.value)


def test_shellcheck_finds_nothing():
    stand_ins = (STAND_IN / name for name in ("scontrol", "sbatch", "spiketrain"))
    scripts = [SCRIPT, ROOT / "infra" / "setup.sh", ROOT / ".ci" / "run", *stand_ins]
    checked = [program("shellcheck"), "--format=json", *scripts]
    assert json.loads(subprocess.run(checked, capture_output=True, text=True).stdout) == []


# --------------------------------------------------------------------- under Slurm's own daemons

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


@pytest.fixture(scope="module")
def daemons() -> Iterator[None]:
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
    munge = f"{folder}/munge"
    commands = [
        [
            *(program("munged"), "--foreground", f"--socket={munge}/socket"),
            *(f"--key-file={munge}/key", f"--pid-file={munge}/pid"),
            *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        ],
        [program("slurmctld"), "-D", "-f", f"{folder}/slurm.conf"],
        [program("slurmd"), "-D", "-f", f"{folder}/slurm.conf", "-N", host],
    ]
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        try:
            for command in commands:
                started.append(
                    subprocess.Popen(
                        command,
                        stdout=(folder / f"{Path(command[0]).name}.said").open("w"),
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
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
            for daemon in reversed(started):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(20)
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Submitted:
    """A job on the stand-ins, as `pipeline.launch.schedulers` submits it."""

    folder: Path
    number: str

    def told(self, field: str) -> str:
        shown = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        ).stdout
        [found] = re.findall(rf"\b{field}=(\S*)", shown)
        return found

    def said(self) -> str:
        file = self.folder / f"a-run-{self.number}.out"
        return file.read_text() if file.exists() else ""

    def until(self, holds: Callable[[], bool], *, within: float = 150.0) -> None:
        until(
            holds,
            within=within,
            pause=0.3,
            said=lambda: f"{self.told('JobState')}:\n{self.said()}",
        )

    def ends(self, state: str) -> None:
        self.until(lambda: self.told("JobState") == state)


@pytest.fixture
def job(
    daemons: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Submitted]:
    """A job whose driver does what the test's parameter says."""
    commands_at(tmp_path / "bin", STAND_IN / "ray", STAND_IN / "spiketrain")
    for name, value in {
        "STAND_IN": str(tmp_path),
        "STAND_IN_DRIVER": request.param,
        "SPIKETRAIN_PATIENCE": "30",
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    # A limit below the 120 s of --signal: Slurm announces the end as soon as it looks, every 30 s.
    limits: dict[str, Any] = {"nodes": 1, "gpus_per_node": 0, "time": "2", "sizes": (1,)}
    number = submit_sbatch(command("r.py", name="a-run", runs=f"{tmp_path}/runs", **limits))
    yield Submitted(tmp_path, number)
    # Ray's folder: numbers begin at 1 with every new Slurm.
    shutil.rmtree(f"/tmp/spiketrain-{number}", ignore_errors=True)


def commands_at(folder: Path, *programs: Path) -> None:
    folder.mkdir()
    for each in programs:
        (folder / each.name).symlink_to(each)


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("job", ["slices"], indirect=True)
def test_a_run_that_needs_two_limits_of_time(job: Submitted, tmp_path: Path):
    job.until((tmp_path / "driver.saved").exists)
    job.ends("COMPLETED")
    assert (job.told("Restarts"), job.told("ExitCode")) == ("1", "0:0")
    assert "queued again" in job.said() and "start 2 of a-run" in job.said()


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("job", ["train"], indirect=True)
def test_a_job_that_is_cancelled_saves_and_stays_cancelled(job: Submitted, tmp_path: Path):
    job.until((tmp_path / "driver.began").exists)
    subprocess.run(["scancel", job.number], check=True)
    job.until((tmp_path / "driver.saved").exists, within=30)
    job.ends("CANCELLED")
    time.sleep(8)  # longer than cred_expire
    assert (job.told("JobState"), job.told("Restarts")) == ("CANCELLED", "0")


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("job", ["fail"], indirect=True)
def test_a_failure_is_the_job_s(job: Submitted):
    job.ends("FAILED")
    assert job.told("ExitCode") == "7:0"


# ------------------------------------------------------------------------------- on the real Ray

PROGRAMS = Path(sys.executable).parent
RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(name="sliced", epochs=40)
"""


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["symmetric", "manual"])
def test_a_run_in_two_slices_of_time(slurm: Slurm, tmp_path: Path, way: str):
    run, words = slurm.runs / "in-slices", ("sliced.py", "--device", "cpu")
    (tmp_path / "sliced.py").write_text(RECIPE)
    commands_at(tmp_path / "bin", *(STAND_IN / name for name in ("srun", "scontrol", "on_ray/ray")))
    foreign = ("RAY_", "SLURM_", "MLFLOW_")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    slurm.environment = {
        **outside,
        **slurm.environment,
        "PATH": f"{tmp_path / 'bin'}:{PROGRAMS}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": os.environ["HOME"],  # where numba and matplotlib keep what they made
        "STAND_IN_RAY": str(PROGRAMS / "ray"),
        "SLURM_JOB_NAME": "in-slices",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_GPUS_ON_NODE": "",
        "SPIKETRAIN_RAY": way,
        "SPIKETRAIN_PATIENCE": "90",
    }
    first = slurm.start(SCRIPT, *words)
    try:
        until(
            lambda: (last(run / "journal.jsonl", "step") or {"step": 0})["step"] >= 3,
            process=first,
            within=150,
            said=lambda: slurm.left("said"),
        )
        first.send_signal(signal.SIGUSR1)
        slurm.end(130, within=60)
        assert slurm.left("scontrol") == f"requeue {slurm.number}\n"
        assert events(run)[-1]["event"] == "stopped" and events(run, "finish") == []
        slurm.start(SCRIPT, *words, SLURM_RESTART_COUNT="1")
        again = r"start 2 of in-slices: workers: 1, nodes: 1, Ray at [\d.]+:2\d{4}"
        assert re.search(again, slurm.end(within=150))
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["restarts"]) == (320, 1)
        assert len(slurm.left("scontrol").splitlines()) == 1
        assert not list(slurm.runs.glob(".slurm-*"))
    finally:
        subprocess.run(
            [tmp_path / "bin" / "ray", "stop"],
            env=slurm.environment | {"RAY_TMPDIR": str(slurm.of_ray)},
            check=True,
        )
