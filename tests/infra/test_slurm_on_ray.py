"""The job script on the real Ray and the real driver, one node: stopped ahead of its time, queued
again, finished.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.track.journal import last
from tests.helpers.small import events
from tests.helpers.waiting import until

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"
STAND_IN = Path(__file__).parent / "stand_in"
PROGRAMS = Path(sys.executable).parent

RECIPE = """
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(name="sliced", epochs=40)
"""


@pytest.mark.parametrize("way", ["symmetric", "manual"])
def test_a_run_in_two_slices_of_time(tmp_path: Path, way: str):
    runs, number = tmp_path / "runs", str(8_000_000 + os.getpid())
    run = runs / "in-slices"
    (tmp_path / "sliced.py").write_text(RECIPE)
    (tmp_path / "bin").mkdir()
    for name, program in {
        "srun": STAND_IN / "srun",
        "scontrol": STAND_IN / "scontrol",
        "ray": STAND_IN / "on_ray" / "ray",
    }.items():
        (tmp_path / "bin" / name).symlink_to(program)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "SLURM_", "MLFLOW_"))
    } | {
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

    def start(**more: str) -> subprocess.Popen[bytes]:
        said = (tmp_path / "said").open("a")
        command = ["bash", str(SCRIPT), "sliced.py", "--device", "cpu"]
        return subprocess.Popen(
            command,
            env=environment | more,
            cwd=tmp_path,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )

    def told() -> str:
        return (tmp_path / "said").read_text()[-4000:]

    started = []
    try:
        started.append(first := start())
        until(
            lambda: (last(run / "journal.jsonl", "step") or {"step": 0})["step"] >= 3,
            process=first,
            within=150,
            said=told,
        )
        first.send_signal(signal.SIGUSR1)
        assert first.wait(60) == 130, told()
        assert (tmp_path / "scontrol").read_text() == f"requeue {number}\n"
        assert events(run)[-1]["event"] == "stopped" and events(run, "finish") == []

        started.append(second := start(SLURM_RESTART_COUNT="1"))
        assert second.wait(150) == 0, told()
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["restarts"]) == (320, 1)
        assert len((tmp_path / "scontrol").read_text().splitlines()) == 1
        assert not list(runs.glob(".slurm-*"))
        assert re.search(
            r"start 2 of in-slices: workers: 1, nodes: 1, Ray at [\d.]+:2\d{4}",
            (tmp_path / "said").read_text(),
        )
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(
            [tmp_path / "bin" / "ray", "stop"],
            env=environment | {"RAY_TMPDIR": f"/tmp/spiketrain-{number}"},
            check=True,
        )
        shutil.rmtree(f"/tmp/spiketrain-{number}", ignore_errors=True)
