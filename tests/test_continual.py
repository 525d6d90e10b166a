"""Runs of several tasks: the right task at the right step, whatever killed them; a new optimizer,
schedule and head in each.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import pipeline
from pipeline.core.errors import UserError
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.launch.evaluate import evaluate_run
from pipeline.launch.in_process import Inline
from pipeline.launch.prepare import write_job
from pipeline.models.mlp import mlp
from pipeline.models.transforms import multi_head, select_head
from pipeline.recipe.phases import Phase
from pipeline.recipe.recipe import Checkpointing, Policy, Recipe, spec, write_json
from pipeline.report.forecasts import show_recipe
from pipeline.report.selection import list_runs
from pipeline.rules.base import LossOf, LossTerm
from pipeline.rules.hlop import HLOP
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.state import fresh_state
from pipeline.train.checkpoint import WEIGHTS, read_trainer, step_folders
from pipeline.train.checkpointing import Saving
from pipeline.train.evaluation import Evaluation, mean_of
from pipeline.train.guards import anomaly as guard
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from pipeline.train.tasks import Learnt, Loaders, Task, tasks_of
from pipeline.train.trainer import Trainer
from tests.helpers.interruptions import (
    between_batches,
    change_losses,
    die,
    die_at,
    dies,
    dies_at,
)
from tests.helpers.small import events, job_of, same_weights, small_recipe, steps_of

# Steps 0-7, 8-23 (in two epochs) and 24-31.
TASKS = tuple(
    Phase(name=f"task-{task}", data=spec(Permuted, task=task), epochs=epochs)
    for task, epochs in enumerate((None, 2, None))
)


class Counting(SLTT):
    """Remembers in its state how often each task began, and learns the slower for it: one call too
    many moves every weight.
    """

    begun: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("begun", torch.zeros(3))

    def start_task(self, model: nn.Module, task: int) -> None:
        super().start_task(model, task)
        self.begun[task] += 1

    def metrics(self) -> dict[str, float]:
        return {"begun": float(self.begun.sum())}

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        for objective in super()._loss_terms(model, x_TB, loss_of, step, rows):
            assert objective.backward is not None
            yield replace(objective, backward=objective.backward / float(self.begun.sum()))


def several(**changes: Any) -> Recipe:
    return small_recipe(
        **{"name": "several", "rule": spec(Counting), "phases": TASKS, "epochs": 1, **changes}
    )


def split(**changes: Any) -> Recipe:
    """Three tasks of two classes, a head each: 8 steps of 4 samples a task."""
    phases = tuple(
        Phase(name=f"pair-{task}", data=spec(SplitClasses, task=task), head=task)
        for task in range(3)
    )
    written = several(
        model=spec(multi_head, network=spec(mlp, classes=2, in_features=64, hidden=(12,)), heads=3),
        data=spec(Synthetic, samples=96, val_samples=30, classes=6, shape=(1, 8, 8)),
        optimizer=several().optimizer.with_(weight_decay=0.0),
        batch_size=4,
        phases=phases,
    )
    return replace(written, **changes)


def protected(**changes: Any) -> Recipe:
    """HLOP around SLTT on a small fully connected network."""
    written = several(
        model=spec(mlp, in_features=64, hidden=(24,)),
        rule=spec(HLOP, inner=spec(SLTT), rows=((10, 6), (5, 3)), learning_rate=0.05),
        optimizer=several().optimizer.with_(weight_decay=0.0),
    )
    return replace(written, **changes)


def train(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Begin the run or go on with it; the summary, empty when it was asked to stop."""
    job = replace(job_of(folder, recipe), trust=("tests",))
    if not folder.exists():
        folder.mkdir()
        write_json(folder / "recipe.json", recipe.resolved().to_json())
        write_job(job)
    with Inline(device="cpu") as launcher:
        return launcher.run(job, "test") or {}


