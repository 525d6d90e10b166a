"""Still images on two DeepSpeed ranks, their first layer computed once, against plain torch on the
joint batch as a recording.
"""

# T time, B batch, C channels, H W pixels

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.synapse import Conv2d
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.loop import MicroBatch
from tests.helpers.joint import by_hand, distance, found_alike, sgd
from tests.helpers.silent import train

pytestmark = pytest.mark.distributed

TIME, STEPS, ROWS = 4, 2, ((0, 5), (5, 8))  # the ranks hold unequal shares
RULES: dict[str, Callable[[], Rule]] = {
    "SLTT": SLTT,
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
    "truncated": lambda: BPTT(truncate=2),
}
optimizer_of = partial(sgd, lr=0.2)


def network(between: Literal["rank", "world"]) -> nn.Module:
    torch.manual_seed(3)
    first = StaticInput(Conv2d(2, 6, 3, padding=1), BatchNorm(6, between=between))
    return nn.Sequential(
        first,
        LIF(),
        Conv2d(6, 4, 3, stride=2, padding=1),
        LIF(threshold=0.3),
        nn.Flatten(2),
        nn.Linear(36, 5),
    )


def images(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    x_BCHW, target_B = (
        torch.randn(8, 2, 6, 6, generator=draw),
        torch.randint(5, (8,), generator=draw),
    )
    return repeat(x_BCHW, TIME), target_B


def ours(rule: Rule, rank: int, *, zero: int) -> tuple[nn.Module, Counter[str]]:
    model, calls = network("world"), Counter[str]()
    rule.attach(model, world=World(seed=7, rank=rank, size=2))
    model.get_submodule("0.0").register_forward_hook(lambda *_: calls.update(forward=1))
    first, end = ROWS[rank]

    def micro_batch(step: int) -> MicroBatch:
        x_TB, target_B = images(step)
        x_TB = repeat(x_TB[0, first:end], TIME)
        return MicroBatch(x_TB, target_B[first:end], range(first, end), (end - first) / 8)

    backend = DeepSpeed(model, optimizer_of, micro_batch=4, zero=zero)
    train(rule, backend, ((step, [micro_batch(step)]) for step in range(STEPS)))
    return model, calls


def _ranks(rank: int, ranks: int) -> dict[tuple[str, int], float]:
    found = {}
    for name, rule_of in RULES.items():
        expected, rule = network("rank"), rule_of()
        rule.attach(expected, world=World(seed=7))
        recordings = ((step, images(step)) for step in range(STEPS))
        contiguous = ((step, (x_TB.contiguous(), y_B)) for step, (x_TB, y_B) in recordings)
        by_hand(rule, expected, optimizer_of(expected), contiguous)
        assert distance(expected, network("rank")) > 1e-3
        for zero in (1, 2):
            model, calls = ours(rule_of(), rank, zero=zero)
            assert calls == {"forward": STEPS}, (
                f"the first layer of {name} must run once a batch; got {calls}"
            )
            found[name, zero] = distance(model, expected)
    return found


def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path) -> None:
    found_alike(_ranks, tmp_path, [(name, zero) for name in RULES for zero in (1, 2)])
