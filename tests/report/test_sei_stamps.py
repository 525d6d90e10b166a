"""The stamps study before it is run: what its controls are, and its report on runs whose answers
are made up.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.recipe.recipe import Recipe, write_json
from pipeline.recipe.suite import Suite, references
from pipeline.train.distillation import Distillation
from pipeline.train.evaluation import Predictions, write_predictions
from pipeline.train.export import pack
from recipes.compare import sei_stamps

SPLITS, REST = sei_stamps.SPLITS, ("multiple-teacher", "block-labels")


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    suite = sei_stamps.recipe()
    assert isinstance(suite, Suite)
    return {recipe.name: recipe for recipe in suite.recipes}


def test_the_runs_of_a_split_share_all_but_what_is_compared(recipes: dict[str, Recipe]) -> None:
    assert len(recipes) == 36
    for split in SPLITS:
        of_split = {
            name: recipe
            for name, recipe in recipes.items()
            if name.startswith(f"sei-stamps-{split}-")
        }
        assert len(of_split) == 12
        assert {recipe.data.kwargs["folder"] for recipe in of_split.values()} == {
            f"data/stamps-{split}"
        }
        fields = ("epochs", "batch_size", "time_steps", "rule", "schedule", "optimizer", "data")
        assert (
            len(
                {
                    json.dumps([recipe.to_json()["recipe"][name] for name in fields])
                    for recipe in of_split.values()
                }
            )
            == 1
        )
        seeds = {
            name.removeprefix(f"sei-stamps-{split}-"): recipe.seed
            for name, recipe in of_split.items()
        }
        assert seeds.pop("peer-alone") == 100 + int(split) and set(seeds.values()) == {int(split)}
        assert references(of_split[f"sei-stamps-{split}-peer"]) == (
            f"sei-stamps-{split}-peer-alone",
        )
        for name, recipe in of_split.items():
            taught = name.endswith(("-teacher", "-peer", "-narrow"))
            assert (
                (recipe.teacher is not None)
                is isinstance(recipe.objective.build(), Distillation)
                is taught
            )


def test_narrow_has_as_many_stored_bits(recipes: dict[str, Recipe]) -> None:
    """4 % more than the 1-bit network, packed, so that bits are not what it lacks."""
    bits = {}
    for cell in ("1-bit-multiple-teacher", "narrow"):
        tensors, _ = pack(recipes[f"sei-stamps-0-{cell}"].model.build(), {})
        bits[cell] = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert 1 < bits["narrow"] / bits["1-bit-multiple-teacher"] < 1.045


def test_the_report_of_made_up_runs(recipes: dict[str, Recipe], tmp_path: Path) -> None:
    from pipeline.data.write.stamps import write_stamps
    from tests.helpers.made_pictures import make

    share = make(tmp_path / "share")
    scenes, draw = 130, np.random.default_rng(0)
    for split in SPLITS:
        write_stamps(
            tmp_path / f"stamps-{split}",
            source=share,
            size=40,
            split=int(split),
            samples=13,
            val_samples=scenes,
            mode="raw",
        )
    runs, right = {}, {}
    for name, recipe in recipes.items():
        runs[name] = run = tmp_path / name
        run.mkdir()
        data = recipe.data.with_(
            folder=str(tmp_path / Path(str(recipe.data.kwargs["folder"])).name)
        )
        write_json(
            run / "recipe.json", recipe.override({"data.folder": data.kwargs["folder"]}).to_json()
        )
        target = np.arange(scenes) % 13
        right[name] = draw.random(scenes) < (0.5 if "1-bit-multiple-teacher" in name else 0.2)
        answers = Predictions(
            index=np.arange(scenes),
            target=target,
            top=np.where(right[name], target, target + 1)[:, None],
            probability=np.ones((scenes, 1), np.float32),
        )
        write_predictions(run / "answers.npz", [[answers]], has_task_column=False)
        made = {
            "data_fingerprint": data.build().fingerprint(),
            "world_size": 2,
            "commits": ["c0ffee"],
            "teacher_top1": 0.65,
        }
        write_json(run / "summary.json", made)
    out = io.StringIO()
    found = json.loads(json.dumps(sei_stamps.report(runs, Console(file=out, width=200))))
    assert list(found) == ["object", "ground"]
    assert {name: len(found[name]["cells"]) for name in found} == {"object": 11, "ground": 11}
    headline = found["object"]["contrasts"][0]
    assert headline["contrast"] == "1-bit: both - neither" and headline["low"] > 0
    both, neither = (
        {split: right[f"sei-stamps-{split}-1-bit-{rest}"].mean() for split in SPLITS}
        for rest in REST
    )
    of_splits = {split: 100 * (both[split] - neither[split]) for split in SPLITS}
    assert {split: headline[split] for split in SPLITS} == pytest.approx(of_splits)
    said = out.getvalue()
    assert (
        "1-bit, multiple, teacher" in said
        and "peer alone: 65.00%, 65.00%, 65.00% in splits 0, 1, 2" in said
    )
