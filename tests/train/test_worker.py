"""One worker: a resume to the bit, stops, refusals, what it reports, and every recipe in small."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

import pipeline
from pipeline.core.errors import UserError
from pipeline.data.datasets.synthetic import Synthetic, SyntheticLoader
from pipeline.data.mixing import Mixing
from pipeline.measure import memory, meters
from pipeline.measure.constants import PARTS
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe.recipe import Checkpointing, Evaluation, spec
from pipeline.recipe.suite import fill_references
from pipeline.rules.sltt import SLTT
from pipeline.track.events import NO_ATTEMPT
from pipeline.track.run_state import state_of
from pipeline.train import trainer, worker
from pipeline.train.checkpoint import read_trainer, step_folders
from pipeline.train.job import Job, RankInfo, note_refusal
from pipeline.train.weights import weights_file
from tests.helpers.events import event
from tests.helpers.interruptions import dies_at, newest
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
    steps_of,
    train_inline,
)
from tests.recipe.test_recipe import RECIPES

# The quick tier trains, of each rule with its options, network, neuron, kind of samples, of phases
# and of precision, the fastest recipe that has it. The others repeat these in other sizes and
# combinations, or have parts that other tests train: NF- and MS-ResNet, 1-bit weights, teachers,
# HLOP around other rules.
QUICK = (
    *("cifar/cifar10_alexnet_f_spide", "cifar/cifar10_sltt"),  # convnet_f; PreAct-ResNet in bf16
    *("continual/permuted_fashion_hlop_sltt", "continual/split_fashion_hlop_sltt"),
    *("events/moving_ottt", "events/nmnist_ide"),  # recordings; a feedback of convolutions
    *("fashion/ann", "fashion/bptt_recompute", "fashion/dfa", "fashion/dsr_if_bptt"),
    *("fashion/dsr_lif", "fashion/ide", "fashion/opzo_fc", "fashion/opzo_ll", "fashion/ottt_o"),
    *("fashion/sltt_k", "stamps/qkformer_sws_ottt"),
)
SHORT = small_recipe(epochs=1)  # 8 steps
LONG = (pytest.mark.full, pytest.mark.timeout(900))  # dozens of runs
TIERED = [
    path if str(path.with_suffix("")).endswith(QUICK) else pytest.param(path, marks=LONG)
    for path in RECIPES
]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `small_recipe()`."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    train_inline(run, small_recipe())
    return run


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `SHORT`."""
    run = tmp_path_factory.mktemp("short") / "run"
    train_inline(run, SHORT)
    return run


@pytest.mark.parametrize(
    "step", [5, 8, *(pytest.param(step, marks=pytest.mark.full) for step in (1, 11))]
)
def test_a_run_that_died_goes_on_to_the_same_bits(
    tmp_path: Path, untouched: Path, step: int
) -> None:
    recipe, broken = small_recipe(), tmp_path / "broken"
    whole = json.loads((untouched / "summary.json").read_text())
    with dies_at(step):
        train_inline(broken, recipe)
    with (broken / "journal.jsonl").open("a") as journal:
        # hours in which there was no place for it
        journal.writelines(
            json.dumps(event("waiting", time=time.time() - ago, attempt=NO_ATTEMPT).to_dict())
            + "\n"
            for ago in (7200, 3600)
        )
    resumed = finished(broken, recipe)
    assert same_weights(untouched, broken)
    same = ("steps", "top1", "loss")
    assert [resumed[key] for key in (*same, "restarts")] == [*(whole[key] for key in same), 1]
    assert resumed["wall_s"] < 1000
    firsts, goes_on_at = events(broken, "first_batch"), newest(step)
    starts = [(start["attempt"], start["step"]) for start in events(broken, "start")]
    assert starts == [(0, 0), (1, goes_on_at)]
    assert [(first["attempt"], first["step"] - 1) for first in firsts] == starts
    assert resumed["startup_s"] == pytest.approx(sum(first["startup_s"] for first in firsts))
    # Of each attempt whose batches came to stay the first batch is start-up.
    assert resumed["timed_batches"] == resumed["steps"] - (2 if goes_on_at else 1)


def test_weights_depend_on_the_seed_and_not_on_accumulation(tmp_path: Path, short: Path) -> None:
    for name, changes in (("seed", {"seed": 1}), ("micro", {"micro_batch": 2})):
        train_inline(tmp_path / name, replace(SHORT, **changes))
    assert gap(short, tmp_path / "seed") > 1e-3
    assert gap(short, tmp_path / "micro") < 1e-5


