"""A run of several tasks, killed with -9 inside its second one, is resumed on the command line to
the same bits.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.track.journal import Follower, read
from tests.helpers.small import same_weights

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

RECIPE = """
from timm.optim import create_optimizer_v2
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Phase, spec
from pipeline.rules.hlop import HLOP
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(
        name="several",
        model=spec(mlp, in_features=64, hidden=(32,)),
        rule=spec(HLOP, inner=spec(SLTT), rows=((10, 8), (6, 4))),
        data=spec(Synthetic, samples=512, val_samples=100, shape=(1, 8, 8)),
        optimizer=spec(create_optimizer_v2, opt="momentum", lr=0.1, momentum=0.9, weight_decay=0.0),
        phases=tuple(
            Phase(name=f"task-{task}", data=spec(Permuted, task=task)) for task in range(3)
        ),
        epochs=1,
        time_steps=6,
        backend="deepspeed",
        zero=1,
    ).override({"checkpoints.every": 5})
"""
SECOND_TASK = range(64, 128)


def command(*words: str, runs: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words, "--inline", "--runs", str(runs)]


def test_a_run_killed_in_its_second_task_goes_on_there(tmp_path: Path) -> None:
    file = tmp_path / "several.py"
    file.write_text(RECIPE)
    whole = subprocess.run(
        command("launch", str(file), "--name", "whole", runs=tmp_path),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert whole.returncode == 0, whole.stderr
    assert "phase 2/3, task-1: from step 64, 64 steps" in whole.stdout
    assert "BWT" in whole.stdout

    journal = tmp_path / "hunted" / "journal.jsonl"
    with (tmp_path / "hunted.log").open("w") as log:
        driver = subprocess.Popen(
            command("launch", str(file), "--name", "hunted", runs=tmp_path), stdout=log, stderr=log
        )
        follower = Follower(journal)
        deadline, seen = time.monotonic() + 200, 0
        while seen < 70 and time.monotonic() < deadline and driver.poll() is None:
            seen = max(
                [seen, *(event["step"] for event in follower.poll() if event["event"] == "step")]
            )
            time.sleep(0.005)
        driver.kill()
        driver.wait()
    assert seen in SECOND_TASK, (tmp_path / "hunted.log").read_text()

    resumed = subprocess.run(
        command("resume", "hunted", runs=tmp_path), capture_output=True, text=True, timeout=280
    )
    assert resumed.returncode == 0, resumed.stderr
    starts = [event["step"] for event in read(journal) if event["event"] == "start"]
    assert starts[0] == 0
    assert starts[1] in SECOND_TASK
    assert [event["phase"] for event in read(journal) if event["event"] == "phase"] == [0, 1, 2]
    assert same_weights(tmp_path / "whole", tmp_path / "hunted")
    one, other = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "hunted")
    )
    assert {key: one[key] for key in ("accuracy_matrix", "acc", "bwt")} == {
        key: other[key] for key in ("accuracy_matrix", "acc", "bwt")
    }
