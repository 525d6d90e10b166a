"""Runs of several tasks: the right task at the right step, whatever killed them; a new optimizer,
schedule and head in each.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import pipeline
from pipeline.core.errors import UserError
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.launch.driver import Inline
from pipeline.launch.evaluate import evaluate_run
from pipeline.launch.prepare import write_job
from pipeline.models.mlp import mlp
from pipeline.models.transforms import multi_head
from pipeline.recipe.phases import Phase
from pipeline.recipe.recipe import Checkpointing, Policy, Recipe, spec
from pipeline.report.forecasts import show_recipe
from pipeline.report.selection import list_runs
from pipeline.rules.base import LossFn, LossTerm
from pipeline.rules.hlop import HLOP
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.train.checkpoint import WEIGHTS, read_trainer, step_folders, step_name
from pipeline.train.checkpointing import SavingHooks
from pipeline.train.evaluation import Evaluation, mean_over_tasks, read_predictions
from pipeline.train.guards import anomaly as guard
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from pipeline.train.tasks import Loaders
from tests.helpers.interruptions import (
    act_before,
    before_batch,
    between_batches,
    change_losses,
    die,
    dies,
)
from tests.helpers.rule_networks import learn
from tests.helpers.small import events, job_of, make_run, same_weights, small_recipe, steps_of

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
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        for objective in super()._loss_terms(model, x_TB, loss_fn, step, rows):
            assert objective.backward is not None
            yield replace(objective, backward=objective.backward / float(self.begun.sum()))


def several(**changes: Any) -> Recipe:
    return small_recipe(
        **{
            "name": "several",
            "model": spec(mlp, in_features=64, hidden=(12,)),
            "rule": spec(Counting),
            "phases": TASKS,
            "epochs": 1,
            **changes,
        }
    )


UNDECAYED = several().optimizer.with_(weight_decay=0.0)


def split(**changes: Any) -> Recipe:
    """Three tasks of two classes, a head each: 8 steps of 4 samples a task."""
    return several(
        **{
            "model": spec(
                multi_head, network=spec(mlp, classes=2, in_features=64, hidden=(12,)), heads=3
            ),
            "data": spec(Synthetic, samples=96, val_samples=30, classes=6, shape=(1, 8, 8)),
            "optimizer": UNDECAYED,
            "batch_size": 4,
            "phases": tuple(
                Phase(name=f"pair-{task}", data=spec(SplitClasses, task=task), head=task)
                for task in range(3)
            ),
            **changes,
        }
    )


def protected(**changes: Any) -> Recipe:
    """HLOP around SLTT on a small fully connected network."""
    rule = spec(HLOP, inner=spec(SLTT), rows=((10, 6), (5, 3)), learning_rate=0.05)
    model = spec(mlp, in_features=64, hidden=(24,))
    return several(**{"model": model, "rule": rule, "optimizer": UNDECAYED, **changes})


def train(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Begin the run or go on with it; the summary, empty when it was asked to stop."""
    job = job_of(folder, recipe) if folder.exists() else make_run(folder, recipe)
    job = replace(job, trust=("tests",))
    write_job(job)
    with Inline(device="cpu") as launcher:
        return launcher.run(job, "test") or {}


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def saved_rule(run: Path) -> dict[str, Tensor]:
    return torch.load(step_folders(run / "checkpoints")[-1] / "rule.pt", weights_only=True)


def assert_as(whole: Path, run: Path) -> None:
    """The run ended as the whole one, to the bit."""
    ours, theirs = summary_of(run), summary_of(whole)
    for key in ("steps", "epochs", "top1", "loss", "accuracy_matrix", "acc", "bwt", "phases"):
        assert ours[key] == theirs[key], key
    assert same_weights(run, whole, trust=["tests"])
    torch.testing.assert_close(saved_rule(run), saved_rule(whole), rtol=0, atol=0)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[..., Recipe], Path]:
    made = {
        recipe: tmp_path_factory.mktemp("whole") / "run" for recipe in (several, split, protected)
    }
    for recipe, run in made.items():
        train(run, recipe())
    return made