def test_mixed_batches_are_the_same_after_a_restart_and_in_micro_batches(
    tmp_path: Path, short: Path
) -> None:
    recipe = replace(SHORT, mixing=spec(Mixing, mixup=0.5, cutmix=1.0))
    goes_on(tmp_path, recipe)
    train_inline(tmp_path / "micro", replace(recipe, micro_batch=2))
    assert gap(tmp_path / "whole", tmp_path / "micro") < 1e-5
    assert gap(tmp_path / "whole", short) > 1e-3


def test_an_average_of_the_weights_goes_on_to_the_same_bits_and_moves_none_of_them(
    tmp_path: Path, short: Path
) -> None:
    goes_on(tmp_path, replace(SHORT, ema_decay=0.8))
    assert not same_weights(tmp_path / "whole", short)
    last = [step_folders(run / "checkpoints")[-1] for run in (tmp_path / "whole", short)]
    one, other = (torch.load(path / "plain" / "state.pt")["network"] for path in last)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("every", "at"), [(1, [2, 4, 6]), (2, [4, 6]), (0, [6])])
def test_a_run_evaluates_as_often_as_it_is_told_and_after_its_last_epoch(
    every: int, at: list[int], tmp_path: Path
) -> None:
    data = spec(Synthetic, samples=16, val_samples=8, shape=(1, 8, 8))
    recipe = small_recipe(data=data, epochs=3, evaluation=Evaluation(every=every))
    train_inline(tmp_path / "run", recipe)
    assert steps_of(tmp_path / "run", "evaluation") == at


def test_the_journal_tells_loss_speed_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(meters, "pss_bytes", memory.pss_bytes)  # tests/conftest.py spares it
    finished(run, small_recipe())
    assert steps_of(run, "step") == list(range(1, 17)) and steps_of(run, "evaluation") == [8, 16]
    summary = json.loads((run / "summary.json").read_text())
    last = read_trainer(step_folders(run / "checkpoints")[-1])
    parts = " ".join(f"{part}_s" for part in PARTS)
    for found, wanted in (
        (events(run, "step")[0]["metrics"], f"loss top1 lr images_per_s step_s {parts}"),
        (
            summary,
            "study rule recipe world_size steps epochs top1 top5 loss firing_rate images_per_s"
            " wall_s train_s data_wait_s peak_saved_bytes state_bytes peak_device_bytes"
            " peak_rss_bytes backward_calls_per_batch restarts commit hardware peak_reserved_bytes"
            " peak_pss_bytes device_j held own_cores conditions evaluation_peak_rss_bytes"
            " evaluation_peak_device_bytes evaluation_peak_reserved_bytes",
        ),
        (
            last,
            "step epoch sample seed run_id commit world_size data_fingerprint score recipe"
            " decisions",
        ),
    ):
        assert set(wanted.split()) <= set(found)
    # SLTT-2 differentiates two of its three steps
    exact = {"steps": 16, "epochs": 2, "evaluated_samples": 20, "backward_calls_per_batch": 2}
    assert summary.items() >= {**exact, "device_j": None}.items()
    assert min(summary["peak_saved_bytes"], summary["state_bytes"]) > 0
    assert 0 < summary["peak_pss_bytes"] < 2 * summary["peak_rss_bytes"]
    # the process itself is in both
    assert 0.5 * summary["peak_rss_bytes"] < summary["evaluation_peak_rss_bytes"]
    size = sum(4 * p.numel() for p in pipeline.load(run).parameters())
    kinds = {"parameters": size, "gradients": size, "optimizer": size, "teacher": 0, "rule": 0}
    assert summary["held"].items() >= kinds.items()  # the optimizer has momentum
    assert "measured_j" not in summary["inference"]


def test_a_checkpoint_with_measurements_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(checkpoints=Checkpointing(every=1))
    with dies_at(2):
        train_inline(tmp_path / "run", recipe)
    monkeypatch.setattr(trainer, "Totals", Mock(side_effect=TypeError("unexpected joules")))
    with pytest.raises(
        UserError, match=r"this version of spiketrain; .* commit \w+: resume the run there .*joules"
    ):
        train_inline(tmp_path / "run", recipe)


