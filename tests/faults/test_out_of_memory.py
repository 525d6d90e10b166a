"""A device whose memory runs out: half the samples at a time, the same batch, and the same weights
but for the order of sums.
"""

import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from pipeline.core.errors import UserError
from pipeline.data.mixing import Mixing
from pipeline.measure.memory import hardware
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import Recipe, spec
from pipeline.rules.base import LossFn, LossTerm, Rule
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train import worker
from pipeline.train.job import Job, RankInfo
from pipeline.train.trainer import Trainer
from tests.helpers.lab import assert_trained_as, samples_of
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)

SEED = 20261127  # of the batch, and of the rows in it, at which memory runs out
BATCH, STEPS, STEPS_PER_EPOCH = 8, 20, 8
NEVER = (-1, -1)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def room_for(
    patch: pytest.MonkeyPatch,
    samples: int,
    *,
    error: Exception = FULL,
    after: int = 0,
    rule: type[Rule] = SLTT,
) -> None:
    """There is room for so many samples alone, after so many micro-batches that held more."""
    original, batches = rule.loss_terms, itertools.count()

    def loss_terms(self: Rule, model: Any, x_TB: Any, *words: Any, **more: Any) -> Any:
        if x_TB.shape[1] > samples and next(batches) >= after:
            raise error
        return original(self, model, x_TB, *words, **more)

    patch.setattr(rule, "loss_terms", loss_terms)


def smaller(run: Path) -> list[int]:
    return [event["micro_batch"] for event in events(run, "smaller")]


def sizes_of(run: Path) -> list[tuple[int, int]]:
    return [(start["micro_batch"], start["accumulation"]) for start in events(run, "start")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.full
def test_the_micro_batch_is_halved_until_it_fits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        room_for(patch, 3)
        summary = train_inline(run, small_recipe())
    assert summary is not None
    # Nothing of the others is left.
    assert [on["micro_batch"] for on in summary["trained_on"]] == [2]
    assert (smaller(run), sizes_of(run)) == ([4, 2], [(8, 1), (4, 2), (2, 4)])
    train_inline(tmp_path / "told", small_recipe(micro_batch=2))
    assert same_weights(run, tmp_path / "told")


@pytest.mark.parametrize(
    ("said", "is_met"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_of_other_errors_of_the_device_a_lack_of_memory_alone_is_met(
    run: Path, monkeypatch: pytest.MonkeyPatch, said: str, is_met: bool
) -> None:
    room_for(monkeypatch, 4, error=RuntimeError(said))
    ends = nullcontext() if is_met else pytest.raises(RuntimeError, match=said)
    with ends:
        train_inline(run, small_recipe(stop_after=1))
    found = [(each["micro_batch"], each["reason"]) for each in events(run, "smaller")]
    assert found == [(4, said)] * is_met
    assert (run / "decisions.json").exists() == is_met


def of_20_steps(**changes: Any) -> Recipe:
    return small_recipe(epochs=3, stop_after=STEPS, **changes)


def written_down(
    patch: pytest.MonkeyPatch, file: Path, *, met: tuple[int, int] = NEVER, room: int = BATCH
) -> None:
    """SLTT tells `file` which sample each row of a batch held.

    In the step and the micro-batch, named by its first row, that are `met` there is room for so
    many samples alone; memory runs out when it has been learnt from in part.
    """
    original = SLTT.loss_terms

    def loss_terms(
        self: SLTT, model: Any, x_TB: Tensor, loss_fn: LossFn, *, step: int, rows: range
    ) -> Iterator[LossTerm]:
        with file.open("a") as told:
            for row, x_T in zip(rows, x_TB.unbind(1), strict=True):
                sample = hashlib.sha256(x_T.cpu().numpy().tobytes()).hexdigest()
                print(step, row, sample, time.time_ns(), file=told)
        slices = original(self, model, x_TB, loss_fn, step=step, rows=rows)
        yield next(slices)
        if (step, rows[0]) == met and len(rows) > room:
            raise FULL
        yield from slices

    patch.setattr(SLTT, "loss_terms", loss_terms)


def drawn(ranks: int) -> tuple[int, int, int]:
    """The step and the first row that memory runs out at, and the rank that holds it; it has two
    micro-batches in a step.
    """
    draw, samples = random.Random(SEED + ranks), BATCH // ranks // 2
    row = draw.randrange(0, BATCH, samples)
    return draw.randrange(1, STEPS), row, row // samples % ranks


def assert_as_untouched(run: Path, files: list[Path], untouched: Path) -> None:
    samples, expected = (
        samples_of(*each, steps=STEPS, batch=BATCH)
        for each in ((run, files), (untouched, [untouched.parent / "rows.txt"]))
    )
    assert_trained_as(untouched, run, samples, expected, steps_per_epoch=STEPS_PER_EPOCH)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    with pytest.MonkeyPatch.context() as patch:
        written_down(patch, folder / "rows.txt")
        train_inline(folder / "run", of_20_steps())
    return folder / "run"


def test_memory_that_runs_out_in_mid_run_costs_no_sample(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: Path
) -> None:
    step, row, _ = drawn(1)
    with monkeypatch.context() as patch:
        written_down(patch, tmp_path / "rows.txt", met=(step, row), room=2)
        train_inline(run, of_20_steps(micro_batch=4))
    assert [(each["step"], each["micro_batch"]) for each in events(run, "smaller")] == [(step, 2)]
    assert sizes_of(run) == [(4, 2), (2, 4)]
    assert_as_untouched(run, [tmp_path / "rows.txt"], untouched)


@pytest.mark.distributed
def test_memory_that_runs_out_on_one_of_two_ranks_in_mid_run_costs_no_sample(
    run: Path, tmp_path: Path, untouched: Path
) -> None:
    step, row, rank = drawn(2)
    job = make_run(run, of_20_steps(micro_batch=2, backend="deepspeed"))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_written_down, 2, tmp_path, job, (step, row))
    assert (tmp_path / f"ended{rank}").read_text() == "OutOfMemoryError"
    (tmp_path / "meeting").mkdir()  # of their own: where the first two met, one has left for good
    run_ranks(_written_down, 2, tmp_path / "meeting", job, (step, row))
    assert sizes_of(run) == [(2, 2), (1, 4)]
    assert_as_untouched(run, [tmp_path / f"rows{rank}.txt" for rank in range(2)], untouched)


def _written_down(rank: int, ranks: int, job: Job, met: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written_down(patch, Path(job.run).parent / f"rows{rank}.txt", met=met, room=1)
        begin = partial(worker.run, job, RankInfo(rank, ranks))
        _told_of_its_end(rank, begin, Path(job.run).parent)


def _told_of_its_end(rank: int, act: Callable[[], object], folder: Path) -> None:
    try:
        act()
    except Exception as error:
        (folder / f"ended{rank}").write_text(type(error).__name__)
        raise


def test_what_was_trained_before_memory_ran_out_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 4, after=random.Random(SEED).randrange(3, 16))
    summary = train_inline(run, small_recipe())
    assert summary is not None
    names, machine = ("world_size", "micro_batch", "hardware"), hardware(torch.device("cpu"))
    assert [[on[name] for name in names] for on in summary["trained_on"]] == [
        [1, 8, machine],
        [1, 4, machine],
    ]
    assert json.loads((run / "summary.json").read_text())["trained_on"] == summary["trained_on"]


ONE = "training: the device's memory runs out with 1 sample at a time"


def test_one_sample_that_does_not_fit_ends_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 0)
    with pytest.raises(UserError, match=ONE):
        train_inline(run, small_recipe())


def test_mixing_takes_the_next_fewer_that_are_whole_pairs(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 3)
    train_inline(run, small_recipe(batch_size=12, stop_after=2, mixing=spec(Mixing, mixup=0.5)))
    assert smaller(run) == [6, 2]


@pytest.mark.parametrize(
    ("changes", "samples", "why"),
    [
        (
            {
                "rule": spec(OTTT, decay=0.5, update="step"),
                "model": spec(mlp, classes=10, in_features=64, hidden=(8,)),
            },
            8,
            (
                r"OTTT.*: moves the weights at every time step, so a batch must not be accumulated;"
                r" got .*micro_batch=4.*"
            ),
        ),
        (
            {"mixing": spec(Mixing, mixup=0.5), "micro_batch": 2},
            2,
            r"Mixing: the size of a micro-batch must be even, .*; got 1",
        ),
    ],
)
def test_where_no_fewer_can_be_taken_it_says_why_and_notes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], samples: int, why: str
) -> None:
    for rule in (SLTT, OTTT):
        room_for(monkeypatch, 0, rule=rule)
    said = (
        rf"training: the device's memory runs out with {samples} samples at a time, and the"
        rf" recipe does not accept fewer: {why}; take"
    )
    for _ in range(2):  # with more memory the run can still go on
        with pytest.raises(UserError, match=said):
            train_inline(run, small_recipe(**changes))
    assert not (run / "decisions.json").exists()


