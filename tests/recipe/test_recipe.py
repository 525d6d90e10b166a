"""Recipes: checked where they are written, changed by dotted keys, and the same after a trip
through JSON.
"""

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from timm.optim import create_optimizer_v2

from pipeline.core import files
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.mixing import Mixing
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.transforms import late
from pipeline.recipe.files import load_recipe, parse_changes, trust_of
from pipeline.recipe.recipe import Recipe, Role, Spec, read_json, roles, select, spec, write_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from tests.helpers.small import recipes_of

RECIPES = sorted(
    path
    for path in Path("recipes").rglob("*.py")
    if not path.name.endswith(("__init__.py", "base.py"))
)
FAMILIES = {"fashion", "stamps", "cifar", "imagenet", "events", "continual"}


def small(**changes: Any) -> Recipe:
    written = Recipe(
        name="small",
        model=spec(
            nf_resnet18_small,
            classes=10,
            in_channels=1,
            width=4,
            blocks=[1],
            neuron=spec(LIF, surrogate=Sigmoid(alpha=2.0)),
        ),
        rule=spec(SLTT, k=1),
        data=spec(Synthetic, samples=64, shape=(1, 8, 8)),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1),
        schedule=spec(cosine, warmup=0.1),
        time_steps=4,
        batch_size=32,
        epochs=1,
    )
    return replace(written, **changes)


def test_a_wrong_keyword_names_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"^SLTT: unexpected keyword 'K'; it accepts k, chunk, rescale$"
    ):
        spec(SLTT, K=2)


@pytest.mark.parametrize(
    ("kwargs", "said"), [({"k": "two"}, "int or None; got 'two'"), ({"rescale": 1}, "bool; got 1")]
)
def test_a_value_of_the_wrong_type_is_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec(SLTT, **kwargs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_steps": 0}, "time_steps must be at least 1"),
        ({"batch_size": 2.5}, "batch_size must be int; got 2.5"),
        ({"over_time": "sum"}, "over_time must be one of 'steps', 'mean'; got 'sum'"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0; got -1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in 0\.\.1, 1 excluded; got 1\.0"),
        ({"backend": "plain", "zero": 1}, "zero=1 needs backend='deepspeed'"),
        ({"rule": SLTT}, "rule must be Spec"),
        ({"name": "a/b"}, "name becomes a folder's name"),
    ],
)
def test_a_recipe_validates_itself(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**changes)


def recordings(**changes: Any) -> Recipe:
    network = spec(mlp, classes=10, in_features=128, hidden=(8,))
    data = spec(Events, folder="data/nowhere", classes=10, steps=4, size=8)
    return small(model=spec(late, network=network, time_steps=4), data=data, **changes)


def test_tiny_tells_every_part_the_time_steps_it_is_left_with() -> None:
    tiny = recordings().tiny()
    assert (tiny.time_steps, tiny.data.kwargs["steps"], tiny.model.kwargs["time_steps"]) == (
        2,
        2,
        2,
    )
    assert tiny.data.build().shape == (2, 2, 8, 8)
    assert tiny.model.kwargs["network"] == recordings().model.kwargs["network"]
    assert recordings(rule=spec(SLTT, k=3)).tiny().rule == spec(SLTT, k=2)
    assert recordings(rule=spec(SLTT, k=1)).tiny().rule == spec(SLTT, k=1)
    tiny.check_time_steps(tiny.data.build().shape)


def test_parts_that_count_on_another_number_of_time_steps_are_refused() -> None:
    recipe = recordings()
    recipe.check_time_steps((4, 2, 8, 8))
    recipe.check_time_steps((1, 8, 8))  # an image is shown at each time step
    with pytest.raises(ValueError, match=r"^recipe: data\.steps must be time_steps=4; got 5$"):
        recipe.check_time_steps((5, 2, 8, 8))
    with pytest.raises(
        ValueError, match=r"^recipe: model\.time_steps must be the recipe's time_steps=5; got 4$"
    ):
        recipe.override({"time_steps": 5}).check_time_steps((5, 2, 8, 8))
    outer = replace(recipe, model=spec(late, network=recipe.model, time_steps=6), time_steps=6)
    with pytest.raises(
        ValueError, match=r"^recipe: model\.network\.time_steps must be .*6; got 4$"
    ):
        outer.check_time_steps((6, 2, 8, 8))


