"""A run whose number of workers changes: the same rows, samples and draws at every size, and what
is refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.data.mixing import Mixing
from pipeline.data.order import TrainOrder
from pipeline.models.convnet import convnet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.recipe.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.norm import BatchNorm
from pipeline.train.build import check_recipe
from pipeline.train.elastic import fit_to_sizes, format_sizes, seed_micro_batch
from pipeline.train.job import Job, RankInfo
from pipeline.train.weights import load_run
from pipeline.train.worker import run
from tests.helpers.interruptions import before_batch
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, small_recipe

BATCH = 24
DIVISORS = tuple(size for size in range(1, BATCH + 1) if BATCH % size == 0)


@st.composite
def histories(draw: Any) -> list[tuple[int, int, int, int]]:
    """What becomes of a run of 2 epochs of 5 batches: (size, micro-batch, first batch, batch at
    which it ends), in turn.

    An attempt begins where a checkpoint stands, at most three batches before the last one ended.
    """
    at, found = 0, []
    while at < 10:
        end = draw(st.integers(at + 1, 10))
        found.append((draw(st.sampled_from(DIVISORS)), draw(st.integers(1, BATCH)), at, end))
        at = end if end == 10 else max(at, end - draw(st.integers(0, 3)))
        if len(found) > 12:
            found.append((1, BATCH, at, 10))
            break
    return found


@given(histories(), st.integers(0, 2**62))
@settings(max_examples=150, deadline=None)
def test_each_sample_is_seen_once_an_epoch_over_any_sequence_of_sizes(
    history: list[tuple[int, int, int, int]], seed: int
) -> None:
    run = {"samples": 5 * BATCH + 7, "seed": seed, "batch_size": BATCH}
    survived: dict[int, list[int]] = {}
    for size, most, first, end in history:
        split = small_recipe(batch_size=BATCH, micro_batch=most).split(size)
        sizes = {**run, "world": size, "micro_batch": split.micro_batch}
        orders = [TrainOrder(rank=rank, **sizes) for rank in range(size)]
        for step in range(first, end):
            epoch, place = divmod(step, 5)
            # Only where it resumes it opens an epoch in its middle.
            start, at = (place * BATCH, 0) if step == first else (0, place * BATCH // size)
            mine = [
                order.epoch(epoch, start=start)[at : at + BATCH // size].reshape(
                    split.accumulation, split.micro_batch
                )
                for order in orders
            ]
            # Micro-batch by micro-batch, the rows of all ranks.
            survived[step] = np.stack(mine, axis=1).ravel().tolist()
    alone = TrainOrder(rank=0, world=1, micro_batch=BATCH, **run)
    for epoch in range(2):
        seen = [survived[5 * epoch + step] for step in range(5)]
        # In the same rows, which draws go by.
        assert seen == alone.epoch(epoch).reshape(5, BATCH).tolist()
        assert len(set(np.ravel(seen))) == 5 * BATCH


def normed(**changes: Any) -> Recipe:
    """Batch norm of each worker's own samples, and dropout."""
    return small_recipe(
        model=spec(convnet, classes=10, in_channels=1, stages=((8,), (8,)), dropout=0.2),
        batch_size=BATCH,
        **changes,
    )


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "expected"),
    [
        ((1, 2, 3), None, 4),
        ((2, 4), None, 6),
        ((1, 2, 3), 3, 2),
        ((1, 2), 5, 4),
        ((2, 4, 8), None, 3),
        ((3,), None, None),
    ],
)
def test_what_looks_at_a_micro_batch_as_one_sees_the_same_rows_at_every_size(
    sizes: tuple[int, ...], micro_batch: int | None, expected: int | None
) -> None:
    recipe = normed(micro_batch=micro_batch)
    made = fit_to_sizes(recipe, recipe.model.build(), SLTT(), sizes)
    assert made.micro_batch == expected
    for split in [made.split(size) for size in sizes if expected]:
        assert split.micro_batch == expected
        assert split.workers * split.micro_batch * split.accumulation == BATCH


def test_without_norm_and_dropout_a_worker_takes_its_whole_share() -> None:
    recipe = small_recipe(batch_size=BATCH)
    assert fit_to_sizes(recipe, recipe.model.build(), SLTT(), (1, 2, 3)) is recipe


def test_what_is_drawn_depends_on_seed_batch_and_row_alone() -> None:
    def drawn(step: int, row: int) -> list[float]:
        seed_micro_batch(3, step=step, first_row=row)
        return torch.rand(4).tolist()

    first = drawn(5, 8)
    torch.rand(100)
    assert drawn(5, 8) == first not in (drawn(6, 8), drawn(5, 12))


