import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.base import DataError
from pipeline.data.order import TrainOrder, ValOrder, permutation, split_held_out


@st.composite
def sizes(draw):
    """samples, world, micro_batch, accumulation: at least one global batch."""
    world, micro_batch, accumulation = (draw(st.integers(1, most)) for most in (5, 4, 3))
    batch = world * micro_batch * accumulation
    return draw(st.integers(batch, 4 * batch + 3)), world, micro_batch, accumulation


def orders(
    samples: int, world: int, micro_batch: int, batch_size: int, seed: int = 3, **more: int
) -> list[TrainOrder]:
    sizes = {"world": world, "micro_batch": micro_batch, "batch_size": batch_size}
    return [TrainOrder(samples=samples, seed=seed, rank=r, **sizes, **more) for r in range(world)]


@given(sizes(), st.integers(1, 4), st.integers(0, 2**62), st.integers(0, 100), st.data())
@settings(max_examples=150, deadline=None)
def test_micro_batches_of_all_ranks_are_slices_of_the_global_batches_and_a_resume_is_the_tail(
    size, repeats, seed, epoch, data
):
    """A global batch holds each of its samples `repeats` times, with different view numbers."""
    samples, world, micro, accumulation = size
    batch = world * micro * accumulation
    assume(batch % repeats == 0)
    steps, distinct = samples // batch, batch // repeats
    ranks = orders(samples, world, micro, batch, seed, repeats=repeats)
    assert [rank.steps for rank in ranks] == [steps] * world
    ids, view_numbers = (
        np.stack([each.reshape(steps, accumulation, micro) for each in values], 2).reshape(
            steps, batch
        )
        for values in (
            [rank.epoch(epoch) for rank in ranks],
            [rank.view_numbers() for rank in ranks],
        )
    )
    whole = permutation(samples, seed=seed, epoch=epoch)
    assert sorted(whole) == list(range(samples))
    for step in range(steps):
        first = step * distinct
        assert np.array_equal(ids[step], np.tile(whole[first : first + distinct], repeats))
        assert np.array_equal(view_numbers[step], np.repeat(np.arange(repeats), distinct))
    start = batch * data.draw(st.integers(0, steps))
    for rank in ranks:
        tail = start // world
        assert np.array_equal(rank.epoch(epoch, start=start), rank.epoch(epoch)[tail:])
        assert np.array_equal(rank.view_numbers(start=start), rank.view_numbers()[tail:])


def test_epoch_and_seed_change_the_order():
    draws = [permutation(50, seed=seed, epoch=e).tolist() for seed, e in ((0, 0), (0, 1), (1, 0))]
    assert draws[0] != draws[1] and draws[0] != draws[2]


@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 5))
def test_evaluation_takes_each_sample_once(samples, world, micro):
    each = [
        ValOrder(samples=samples, rank=rank, world=world, micro_batch=micro)
        for rank in range(world)
    ]
    assert np.concatenate([order.epoch(9) for order in each]).tolist() == list(range(samples))
    lengths = [len(order.epoch(0)) for order in each]
    assert max(lengths) - min(lengths) <= 1
    assert [order.steps for order in each] == [-(-length // micro) for length in lengths]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10}, r"multiple of world x micro_batch = 2 x 4 = 8; got 10"),
        ({"batch_size": 0}, r"batch_size must be above 0 and .*; got 0"),
        ({"batch_size": 104}, r"at most the 100 samples of the set; got 104"),
        ({"rank": 2}, r"rank must be in 0..world-1, .* rank=2, world=2"),
        ({"micro_batch": 0}, r"micro_batch 1 or more; got .* micro_batch=0"),
        ({"repeats": 3}, r"repeats must be 1 or more and divide batch_size=8; got 3"),
        ({"repeats": 0}, r"repeats must be 1 or more and divide batch_size=8; got 0"),
        ({"seed": -1}, r"seed must be in 0..2\^63-1; got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    sizes = {"samples": 100, "seed": 0, "rank": 0, "world": 2, "batch_size": 8, "micro_batch": 4}
    with pytest.raises(DataError, match=message):
        TrainOrder(**sizes | change)


@pytest.mark.parametrize("start", [4, -8, 104])
def test_a_start_within_a_global_batch_or_an_evaluation_is_refused(start):
    with pytest.raises(DataError, match=r"start must be a multiple of batch_size=8 in 0\.\.96"):
        orders(100, 2, 4, 8)[0].epoch(0, start=start)
    with pytest.raises(DataError, match=f"starts at 0; got start={start}"):
        ValOrder(samples=10, rank=0, world=1, micro_batch=2).epoch(0, start=start)


def test_a_held_out_part_is_fixed_and_disjoint():
    train, chosen_on = split_held_out(1000, 0.1).values()
    assert len(chosen_on) == 100 and sorted([*train, *chosen_on]) == list(range(1000))
    assert np.array_equal(split_held_out(1000, 0.1)["val"], chosen_on)
    assert (
        30 < np.mean(chosen_on < 500) * 100 < 70
    )  # spread over the file, which may be sorted by class


def test_an_order_of_some_ids_is_the_order_of_their_places():
    ids = np.array([3, 5, 8, 13, 21, 34, 55])
    sizes = {"seed": 1, "rank": 0, "world": 1, "batch_size": 3, "micro_batch": 3}
    assert np.array_equal(
        TrainOrder(samples=7, ids=ids, **sizes).epoch(2, start=3),
        ids[TrainOrder(samples=7, **sizes).epoch(2, start=3)],
    )
    parts = [
        ValOrder(samples=7, ids=ids, rank=rank, world=2, micro_batch=2).epoch(0)
        for rank in range(2)
    ]
    assert np.array_equal(np.concatenate(parts), ids)