def outcome(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        key: summary[key]
        for key in ("steps", "epochs", "top1", "loss", "accuracy_matrix", "acc", "bwt", "phases")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody touched."""
    folder = tmp_path_factory.mktemp("continual") / "whole"
    train(folder, several())
    return folder


# --------------------------------------------------------------------------------------- resumption


def at_step(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    """In the middle of a batch."""
    return lambda patch: die_at(patch, step)


def before_saving(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The task is learnt and evaluated; its checkpoint is not there."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        save = Saving.save

        def dying(self: Saving, at: int, **about: Any) -> None:
            (die if at == step else save)(self, at, **about)

        patch.setattr(Saving, "save", dying)

    return patched


def before_task(task: int) -> Callable[[pytest.MonkeyPatch], None]:
    """The checkpoint at the boundary is there; the rule has not heard of the next task."""

    def patched(patch: pytest.MonkeyPatch) -> None:
        begin = Trainer._begin_task

        def dying(self: Trainer) -> None:
            (die if self.stretch.index == task else begin)(self)

        patch.setattr(Trainer, "_begin_task", dying)

    return patched


def at_the_end(patch: pytest.MonkeyPatch) -> None:
    """Everything is saved; the summary is not written."""
    patch.setattr(Trainer, "_finish", die)


@pytest.mark.parametrize(
    ("killed", "goes_on_at"),
    [
        (at_step(5), 3),
        (before_saving(8), 6),
        (before_task(1), 8),
        (at_step(8), 8),
        (at_step(13), 12),
        (before_saving(24), 21),
        (before_task(2), 24),
        (at_step(26), 24),
        (at_the_end, 32),
    ],
)
def test_a_killed_run_goes_on_in_the_right_task_to_the_same_bits(
    tmp_path: Path,
    whole: Path,
    killed: Callable[[pytest.MonkeyPatch], None],
    goes_on_at: int,
) -> None:
    with dies(killed):
        train(tmp_path / "run", several())
    resumed = train(tmp_path / "run", several())
    assert steps_of(tmp_path / "run", "start") == [0, goes_on_at]
    assert same_weights(tmp_path / "run", whole, trust=["tests"])
    assert outcome(resumed) == outcome(json.loads((whole / "summary.json").read_text()))
    assert saved_rule(tmp_path / "run")["begun"].tolist() == [1, 1, 1]


def saved_rule(run: Path) -> dict[str, Tensor]:
    """What the rule has learnt, of the newest checkpoint."""
    return torch.load(step_folders(run / "checkpoints")[-1] / "rule.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_hlop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hlop") / "whole"
    train(folder, protected())
    return folder


@pytest.mark.parametrize("killed", [at_step(13), before_saving(24), before_task(2), at_step(30)])
def test_a_killed_hlop_run_goes_on_in_the_right_task(
    tmp_path: Path, whole_hlop: Path, killed: Callable[[pytest.MonkeyPatch], None]
) -> None:
    untouched = json.loads((whole_hlop / "summary.json").read_text())
    # The task; 25 rows of 64 inputs and 15 of 24, the velocity of the newest among them, an energy
    # each; moments of two batches.
    assert untouched["held"]["rule"] == 8 + 4 * (25 * 64 + 1 + 15 * 24 + 1 + 2 * (64**2 + 24**2))
    with dies(killed):
        train(tmp_path / "run", protected())
    resumed = train(tmp_path / "run", protected())
    assert outcome(resumed) == outcome(untouched)
    assert same_weights(tmp_path / "run", whole_hlop)
    assert [phase["rule_metrics"]["free_classifier"] for phase in resumed["phases"]] == [18, 15, 12]
    assert all(0 < phase["rule_metrics"]["energy_layers.0"] <= 1 for phase in resumed["phases"])
    first, other = saved_rule(whole_hlop), saved_rule(tmp_path / "run")
    assert first.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in first.items())


def test_a_run_that_is_stopped_at_a_boundary_begins_the_next_task_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    with monkeypatch.context() as patch:
        between_batches(patch, lambda trainer: (trainer.folder / "stop").touch(), step=8)
        assert train(tmp_path / "run", several()) == {}
    assert len(events(tmp_path / "run", "phase")) == 1
    (tmp_path / "run" / "stop").unlink()
    assert outcome(train(tmp_path / "run", several())) == outcome(
        json.loads((whole / "summary.json").read_text())
    )
    assert [event["phase"] for event in events(tmp_path / "run", "phase")] == [0, 1, 2]
    assert same_weights(tmp_path / "run", whole, trust=["tests"])


def test_checkpoints_say_where_they_stand(tmp_path: Path) -> None:
    train(tmp_path / "run", several(checkpoints=Checkpointing(every=3, keep=99)))
    found = [read_trainer(path) for path in step_folders(tmp_path / "run" / "checkpoints")]
    places = {each["step"]: (each["phase"], each["epoch"], each["sample"]) for each in found}
    assert [places[step] for step in (6, 8, 18, 24, 30)] == [
        (0, 0, 48),
        (1, 1, 0),
        (1, 2, 16),
        (2, 3, 0),
        (2, 3, 48),
    ]
    assert [each["step"] for each in found if each["score"] is not None] == [
        32
    ]  # only there is the score one of all tasks


# ------------------------------------------------------------------------------ what a phase begins


def test_each_task_has_a_new_optimizer_and_schedule(tmp_path: Path) -> None:
    recipe = several(rule=spec(SLTT))
    train(tmp_path / "run", recipe)
    torch.manual_seed(recipe.seed)
    network, rule, epoch = recipe.model.build(), SLTT(), 0
    rule.attach(network)
    for phase in recipe.phases:
        optimizer = recipe.optimizer.build(network)
        loader = phase.data.build(recipe.data.build()).train(
            seed=0, rank=0, world=1, batch_size=8, micro_batch=8, threads=1
        )
        steps = 8 * (phase.epochs or 1)
        schedule, step = cosine(optimizer, steps, 8, warmup=0.2), 0
        for _ in range(phase.epochs or 1):
            with loader.epoch(epoch) as batches:
                for batch in batches:
                    schedule(step)
                    for objective in rule.loss_terms(
                        network, repeat(batch.x, 3), CrossEntropy()(batch.target)
                    ):
                        assert objective.backward is not None
                        objective.backward.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
            epoch += 1
    for key, value in pipeline.load(tmp_path / "run").state_dict().items():
        assert torch.equal(value, network.state_dict()[key])


def test_the_learning_rate_begins_anew(whole: Path) -> None:
    rates = [event["metrics"]["lr"] for event in events(whole, "step")]
    assert len(rates) == 32
    assert [rates[step] for step in (0, 8, 24)] == [0, 0, 0]  # warm-up
    assert rates[0:8] == rates[24:32]
    assert rates[0:8] != rates[8:16]  # the second task is twice as long


def test_a_head_learns_in_its_own_phase_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train(tmp_path / "run", split(checkpoints=Checkpointing(every=3, keep=99)))
    ends = [
        load_file(tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / WEIGHTS)
        for step in (8, 16, 24)
    ]
    torch.manual_seed(0)
    ends = [split().model.build().state_dict(), *ends]
    moved = [
        [
            not torch.equal(
                before[f"classifier.heads.{head}.weight"], after[f"classifier.heads.{head}.weight"]
            )
            for head in range(3)
        ]
        for before, after in itertools.pairwise(ends)
    ]
    assert moved == [[True, False, False], [False, True, False], [False, False, True]]


def test_a_run_with_heads_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    untouched = train(tmp_path / "whole", split())
    with dies_at(13):
        train(tmp_path / "run", split())
    assert outcome(train(tmp_path / "run", split())) == outcome(untouched)
    assert same_weights(tmp_path / "run", tmp_path / "whole", trust=["tests"])


def test_only_the_sets_that_are_needed_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now, most = {"train": 0, "val": 0}, {"train": 0, "val": 0}

    def counted(kind: str) -> Callable[..., Any]:
        original = getattr(Loaders, kind)

        def opened(self: Loaders, task: int) -> Any:
            loader = original(self, task)
            close = loader.close
            open_now[kind] += 1
            most[kind] = max(most[kind], open_now[kind])

            def closed() -> None:
                open_now[kind] -= 1
                close()

            loader.close = closed
            return loader

        return opened

    for kind in most:
        monkeypatch.setattr(Loaders, kind, counted(kind))
    train(tmp_path / "run", several())
    assert most == {"train": 1, "val": 1}
    assert open_now == {"train": 0, "val": 0}


def test_a_task_that_opens_with_a_higher_loss_is_not_taken_for_a_leap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss is held against those of its own task, after a resume at the boundary too; a leap
    within a task is one.
    """
    monkeypatch.setattr(guard, "WINDOW", 4)
    more = {step: 0.0 if step < 8 else 1e2 if step < 24 else 1e4 for step in range(32)}
    more[14] = 1e6
    change_losses(monkeypatch, lambda step, loss: loss + more[step])
    recipe = several(policy=Policy(loss_spike=4.0))
    with dies(before_task(1)):
        train(tmp_path / "run", recipe)
    train(tmp_path / "run", recipe)
    assert steps_of(tmp_path / "run", "start") == [0, 8]
    assert steps_of(tmp_path / "run", "skipped") == [14]


# --------------------------------------------------------------------------------- what is reported


def accuracy(network: nn.Module, task: Task, steps: int) -> float:
    loader = task.data.val(rank=0, world=1, micro_batch=7, threads=1)
    hits = samples = 0
    with torch.no_grad(), loader.epoch(0) as batches:
        for batch in batches:
            with fresh_state(network):
                hits += int(
                    (network(repeat(batch.x, steps)).mean(0).argmax(-1) == batch.target).sum()
                )
            samples += len(batch.target)
    return hits / samples


@pytest.mark.parametrize("recipe", [several(), split()], ids=["shared", "heads"])
def test_the_accuracy_matrix_is_what_each_task_was_evaluated_to(
    tmp_path: Path, recipe: Recipe
) -> None:
    summary = train(tmp_path / "run", replace(recipe, epochs=3))
    rows = summary["accuracy_matrix"]
    assert [len(row) for row in rows] == [1, 2, 3]
    network = pipeline.load(tmp_path / "run", trust=["tests"])
    for index, task in enumerate(tasks_of(recipe)):
        task.choose_head(network)
        assert rows[2][index] == pytest.approx(accuracy(network, task, recipe.time_steps))
    assert summary["acc"] == summary["top1"] == pytest.approx(sum(rows[2]) / 3)
    assert summary["bwt"] == pytest.approx((rows[2][0] - rows[0][0] + rows[2][1] - rows[1][1]) / 2)
    assert [phase["top1"] for phase in summary["phases"]] == [
        rows[index][index] for index in range(3)
    ]
    assert [phase["rule_metrics"] for phase in summary["phases"]] == [
        {"begun": 1},
        {"begun": 2},
        {"begun": 3},
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy_matrix"] == rows


def test_backward_transfer_by_hand() -> None:
    learnt = Learnt()
    tasks = tasks_of(several())
    assert learnt.metrics([0.5], tasks) == {"top1_task-0": 0.5}
    learnt.add([0.9], {})
    assert learnt.metrics([0.7, 0.8], tasks) == {
        "top1_task-0": 0.7,
        "top1_task-1": 0.8,
        "bwt": pytest.approx(-0.2),
    }
    learnt.add([0.7, 0.8], {})
    learnt.add([0.6, 0.85, 0.9], {})
    summary = learnt.summary(tasks)
    assert summary["bwt"] == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert summary["acc"] == pytest.approx((0.6 + 0.85 + 0.9) / 3)


def test_the_journal_tells_phases_and_what_each_task_still_knows(whole: Path) -> None:
    phases = [
        {key: event[key] for key in ("step", "phase", "of", "name", "steps", "epochs")}
        for event in events(whole, "phase")
    ]
    assert phases == [
        {"step": 0, "phase": 0, "of": 3, "name": "task-0", "steps": 8, "epochs": 1},
        {"step": 8, "phase": 1, "of": 3, "name": "task-1", "steps": 16, "epochs": 2},
        {"step": 24, "phase": 2, "of": 3, "name": "task-2", "steps": 8, "epochs": 1},
    ]
    [start] = events(whole, "start")
    assert (start["total_steps"], start["epochs"]) == (32, 4)
    told = events(whole, "evaluation")
    assert [(event["step"], event["epoch"]) for event in told] == [
        (8, 0),
        (16, 1),
        (24, 2),
        (32, 3),
    ]
    assert "bwt" not in told[0]["metrics"]
    assert {"top1_task-0", "top1_task-1", "bwt", "top1", "loss"} <= set(
        told[1]["metrics"]
    )  # in the middle of a task, too
    rows = json.loads((whole / "summary.json").read_text())["accuracy_matrix"]
    assert [told[3]["metrics"][f"top1_task-{task}"] for task in range(3)] == rows[2]
    assert [event["epoch"] for event in events(whole, "step")] == [0] * 8 + [1] * 8 + [2] * 8 + [
        3
    ] * 8


def test_a_run_of_several_tasks_can_be_shown_listed_and_evaluated(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    show_recipe(several(), 1, Console(width=150, file=shown))
    assert "phases.2.data.task" in shown.getvalue()
    [row] = list_runs(whole.parent)
    assert (row.state, row.step, row.total_steps) == ("finished", 32, 32)
    evaluate_run(whole, which="last", weights=None, time_steps=None, trust=("tests",))
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((whole / "summary.json").read_text())["accuracy_matrix"]
    assert len(lines) == 5
    for line, name, top1 in zip(lines, ("task-0", "task-1", "task-2"), rows[2], strict=False):
        assert f"T = 3, {name}): top-1 {top1:.2%}" in line
    assert f"mean of 3 tasks): top-1 {sum(rows[2]) / 3:.2%}" in lines[3]
    assert re.fullmatch(
        r"an inference: [\d.]+ [nµ]J estimated \(45 nm, fp32\), not measured on a CPU", lines[4]
    )


def test_stop_after_cuts_each_phase(tmp_path: Path) -> None:
    summary = train(tmp_path / "run", several(stop_after=2))
    assert summary["steps"] == 6
    assert steps_of(tmp_path / "run", "phase") == [0, 2, 4]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            split(model=spec(multi_head, network=spec(mlp, classes=3, in_features=64), heads=3)),
            "got 3 and 2 in pair-0",
        ),
        (
            split(model=spec(multi_head, network=spec(mlp, classes=2, in_features=64), heads=2)),
            r"head must be in 0\.\.1; got 2",
        ),
        (
            split(model=spec(mlp, classes=2, in_features=64)),
            "must have several heads, see multi_head; got MLP",
        ),
        (
            split(optimizer=several().optimizer),
            "weight_decay must be 0 where phases have heads.*got 0.0001",
        ),
        (split(batch_size=64), "batch_size must be at most the 32 samples of the set"),
        (
            several(model=spec(multi_head, network=spec(mlp, in_features=64), heads=2)),
            "a phase must name its own; got head=None for task-",
        ),
        (protected(optimizer=several().optimizer), "weight_decay must be 0"),
        (
            several(phases=(TASKS[0], Phase(name="x", data=spec(SplitClasses, task=9)))),
            "make 5 tasks, from 0; got task=9",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, recipe: Recipe, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", recipe)


def test_the_mean_over_tasks_counts_each_once() -> None:
    mean = mean_of([Evaluation(10, 0.5, 0.9, 1.0, 0.1), Evaluation(30, 0.7, 1.0, 2.0, 0.3)])
    assert mean == Evaluation(40, pytest.approx(0.6), pytest.approx(0.95), 1.5, pytest.approx(0.2))
    assert not math.isnan(mean.loss)
    assert (
        mean_of([Evaluation(10, 0.5, 0.9, 1.0, 0.1), Evaluation(30, 0.7, None, 2.0, 0.3)]).top5
        is None
    )


def test_selecting_a_head_reaches_into_a_wrapped_network() -> None:
    network = split().model.build()
    select_head(nn.Sequential(network), 2)
    assert network.classifier.selected == 2
