import math
import subprocess
import sys

import pytest
import torch

from pipeline.data.base import DataError
from pipeline.data.datasets.synthetic import Synthetic
from tests.helpers.loaders import by_index, read

SIZES = {"seed": 5, "world": 1, "rank": 0, "batch_size": 12, "micro_batch": 12, "threads": 1}


def test_a_sample_is_moved_anew_in_each_epoch_unless_it_is_not_augmented():
    for augment, least, most in (("shift-flip", 21, 50), ("none", 0, 0)):
        data = Synthetic(50, shape=(1, 8, 8), augment=augment)
        first, later = (by_index(read(data.train(**SIZES), epoch)) for epoch in (2, 3))
        both = first.keys() & later.keys()
        assert least <= sum(not torch.equal(first[i], later[i]) for i in both) <= most


def test_recordings_are_counts_that_change_with_time_and_move_as_one():
    data = Synthetic(50, shape=(3, 2, 8, 8))
    batch = read(data.train(**SIZES))[0]
    assert batch.x.shape == (12, 3, 2, 8, 8) and data.shape == (3, 2, 8, 8)
    assert torch.equal(batch.x, batch.x.round()) and batch.x.min() == 0 and batch.x.max() > 0
    assert not torch.equal(batch.x[:, 0], batch.x[:, 1])
    still, noise = {"augment": "none"}, {"noise": 0.0, "content_seed": 3}
    plain = read(Synthetic(50, shape=(3, 2, 8, 8), **still, **noise).train(**SIZES))[0]
    moved = read(Synthetic(50, shape=(3, 2, 8, 8), **noise).train(**SIZES))[0]
    for one, other in zip(plain.x, moved.x, strict=True):
        fits = {
            (down, right, turned)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for turned in (False, True)
            if torch.equal(other[..., 1:-1, 1:-1], window(one, down, right, turned))
        }
        assert len(fits) == 1  # one shift and one flip for all frames of the recording


def window(x, down, right, turned):
    """The inside of `x` after it was moved by one pixel at most, and mirrored."""
    cut = x[..., 1 + down : x.shape[-2] - 1 + down, 1 + right : x.shape[-1] - 1 + right]
    return cut.flip(-1) if turned else cut


def test_the_copies_of_a_sample_are_views_of_their_own():
    loader = Synthetic(50, shape=(1, 16, 16), noise=0.1, repeats=2).train(
        **SIZES | {"batch_size": 10, "micro_batch": 10}
    )
    for batch in read(loader):
        assert torch.equal(batch.index[:5], batch.index[5:])
        moved = [
            not torch.equal(one, other) for one, other in zip(batch.x[:5], batch.x[5:], strict=True)
        ]
        assert sum(moved) >= 3  # 1 of 50 has the same shift and flip twice


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 2, 8, 8)], ids=["images", "recordings"])
def test_linear_regression_learns_it(shape):
    data, generator = (
        Synthetic(600, classes=5, shape=shape, val_samples=200),
        torch.Generator().manual_seed(0),
    )
    weight = torch.randn(math.prod(shape), 5, generator=generator).mul_(0.01).requires_grad_()
    loader = data.train(**SIZES | {"batch_size": 50, "micro_batch": 50})
    for epoch in range(4):
        for batch in read(loader, epoch):
            loss = torch.nn.functional.cross_entropy(batch.x.flatten(1) @ weight, batch.target)
            weight.data -= 0.1 * 64 / len(weight) * torch.autograd.grad(loss, weight)[0]
    right = [
        (b.x.flatten(1) @ weight).argmax(1) == b.target for b in read(data.val(micro_batch=50))
    ]
    assert torch.cat(right).float().mean() > 0.8


def test_fingerprint_names_the_content():
    prints = {
        Synthetic(noise=noise, content_seed=seed).fingerprint()
        for noise in (0.5, 0.6)
        for seed in (0, 1)
    }
    assert len(prints) == 4 and Synthetic(augment="none").fingerprint() in prints


WITHOUT_FFCV = """
import sys
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.synthetic import Synthetic
Synthetic().train(seed=0, batch_size=4, micro_batch=4)
Beton("/nowhere", classes=2, size=8)
sys.exit(bool({"ffcv", "numba"} & set(sys.modules)))
"""


def test_needs_neither_ffcv_nor_numba():
    assert subprocess.run([sys.executable, "-c", WITHOUT_FFCV], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 0},
        {"classes": 0},
        {"shape": (1, 0, 4)},
        {"shape": (4, 4)},
        {"augment": "crop"},
        {"noise": -1},
        {"repeats": 0},
    ],
)
def test_refuses(wrong):
    with pytest.raises(DataError, match=r"Synthetic: .*got"):
        Synthetic(**wrong)
