"""Tasks of one data set: every sample in its place, whatever the ranks, after every resume."""

# B batch, C channels, H W pixels

import pytest
import torch

from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.data.order import permutation
from tests.helpers.loaders import by_index, read

SIZES = {"seed": 5, "world": 1, "rank": 0, "batch_size": 12, "micro_batch": 12, "threads": 1}
VAL = {"rank": 0, "world": 1, "micro_batch": 16, "threads": 1}


def plain(samples=50, **changes):
    return Synthetic(samples, **{"classes": 6, "shape": (2, 4, 5), "val_samples": 20, **changes})


# ----------------------------------------------------------------------------------------- permuted


@pytest.mark.parametrize("part", ["train", "val"])
def test_every_pixel_is_found_again_and_only_there(part):
    def batches(data):
        return read(data.train(**SIZES) if part == "train" else data.val(**VAL))

    data = Permuted(plain(), task=3, seed=9)
    assert sorted(data.order) == list(range(20)) and data.order.tolist() != list(range(20))
    for before, after in zip(batches(plain()), batches(data), strict=True):
        assert torch.equal(before.target, after.target) and torch.equal(before.index, after.index)
        for p in range(20):
            q = int(data.order[p])
            assert torch.equal(after.x[:, :, p // 5, p % 5], before.x[:, :, q // 5, q % 5])


def test_the_order_is_the_tasks_and_the_same_in_every_run():
    def order(**task):
        return tuple(Permuted(plain(), **task).order.tolist())

    assert len({order(task=task, seed=seed) for task in range(4) for seed in range(2)}) == 8
    assert order(task=2) == tuple(
        Permuted(plain(samples=60, content_seed=3), task=2).order.tolist()
    )
    # task 0 is as it is only when asked
    assert order(task=0, first="plain") == tuple(range(20)) != order(task=0)
    assert order(task=1, first="plain") == order(task=1)


def test_recordings_are_permuted_alike_at_every_time_step():
    data = Synthetic(24, shape=(3, 2, 4, 5))
    [before, after] = [read(each.val(**VAL))[0].x for each in (data, Permuted(data, task=1))]
    assert torch.equal(
        after.flatten(-2), before.flatten(-2)[..., torch.from_numpy(Permuted(data, task=1).order)]
    )


def test_fingerprint_names_content_and_order():
    prints = [
        Permuted(plain(), task=0).fingerprint(),
        Permuted(plain(), task=0, first="plain").fingerprint(),
        Permuted(plain(), task=1).fingerprint(),
        Permuted(plain(), task=1, seed=1).fingerprint(),
        Permuted(plain(content_seed=1), task=1).fingerprint(),
        plain().fingerprint(),
    ]
    assert len(set(prints)) == 6
    assert Permuted(plain(augment="none"), task=1).fingerprint() == prints[2]


# -------------------------------------------------------------------------------------------- split


def test_a_task_has_each_sample_of_its_classes_once():
    seen = []
    for task in range(3):
        data = SplitClasses(plain(), task=task)
        loader = data.val(**VAL)
        batches = read(loader)
        ids = torch.cat([batch.index for batch in batches])
        assert set((ids % 6).tolist()) == {2 * task, 2 * task + 1} == set(data.task_classes)
        assert torch.equal(torch.cat([batch.target for batch in batches]), ids % 6 - 2 * task)
        assert loader.samples == len(ids) and data.classes == 2
        seen += ids.tolist()
    assert sorted(seen) == list(range(20))


def test_the_training_order_is_one_permutation_of_the_tasks_samples():
    ids = [i for i in range(50) if i % 6 in (2, 3)]
    loader = SplitClasses(plain(), task=1).train(**SIZES | {"batch_size": 3, "micro_batch": 3})
    assert loader.samples == len(ids) == 16 and loader.steps_per_epoch == 5
    for epoch in (0, 3):
        found = torch.cat([batch.index for batch in read(loader, epoch)]).tolist()
        assert found == [ids[place] for place in permutation(16, seed=5, epoch=epoch)[:15]]


def test_a_shared_head_keeps_the_datas_labels():
    data = SplitClasses(plain(), task=2, labels="data")
    assert data.classes == 6
    assert {int(t) for batch in read(data.val(**VAL)) for t in batch.target} == {4, 5}


def test_classes_may_come_in_another_order():
    data = SplitClasses(plain(), task=1, order=(5, 0, 3, 1, 2, 4))
    assert data.task_classes == (3, 1)
    for batch in read(data.val(**VAL)):
        assert torch.equal(batch.target, (batch.index % 6 == 1).long())


def test_permuted_classes_are_split_too():
    [batch] = read(SplitClasses(Permuted(plain(), task=4), task=1).val(**VAL))
    [whole] = read(Permuted(plain(), task=4).val(**VAL | {"micro_batch": 20}))
    assert torch.equal(batch.x, whole.x[batch.index]) and set((batch.index % 6).tolist()) == {2, 3}


def test_split_fingerprint_names_classes_and_labels():
    prints = {
        SplitClasses(plain(content_seed=seed), task=task, labels=labels).fingerprint()
        for seed in (0, 1)
        for task in (0, 1)
        for labels in ("task", "data")
    }
    assert len(prints) == 8


def test_files_leave_classes_out(fashion):
    how = {"classes": 10, "size": 28, "channels": 1, "mean": (0.5,), "std": (0.5,)}
    still = {"crop": "shift", "reach": 0, "flip": "never"}
    beton = Beton(fashion, **how, **still)
    data, task_classes = SplitClasses(beton, task=3), [i for i in range(100) if i % 10 in (6, 7)]
    batches = read(data.train(**SIZES | {"batch_size": 5, "micro_batch": 5}))
    assert sorted(by_index(batches)) == task_classes
    assert all(torch.equal(batch.target, batch.index % 10 - 6) for batch in batches)
    [whole], [mine] = read(beton.val(**VAL | {"micro_batch": 30})), read(data.val(**VAL))
    assert mine.index.tolist() == [6, 7, 16, 17, 26, 27]
    assert torch.equal(mine.x, whole.x[mine.index])
    held_out = SplitClasses(Beton(fashion, **how, held_out=0.3), task=3)
    trained_on = held_out.train(**SIZES | {"batch_size": 1, "micro_batch": 1})
    chosen_on, learnt = (by_index(read(each)) for each in (held_out.val(**VAL), trained_on))
    assert chosen_on and sorted([*chosen_on, *learnt]) == task_classes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Permuted(plain(), task=-1), "task and seed must be 0 or more.*got task=-1"),
        (
            lambda: Permuted(plain(), task=0, first="none"),
            "first 'permuted' or 'plain'.*got .*'none'",
        ),
        (
            lambda: SplitClasses(plain(), task=3),
            "below the 3 tasks that 6 classes make with 2 per task; got 3",
        ),
        (lambda: SplitClasses(plain(), task=0, classes_per_task=0), "0 tasks .* with 0 per task"),
        (lambda: SplitClasses(plain(), task=0, classes_per_task=7), "0 tasks .* with 7 per task"),
        (
            lambda: SplitClasses(plain(), task=0, order=(0, 1)),
            r"each of 0\.\.5 once, .*; got order=\(0, 1\)",
        ),
        (
            lambda: SplitClasses(plain(), task=0, labels="both"),
            "labels must be 'task' or 'data'; got .* labels='both'",
        ),
        (
            lambda: SplitClasses(SplitClasses(plain(), task=0), task=0),
            "SplitClasses: data must have a method with_classes, .*got SplitClasses",
        ),
        (
            lambda: SplitClasses(plain(), task=0).train(**SIZES | {"batch_size": 24}),
            "at most the 18 samples of the set; got 24",
        ),
        (
            lambda: plain().with_classes((9,)).train(**SIZES),
            r"^data: train must have samples .* \(9,\)",
        ),
    ],
)
def test_refuses(make, said):
    with pytest.raises(DataError, match=said):
        make()
