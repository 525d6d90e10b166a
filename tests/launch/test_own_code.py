"""A stranger's package beside its recipe: every command that is printed works as it was printed,
from another folder.
"""

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.__main__ import main
from pipeline.recipe.suite import runs_of
from pipeline.spiking.state import fresh_state
from pipeline.track.journal import Follower, read
from tests.helpers.small import without_stages

PACKAGE = {
    # No __init__.py: most packages that lie beside a script have none.
    "network.py": (
        '''
from torch import nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear


class Flat(nn.Module):
    def forward(self, x_TBCHW):
        return x_TBCHW.flatten(2)


class Striped(nn.Module):
    """Two layers for pictures of one channel."""

    def __init__(self, side, classes, hidden=12):
        super().__init__()
        self.hidden = nn.Sequential(Flat(), Linear(side * side, hidden), LIF())
        self.classifier = Linear(hidden, classes)

    def forward(self, x_TBCHW):
        return self.classifier(self.hidden(x_TBCHW))
'''
    ),
    "rule.py": (
        '''
import time

import torch

from pipeline.rules.base import LossTerm, Rule, slices, slice_loss
from pipeline.spiking.state import fresh_state


class LastStep(Rule):
    """Learns from the last time step alone, whose membranes come from the others as constants."""

    memory = "constant"
    chunk = 1

    def __init__(self, *, pause=0.0):
        super().__init__()
        self.pause = pause

    def _loss_terms(self, model, x_TB, loss_fn, step, rows):
        time.sleep(self.pause)  # so that somebody can end it in the middle
        steps = x_TB.shape[0]
        with fresh_state(model):
            for index, x_cB in enumerate(slices(x_TB, 1)):
                learns = index == steps - 1
                with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                    loss, share_BK = slice_loss(model(x_cB), loss_fn, steps=steps)
                backward = loss if learns else None
                yield LossTerm(backward=backward, loss=loss.detach(), logits=share_BK)
'''
    ),
    "data.py": (
        '''
from contextlib import contextmanager

import numpy as np
import torch

from pipeline.data.base import Batch


class Stripes:
    """Pictures of upright and of level stripes under noise, computed from their numbers."""

    classes = 2

    def __init__(self, side=8, samples=96, val_samples=20):
        self.side, self.samples, self.val_samples = side, samples, val_samples
        self.shape = (1, side, side)

    def fingerprint(self):
        return f"stripes-{self.side}-{self.samples}-{self.val_samples}"

    def check(self):
        """Nothing on disk."""

    def train(self, *, seed, rank, world, batch_size, micro_batch, threads):
        def rows(epoch, start):
            order = np.random.default_rng((seed, epoch)).permutation(self.samples)
            whole = order[start : self.samples // batch_size * batch_size]
            return whole.reshape(-1, world, micro_batch)[:, rank]

        return Batches(self, rows, self.samples, self.samples // batch_size)

    def val(self, *, rank, world, micro_batch, threads):
        mine = 1000 + np.arange(self.val_samples)[rank::world]
        parts = [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]
        return Batches(self, lambda epoch, start: parts, self.val_samples, len(parts))


class Batches:
    def __init__(self, data, rows, samples, steps_per_epoch):
        self.data, self.rows = data, rows
        self.samples, self.steps_per_epoch = samples, steps_per_epoch

    @contextmanager
    def epoch(self, epoch, *, start=0):
        yield (self.batch(ids) for ids in self.rows(epoch, start))

    def close(self):
        """Nothing is open."""

    def batch(self, ids):
        stripes = np.tile(np.arange(self.data.side) % 2, (self.data.side, 1))
        noise = [np.random.default_rng(i).normal(0, 0.3, stripes.shape) for i in ids]
        x = np.stack([(stripes.T if i % 2 else stripes) + n for i, n in zip(ids, noise)])
        x_B = torch.from_numpy(x[:, None].astype(np.float32))
        return Batch(x_B, torch.from_numpy(ids % 2), torch.from_numpy(ids % 1000))
'''
    ),
}
RECIPE = """
from timm.optim import create_optimizer_v2

from mysnn.data import Stripes
from mysnn.network import Striped
from mysnn.rule import LastStep
from pipeline.train.objective import CrossEntropy
from pipeline.recipe import Checkpointing, Recipe, spec
from pipeline.train.schedule import cosine


def recipe():
    mine = Recipe(
        name="mine",
        model=spec(Striped, side=8, classes=2),
        rule=spec(LastStep, pause=0.05),
        data=spec(Stripes),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1),
        schedule=spec(cosine, warmup=0.2),
        time_steps=3,
        batch_size=8,
        epochs=3,
        checkpoints=Checkpointing(every=3),
    )
"""
# Not `python -m pipeline`, which has the folder that it is started in on its path.
SPIKETRAIN = str(Path(sys.executable).with_name("spiketrain"))
# From a command as it was printed to all that it has printed.
Typed = Callable[[str], str]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    lab = tmp_path / "lab"
    (lab / "mysnn").mkdir(parents=True)
    for name, text in PACKAGE.items():
        (lab / "mysnn" / name).write_text(text)
    (lab / "one.py").write_text(RECIPE + "    return mine\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield lab
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mysnn", "one")]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not entry.endswith("/lab")]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    def run(command: str) -> str:
        forget()
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert (end.value.code or 0, without_stages(said.err).replace(NO_PARENT, "")) == (
            0,
            "",
        ), said.err
        return said.out

    return run


NO_PARENT = "no artifact in MLflow: these runs belong to no suite\n"


def killed_launch(recipe: Path) -> str:
    """What a launch has printed until it was killed (`kill -9`), some steps after a checkpoint."""
    words = f"launch {recipe} --inline --device cpu --name it --trust mysnn".split()
    with Path("log").open("w") as log:
        driver = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", SPIKETRAIN, *words], stdout=log, stderr=log
        )
    journal, saved = Follower(Path("runs/it/journal.jsonl")), False
    while driver.poll() is None:
        for event in journal.poll():
            saved = saved or event["event"] == "checkpoint"
            if saved and event["event"] == "step" and event["step"] >= 10:
                driver.kill()
        time.sleep(0.05)
    assert driver.returncode == -signal.SIGKILL, Path("log").read_text()
    return Path("log").read_text()


