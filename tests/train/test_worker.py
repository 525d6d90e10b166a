"""One worker: a resume to the bit, stops, refusals, what it reports, and every recipe in small."""

import json
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

import pipeline
from pipeline.core.errors import Diverged, UserError
from pipeline.data.datasets.synthetic import Synthetic, SyntheticLoader
from pipeline.data.mixing import Mixing
from pipeline.launch.in_process import Inline
from pipeline.measure.constants import PARTS
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe.recipe import Checkpointing, Evaluation, Recipe, spec
from pipeline.recipe.suite import filled
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.state import fresh_state
from pipeline.track.events import OF_NONE
from pipeline.track.state import state_of
from pipeline.train import assemble, trainer, worker
from pipeline.train.checkpoint import read_trainer, step_folders
from pipeline.train.job import Job, RankInfo, note_refusal
from pipeline.train.trainer import Trainer
from pipeline.train.weights import load_start, weights_file
from tests.helpers.events import event
from tests.helpers.interruptions import before_batch, die, dies, dies_at
from tests.helpers.processes import refusal, run_ranks
from tests.helpers.small import (
    events,
    finished,
    gap,
    goes_on,
    make_run,
    recipes_of,
    same_weights,
    small_recipe,
    state,
    steps_of,
    train_inline,
)
from tests.recipe.test_recipe import RECIPES

# Recipes that call the functions of a smaller or another one with other sizes, or many times, and
# nothing else new: of 384 channels or 50 layers, of recipes/stamps, of ten classes in the place of
# a hundred, of still images in the place of recordings; and those whose network trains here by
# another rule, and whose rule on another network.
REPEATED = (
    *(
        "qkformer_10_384_bptt",
        "qkformer_10_384_sltt",
        "nf_resnet34_ottt",
        "nf_resnet34_t1",
        "nf_resnet50_t1",
        "preact18_ann",
    ),
    *("cifar10_dsr_lif", "cifar10_ottt_o", "cifar10dvs_dsr", "cifar10dvs_sltt"),
    *(
        "qkformer_10_512_",
        "qkformer_10_768_",
        "qkformer_10_384_sei_",
        "ms_resnet34_sei_",
        "nf_resnet101_",
        "sei_stamps",
    ),
    "tuned_fashion",
    *(
        "claims_fashion",
        "rules_fashion",
        "nf_resnet34_sltt",
        "cifar10_cifarnet_f_spide",
        "cifar10dvs_ottt",
    ),
    *("qkformer_10_384_sws_ottt", "gesture_opzo_ll"),
    *(
        "cifar100_opzo",
        "cifar100_cifarnet_f",
        "cifar100_ottt",
        "cifar100_dsr",
        "cifar100_sltt",
        "cifar10dvs_spide",
    ),
)
LONG = (pytest.mark.full, pytest.mark.timeout(900))  # dozens of runs
TIERED = [
    pytest.param(path, marks=LONG) if path.name.startswith(REPEATED) else path for path in RECIPES
]


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_a_run_that_died_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    recipe, broken = small_recipe(), tmp_path / "broken"
    whole = finished(tmp_path / "whole", recipe)
    with dies_at(step):
        train_inline(broken, recipe)
    with (broken / "journal.jsonl").open("a") as journal:
        # hours in which there was no place for it
        journal.writelines(
            json.dumps(event("waiting", time=time.time() - ago, attempt=OF_NONE).to_dict()) + "\n"
            for ago in (7200, 3600)
        )
    resumed = finished(broken, recipe)
    assert same_weights(tmp_path / "whole", broken)
    assert [resumed[key] for key in ("steps", "top1", "loss", "restarts")] == [
        *(whole[key] for key in ("steps", "top1", "loss")),
        1,
    ]
    assert resumed["wall_s"] < 1000
    starts = events(broken, "start")
    assert [(start["attempt"], start["step"]) for start in starts] == [
        (0, 0),
        (1, max(s for s in (0, 3, 6, 8, 9) if s <= step)),
    ]
    firsts = events(broken, "first_batch")
    assert [(first["attempt"], first["step"] - 1) for first in firsts] == [
        (start["attempt"], start["step"]) for start in starts
    ]
    assert resumed["startup_s"] == pytest.approx(sum(first["startup_s"] for first in firsts))
    counted = (
        2 if starts[1]["step"] else 1
    )  # attempts whose batches came to stay; the first of each is start-up
    assert resumed["timed_batches"] == resumed["steps"] - counted