@pytest.fixture
def whole(wholes: dict[Callable[..., Recipe], Path]) -> Path:
    return wholes[several]


# --------------------------------------------------------------------------------------- resumption


Kill = Callable[[pytest.MonkeyPatch], None]


def at_step(step: int) -> Kill:
    return lambda patch: before_batch(patch, die, step=step)


def before_saving(step: int) -> Kill:
    """The task is learnt and evaluated; its checkpoint is not there."""
    save = SavingHooks.save

    def dying(saving: SavingHooks, at: int, **about: Any) -> None:
        (die if at == step else save)(saving, at, **about)

    return lambda patch: patch.setattr(SavingHooks, "save", dying)


def before(method: str, step: int) -> Kill:
    """The trainer dies before it calls that method of its own after `step` batches. Before
    `_begin_task` the checkpoint at the boundary is there; the rule has not heard of the next task.
    """
    return lambda patch: act_before(method, patch, die, step)


@pytest.mark.parametrize(
    ("recipe", "killed", "goes_on_at"),
    [
        (several, before_saving(8), 6),
        (several, before("_begin_task", 8), 8),
        (several, at_step(8), 8),
        (several, before("_finish", 32), 32),
        (protected, at_step(30), 30),
        (split, at_step(13), 12),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in (
                (several, at_step(5), 3),
                (several, at_step(13), 12),
                (several, before_saving(24), 21),
                (several, before("_begin_task", 24), 24),
                (several, at_step(26), 24),
                (protected, at_step(13), 12),
                (protected, before_saving(24), 21),
                (protected, before("_begin_task", 24), 24),
            )
        ),
    ],
)
def test_a_killed_run_goes_on_in_the_right_task_to_the_same_bits(
    tmp_path: Path,
    wholes: dict[Callable[..., Recipe], Path],
    recipe: Callable[..., Recipe],
    killed: Kill,
    goes_on_at: int,
) -> None:
    with dies(killed):
        train(tmp_path / "run", recipe())
    train(tmp_path / "run", recipe())
    assert steps_of(tmp_path / "run", "start") == [0, goes_on_at]
    assert_as(wholes[recipe], tmp_path / "run")


def test_a_rule_hears_of_each_task_once_and_keeps_what_it_has_learnt(
    wholes: dict[Callable[..., Recipe], Path],
) -> None:
    assert saved_rule(wholes[several])["begun"].tolist() == [1, 1, 1]
    summary = summary_of(wholes[protected])
    # The task; 25 rows of 64 inputs and 15 of 24, the velocity of the newest among them, an energy
    # each; moments of two batches.
    assert summary["held"]["rule"] == 8 + 4 * (25 * 64 + 1 + 15 * 24 + 1 + 64**2 + 24**2)
    for phase, free in zip(summary["phases"], (18, 15, 12), strict=True):
        assert phase["rule_metrics"]["free_classifier"] == free
        assert 0 < phase["rule_metrics"]["energy_layers.0"] <= 1


def test_a_run_that_is_stopped_at_a_boundary_begins_the_next_task_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        between_batches(patch, lambda trainer: (trainer.folder / "stop").touch(), step=8)
        assert train(run, several()) == {}
    (run / "stop").unlink()
    train(run, several())
    assert [(event["phase"], event["attempt"]) for event in events(run, "phase")] == [
        (0, 0),
        (1, 1),
        (2, 1),
    ]
    assert_as(whole, run)


def test_checkpoints_say_where_they_stand(tmp_path: Path) -> None:
    train(tmp_path / "run", several(checkpoints=Checkpointing(every=3, keep=99)))
    found = [read_trainer(path) for path in step_folders(tmp_path / "run" / "checkpoints")]
    places = [(each["step"], each["phase"], each["epoch"], each["sample"]) for each in found]
    assert {(6, 0, 0, 48), (8, 1, 1, 0), (18, 1, 2, 16), (24, 2, 3, 0), (30, 2, 3, 48)} <= {*places}
    # Only there is the score one of all tasks.
    assert [each["step"] for each in found if each["score"] is not None] == [32]