@pytest.mark.distributed
def test_one_sample_that_does_not_fit_one_of_two_ranks_ends_the_run(
    run: Path, tmp_path: Path
) -> None:
    """The rank dies of it, which frees the other; what it noted is what every rank of the next
    attempt ends with.
    """
    job = make_run(run, small_recipe(backend="deepspeed", micro_batch=1))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_without_room_on_one, 2, tmp_path, job)
    # No UserError, which would say that every rank knows.
    assert (run / "ended1").read_text() == "ValueError"
    with pytest.raises(UserError, match=ONE):
        worker.run(job, RankInfo())


@pytest.mark.distributed
def test_a_worker_that_dies_of_it_is_spoken_for_by_the_next_attempt(
    run: Path, tmp_path: Path
) -> None:
    """Rank 0, which holds the journal, has heard of a lost connection alone."""
    job = make_run(run, small_recipe(stop_after=1))
    with pytest.raises(ProcessRaisedException):
        run_ranks(_without_room_on_one, 2, tmp_path, job)
    for _ in range(2):  # and once alone
        worker.run(job, RankInfo())
    assert [
        (event["event"], event["micro_batch"]) for event in events(run, "start", "smaller")
    ] == [("start", 4), ("smaller", 2), ("start", 2), ("start", 2)]
    assert events(run, "smaller")[0]["reason"] == "memory ran out on another worker"


class InStep(Trainer):
    """All ranks have begun before one of them trains."""

    def _train(self) -> None:
        self.ranks.all_gather_object(None)
        super()._train()


def _without_room_on_one(rank: int, ranks: int, job: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            room_for(patch, 0)
        begin = partial(worker.run, job, RankInfo(rank, ranks), trainer_of=InStep)
        _told_of_its_end(rank, begin, Path(job.run))