def test_a_recipe_is_the_same_after_json() -> None:
    recipe = small()
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert Recipe.from_json(recipe.to_json()).model.build().stages[0][
        0
    ].first.neuron.surrogate == Sigmoid(alpha=2.0)


def test_two_writers_of_one_json_file_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two pods, whose processes have the same number, on storage that they share."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path, values = tmp_path / "job.json", [[number] * 1000 for number in range(2)]

    def write(value: list[int]) -> None:
        for _ in range(30):
            write_json(path, value)

    write_json(path, values[0])
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, value) for value in values]
        while not all(writer.done() for writer in writers):
            assert read_json(path) in values
    assert [writer.result() for writer in writers] == [None, None]
    assert list(tmp_path.iterdir()) == [path]


def test_a_json_file_is_written_through_to_the_disk_its_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, Any]] = []
    monkeypatch.setattr(
        files, "sync_folder", lambda folder: synced.append((folder, read_json(folder / "job.json")))
    )
    write_json(tmp_path / "job.json", 1)
    assert synced == [(tmp_path, 1)]


def test_what_is_the_users_is_said_and_storage_that_fails_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "whole.json").write_text("{}")
    for name, said in (
        ("none.json", "does not exist"),
        ("folder.json", "Is a directory"),
        ("torn.json", "Expecting property"),
    ):
        with pytest.raises(ValueError, match=f"must be a JSON file; .*{said}"):
            read_json(tmp_path / name)
    for number, kind in (
        (errno.EACCES, ValueError),
        (errno.EIO, OSError),
        (errno.ESTALE, OSError),
        (errno.ETIMEDOUT, OSError),
    ):

        def fails(self: Path, number: int = number) -> str:
            raise OSError(number, os.strerror(number), str(self))

        monkeypatch.setattr(Path, "read_text", fails)
        with pytest.raises(kind, match=os.strerror(number)):
            read_json(tmp_path / "whole.json")


def test_what_has_no_json_form_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "job.json", object())
    assert read_json(tmp_path / "job.json") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.os.system",
        "pipeline.data.write.images.os.system",
        "pipeline.models.teachers.cache.os.system",
        "subprocess.run",
        "torch.hub.load",
        "torch.load",
        "torch.utils.collect_env.run",
        "timm.models.load_state_dict",
        "timm.models._helpers.load_state_dict",
        "timm.models._hub.push_to_hf_hub",
        "timm.models.resnet.resnet18",
        "timm.optim._optim_factory.list_optimizers",
        "pipeline.data.write.images.write_folder",
        "pipeline.data.ffcv.format.BetonWriter",
        "pipeline.data.write.published_events._files",
        "pipeline.recipe.files.load_recipe",
        "pipeline.models.teachers.cache.CachedPredictions",
        "recipes.compare.factorial_base.read_right",
        "recipesque.run",
    ],
)
def test_json_imports_from_trusted_packages_alone(target: str) -> None:
    value = small().to_json()
    value["recipe"]["rule"] = {"target": target, "kwargs": {}}
    with pytest.raises(ValueError, match="not in a trusted package"):
        Recipe.from_json(value)


@pytest.mark.parametrize(
    "target", ["pipeline.rules.bptt.BPTT.loss_terms", "torch.nn.modules.module.Module.apply"]
)
def test_a_method_makes_no_part(target: str) -> None:
    value = small().to_json()
    value["recipe"]["rule"] = {"target": target, "kwargs": {}}
    with pytest.raises(
        ValueError,
        match=f"^recipe.json: {target} must be a class, a class method or a function of a module",
    ):
        Recipe.from_json(value)


