"""Runs with a teacher: asked once a batch, resumed to the bit, one probe for all ranks, never asked
again where it is known.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import pipeline
from pipeline.core.errors import UserError
from pipeline.data.base import DataError
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.mixing import Mixing
from pipeline.launch.driver import Inline
from pipeline.measure.constants import PARTS, REST
from pipeline.models.mlp import mlp
from pipeline.models.teachers.base import Teacher, content_hash
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.timm import TimmTeacher, timm_teacher
from pipeline.models.teachers.weights import File, Hub, Untrained
from pipeline.recipe.phases import Phase
from pipeline.recipe.recipe import Recipe, spec
from pipeline.report.forecasts import show_recipe
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.track.journal import NullTracker
from pipeline.train.assemble import TrainContext
from pipeline.train.backend.collectives import Ranks
from pipeline.train.build import check_recipe
from pipeline.train.distillation import Distillation
from pipeline.train.job import Job, RankInfo
from pipeline.train.teaching import build_teacher, open_teaching
from pipeline.train.trainer import Trainer
from pipeline.train.weights import study_inputs
from pipeline.train.worker import run
from tests.helpers import damage
from tests.helpers.interruptions import dies_at
from tests.helpers.processes import run_ranks
from tests.helpers.small import (
    events,
    finished,
    gap,
    make_run,
    same_weights,
    small_recipe,
    train_inline,
)


def taught(*, cache: Any = None, **changes: Any) -> Recipe:
    """8 steps of 8 samples, in 2 micro-batches each, in one epoch; 20 samples to evaluate on."""
    teacher = spec(
        timm_teacher,
        name="test_efficientnet",
        weights=spec(Untrained),
        size=32,
        probe=spec(Probe, l2=0.1),
        **({} if cache is None else {"cache": spec(Cache, folder=str(cache), limit_gb=0.01)}),
    )
    standard: dict[str, Any] = {
        "model": spec(mlp, in_features=64, hidden=(16,)),
        "objective": spec(Distillation, form="soft", ensemble_weight=0.5, temperature=2.0),
        "rule": spec(SLTT, k=1),
        "time_steps": 4,
        "epochs": 1,
        "micro_batch": 4,
        "teacher": teacher,
    }
    return small_recipe(**{**standard, **changes})


def trained(job: Job, place: RankInfo) -> tuple[TrainContext, Teacher]:
    """The parts and the teacher of a run that has been trained."""
    trainer_of = Mock(side_effect=Trainer)
    run(job, place, trainer_of=trainer_of)
    context = trainer_of.call_args.args[0]
    return context, context.teaching.teacher


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many pictures each call of a teacher, and each of its features, was about."""
    calls: dict[str, list[int]] = {"forward": [], "features": []}
    for name, about in calls.items():

        def counted(
            self: TimmTeacher, x: torch.Tensor, act=getattr(TimmTeacher, name), about=about
        ) -> torch.Tensor:
            about.append(len(x))
            return act(self, x)

        monkeypatch.setattr(TimmTeacher, name, counted)
    return calls


@pytest.mark.parametrize(
    "rule", [spec(BPTT), spec(SLTT), spec(SLTT, k=1)], ids=["bptt", "sltt", "sltt_k"]
)
def test_the_teacher_is_asked_once_a_batch_whatever_the_time_steps(
    tmp_path: Path, asked: Any, rule: Any
) -> None:
    """Once for each of its 5 evaluation batches, then once for each of 8 x 2 micro-batches at T =
    4.
    """
    finished(tmp_path / "run", taught(rule=rule))
    assert asked == {
        "forward": [4] * (5 + 16),
        "features": [32, 32] + [4] * (5 + 16),  # the probe's 64 samples, then each answer's
    }


