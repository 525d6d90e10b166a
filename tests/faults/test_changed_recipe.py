"""recipe.json is changed while a run lies still: it is not gone on with, and with the old one back
it is, to the same bits.
"""

from pathlib import Path

import pytest

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.cluster import Cluster
from pipeline.launch.in_process import Inline
from pipeline.launch.prepare import prepare
from pipeline.recipe.recipe import read_json, spec, write_json
from pipeline.train.checkpoint import WEIGHTS, step_folders
from tests.helpers.interruptions import dies_at
from tests.helpers.small import Command, same_weights, small_recipe, steps_of, train_inline

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "met", ["nothing", "a death before its first checkpoint", "damage of all of its checkpoints"]
)
def test_a_run_without_a_checkpoint_begins_as_it_was_launched_or_not_at_all(
    tmp_path: Path, spiketrain: Command, met: str
) -> None:
    """Else it would be known, and compared with others, as what it is not."""
    recipe, run, start = small_recipe(), tmp_path / "runs" / "it", tmp_path / "elsewhere.pt"
    job = prepare(recipe, Cluster(inline=True), run.parent, name="it")
    if met != "nothing":
        with dies_at(2 if "before" in met else 4), Inline() as launcher:
            launcher.run(job, "test")
    for checkpoint in step_folders(run / "checkpoints"):
        (checkpoint / WEIGHTS).write_bytes(b"")
    starts = 0 if met == "nothing" else 1
    words = ("resume", "it", "--inline", "--runs", str(run.parent))
    for made, said in (
        (recipe.override({"optimizer.lr": 0.25}), "optimizer.lr: 0.1 and 0.25"),
        (small_recipe(init=str(start)), f'init: null and "{start}"'),
    ):
        write_json(run / "recipe.json", made.resolved().to_json())
        assert_differs(spiketrain(*words), "the run was launched", said)
    assert steps_of(run, "start") == [0] * starts
    write_json(run / "recipe.json", recipe.resolved().to_json())
    assert spiketrain(*words)[0] == 0
    assert steps_of(run, "start") == [0] * (starts + 1)


def assert_differs(ended: tuple[int, str, str], when: str, fields: str) -> None:
    code, _, error = ended
    assert code == 2
    assert error == f"resume: recipe.json must be as it was when {when}; it differs now: {fields}\n"


def test_the_fields_that_differ_are_named(tmp_path: Path, spiketrain: Command) -> None:
    recipe, run = small_recipe(), tmp_path / "runs" / "it"
    with dies_at(7), Inline() as launcher:
        launcher.run(prepare(recipe, Cluster(inline=True), run.parent, name="it"), "test")
    changed = recipe.override({"optimizer.lr": 0.25, "rule.k": 1, "epochs": 3})
    other = small_recipe(
        data=spec(Synthetic, samples=64, val_samples=20, shape=(1, 8, 8), noise=0.5)
    )
    words = ("resume", "it", "--inline", "--runs", str(run.parent))
    for made, said in (
        (changed, "rule.k: 2 and 1; optimizer.lr: 0.1 and 0.25; epochs: 2 and 3"),
        (other, 'data.noise: "(absent)" and 0.5'),
    ):
        write_json(run / "recipe.json", made.resolved().to_json())
        assert_differs(spiketrain(*words), "step 6 was saved", said)
    value = (
        recipe.override({"micro_batch": 4}).resolved().to_json()
    )  # how it fits into memory is not what is learnt
    write_json(run / "recipe.json", value)
    assert spiketrain(*words)[0] == 0
    assert read_json(run / "summary.json")["restarts"] == 1
    with dies_at(7):
        train_inline(tmp_path / "untouched", recipe)
    write_json(tmp_path / "untouched" / "recipe.json", value)
    train_inline(tmp_path / "untouched", recipe)
    assert same_weights(run, tmp_path / "untouched")
