"""recipe.json is changed while a run lies still: it is not gone on with, and with the old one back
it is, to the same bits.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import Inline
from pipeline.launch.prepare import prepare
from pipeline.recipe.recipe import Recipe, read_json, spec, write_json
from pipeline.train.checkpoint import WEIGHTS, step_folders
from tests.helpers.interruptions import dies_at
from tests.helpers.small import Command, Refused, same_weights, small_recipe, steps_of, train_inline

pytestmark = pytest.mark.timeout(120)


def change(run: Path, recipe: Recipe) -> None:
    write_json(run / "recipe.json", recipe.resolved().to_json())


@pytest.fixture
def killed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """A run that dies before this step, of which no MLflow hears; 0: it never began."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    def made(step: int) -> Path:
        job = prepare(small_recipe(), Cluster(inline=True), tmp_path / "runs", name="it")
        if step:
            with dies_at(step), Inline() as launcher:
                launcher.run(job, "test")
        return tmp_path / "runs" / "it"

    return made


@pytest.mark.parametrize(
    ("step", "starts"),
    [(0, []), (2, [0]), (4, [0])],
    ids=["nothing", "a death before its first checkpoint", "damage of all of its checkpoints"],
)
def test_a_run_without_a_checkpoint_begins_as_it_was_launched_or_not_at_all(
    tmp_path: Path,
    killed_at: Callable[[int], Path],
    refused: Refused,
    spiketrain: Command,
    step: int,
    starts: list[int],
) -> None:
    run, start = killed_at(step), tmp_path / "elsewhere.pt"
    for checkpoint in step_folders(run / "checkpoints"):
        (checkpoint / WEIGHTS).write_bytes(b"")
    words = ("resume", "it", "--inline", "--runs", str(run.parent))
    differs = "resume: recipe.json must be the same as at the launch; it differs in"
    for made, said in (
        (small_recipe().override({"optimizer.lr": 0.25}), "optimizer.lr: 0.1 and 0.25"),
        (small_recipe(init=str(start)), f'init: null and "{start}"'),
    ):
        change(run, made)
        assert refused(*words) == f"{differs} {said}"
    assert steps_of(run, "start") == starts
    change(run, small_recipe())
    assert spiketrain(*words)[0] == 0
    assert steps_of(run, "start") == [*starts, 0]


def test_the_fields_that_differ_are_named(
    tmp_path: Path,
    killed_at: Callable[[int], Path],
    refused: Refused,
    spiketrain: Command,
) -> None:
    recipe, run, untouched = small_recipe(), killed_at(7), tmp_path / "untouched"
    other = spec(Synthetic, samples=64, val_samples=20, shape=(1, 8, 8), noise=0.5)
    words = ("resume", "it", "--inline", "--runs", str(run.parent))
    differs = "resume: recipe.json must be the same as at step 6; it differs in"
    for made, said in (
        (
            recipe.override({"optimizer.lr": 0.25, "rule.k": 1, "epochs": 3}),
            "rule.k: 2 and 1; optimizer.lr: 0.1 and 0.25; epochs: 2 and 3",
        ),
        (small_recipe(data=other), 'data.noise: "(absent)" and 0.5'),
    ):
        change(run, made)
        assert refused(*words) == f"{differs} {said}"
    # How it fits into memory is not what is learnt.
    change(run, small_recipe(micro_batch=4))
    assert spiketrain(*words)[0] == 0
    assert read_json(run / "summary.json")["restarts"] == 1
    with dies_at(7):
        train_inline(untouched, recipe)
    change(untouched, small_recipe(micro_batch=4))
    train_inline(untouched, recipe)
    assert same_weights(run, untouched)