def test_what_the_first_batch_waits_for_is_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as long as a compiler takes
    before_batch(monkeypatch, lambda trainer: time.sleep(1.0), step=0)
    summary = finished(tmp_path / "run", small_recipe())
    assert 1.0 <= summary["startup_s"] < summary["wall_s"]
    assert summary["net_s"] <= summary["wall_s"] - summary["startup_s"]


def test_weights_depend_on_the_seed(tmp_path: Path) -> None:
    train_inline(tmp_path / "a", small_recipe())
    train_inline(tmp_path / "b", small_recipe(seed=1))
    assert not same_weights(tmp_path / "a", tmp_path / "b")


def test_accumulated_micro_batches_train_the_same_network(tmp_path: Path) -> None:
    train_inline(tmp_path / "a", small_recipe())
    train_inline(tmp_path / "b", small_recipe(micro_batch=2))
    assert gap(tmp_path / "a", tmp_path / "b") < 1e-5


def test_mixed_batches_are_the_same_after_a_restart_and_in_micro_batches(tmp_path: Path) -> None:
    recipe = small_recipe(mixing=spec(Mixing, mixup=0.5, cutmix=1.0))
    goes_on(tmp_path, recipe)
    train_inline(tmp_path / "micro", replace(recipe, micro_batch=2))
    train_inline(tmp_path / "plain", small_recipe())
    assert gap(tmp_path / "whole", tmp_path / "micro") < 1e-5
    assert gap(tmp_path / "whole", tmp_path / "plain") > 1e-3