# ------------------------------------------------------------------------------ what a phase begins


def test_each_task_has_a_new_optimizer_and_schedule(tmp_path: Path) -> None:
    recipe = several(rule=spec(SLTT))
    train(tmp_path / "run", recipe)
    torch.manual_seed(recipe.seed)
    network, rule, epochs = recipe.model.build(), SLTT(), itertools.count()
    rule.attach(network)
    for phase in recipe.phases:
        optimizer = recipe.optimizer.build(network)
        loader = phase.data.build(recipe.data.build()).train(
            seed=0, rank=0, world=1, batch_size=8, micro_batch=8, threads=1
        )
        schedule = cosine(optimizer, 8 * (phase.epochs or 1), 8, warmup=0.2)
        for first in range(0, 8 * (phase.epochs or 1), 8):
            with loader.epoch(next(epochs)) as batches:
                for step, batch in enumerate(batches, first):
                    schedule(step)
                    loss_fn = CrossEntropy()(batch.target)
                    learn(rule.loss_terms(network, repeat(batch.x, 3), loss_fn))
                    optimizer.step()
                    optimizer.zero_grad()
    trained = pipeline.load(tmp_path / "run").state_dict()
    torch.testing.assert_close(trained, network.state_dict(), rtol=0, atol=0)


def test_a_head_learns_in_its_own_phase_alone(tmp_path: Path) -> None:
    train(tmp_path / "run", split(checkpoints=Checkpointing(every=3, keep=99)))
    torch.manual_seed(0)
    heads = [f"classifier.heads.{head}.weight" for head in range(3)]
    folders = [tmp_path / "run" / "checkpoints" / step_name(step) for step in (8, 16, 24)]
    ends = [split().model.build().state_dict(), *(load_file(each / WEIGHTS) for each in folders)]
    moved = [
        [not torch.equal(before[name], after[name]) for name in heads]
        for before, after in itertools.pairwise(ends)
    ]
    assert moved == [[True, False, False], [False, True, False], [False, False, True]]


def test_only_the_sets_that_are_needed_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, list[Mock]] = {"train": [], "val": []}
    for kind, loaders in opened.items():
        original = getattr(Loaders, kind)

        def opens(self: Loaders, task: int, made=original, loaders=loaders) -> Any:
            assert all(each.called for each in loaders)  # the one before is closed
            loader = made(self, task)
            loader.close = Mock()
            loaders.append(loader.close)
            return loader

        monkeypatch.setattr(Loaders, kind, opens)
    train(tmp_path / "run", several())
    for loaders in opened.values():
        assert len(loaders) >= len(TASKS) and loaders[-1].called


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
    with dies(before("_begin_task", 8)):
        train(tmp_path / "run", recipe)
    train(tmp_path / "run", recipe)
    assert steps_of(tmp_path / "run", "start") == [0, 8]
    assert steps_of(tmp_path / "run", "skipped") == [14]


# --------------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize(
    "recipe", [several(), pytest.param(split(), marks=pytest.mark.full)], ids=["shared", "heads"]
)
def test_the_accuracy_matrix_is_what_each_task_was_evaluated_to(
    tmp_path: Path, recipe: Recipe
) -> None:
    summary = train(tmp_path / "run", replace(recipe, epochs=3))
    assert summary_of(tmp_path / "run")["accuracy_matrix"] == summary["accuracy_matrix"]
    [a], [_, c], last = summary["accuracy_matrix"]
    predictions = read_predictions(tmp_path / "run" / "answers.npz")
    assert last == [predictions.is_correct[predictions.task == task].mean() for task in range(3)]
    assert summary["acc"] == summary["top1"] == pytest.approx(fmean(last))
    assert summary["bwt"] == pytest.approx((last[0] - a + last[1] - c) / 2)
    told = [(phase["top1"], phase["rule_metrics"]["begun"]) for phase in summary["phases"]]
    assert told == [(a, 1), (c, 2), (last[2], 3)]