def test_another_data_set_than_the_one_launched_on_is_refused(tmp_path: Path) -> None:
    job = replace(make_run(tmp_path / "run", small_recipe()), data_fingerprint="of another")
    with pytest.raises(UserError, match="restore the file that the recipe names"):
        worker.run(job, RankInfo())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 128}, "batch_size must be at most the 64 samples"),
        (
            {"model": spec(nf_resnet18_small, classes=7, in_channels=1, width=4, blocks=(1,))},
            "must have the same number of classes; got 7 and 10",
        ),
        (
            {"data": spec(Synthetic, samples=64, shape=(2, 1, 8, 8))},
            r"data\.steps, the T of its recordings, must be time_steps=3; got 2",
        ),
        ({"init": "nowhere"}, "init: must be a run's folder or a weights file"),
        (
            {"mixing": spec(Mixing, mixup=0.5), "micro_batch": 1},
            r"Mixing: the size of a micro-batch must be even, .*; got 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train_inline(tmp_path / "run", small_recipe(**changes))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", TIERED, ids=str)
def test_every_recipe_trains_in_small(tmp_path: Path, path: Path) -> None:
    """In fp32 on a CPU without AVX-512, which takes 30 to 40 times as long for a convolution in
    bf16.
    """
    has_bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    for recipe in recipes_of(path):
        data = recipe.data.build()
        steps = [recipe.tiny().time_steps] if len(data.shape) == 4 else []  # of a recording
        most = 64 if steps else 32  # pixels a side
        shape = (*steps, data.shape[-3], min(data.shape[-2], most), min(data.shape[-1], most))
        val = 10 if recipe.phases else 2  # of each class, as SplitClasses asks for
        tiny = recipe.tiny(
            data=spec(Synthetic, samples=160, val_samples=val, classes=data.classes, shape=shape)
        )
        tiny = fill_references(tiny, lambda name: weights_file(tmp_path / name))
        precision = tiny.precision if has_bf16 else "fp32"
        small = replace(tiny, backend="plain", batch_size=2, precision=precision)
        summary = finished(tmp_path / recipe.name, small)
        assert summary["steps"] == 4


def test_a_resumed_run_needs_the_weights_it_started_from_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_inline(tmp_path / "first", SHORT)
    recipe = replace(SHORT, init=str(tmp_path / "first"))
    train_inline(tmp_path / "whole", recipe)
    with dies_at(7):
        train_inline(tmp_path / "broken", recipe)
    (tmp_path / "first").rename(tmp_path / "moved")
    train_inline(tmp_path / "broken", recipe)
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    assert not same_weights(tmp_path / "whole", tmp_path / "moved")


def test_rows_are_the_samples_places_in_the_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_terms = Mock(side_effect=SLTT.loss_terms)
    monkeypatch.setattr(SLTT, "loss_terms", lambda *args, **about: loss_terms(*args, **about))
    train_inline(tmp_path / "run", small_recipe(micro_batch=2, stop_after=2))
    seen = [call.kwargs["rows"] for call in loss_terms.call_args_list]
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
            patch.setattr(f"pipeline.train.assemble.{name}", Mock(side_effect=error))
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
    assert run_ranks(_refused_on_one, 2, tmp_path, job, "Recipe.read") == [said] * 2


@pytest.mark.distributed
@pytest.mark.timeout(60)
def test_what_one_of_two_ranks_alone_is_refused_ends_it_and_the_next_attempt_says_why(
    tmp_path: Path,
) -> None:
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed"))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_refused_on_one, 2, tmp_path, job, "build_schedule")
    assert (
        (tmp_path / "run" / "ended1").read_text().startswith("ValueError: recipe: lab.rules.Mine")
    )  # which frees the other
    with pytest.raises(UserError, match=r"recipe: lab\.rules\.Mine does not exist"):
        worker.run(job, RankInfo())


def test_a_worker_computes_in_the_recipes_precision(tmp_path: Path) -> None:
    job = make_run(tmp_path / "run", small_recipe(precision="tf32"))
    said = r"recipe: precision='tf32' needs an NVIDIA card .*; got cpu"
    with pytest.raises(UserError, match=said):
        worker.run(job, RankInfo())


@pytest.mark.parametrize(
    ("batches", "times"), [(3, 1), pytest.param(50, 0, marks=pytest.mark.full)]
)
def test_a_worker_that_waits_for_data_much_of_the_time_says_so_once(
    batches: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has seen so many steady batches; this run has fewer than 50."""
    made = SyntheticLoader._batch

    def slow(self: SyntheticLoader, *which: Any) -> Any:
        time.sleep(0.5)
        return made(self, *which)

    monkeypatch.setattr(SyntheticLoader, "_batch", slow)
    monkeypatch.setattr(trainer, "MIN_STEADY_BATCHES", batches)
    train_inline(tmp_path / "run", small_recipe(stop_after=7, checkpoints=Checkpointing(every=0)))
    told = events(tmp_path / "run", "data_wait")
    assert [each["loader_threads"] for each in told] == [1] * times
    assert all(0.2 < each["share"] <= 1 for each in told)
