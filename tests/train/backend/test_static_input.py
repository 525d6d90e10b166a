"""Still images on two DeepSpeed ranks, their first layer computed once, against plain torch on the
joint batch as a recording.
"""

# T time, B batch, C channels, H W pixels

from collections import Counter
from collections.abc import Callable, Iterator
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
from pipeline.train.objective import CrossEntropy
from tests.helpers.processes import run_ranks
from tests.helpers.silent import train

pytestmark = pytest.mark.distributed

TIME, STEPS, ROWS = 4, 2, ((0, 5), (5, 8))  # the ranks hold unequal shares
RULES: dict[str, Callable[[], Rule]] = {
    "SLTT": SLTT,
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
    "truncated": lambda: BPTT(truncate=2),
}


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
    return torch.randn(8, 2, 6, 6, generator=draw), torch.randint(5, (8,), generator=draw)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def reference(rule: Rule) -> nn.Module:
    model = network("rank")
    rule.attach(model, world=World(seed=7))
    optimizer = sgd(model)
    for step in range(STEPS):
        x_BCHW, target_B = images(step)
        for objective in rule.loss_terms(
            model, repeat(x_BCHW, TIME).contiguous(), CrossEntropy()(target_B), step=step
        ):
            if objective.backward is not None:
                objective.backward.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def ours(rule: Rule, rank: int, *, zero: int) -> tuple[nn.Module, Counter[str]]:
    model = network("world")
    rule.attach(model, world=World(seed=7, rank=rank, size=2))
    calls: Counter[str] = Counter()
    model.get_submodule("0.0").register_forward_hook(lambda *_: calls.update(forward=1))
    backend = DeepSpeed(model, sgd, micro_batch=4, zero=zero)

    def micro_batches(step: int) -> Iterator[MicroBatch]:
        first, end = ROWS[rank]
        x_BCHW, target_B = images(step)
        yield MicroBatch(
            repeat(x_BCHW[first:end], TIME),
            target_B[first:end],
            range(first, end),
            (end - first) / 8,
        )

    batches = ((step, micro_batches(step)) for step in range(STEPS))
    train(rule, backend, batches)
    return model, calls


def _ranks(rank: int, ranks: int) -> dict[tuple[str, int], float]:
    found = {}
    for name, rule in RULES.items():
        expected = reference(rule()).state_dict()
        for zero in (1, 2):
            model, calls = ours(rule(), rank, zero=zero)
            assert calls["forward"] == STEPS, (
                f"the first layer of {name} must run once a batch; got {calls}"
            )
            found[name, zero] = max(
                float((value - expected[key]).abs().max())
                for key, value in model.state_dict().items()
            )
        assert (
            float((expected["0.0.weight"] - network("rank").state_dict()["0.0.weight"]).abs().max())
            > 1e-3
        )
    return found


def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path) -> None:
    found = run_ranks(_ranks, 2, tmp_path)
    assert len(found[0]) == len(RULES) * 2
    wrong = {case: gap for result in found for case, gap in result.items() if not gap <= 1e-6}
    assert not wrong