def test_the_journal_tells_phases_and_what_each_task_still_knows(whole: Path) -> None:
    names = ("step", "phase", "of", "name", "steps", "epochs")
    assert [tuple(event[name] for name in names) for event in events(whole, "phase")] == [
        (0, 0, 3, "task-0", 8, 1),
        (8, 1, 3, "task-1", 16, 2),
        (24, 2, 3, "task-2", 8, 1),
    ]
    [start] = events(whole, "start")
    assert (start["total_steps"], start["epochs"]) == (32, 4)
    told = events(whole, "evaluation")
    assert [(each["step"], each["epoch"]) for each in told] == [(8, 0), (16, 1), (24, 2), (32, 3)]
    first, within, _, last = (event["metrics"] for event in told)
    assert {"top1_task-0", "top1_task-1", "bwt", "top1", "loss"} <= set(within)
    assert "bwt" not in first
    row = summary_of(whole)["accuracy_matrix"][2]
    assert [last[f"top1_task-{task}"] for task in range(3)] == row
    assert last["bwt"] == summary_of(whole)["bwt"]
    assert [each["epoch"] for each in events(whole, "step")] == sorted([*range(4)] * 8)


def test_a_run_of_several_tasks_can_be_shown_listed_and_evaluated(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_recipe(several(), 1, Console(width=150))
    assert "phases.2.data.task" in capsys.readouterr().out
    [row] = list_runs(whole.parent)
    assert (row.state, row.step, row.total_steps) == ("finished", 32, 32)
    evaluate_run(whole, which="last", weights=None, time_steps=None, trust=("tests",))
    *tasks, mean, energy = capsys.readouterr().out.splitlines()
    row = summary_of(whole)["accuracy_matrix"][2]
    for task, (line, top1) in enumerate(zip(tasks, row, strict=True)):
        assert f"T = 3, task-{task}): top-1 {top1:.2%}" in line
    assert f"mean of 3 tasks): top-1 {sum(row) / 3:.2%}" in mean
    said = r"an inference: [\d.]+ [nµ]J estimated \(45 nm, fp32\), not measured on a CPU"
    assert re.fullmatch(said, energy)


def test_stop_after_cuts_each_phase(tmp_path: Path) -> None:
    assert train(tmp_path / "run", several(stop_after=2))["steps"] == 6
    assert steps_of(tmp_path / "run", "phase") == [0, 2, 4]


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            split(model=spec(multi_head, network=spec(mlp, classes=3, in_features=64), heads=3)),
            r"got 3 and 2 \(pair-0\)",
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
            split(optimizer=small_recipe().optimizer),
            "weight_decay must be 0 if phases have heads.*got 0.0001",
        ),
        (split(batch_size=64), "batch_size must be at most the 32 samples of the set"),
        (
            several(model=spec(multi_head, network=spec(mlp, in_features=64), heads=2)),
            "each phase must name its head; got head=None for task-",
        ),
        (protected(optimizer=small_recipe().optimizer), "weight_decay must be 0"),
        (
            several(phases=(TASKS[0], Phase(name="x", data=spec(SplitClasses, task=9)))),
            "below the 5 tasks that 10 classes make with 2 per task; got 9",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, recipe: Recipe, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", recipe)


def test_the_mean_over_tasks_counts_each_once() -> None:
    one, other = Evaluation(10, 0.5, 0.9, 1.0, 0.1), Evaluation(30, 0.7, 1.0, 2.0, 0.3)
    assert mean_over_tasks([one, other]) == Evaluation(
        *(40, pytest.approx(0.6), pytest.approx(0.95), 1.5, pytest.approx(0.2))
    )
    assert mean_over_tasks([one, replace(other, top5=None)]).top5 is None