@pytest.mark.parametrize(
    "target", ["torch.utils.collect_env.run", "timm.optim.create_optimizer_v2", "torch.nn.Linear"]
)
def test_a_value_in_json_is_a_dataclass_and_runs_nothing(target: str, tmp_path: Path) -> None:
    value = small().to_json()
    value["recipe"]["model"]["kwargs"]["neuron"]["kwargs"]["surrogate"] = {
        "value": target,
        "kwargs": {"command": f"touch {tmp_path / 'pwned'}"},
    }
    with pytest.raises(ValueError, match=r"trusted|must be a dataclass"):
        Recipe.from_json(value)
    assert list(tmp_path.iterdir()) == []


def test_a_users_package_is_admitted_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab.py").write_text(
        "from pipeline.rules.bptt import BPTT\nclass Mine(BPTT):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    value = small().to_json()
    value["recipe"]["rule"] = {"target": "my_lab.Mine", "kwargs": {}}
    with pytest.raises(ValueError, match="name its package with --trust"):
        Recipe.from_json(value)
    assert type(Recipe.from_json(value, trust=["my_lab"]).rule.build()).__name__ == "Mine"


def test_another_format_and_unknown_fields_are_refused() -> None:
    value = small().to_json()
    with pytest.raises(ValueError, match="reads format version 2; got 1"):
        Recipe.from_json({**value, "version": 1})
    with pytest.raises(ValueError, match="unknown field 'colour'; it has name, model"):
        Recipe.from_json({**value, "recipe": {**value["recipe"], "colour": 1}})


def test_overrides_reach_into_parts_and_are_validated() -> None:
    changed = small().override(
        {"optimizer.lr": 0.05, "rule.k": 2, "epochs": 3, "rule.rescale": True}
    )
    assert (changed.optimizer.kwargs["lr"], changed.rule.kwargs["k"], changed.epochs) == (
        0.05,
        2,
        3,
    )
    for key, value, said in [
        ("optimiser.lr", 1, "no field 'optimiser'; it has name, model"),
        ("rule.kk", 1, "SLTT: unexpected keyword 'kk'; it accepts k"),
        (
            "rule",
            1,
            "rule is a part, SLTT.k=1.; change its keywords: rule.k, rule.chunk, rule.rescale",
        ),
        ("epochs", "many", "epochs must be int; got 'many'"),
        ("epochs.x", 1, "goes below a plain value"),
    ]:
        with pytest.raises(ValueError, match=said):
            small().override({key: value})


def test_set_parses_python_literals_and_leaves_words_alone() -> None:
    assert parse_changes(["a.b=0.5", "c=True", "d=bf16", "e=None", "f=(1, 2)"]) == {
        "a.b": 0.5,
        "c": True,
        "d": "bf16",
        "e": None,
        "f": (1, 2),
    }
    with pytest.raises(ValueError, match="key=value"):
        parse_changes(["lr"])


@pytest.mark.parametrize(
    ("batch", "micro", "workers", "expected"),
    [
        (32, None, 2, (16, 1)),
        (32, 4, 2, (4, 4)),
        (24, 5, 2, (4, 3)),
        (7, None, 7, (1, 1)),
        (96, 100, 3, (32, 1)),
    ],
)
def test_a_global_batch_splits_exactly(
    batch: int, micro: int | None, workers: int, expected: tuple[int, int]
) -> None:
    split = small(batch_size=batch, micro_batch=micro).split(workers)
    assert (split.micro_batch, split.accumulation) == expected
    assert split.workers * split.micro_batch * split.accumulation == batch


def test_a_batch_that_does_not_divide_names_sizes_that_do() -> None:
    with pytest.raises(ValueError, match="must divide by 3 workers; got 32, near it 30 and 33 do"):
        small().split(3)