def test_the_run_tells_what_the_teacher_costs_and_how_good_it_is(tmp_path: Path) -> None:
    summary = finished(tmp_path / "run", taught())
    [fitted, told] = events(tmp_path / "run", "teacher", "probe")
    figures = told["figures"]
    assert (told["teacher"], figures["samples"]) == ("test_efficientnet", 20)
    assert figures["top1"] == summary["teacher_top1"] and figures["top1"] <= figures["top5"] <= 1
    assert fitted["views"] == 64 and fitted["seconds"] > 0
    assert 0 < summary["teacher_s"] < summary["train_s"]
    assert sum(summary[f"{name}_s"] for name in (*PARTS, REST)) == pytest.approx(summary["train_s"])
    assert events(tmp_path / "run", "step")[0]["metrics"]["teacher_s"] > 0


def test_without_steps_a_student_is_and_is_evaluated_as_without_a_teacher(tmp_path: Path) -> None:
    """Evaluation reports the loss on labels; the student's weights begin as they do alone."""
    alone = taught(objective=small_recipe().objective, teacher=None, stop_after=1)
    losses = [
        finished(tmp_path / name, recipe.override({"optimizer.lr": 0.0}))["loss"]
        for name, recipe in (("taught", taught(stop_after=1)), ("alone", alone))
    ]
    assert losses[0] == losses[1]
    assert same_weights(tmp_path / "taught", tmp_path / "alone")