@pytest.mark.parametrize(
    ("sizes", "text"), [((4,), "4"), ((2, 3, 4), "2:4"), ((2, 4, 8), "2,4,8"), ((2, 3), "2:3")]
)
def test_sizes_are_told_as_they_are_written(sizes: tuple[int, ...], text: str) -> None:
    assert format_sizes(sizes) == text


@pytest.mark.parametrize(
    ("changes", "sizes", "said"),
    [
        (
            {},
            tuple(range(2, 9)),
            "launch: every number of workers must divide batch_size=24; got 2:8, with 5, 7;"
            " take --workers of 1,2,3,4,6,8",
        ),
        (
            {},
            (5,),
            "recipe: batch_size must be divisible by 5 workers; got 24; the nearest sizes are 20"
            " and 25",
        ),
        (
            {"zero": 2, "backend": "deepspeed"},
            (2, 4),
            "launch: ZeRO-2 needs one number of workers; got 2,4; take one number, or zero=0"
            " (DeepSpeed 0.19.8 loads ZeRO checkpoints only on the same number, and its universal"
            " checkpoints support only Adam)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    changes: dict[str, Any], sizes: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        check_recipe(small_recipe(batch_size=BATCH, **changes), *sizes)
    assert str(refusal.value) == said


def test_statistics_over_all_workers_want_whole_batches() -> None:
    network, recipe = nn.Sequential(BatchNorm(4, between="world")), small_recipe(batch_size=BATCH)
    assert fit_to_sizes(recipe, network, SLTT(), (1, 2)).micro_batch is None
    said = r"needs whole global batches .* micro_batch=4, which is accumulated on 1 worker"
    with pytest.raises(ValueError, match=said):
        fit_to_sizes(replace(recipe, micro_batch=4), network, SLTT(), (1, 2))


def test_what_a_size_makes_of_a_batch_is_refused_by_the_part_that_it_disturbs() -> None:
    """A rule that moves weights within a batch, and neighbours that are mixed."""
    model = spec(nf_resnet18_small, classes=10, in_channels=1, width=4, blocks=(1, 1))
    moves = small_recipe(model=model, batch_size=BATCH, rule=spec(OTTT, update="step"))
    mixed = small_recipe(batch_size=BATCH, mixing=spec(Mixing, mixup=0.2))
    zero = small_recipe(batch_size=BATCH, zero=2, backend="deepspeed")
    for recipe, sizes in ((moves, (1, 2)), (mixed, (1, 2, 3)), (zero, (4,))):
        check_recipe(recipe, *sizes)
    with pytest.raises(ValueError, match="must not be accumulated; got Split"):
        check_recipe(replace(moves, micro_batch=6), 2, 4)
    with pytest.raises(ValueError, match="a micro-batch must be even"):
        check_recipe(mixed, 2, 8)


# ----------------------------------------------------------------------------------- with processes


def part_of_a_run(rank: int, ranks: int, job: Job, at: int) -> None:
    """Somebody asks it to stop at a step, as with Ctrl-C."""
    stop = Path(job.run) / "stop"
    if rank == 0:
        stop.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        before_batch(patch, lambda trainer: stop.touch(), step=at)
        run(job, RankInfo(rank, ranks, "cpu", rank, (1, 2, 3)))


@pytest.mark.distributed
def test_sizes_that_change_within_an_epoch_train_the_same_network(tmp_path: Path) -> None:
    """Batch norm and dropout among its layers, by the plain backend."""
    recipe = normed(epochs=4, rule=spec(BPTT))
    recipe = replace(recipe, data=recipe.data.with_(samples=BATCH * 6 + 5))
    alone, changing = (make_run(tmp_path / name, recipe) for name in ("alone", "changing"))
    part_of_a_run(0, 1, alone, -1)
    part_of_a_run(0, 1, changing, 2)
    run_ranks(part_of_a_run, 3, tmp_path, changing, 15)
    part_of_a_run(0, 1, changing, -1)
    starts = events(Path(changing.run), "start")
    told = [(start["world_size"], start["step"], start["micro_batch"]) for start in starts]
    assert told == [(1, 0, 4), (3, 3, 4), (1, 16, 4)]
    ours, theirs = (dict(load_run(Path(job.run)).named_parameters()) for job in (changing, alone))
    assert len(ours) > 5
    for name, value in ours.items():
        least = 1e-5 * torch.linalg.norm(theirs[name])
        assert torch.linalg.norm(value - theirs[name]) <= least, name