def test_an_average_of_the_weights_goes_on_to_the_same_bits_and_moves_none_of_them(
    tmp_path: Path,
) -> None:
    goes_on(tmp_path, small_recipe(ema_decay=0.8))
    train_inline(tmp_path / "plain", small_recipe())
    assert not same_weights(tmp_path / "whole", tmp_path / "plain")
    one, other = (
        torch.load(
            step_folders(tmp_path / name / "checkpoints")[-1] / "plain" / "state.pt",
            weights_only=True,
        )["network"]
        for name in ("whole", "plain")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_stop_file_saves_after_the_step_and_the_run_goes_on(tmp_path: Path) -> None:
    recipe = small_recipe(checkpoints=Checkpointing(every=0))
    make_run(tmp_path / "run", recipe)
    (tmp_path / "run" / "stop").touch()
    assert train_inline(tmp_path / "run", recipe) is None
    assert [path.name for path in step_folders(tmp_path / "run" / "checkpoints")] == [
        "step_00000001"
    ]
    assert events(tmp_path / "run")[-1]["event"] == "stopped"
    (tmp_path / "run" / "stop").unlink()
    train_inline(tmp_path / "run", recipe)
    train_inline(tmp_path / "whole", recipe)
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_with_measurements_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dies_at(2):
        train_inline(tmp_path / "run", small_recipe(checkpoints=Checkpointing(every=1)))
    monkeypatch.setattr(trainer, "Totals", Mock(side_effect=TypeError("unexpected joules")))
    with pytest.raises(
        UserError, match=r"this version's kind; .* commit \w+: resume there .*joules"
    ):
        train_inline(tmp_path / "run", small_recipe(checkpoints=Checkpointing(every=1)))


def test_each_epoch_trains_on_each_sample_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = SyntheticLoader.epoch

    @contextmanager
    def epoch(self: Any, number: int, *, start: int = 0) -> Any:
        def noted(batch: Any) -> Any:
            if self.samples == 64:  # of the training set
                seen.extend(batch.index.tolist())
            return batch

        with original(self, number, start=start) as source:
            yield map(noted, source)

    monkeypatch.setattr(SyntheticLoader, "epoch", epoch)
    train_inline(tmp_path / "run", small_recipe())
    assert sorted(seen[:64]) == list(range(64))
    assert sorted(seen[64:]) == list(range(64))
    assert seen[:64] != seen[64:]


@pytest.mark.parametrize(("every", "at"), [(1, [8, 16, 24]), (2, [16, 24]), (0, [24])])
def test_a_run_evaluates_as_often_as_it_is_told_and_after_its_last_epoch(
    every: int, at: list[int], tmp_path: Path
) -> None:
    train_inline(tmp_path / "run", small_recipe(epochs=3, evaluation=Evaluation(every=every)))
    assert steps_of(tmp_path / "run", "evaluation") == at


def test_the_journal_tells_loss_speed_and_place(tmp_path: Path) -> None:
    finished(tmp_path / "run", small_recipe())
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps] == list(range(1, 17))
    wanted = {"loss", "top1", "lr", "images_per_s", "step_s", *(f"{part}_s" for part in PARTS)}
    assert wanted <= set(steps[0]["metrics"])
    assert steps_of(tmp_path / "run", "evaluation") == [8, 16]
    on_disk = json.loads((tmp_path / "run" / "summary.json").read_text())
    wanted = (
        "study rule recipe world_size steps epochs top1 top5 loss firing_rate images_per_s wall_s"
        " train_s data_wait_s peak_saved_bytes state_bytes peak_device_bytes peak_rss_bytes"
        " backward_calls_per_batch restarts commit hardware peak_reserved_bytes peak_pss_bytes"
        " device_j held own_cores conditions evaluation_peak_rss_bytes evaluation_peak_device_bytes"
        " evaluation_peak_reserved_bytes"
    )
    assert set(wanted.split()) <= set(on_disk)
    # SLTT-2 differentiates two of its three steps
    exact = ("steps", "epochs", "evaluated_samples", "backward_calls_per_batch")
    assert [on_disk[name] for name in exact] == [16, 2, 20, 2]
    assert min(on_disk["peak_saved_bytes"], on_disk["state_bytes"]) > 0
    assert 0 < on_disk["peak_pss_bytes"] < 2 * on_disk["peak_rss_bytes"]
    # the process itself is in both
    assert 0.5 * on_disk["peak_rss_bytes"] < on_disk["evaluation_peak_rss_bytes"]
    size = sum(4 * p.numel() for p in pipeline.load(tmp_path / "run").parameters())
    kinds = ("parameters", "gradients", "optimizer", "teacher", "rule")
    assert [on_disk["held"][kind] for kind in kinds] == [size, size, size, 0, 0]  # momentum
    assert on_disk["device_j"] is None and "measured_j" not in on_disk["inference"]
    needed = (
        "step epoch sample seed run_id commit world_size data_fingerprint score recipe decisions"
    )
    last = step_folders(tmp_path / "run" / "checkpoints")[-1]
    assert set(needed.split()) <= set(read_trainer(last))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_loaded_in_python_the_network_gives_the_evaluated_accuracy(
    tmp_path: Path, ema_decay: float
) -> None:
    recipe = small_recipe(epochs=6, ema_decay=ema_decay)
    summary = finished(tmp_path / "run", recipe)
    network = pipeline.load(tmp_path / "run")
    assert not network.training
    hits = 0
    loader = recipe.data.build().val(rank=0, world=1, micro_batch=7, threads=1)
    with torch.no_grad(), loader.epoch(0) as batches:
        for batch in batches:
            with fresh_state(network):
                hits += int(
                    (
                        network(repeat(batch.x, recipe.time_steps)).mean(0).argmax(-1)
                        == batch.target
                    ).sum()
                )
    assert summary["top1"] == pytest.approx(hits / 20)
    with pytest.raises(ValueError, match=r"holds recipe\.json"):
        pipeline.load(tmp_path)


