"""A recipe of seconds, and runs of it without Ray."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2

from pipeline.__main__ import main
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.driver import Inline
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe.recipe import Checkpointing, Recipe, spec, write_json
from pipeline.recipe.recipe_files import load_recipe
from pipeline.rules.sltt import SLTT
from pipeline.track.journal import read
from pipeline.train.job import Job
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from pipeline.train.weights import load_run
from tests.helpers.interruptions import dies_at

# From the words of a command to its exit code, stdout and stderr
Command = Callable[..., tuple[int, str, str]]
# From the words of a command that ends with exit code 0 to what it prints
Done = Callable[..., str]
# from the words of a command to the line that refuses it
Refused = Callable[..., str]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: from its words to its exit code, and what it wrote to
    either stream, stages left out.
    """

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spiketrain", *words])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, without_stages(said.err)

    return run


def without_stages(error: str) -> str:
    """What a command wrote to stderr but the stages that it was waited for
    (pipeline/core/stages.py).
    """
    return re.sub(r"^spiketrain: .*(\n  .*)* \.\.\.\n", "", error, flags=re.MULTILINE)


def small_recipe(**changes: Any) -> Recipe:
    """16 steps of 8 samples in 2 epochs, SLTT-2 of 3 steps, augmentation on."""
    recipe = Recipe(
        name="small",
        model=spec(nf_resnet18_small, classes=10, in_channels=1, width=4, blocks=(1, 1)),
        rule=spec(SLTT, k=2, rescale=True),
        data=spec(Synthetic, samples=64, val_samples=20, shape=(1, 8, 8)),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule=spec(cosine, warmup=0.2),
        time_steps=3,
        batch_size=8,
        epochs=2,
        log_every=1,
        checkpoints=Checkpointing(every=3),
        backend="plain",
    )
    return replace(recipe, **changes)


def recipes_of(file: Path) -> tuple[Recipe, ...]:
    """Of a recipe file, one or all of its suite."""
    made = load_recipe(file)
    return (made,) if isinstance(made, Recipe) else made.recipes


def make_run(folder: Path, recipe: Recipe) -> Job:
    folder.mkdir(parents=True)
    write_json(folder / "recipe.json", recipe.resolved().to_json())
    return job_of(folder, recipe)


def job_of(folder: Path, recipe: Recipe) -> Job:
    """As it was launched with this recipe, whatever its folder says by now."""
    fingerprint, told = recipe.data.build().fingerprint(), recipe.resolved().to_json()
    return Job(
        run=str(folder),
        study="s",
        data_fingerprint=fingerprint,
        commit="c",
        recipe=told,
        run_id="r",
    )


def train_inline(
    folder: Path, recipe: Recipe, *, trust: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Make the run unless it is there, and train it in this process."""
    job = job_of(folder, recipe) if folder.exists() else make_run(folder, recipe)
    with Inline() as launcher:
        return launcher.run(replace(job, trust=trust), "test")


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of these kinds in the run's journal; all of them without a kind."""
    return [event for event in read(run / "journal.jsonl") if not kinds or event["event"] in kinds]


def steps_of(run: Path, kind: str) -> list[int]:
    """The steps of the events of one kind in the run's journal."""
    return [event["step"] for event in events(run, kind)]


def same_weights(one: Path, other: Path, *, trust: Sequence[str] = ()) -> bool:
    a, b = (load_run(folder, trust=trust).state_dict() for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def finished(folder: Path, recipe: Recipe, *, trust: tuple[str, ...] = ()) -> dict[str, Any]:
    """The summary of a run that `train_inline` has trained to its end."""
    summary = train_inline(folder, recipe, trust=trust)
    assert summary is not None
    return summary


def goes_on(
    folder: Path, recipe: Recipe, *, step: int = 5, trust: tuple[str, ...] = ()
) -> tuple[dict[str, Any], ...]:
    """Check that a run that dies before batch `step` goes on to the same bits as a whole one.
    Returns the summaries of FOLDER/whole and FOLDER/broken.
    """
    whole = finished(folder / "whole", recipe, trust=trust)
    with dies_at(step):
        train_inline(folder / "broken", recipe, trust=trust)
    broken = finished(folder / "broken", recipe, trust=trust)
    assert same_weights(folder / "whole", folder / "broken", trust=trust)
    return whole, broken


def state(run: Path) -> dict[str, torch.Tensor]:
    """The weights and statistics of a run's network."""
    return load_run(run).state_dict()


def gap(one: Path, other: Path) -> float:
    """The largest difference between the states of two runs."""
    a, b = state(one), state(other)
    return max(float((a[key] - b[key]).abs().max()) for key in a)
