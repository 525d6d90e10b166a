"""Recipes: checked where they are written, changed by dotted keys, and the same after a trip
through JSON.
"""

import errno
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from timm.optim import create_optimizer_v2

from pipeline.cli.options import parse_changes
from pipeline.core import files
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.mixing import Mixing
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.transforms import late
from pipeline.recipe.recipe import Recipe, Role, Spec, read_json, roles, select, spec, write_json
from pipeline.recipe.recipe_files import load_recipe, trust_of
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


def changed(fields: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The JSON of a small recipe with other fields, and with `more` beside them."""
    value = small().to_json()
    return {**value, "recipe": {**value["recipe"], **(fields or {})}, **more}


def with_rule(target: str) -> dict[str, Any]:
    return changed({"rule": {"target": target, "kwargs": {}}})


def at_steps(steps: int, recording: int, *, model: Spec | None = None) -> None:
    recipe = recordings()
    recipe = replace(recipe, time_steps=steps, model=recipe.model if model is None else model)
    recipe.check_time_steps((recording, 2, 8, 8))


def after(key: str, value: Any) -> Recipe:
    return small().override({key: value})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: spec(SLTT, K=2),
            "^SLTT: unexpected keyword 'K'; it accepts k, chunk, rescale$",
        ),
        (lambda: spec(SLTT, k="two"), "int or None; got 'two'"),
        (lambda: spec(SLTT, rescale=1), "bool; got 1"),
        (lambda: small(time_steps=0), "time_steps must be at least 1"),
        (lambda: small(batch_size=2.5), "batch_size must be int; got 2.5"),
        (lambda: small(over_time="sum"), "over_time must be one of 'steps', 'mean'; got 'sum'"),
        (lambda: small(clip_norm=-1.0), "clip_norm must be at least 0; got -1.0"),
        (
            lambda: small(ema_decay=1.0),
            r"ema_decay must be in 0\.\.1, 1 excluded; got 1\.0",
        ),
        (lambda: small(backend="plain", zero=1), "zero=1 needs backend='deepspeed'"),
        (lambda: small(rule=SLTT), "rule must be Spec"),
        (lambda: small(name="a/b"), "name must be valid as a folder's name"),
        (
            lambda: small(family="a/b"),
            "family must be valid as a folder's name, without '/'; got 'a/b'",
        ),
        (lambda: small(published=((0, 0.5),)), "recipe: published must be"),
        (lambda: small(published=((1, 50.0),)), "recipe: published must be"),
        (lambda: small(published=((1,),)), "recipe: published must be"),
        (
            lambda: small(published_setting=(("time_steps", 4),)),
            "recipe: published_setting needs published, the points of the log; got no",
        ),
        (
            lambda: small().split(3),
            "must be divisible by 3 workers; got 32; the nearest sizes are 30 and 33",
        ),
        (lambda: at_steps(4, 5), r"^recipe: data\.steps, .*, must be time_steps=4; got 5$"),
        (
            lambda: at_steps(5, 5),
            r"^recipe: model\.time_steps must be the recipe's time_steps=5; got 4$",
        ),
        (
            lambda: at_steps(6, 6, model=spec(late, network=recordings().model, time_steps=6)),
            r"^recipe: model\.network\.time_steps must be .*6; got 4$",
        ),
        (
            lambda: Recipe.from_json(with_rule("pipeline.rules.bptt.BPTT.loss_terms")),
            "^recipe.json: .*loss_terms must be a class, a class method or a function of a module",
        ),
        (
            lambda: Recipe.from_json(with_rule("torch.nn.modules.module.Module.apply")),
            "^recipe.json: .*apply must be a class, a class method or a function of a module",
        ),
        (lambda: Recipe.from_json(changed(version=1)), "reads format version 2; got 1"),
        (
            lambda: Recipe.from_json(changed({"colour": 1})),
            "unknown field 'colour'; it has name, model",
        ),
        (
            lambda: Recipe.from_json(changed({"evaluation": {"often": 3}})),
            r"recipe\.json: evaluation: unknown field 'often'",
        ),
        (lambda: after("optimiser.lr", 1), "no field 'optimiser'; it has name, model"),
        (lambda: after("rule.kk", 1), "SLTT: unexpected keyword 'kk'; it accepts k"),
        (
            lambda: after("rule", 1),
            "rule is a part, SLTT.k=1.; change its keywords: rule.k, rule.chunk, rule.rescale",
        ),
        (lambda: after("epochs", "many"), "epochs must be int; got 'many'"),
        (lambda: after("epochs.x", 1), "names a field of a plain value"),
        (
            lambda: after("evaluation", 3),
            "^recipe: evaluation is a group; change its fields: evaluation.every, ",
        ),
        (
            lambda: after("evaluation.often", 3),
            "^recipe: no field 'evaluation.often'; it has evaluation.every, ",
        ),
        (
            lambda: after("evaluation.every", -1),
            "^recipe: evaluation.every must be at least 0; got -1",
        ),
        (
            lambda: after("checkpoints.keep", 0),
            "^recipe: checkpoints.keep must be at least 1; got 0",
        ),
        (
            lambda: after("checkpoints.keep", "two"),
            "^recipe: checkpoints.keep must be int; got 'two'",
        ),
        (
            lambda: after("evaluation.every.step", 3),
            "^recipe: 'evaluation.every.step' names a field of a plain value, 1",
        ),
        (lambda: parse_changes(["lr"]), "key=value"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def recordings(**changes: Any) -> Recipe:
    network = spec(mlp, classes=10, in_features=128, hidden=(8,))
    return small(
        model=spec(late, network=network, time_steps=4),
        data=spec(Events, folder="data/nowhere", classes=10, steps=4, size=8),
        **changes,
    )


def test_tiny_tells_every_part_the_time_steps_it_is_left_with() -> None:
    tiny = recordings().tiny()
    assert tiny.model == recordings().model.with_(time_steps=2)
    assert (tiny.time_steps, tiny.data.kwargs["steps"], tiny.data.build().shape) == (
        2,
        2,
        (2, 2, 8, 8),
    )
    for k, expected in ((3, 2), (1, 1)):
        assert recordings(rule=spec(SLTT, k=k)).tiny().rule == spec(SLTT, k=expected)
    tiny.check_time_steps(tiny.data.build().shape)
    recordings().check_time_steps((1, 8, 8))  # an image is shown at each time step


def test_a_recipe_is_the_same_after_json() -> None:
    log = small(
        family="fashion",
        published=((1, 0.04), (200, 0.79)),
        published_setting=(("time_steps", 4), ("model.over", "time")),
    )
    for recipe in (small(), log):
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert log.study_key({}) == small().study_key({})
    tiny = replace(log, name="other").tiny()
    assert (tiny.family, tiny.published, tiny.published_setting) == ("fashion", (), ())


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


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.json", "does not exist"),
        ("folder.json", "Is a directory"),
        ("torn.json", "Expecting property"),
    ],
)
def test_a_file_that_is_no_json_is_refused(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ValueError, match=f"must be a JSON file; .*{said}"):
        read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, ValueError),
        (errno.EIO, OSError),
        (errno.ESTALE, OSError),
        (errno.ETIMEDOUT, OSError),
    ],
)
def test_what_is_the_users_is_said_and_storage_that_fails_is_no_damage(
    number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(number, os.strerror(number), "whole.json")
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=error))
    with pytest.raises(kind, match=os.strerror(number)):
        read_json(Path("whole.json"))


def test_what_has_no_json_form_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "job.json", object())
    assert {each.name: read_json(each) for each in tmp_path.iterdir()} == {"job.json": 1}


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
        "pipeline.data.write.published_events._find_files",
        "pipeline.recipe.recipe_files.load_recipe",
        "pipeline.models.teachers.cache.CachedPredictions",
        "recipes.compare.blocks_base.interval",
        "recipesque.run",
    ],
)
def test_json_imports_from_trusted_packages_alone(target: str) -> None:
    with pytest.raises(ValueError, match="not in a trusted package"):
        Recipe.from_json(with_rule(target))


@pytest.mark.parametrize(
    "target", ["torch.utils.collect_env.run", "timm.optim.create_optimizer_v2", "torch.nn.Linear"]
)
def test_a_value_in_json_is_a_dataclass_and_runs_nothing(target: str, tmp_path: Path) -> None:
    value = {"value": target, "kwargs": {"command": f"touch {tmp_path / 'pwned'}"}}
    with pytest.raises(ValueError, match=r"trusted|must be a dataclass"):
        Recipe.from_json(changed({"rule": value}))
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_into_parts_and_are_validated() -> None:
    changed = small().override(
        {"optimizer.lr": 0.05, "rule.k": 2, "epochs": 3, "rule.rescale": True}
    )
    assert (changed.rule, changed.optimizer.kwargs["lr"], changed.epochs) == (
        spec(SLTT, k=2, rescale=True),
        0.05,
        3,
    )


def test_set_parses_python_literals_and_leaves_words_alone() -> None:
    assert parse_changes(["a.b=0.5", "c=True", "d=bf16", "e=None", "f=(1, 2)"]) == {
        "a.b": 0.5,
        "c": True,
        "d": "bf16",
        "e": None,
        "f": (1, 2),
    }


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
    assert (split.workers, split.micro_batch, split.accumulation) == (workers, *expected)


def test_each_field_says_whether_a_study_covers_it_and_whether_it_may_change() -> None:
    both = Role.STUDY | Role.PER_RUN
    assert [
        name
        for name, role in roles().items()
        if not role & (both | Role.PER_ATTEMPT) or both in role
    ] == []
    assert {name for name, role in roles().items() if Role.PER_ATTEMPT in role} == {
        "micro_batch",
        "init",
        "policy.max_rollbacks",
        "policy.replicas_every",
        "checkpoints.every",
        "checkpoints.minutes",
        "checkpoints.keep",
        "log_every",
    }
    assert all(
        Role.STUDY in roles()[name]
        for name in ("policy.skip", "policy.loss_spike", "evaluation.samples")
    )


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
    encoded = {"seed": 1, "evaluation": {"every": 2, "fidelity_every": 3}, "log_every": 4}
    assert select(encoded, lambda role: Role.PER_RUN in role) == {
        "seed": 1,
        "evaluation": {"fidelity_every": 3},
    }


def test_a_recipe_keeps_its_study_key_when_recipes_learn_more() -> None:
    """What is left out is not written: the keys of published studies stay."""
    written = small().to_json()["recipe"]
    assert not {"phases", "mixing", "family", "published", "stop_after"} & set(written)
    assert small(phases=()).study_key({}) == small().study_key({})
    assert "mixing" in small(mixing=spec(Mixing, mixup=0.2)).to_json()["recipe"]


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
        replace(base, precision="bf16"),
        replace(base, optimizer=base.optimizer.with_(lr=0.2)),
        replace(base, data=beton.with_(size=32)),
        replace(base, objective=spec(CrossEntropy, label_smoothing=0.1)),
    ]
    assert {recipe.study_key({"data": "abc"}) for recipe in same} == {key}
    keys = {recipe.study_key({"data": "abc"}) for recipe in other}
    assert len({key, *keys, base.study_key({"data": "abd"})}) == 7


def test_a_recipe_file_that_fails_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from pipeline.recipe.recipe import spec\nfrom pipeline.rules.sltt import SLTT\ndef"
        " recipe():\n    return spec(SLTT, q=1)\n"
    )
    (tmp_path / "empty.py").write_text("x = 1\n")
    for name, said in (
        ("mine.py", r"mine\.py:4: SLTT: unexpected keyword 'q'"),
        ("empty.py", r"must define a function recipe\(\)"),
        ("none.py", "does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            load_recipe(tmp_path / name)


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
    (made,) = recipes_of(file)
    assert trust_of(made, [file]) == ("own_experiments.mine",)
    assert Recipe.from_json(made.to_json(), trust=["own_experiments.mine"]) == made
    # The report that it defines is in a package that is trusted anyway.
    ours = Path("recipes/compare/claims_fashion.py")
    assert trust_of(load_recipe(ours), [ours]) == ()


def test_every_recipe_file_resolves_and_survives_tiny() -> None:
    assert len(RECIPES) >= 90, f"found {RECIPES}"
    for path in RECIPES:
        for recipe in recipes_of(path):
            assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
            assert recipe.tiny().time_steps <= 2
            families = {path.parent.name} if path.parent.name in FAMILIES else FAMILIES
            assert recipe.family in families, path
            head = path.read_text().split('"""')[1]
            assert len(head.strip().splitlines()) <= 15, path
            words = (
                "Command:",
                "Source:",
                "Result:",
                *(("Plan:",) if "imagenet" in str(path) else ()),
            )
            assert all(word in head for word in words), path


def test_a_spec_survives_pickling() -> None:
    part = spec(SLTT, k=3)
    assert pickle.loads(pickle.dumps(part)) == part and isinstance(part, Spec)


def given(part: Spec, built: Any) -> tuple[Spec, Any]:
    return part, built


def test_a_keyword_that_is_annotated_as_a_spec_gets_the_spec() -> None:
    part, built = spec(given, part=spec(SLTT, k=3), built=spec(SLTT, k=3)).build()
    assert part == spec(SLTT, k=3) and isinstance(built, SLTT)
    with pytest.raises(ValueError, match="given: part must be Spec; got "):
        spec(given, part=SLTT(), built=None)