def test_each_field_says_whether_a_study_covers_it_and_whether_it_may_change() -> None:
    main = Role.STUDY | Role.BESIDE | Role.FREE
    assert [name for name, role in roles().items() if not role & main] == []
    assert {name for name, role in roles().items() if Role.FREE in role} == {
        "micro_batch",
        "init",
        "policy.max_rollbacks",
        "policy.replicas_every",
        "checkpoints.every",
        "checkpoints.minutes",
        "checkpoints.keep",
        "log_every",
    }
    for name in ("policy.skip", "policy.loss_spike", "evaluation.samples"):  # decide results
        assert Role.STUDY in roles()[name]
    assert [
        name for name, role in roles().items() if Role.STUDY in role and Role.BESIDE in role
    ] == []


def test_a_study_and_an_attempt_are_told_apart_by_the_roles_of_fields() -> None:
    base = small()
    changes: dict[str, dict[str, Any]] = {
        "study": {"policy.loss_spike": 4.0, "evaluation.samples": 8, "evaluation.every": 3},
        "beside": {"seed": 3, "evaluation.fidelity_every": 2, "family": "x"},
        "free": {"checkpoints.keep": 5, "policy.max_rollbacks": 0, "log_every": 3},
    }
    for role, fields in changes.items():
        for key, value in fields.items():
            other = base.override({key: value})
            assert (other.study_key({}) != base.study_key({})) == (role == "study"), key
            assert (other.decisive() != base.decisive()) == (role != "free"), key
            assert Recipe.from_json(json.loads(json.dumps(other.to_json()))) == other


def test_selected_fields_stay_in_their_groups() -> None:
    encoded = {"seed": 1, "evaluation": {"every": 2, "fidelity_every": 3}, "log_every": 4}
    assert select(encoded, lambda role: Role.BESIDE in role) == {
        "seed": 1,
        "evaluation": {"fidelity_every": 3},
    }


def test_a_group_refuses_what_its_fields_do_not_admit() -> None:
    for key, value, said in (
        ("evaluation", 3, "evaluation is a group; change its fields: evaluation.every, "),
        ("evaluation.often", 3, "no field 'evaluation.often'; it has evaluation.every, "),
        ("evaluation.every", -1, "evaluation.every must be at least 0; got -1"),
        ("checkpoints.keep", 0, "checkpoints.keep must be at least 1; got 0"),
        ("checkpoints.keep", "two", "checkpoints.keep must be int; got 'two'"),
        ("evaluation.every.step", 3, "'evaluation.every.step' goes below a plain value, 1"),
    ):
        with pytest.raises(ValueError, match=f"^recipe: {re.escape(said)}"):
            small().override({key: value})
    value = small().to_json()
    value["recipe"]["evaluation"]["often"] = 3
    with pytest.raises(ValueError, match=r"recipe\.json: evaluation: unknown field 'often'"):
        Recipe.from_json(value)


def test_a_recipe_keeps_its_study_key_when_recipes_learn_more() -> None:
    """What is left out is not written: the keys of published studies stay."""
    written = small().to_json()["recipe"]
    assert not {"phases", "mixing", "family", "published", "stop_after"} & set(written)
    assert "mixing" in small(mixing=spec(Mixing, mixup=0.2)).to_json()["recipe"]


def test_a_family_is_written_inherited_and_checked_as_a_name() -> None:
    recipe = small(family="fashion")
    assert (
        Recipe.from_json(recipe.to_json()) == recipe
        and replace(recipe, name="other").tiny().family == "fashion"
    )
    with pytest.raises(
        ValueError, match="family becomes a folder's name and must not hold '/'; got 'a/b'"
    ):
        small(family="a/b")


def test_the_study_key_ignores_rule_seed_name_and_paths_and_nothing_else() -> None:
    beton = spec(Beton, folder="data/one", classes=10, size=28)
    base = small(data=beton)
    key = base.study_key({"data": "abc"})
    same = [
        replace(base, rule=spec(BPTT)),
        replace(base, seed=4),
        replace(base, name="other"),
        replace(base, family="another"),
        replace(base, published=((1, 0.04), (200, 0.79))),
        replace(base, data=beton.with_(folder="elsewhere")),
        base.resolved(),
    ]
    other = [
        replace(base, time_steps=5),
        replace(base, optimizer=base.optimizer.with_(lr=0.2)),
        replace(base, data=beton.with_(size=32)),
        replace(base, objective=spec(CrossEntropy, label_smoothing=0.1)),
    ]
    assert {recipe.study_key({"data": "abc"}) for recipe in same} == {key}
    keys = [recipe.study_key({"data": "abc"}) for recipe in other] + [
        base.study_key({"data": "abd"})
    ]
    assert len({key, *keys}) == 6


