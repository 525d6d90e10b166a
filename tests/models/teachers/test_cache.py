"""Answers on disk: exact, written by several at a time, whole after a death, refused where damaged
or too many.
"""

# B batch, K classes

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.teachers.cache import Cache, CachedPredictions, record_format
from tests.helpers.damage import flip
from tests.helpers.rule_networks import refusals

K = 5


def kept(folder: Path, *, rank: int = 0, storage: Any = "fp32") -> CachedPredictions:
    return CachedPredictions(folder, classes=K, storage=storage, rank=rank)


def answers(first: int, count: int) -> tuple[Tensor, Tensor]:
    index_B = torch.arange(first, first + count)
    return index_B, torch.randn(count, K, generator=torch.Generator().manual_seed(first))


def test_what_was_written_is_read_to_the_bit_in_any_order(tmp_path: Path) -> None:
    index_B, logits_BK = answers(10, 6)
    assert torch.equal(kept(tmp_path).add(3, index_B, logits_BK), logits_BK)
    order = torch.tensor([4, 0, 2])
    assert torch.equal(kept(tmp_path).find(3, index_B[order]), logits_BK[order])


def test_another_epoch_another_sample_or_a_part_of_a_batch_is_not_known(tmp_path: Path) -> None:
    kept(tmp_path).add(3, *answers(10, 6))
    reader = kept(tmp_path)
    asked = ((4, [10]), (3, [9]), (3, [10, 16]), (3, [10, 15]))
    known = [reader.find(epoch, torch.tensor(index)) is not None for epoch, index in asked]
    assert known == [False, False, False, True]


def test_several_write_at_one_time(tmp_path: Path) -> None:
    writers = kept(tmp_path), kept(tmp_path, rank=1)
    for first in (0, 2, 4, 6):
        writers[first // 2 % 2].add(0, *answers(first, 2))
    expected = torch.cat([answers(first, 2)[1] for first in (0, 2, 4, 6)])
    assert torch.equal(kept(tmp_path).find(0, torch.arange(8)), expected)


def test_what_a_death_left_half_written_is_not_read(tmp_path: Path) -> None:
    kept(tmp_path).add(0, *answers(0, 4))
    (file,) = tmp_path.iterdir()
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 7)
    reader = kept(tmp_path)
    assert reader.find(0, torch.arange(4)) is None
    assert reader.find(0, torch.arange(3)) is not None
    reader.add(0, *answers(0, 4))  # in a file of its own
    assert kept(tmp_path).find(0, torch.arange(4)) is not None


def test_a_damaged_answer_is_refused(tmp_path: Path) -> None:
    kept(tmp_path).add(0, *answers(0, 4))
    (file,) = tmp_path.iterdir()
    flip(file, file.stat().st_size - 3)
    reader = kept(tmp_path)
    assert reader.find(0, torch.arange(3)) is not None
    with pytest.raises(ValueError, match=r"record 3 of .* it is damaged: delete the file"):
        reader.find(0, torch.arange(4))


@pytest.mark.parametrize(("storage", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounded_answers_are_the_same_the_first_time(
    tmp_path: Path, storage: str, dtype: torch.dtype
) -> None:
    index_B, logits_BK = answers(0, 4)
    first = kept(tmp_path, storage=storage).add(0, index_B, logits_BK)
    assert torch.equal(kept(tmp_path, storage=storage).find(0, index_B), first)
    assert torch.equal(first, logits_BK.to(dtype).float())
    assert record_format(K, storage).itemsize == 16 + 2 * K  # type: ignore[arg-type]


@pytest.mark.parametrize(("planned", "least"), [(4, 10), (8, 14)])
def test_a_run_that_would_not_fit_is_refused_before_it_begins(tmp_path, planned, least) -> None:
    """`least`: the answers that are there and those that will be."""
    size = record_format(K, "fp32").itemsize
    for folder, count in (("mine", 4), ("others", 6)):
        kept(tmp_path / folder).add(0, *answers(0, count))

    def check(limit: float) -> None:
        cache = Cache(folder=tmp_path, limit_gb=limit * size / 1e9)
        cache.check(tmp_path / "mine", predictions=planned, classes=K)

    check(least + 0.5)
    message = r"Cache: limit_gb must be at least .* holds .* GB already; got limit_gb="
    with pytest.raises(ValueError, match=message):
        check(least - 0.5)


test_refuses = refusals(
    [
        ({"folder": Path("x"), "limit_gb": 0.0}, "limit_gb"),
        ({"folder": Path("x"), "limit_gb": 1.0, "storage": "int8"}, "storage"),
    ],
    Cache,
)
