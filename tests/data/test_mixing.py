"""Mixup and CutMix against timm's, fed with the same draws; the same batches for any number of
ranks and micro-batches.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import betaincinv
from timm.data import mixup as timm_mixup

from pipeline.core.errors import DataError
from pipeline.core.random import MIX, MIX_BY_CUT, MIX_SHARE, MIX_X, MIX_Y, below, bits
from pipeline.data.mixing import Mixing

CLASSES, H, W = 5, 9, 12
PLACE = {"classes": CLASSES, "seed": 3, "step": 41}


def batch(rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, target = (
        torch.randn(64, 3, H, W, generator=draw),
        torch.randint(CLASSES, (64,), generator=draw),
    )
    return x[rows.start : rows.stop].clone(), target[rows.start : rows.stop]


class Fed:
    """Stands for numpy within timm: its generator gives what ours drew for the keys of a pair's
    samples, in timm's order.
    """

    def __init__(self, keys: list[int], how: str) -> None:
        self.keys, self.ends = np.array(keys), []
        draw = lambda number: bits(PLACE["seed"], PLACE["step"], self.keys, number)
        unit = lambda number: (draw(number) >> np.uint64(11)) / 2.0**53
        order = (MIX, MIX_BY_CUT) if how == "batch" else (MIX_BY_CUT, MIX)
        self.units = [unit(number) for number in order]
        self.quantile = ((draw(MIX_SHARE) >> np.uint64(52)).astype(float) + 0.5) / 4096
        is_cut = unit(MIX_BY_CUT) < 0.4
        is_mixed = unit(MIX) < 0.8
        for row in range(len(keys)):  # timm asks for a box only where it cuts
            if is_cut[row] and is_mixed[row]:
                self.ends += [(H, below(draw(MIX_Y), H)[row]), (W, below(draw(MIX_X), W)[row])]
        self.random = SimpleNamespace(rand=self.rand, beta=self.beta, randint=self.randint)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def rand(self, size: int | None = None) -> Any:
        values = self.units.pop(0)
        return values[0] if size is None else values

    def beta(self, a: float, b: float, size: int | None = None) -> Any:
        assert a == b
        values = np.round(betaincinv(a, a, self.quantile), 6)
        return values[0] if size is None else values

    def randint(self, low: int, high: int, size: int | None = None) -> int:
        length, place = self.ends.pop(0)
        assert (low, high, size) == (0, length, None)
        return int(place)


@pytest.mark.parametrize(
    ("per", "mode"), [("batch", "batch"), ("pair", "pair"), ("sample", "elem")]
)
def test_it_is_timms_fed_with_the_same_draws(
    per: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Mixing(mixup=0.4, cutmix=1.0, probability=0.8, switch=0.4, per=per)
    theirs = timm_mixup.Mixup(
        0.4, 1.0, prob=0.8, switch_prob=0.4, mode=mode, label_smoothing=0.0, num_classes=CLASSES
    )
    seen = set()
    for step in range(30 if per == "batch" else 2):
        monkeypatch.setitem(PLACE, "step", step)
        x_B, target_B = ours(*batch(range(24)), rows=range(24), **PLACE)
        for row in range(0, 24, 2):
            fed = Fed({"batch": [0], "pair": [row // 2], "sample": [row, row + 1]}[per], mode)
            with monkeypatch.context() as patch:
                patch.setattr(timm_mixup, "np", fed)
                expected_x, expected_target = theirs(*batch(range(row, row + 2)))
            torch.testing.assert_close(x_B[row : row + 2], expected_x, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(target_B[row : row + 2], expected_target, rtol=0, atol=1e-6)
            assert not fed.ends
            for found, plain in zip(expected_x, batch(range(row, row + 2))[0], strict=True):
                seen.add(
                    "same"
                    if torch.equal(found, plain)
                    else "cut"
                    if (found == plain).any()
                    else "mixed"
                )
    assert seen == {"same", "cut", "mixed"}


@pytest.mark.parametrize("per", ["batch", "pair", "sample"])
def test_micro_batches_and_ranks_do_not_matter(per: str) -> None:
    mixing = Mixing(mixup=0.3, cutmix=0.7, per=per)
    for step in range(4):
        place = PLACE | {"step": step}
        x_B, target_B = mixing(*batch(range(24)), rows=range(24), **place)
        for micro in (2, 6, 8):
            parts = [
                mixing(*batch(rows), rows=rows, **place)
                for rows in (range(i, i + micro) for i in range(0, 24, micro))
            ]
            assert torch.equal(torch.cat([x for x, _ in parts]), x_B)
            assert torch.equal(torch.cat([target for _, target in parts]), target_B)


def test_seed_and_step_draw_anew() -> None:
    mixed = [
        Mixing(mixup=1.0, per="sample")(*batch(range(8)), rows=range(8), **PLACE | place)[0]
        for place in ({}, {"seed": 4}, {"step": 42})
    ]
    assert len({x_B.numpy().tobytes() for x_B in mixed}) == 3


def test_recordings_are_cut_in_space_alone() -> None:
    x_B = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 3, 2, H, W).clone()
    for step in range(5):
        mixed_B, shares_BK = Mixing(cutmix=1.0)(
            x_B, torch.tensor([0, 1]), rows=range(2), **PLACE | {"step": step}
        )
        assert (mixed_B == mixed_B[:, :1, :1]).all()
        torch.testing.assert_close(mixed_B[0].mean(), shares_BK[0, 1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "mixup and cutmix must be 0 or more, .* above 0; got mixup=0.0, cutmix=0.0"),
        ({"mixup": -1.0, "cutmix": 1.0}, "mixup and cutmix must be 0 or more, .* got mixup=-1.0"),
        (
            {"mixup": 1.0, "probability": 0.0},
            r"probability must be above 0 and at most 1; got 0\.0",
        ),
        ({"mixup": 1.0, "switch": 0.5}, "switch .* needs both mixup and cutmix"),
        (
            {"mixup": 1.0, "cutmix": 1.0, "switch": 1.0},
            r"switch must be between 0 and 1, .* switch=1\.0",
        ),
        ({"mixup": 1.0, "per": "elem"}, "per must be 'batch', 'pair' or 'sample'; got 'elem'"),
    ],
)
def test_what_mixes_nothing_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^Mixing: {said}"):
        Mixing(**wrong)


def test_an_odd_micro_batch_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"^Mixing: the size of a micro-batch must be even, .*; got 3$"
    ):
        Mixing(mixup=1.0).check(micro_batch=3)