def printed(verb: str, said: str) -> str:
    found = re.findall(rf"spiketrain {verb} .*", said)
    assert found and found[-1].count("--trust") == 1, said
    return found[-1]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_every_command_that_is_printed_works_with_a_strangers_package(
    lab: Path, typed: Typed
) -> None:
    resumed = typed(printed("resume", killed_launch(lab / "one.py")))
    # It began twice, and learnt every batch of its three epochs.
    journal = [event["event"] for event in read(Path("runs/it/journal.jsonl"))]
    assert journal.count("start") == 2 and journal[-1] == "finish"
    assert "LastStep" in typed("spiketrain compare it --trust mysnn")
    assert "LastStep" in Path(typed(printed("report", resumed)).splitlines()[-1]).read_text()
    assert "top-1 " in typed("spiketrain evaluate it --trust mysnn")
    [line] = re.findall(r"^load    (.*)$", typed(printed("export", resumed)), re.MULTILINE)
    forget()
    network = eval(line, {"pipeline": pipeline})
    with torch.no_grad(), fresh_state(network):
        assert network(torch.zeros(3, 5, 1, 8, 8)).shape == (3, 5, 2)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_runs_side_by_side_join_the_launchs_ray_and_trust_the_package(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "from dataclasses import replace\nfrom pipeline.rules.bptt import BPTT\n"
    both = '    return [replace(mine, name="bptt", rule=spec(BPTT)), mine]\n'
    (lab / "two.py").write_text(head + RECIPE + both)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    words = f"launch {lab}/two.py --device cpu --side-by-side 2 --name it --trust mysnn"
    done = subprocess.run([SPIKETRAIN, *words.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = [read(run / "journal.jsonl")[-1]["event"] for run in runs_of(Path("runs/it")).values()]
    assert ends == ["finish", "finish"]