def test_another_data_set_than_the_one_launched_on_is_refused(tmp_path: Path) -> None:
    job = make_run(tmp_path / "run", small_recipe())
    with (
        pytest.raises(UserError, match="another file lies where the recipe points"),
        Inline() as launcher,
    ):
        launcher.run(replace(job, data_fingerprint="of another"), "test")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 128}, "batch_size must be at most the 64 samples"),
        (
            {"model": spec(nf_resnet18_small, classes=7, in_channels=1, width=4, blocks=(1,))},
            "must have the same classes; got 7 and 10",
        ),
        (
            {"data": spec(Synthetic, samples=64, shape=(2, 1, 8, 8))},
            r"data\.steps must be time_steps=3; got 2",
        ),
        ({"init": "nowhere"}, "init: must be a run's folder or a weights file"),
        (
            {"mixing": spec(Mixing, mixup=0.5), "micro_batch": 1},
            r"Mixing: a micro-batch must be even, .*; got 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train_inline(tmp_path / "run", small_recipe(**changes))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="training: "):
        train_inline(tmp_path / "run", small_recipe().override({"optimizer.lr": 1e30}))
    assert events(tmp_path / "run")[-1]["event"] == "diverged"


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    train_inline(tmp_path / "first", small_recipe())
    recipe = small_recipe(init=str(tmp_path / "first"), time_steps=5)
    network = recipe.model.build()
    assert load_start(network, tmp_path / "first").fresh == ()
    for key, value in state(tmp_path / "first").items():
        assert torch.equal(network.state_dict()[key], value)
    train_inline(tmp_path / "second", recipe)


def test_init_swaps_the_head_and_counts_every_other_mismatch(tmp_path: Path) -> None:
    train_inline(tmp_path / "first", small_recipe())
    other_head = nf_resnet18_small(3, in_channels=1, width=4, blocks=(1, 1))
    assert load_start(other_head, tmp_path / "first").fresh == (
        "classifier.weight",
        "classifier.bias",
    )
    wider = nf_resnet18_small(10, in_channels=1, width=8, blocks=(1,))
    with pytest.raises(
        ValueError, match=r"10 unknown: stages\.1\.0\.branch\.0\.synapse\.bias, "
    ) as refusal:
        load_start(wider, tmp_path / "first")
    assert "9 of another shape: stem.0.weight ([4, 1, 3, 3] instead of [8, 1, 3, 3])" in str(
        refusal.value
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", TIERED, ids=str)
def test_every_recipe_trains_in_small(tmp_path: Path, path: Path) -> None:
    for recipe in recipes_of(path):
        data = recipe.data.build()
        steps = [recipe.tiny().time_steps] if len(data.shape) == 4 else []  # of a recording
        most = 64 if steps else 32  # pixels a side
        shape = (*steps, data.shape[-3], min(data.shape[-2], most), min(data.shape[-1], most))
        tiny = recipe.tiny(
            data=spec(Synthetic, samples=160, val_samples=10, classes=data.classes, shape=shape)
        )
        tiny = filled(tiny, lambda name: weights_file(tmp_path / name))
        summary = finished(tmp_path / recipe.name, replace(tiny, backend="plain", batch_size=2))
        assert summary["steps"] == 4


def test_a_resumed_run_needs_the_weights_it_started_from_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_inline(tmp_path / "first", small_recipe())
    recipe = small_recipe(init=str(tmp_path / "first"))
    train_inline(tmp_path / "whole", recipe)
    with dies_at(7):
        train_inline(tmp_path / "broken", recipe)
    (tmp_path / "first").rename(tmp_path / "moved")
    train_inline(tmp_path / "broken", recipe)
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert not same_weights(tmp_path / "whole", tmp_path / "moved")


def test_a_run_that_died_after_its_last_checkpoint_is_finished_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dies(lambda patch: patch.setattr(Trainer, "_finish", die)):
        train_inline(tmp_path / "run", small_recipe())
    whole = finished(tmp_path / "whole", small_recipe())
    resumed = finished(tmp_path / "run", small_recipe())
    results = ("steps", "top1", "loss")
    assert [resumed[name] for name in results] == [whole[name] for name in results]


def test_rows_are_the_samples_places_in_the_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[range] = []
    original = SLTT.loss_terms

    def loss_terms(self: SLTT, *args: Any, rows: range, **kwargs: Any) -> Any:
        seen.append(rows)
        return original(self, *args, rows=rows, **kwargs)

    monkeypatch.setattr(SLTT, "loss_terms", loss_terms)
    train_inline(tmp_path / "run", small_recipe(micro_batch=2, stop_after=2))
    assert seen == [range(first, first + 2) for first in (0, 2, 4, 6)] * 2


def test_what_a_rule_cannot_compute_is_refused_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what one rank of an earlier attempt has left a note of."""
    error, recipe = ValueError("SLTT: the neurons must know their state"), small_recipe()
    make_run(tmp_path / "noted", recipe)
    note_refusal(tmp_path / "noted", error)
    for name in ("noted", "run"):
        with pytest.raises(UserError, match=str(error)):
            train_inline(tmp_path / name, recipe)
        assert state_of(tmp_path / name) == "failed"
        monkeypatch.setattr(SLTT, "loss_terms", Mock(side_effect=error))


def _refused_on_one(rank: int, ranks: int, job: Job, name: str) -> str:
    """What rank 1 alone finds while it composes its parts ends all of them."""

    error = ValueError("recipe: lab.rules.Mine does not exist in this installation")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            target, attribute = {
                "recipe": (Recipe, "read"),
                "schedule": (assemble, "build_schedule"),
            }[name]
            patch.setattr(target, attribute, Mock(side_effect=error))
        said = refusal(worker.run, job, RankInfo(rank, ranks), of=Exception)
        (Path(job.run) / f"ended{rank}").write_text(said)
        if not said.startswith("UserError"):
            raise RuntimeError(said)  # as a worker dies
        return said


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_a_recipe_that_one_of_two_nodes_cannot_read_is_refused_by_both(tmp_path: Path) -> None:
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed"))
    said = "UserError: recipe: lab.rules.Mine does not exist in this installation (worker 1)"
    assert run_ranks(_refused_on_one, 2, tmp_path, job, "recipe") == [said] * 2


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_what_one_of_two_ranks_alone_is_refused_ends_it_and_the_next_attempt_says_why(
    tmp_path: Path,
) -> None:
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed"))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_refused_on_one, 2, tmp_path, job, "schedule")
    assert (
        (tmp_path / "run" / "ended1").read_text().startswith("ValueError: recipe: lab.rules.Mine")
    )  # which frees the other
    with pytest.raises(UserError, match=r"recipe: lab\.rules\.Mine does not exist"):
        worker.run(job, RankInfo())


def test_a_worker_keeps_near_its_card_and_computes_in_the_recipes_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = MagicMock()
    monkeypatch.setattr(worker, "near_cores", near)
    job = make_run(tmp_path / "run", small_recipe(precision="tf32"))
    with pytest.raises(
        UserError, match=r"recipe: precision='tf32' must have an NVIDIA card .*; got cpu"
    ):
        worker.run(replace(job, threads=1, loader_threads=3), RankInfo())
    near.assert_called_once_with(torch.device("cpu"), at_least=3)


@pytest.mark.parametrize(("batches", "times"), [(3, 1), (50, 0)])
def test_a_worker_that_waits_for_data_much_of_the_time_says_so_once(
    batches: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has seen so many steady batches; this run has fewer than 50."""
    made = SyntheticLoader._batch

    def slow(self: SyntheticLoader, *which: Any) -> Any:
        time.sleep(0.5)
        return made(self, *which)

    monkeypatch.setattr(SyntheticLoader, "_batch", slow)
    monkeypatch.setattr(trainer, "STEADY_ENOUGH", batches)
    train_inline(tmp_path / "run", small_recipe(stop_after=7, checkpoints=Checkpointing(every=0)))
    told = events(tmp_path / "run", "data_wait")
    assert len(told) == times
    assert all(0.2 < each["share"] <= 1 and each["loader_threads"] == 1 for each in told)