def test_the_setting_of_a_published_log_is_read_back_and_needs_the_log() -> None:
    setting = (("time_steps", 4), ("model.over", "time"))
    recipe = small(published=((1, 0.04),), published_setting=setting)
    assert (
        Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        and recipe.tiny().published_setting == ()
    )
    assert recipe.study_key({}) == small().study_key({})
    with pytest.raises(
        ValueError,
        match="recipe: published_setting needs published, the points of the log; it has none",
    ):
        small(published_setting=setting)


def test_published_points_are_read_back_and_checked() -> None:
    recipe = small(published=((1, 0.04), (200, 0.79)))
    assert (
        Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        and recipe.tiny().published == ()
    )
    for wrong in (((0, 0.5),), ((1, 50.0),), ((1,),)):
        with pytest.raises(ValueError, match="recipe: published must be"):
            small(published=wrong)


def test_resolved_paths_are_absolute() -> None:
    recipe = small(data=spec(Beton, folder="data/x", classes=10, size=28), init="runs/a").resolved()
    assert Path(recipe.data.kwargs["folder"]).is_absolute()
    assert Path(recipe.init or "").is_absolute()


def test_a_recipe_file_that_fails_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from pipeline.recipe.recipe import spec\nfrom pipeline.rules.sltt import SLTT\ndef"
        " recipe():\n    return spec(SLTT, q=1)\n"
    )
    with pytest.raises(ValueError, match=r"mine\.py:4: SLTT: unexpected keyword 'q'"):
        load_recipe(file)
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"must define a function recipe\(\)"):
        load_recipe(file)
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(tmp_path / "none.py")


def test_running_a_file_in_a_folder_of_ones_own_is_trusting_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_experiments").mkdir()
    file = tmp_path / "own_experiments" / "mine.py"
    file.write_text(
        "from torch import nn\nfrom pipeline.recipe.recipe import spec\n"
        "from tests.helpers.small import small_recipe\n\n"
        "class Mine(nn.Module):\n    pass\n\n"
        "def recipe():\n    return small_recipe(model=spec(Mine))\n"
    )
    made = load_recipe(file)
    assert isinstance(made, Recipe)
    [own] = trust_of(made, [file])
    assert own == "own_experiments.mine" and Recipe.from_json(made.to_json(), trust=[own]) == made
    ours = Path("recipes/compare/claims_fashion.py")
    assert (
        trust_of(load_recipe(ours), [ours]) == ()
    )  # with a report that it defines, in a package that is trusted anyway


def test_every_recipe_file_resolves_and_survives_tiny() -> None:
    assert len(RECIPES) >= 90, f"found {RECIPES}"
    for path in RECIPES:
        for recipe in recipes_of(path):
            assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
            assert recipe.tiny().time_steps <= 2
            assert recipe.family in FAMILIES, path
            head = path.read_text().split('"""')[1]
            assert len(head.strip().splitlines()) <= 15, path
            assert "Command:" in head, path
            assert "Source:" in head, path
            assert "Result:" in head, path


def test_a_recipes_family_is_its_folders_name() -> None:
    found = {
        path: {recipe.family for recipe in recipes_of(path)}
        for path in RECIPES
        if path.parent.name in FAMILIES
    }
    assert len(found) >= 80
    assert {
        path: families for path, families in found.items() if families != {path.parent.name}
    } == {}


def test_a_spec_survives_pickling() -> None:
    import pickle

    part = spec(SLTT, k=3)
    assert pickle.loads(pickle.dumps(part)) == part
    assert isinstance(part, Spec)