def test_the_teacher_is_no_part_of_what_is_trained_or_saved(tmp_path: Path) -> None:
    recipe = taught(backend="deepspeed", zero=1)
    with Inline():
        parts, teacher = trained(make_run(tmp_path / "run", recipe), RankInfo())
    own = {id(p) for p in teacher.parameters()}
    assert len(own) > 50 and not own & {id(p) for p in parts.backend.model.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    # no statistic has moved
    assert teacher.identity()["weights"] == content_hash(teacher.body)  # type: ignore[arg-type]
    saved, built = pipeline.load(tmp_path / "run"), recipe.model.build()
    assert saved.state_dict().keys() == built.state_dict().keys()


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_that_died_goes_on_to_the_same_bits_with_the_probe_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    fit = create_autospec(Probe.fit, side_effect=Probe.fit)
    monkeypatch.setattr(Probe, "fit", fit)
    train_inline(tmp_path / "whole", taught(cache=tmp_path / "cache" if cached else None))
    broken = taught(cache=tmp_path / "other" if cached else None)
    with dies_at(5):
        train_inline(tmp_path / "broken", broken)
    train_inline(tmp_path / "broken", broken)
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert fit.call_count == 2  # once for each run
    assert len(events(tmp_path / "broken", "teacher")) == 1


def test_a_second_run_with_the_same_views_never_asks(tmp_path: Path, asked: Any) -> None:
    """Another objective, rule and micro-batch, for they decide no view; another seed does."""
    first = taught(cache=tmp_path / "cache", epochs=2)
    train_inline(tmp_path / "first", first)
    assert len(asked["forward"]) == 5 + 32
    for calls in asked.values():
        calls.clear()
    train_inline(tmp_path / "again", first)
    other = replace(first, rule=spec(BPTT), objective=spec(Distillation), micro_batch=None)
    train_inline(tmp_path / "other", other)
    assert asked == {"forward": [], "features": []}
    assert same_weights(tmp_path / "first", tmp_path / "again")
    train_inline(tmp_path / "seed", replace(first, seed=1))
    assert asked == {"forward": [4] * 32, "features": [4] * 32}


def test_a_cache_that_cannot_hold_the_run_is_refused(tmp_path: Path) -> None:
    recipe = taught(cache=tmp_path / "cache").override({"teacher.cache.limit_gb": 1e-6})
    with pytest.raises(
        UserError, match=r"Cache: .* for the 64 predictions of this run, .*; got limit_gb=1e-06"
    ):
        train_inline(tmp_path / "run", recipe)


def test_the_probe_is_fitted_on_every_training_sample_and_no_other(
    tmp_path: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, opened = taught(), DataError("the evaluation part was opened")
    monkeypatch.setattr(Synthetic, "val", Mock(side_effect=opened))
    with pytest.raises(DataError, match=str(opened)):  # by the accuracy, which comes after the fit
        open_teaching(
            recipe,
            Synthetic(samples=61, shape=(1, 8, 8)),  # no batch size divides it
            recipe.split(1),
            folder=tmp_path,
            steps=1,
            ranks=Ranks(),
            tracker=NullTracker(),
            threads=1,
            is_fresh=True,
        )
    assert asked["features"] == [32, 29]
    assert len(list(tmp_path.glob("teacher/*/probe-*.safetensors"))) == 1


def test_a_damaged_probe_is_found_by_the_hash_in_its_name(tmp_path: Path) -> None:
    recipe = taught(stop_after=1)
    train_inline(tmp_path / "first", recipe)
    (probe,) = (tmp_path / "first" / "teacher").glob("*/probe-*.safetensors")
    damage.flip(probe, probe.stat().st_size - 1)
    with pytest.raises(
        UserError, match=r"Probe: .* must have the checksum in its name; it is damaged: delete the"
    ):
        train_inline(tmp_path / "first", recipe)


def test_weights_in_a_file_belong_to_the_study_by_content(tmp_path: Path) -> None:
    keys = []
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        save_file({"w": torch.tensor(value)}, tmp_path / f"{name}.safetensors")
        weights = spec(File, path=str(tmp_path / f"{name}.safetensors"))
        recipe = taught(teacher=spec(timm_teacher, name="test_resnet", weights=weights))
        keys.append(recipe.study_key(study_inputs(recipe, "data")))
    assert keys[0] == keys[1] != keys[2]


def test_tiny_needs_no_download_and_no_cache() -> None:
    tiny = taught(teacher=spec(timm_teacher, name="test_resnet", probe=spec(Probe))).tiny()
    assert tiny.teacher == spec(
        timm_teacher,
        name="test_resnet",
        probe=spec(Probe, views=64),
        weights=spec(Untrained),
        cache=None,
    )


def test_a_recipe_is_shown_without_the_weights_of_its_teacher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hub, "load", None)  # who calls it fails
    recipe = taught(teacher=spec(timm_teacher, name="test_resnet", probe=spec(Probe)))
    show_recipe(recipe, 1, Console(width=150))
    assert "test_resnet" in capsys.readouterr().out


MIXED = {"mixing": spec(Mixing, mixup=0.8)}
REPEATED = {"data": spec(Synthetic, samples=64, shape=(1, 8, 8), repeats=2)}


@pytest.mark.parametrize(
    ("is_cached", "change", "said"),
    [
        (
            False,
            {"phases": (Phase(name="one", data=spec(Synthetic)),)},
            "a teacher must be used without phases, .*; got 1",
        ),
        (
            True,
            MIXED,
            "a cache needs samples without mixing and repeats, because the cache has one",
        ),
        (True, REPEATED, "a cache needs samples without mixing and repeats"),
        (False, MIXED, ""),
        (False, REPEATED, "a probe needs samples without repeats, .*; got repeats=2"),
    ],
)
def test_what_a_teacher_cannot_answer_is_refused(
    tmp_path: Path, is_cached: bool, change: dict[str, Any], said: str
) -> None:
    recipe = taught(cache=tmp_path / "cache" if is_cached else None, **change)
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        build_teacher(recipe, recipe.data.build())


def test_a_recipe_that_fits_is_checked_without_data() -> None:
    check_recipe(taught(), 2)


# ---------------------------------------------------------------------------------------- two ranks


def _rank(rank: int, ranks: int, job: Job) -> torch.Tensor:
    _, teacher = trained(job, RankInfo(rank, ranks, "cpu", rank))
    assert teacher.head is not None
    return teacher.head.weight


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_ranks_have_one_probe_and_learn_the_gradient_of_one(tmp_path: Path) -> None:
    recipe = taught(stop_after=1, micro_batch=None)
    train_inline(tmp_path / "one", recipe)
    heads = run_ranks(_rank, 2, tmp_path, make_run(tmp_path / "two", recipe))
    assert torch.equal(heads[0], heads[1])
    assert gap(tmp_path / "one", tmp_path / "two") < 1e-6
    train_inline(tmp_path / "still", recipe.override({"optimizer.lr": 0.0}))
    assert gap(tmp_path / "one", tmp_path / "still") > 1e-3
