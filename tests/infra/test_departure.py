"""The very commands by which a pod of infra/k8s is taken away, on processes of this test: they see
them as all that there are.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.driver import workers_below
from tests.helpers.lab import Driven, Lab
from tests.helpers.nodes import TOKEN, nodes
from tests.infra.rules import build, cluster_of

JOB = Path(__file__).parents[2] / "infra" / "k8s" / "base" / "job"
PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"


def hook(place: str, *processes: int, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Of the `head` or of a `worker`, with these processes for /proc."""
    cluster = cluster_of(build(JOB)[0])
    group = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}[place]
    command = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    (folder / "proc").mkdir()
    for process in processes:
        (folder / "proc" / str(process)).symlink_to(f"/proc/{process}")
    mine = [word.replace(" /proc/", f" {folder}/proc/") for word in command]
    assert mine != command
    return subprocess.Popen(
        mine,
        env={"PATH": PATH, "HOME": str(folder), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_head_that_leaves_has_its_driver_save_and_waits_for_it(tmp_path: Path) -> None:
    """The driver is what pip's script of that name is to the kernel; a stop takes it a while."""
    script = tmp_path / "spiketrain"
    script.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(2), sys.exit(130)))\n"
        "print('drives', flush=True)\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    driver = subprocess.Popen([script, "launch", "r.py"], stdout=subprocess.PIPE)
    beside = subprocess.Popen(["sleep", "60"])
    try:
        assert driver.stdout is not None and driver.stdout.readline()
        began = time.monotonic()
        leaving = hook("head", driver.pid, beside.pid, folder=tmp_path)
        assert (
            driver.wait(20) == 130
        )  # and so it is a zombie no longer, as Ray's supervisor sees to
        assert leaving.wait(20) == 0 and time.monotonic() - began > 2
        assert beside.poll() is None
    finally:
        for each in (driver, beside):
            each.kill()
            each.wait()


def test_a_worker_that_trains_nothing_leaves_at_once(tmp_path: Path) -> None:
    assert hook("worker", os.getpid(), folder=tmp_path).wait(5) == 0


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_a_worker_that_leaves_has_its_run_save(tmp_path: Path) -> None:
    with nodes({}) as cluster:
        lab = Lab(tmp_path / "lab")
        lab.pace(1)
        run = Driven(lab, "--address", cluster.address, "--workers", "1")
        try:
            run.start_of(1)
            run.at_step(3)
            mine = [each.pid for each in workers_below(psutil.Process())]
            leaving = hook("worker", *mine, folder=tmp_path, RAY_ADDRESS=cluster.address, **TOKEN)
            notice = run.wait_for(lambda event: event["event"] == "preempted")
            assert len(notice["machines"]) == 1 and 60 < notice["seconds_left"] <= 100
            saved = run.wait_for(lambda event: event["event"] == "checkpoint")
            assert saved["step"] == notice["step"]
            assert leaving.poll() is None  # something trains here still
            run.process.send_signal(signal.SIGUSR1)
            assert run.end() == 130
            assert leaving.wait(60) == 0, leaving.communicate()[1]
        finally:
            run.kill()
