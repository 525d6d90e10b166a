"""What must not be learnt from: told apart on every rank alike, and gone without a trace."""

import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.measure.clock import Clock
from pipeline.rules.base import Rule
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.sltt import SLTT
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.base import Backend, clone_tensors
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.ema import EMABackend
from pipeline.train.backend.plain import Plain
from pipeline.train.guards import anomaly as guard
from pipeline.train.guards.anomaly import WINDOW, AnomalyGuard
from pipeline.train.loop import MicroBatch
from pipeline.train.recovery import Rollback
from tests.helpers.processes import run_ranks
from tests.helpers.silent import NoMeters, train


class Trained:
    """A network with momentum and dropout, under SLTT with running statistics, and its guard;
    `batch` trains on one.

    `decides_on_device`: whether the optimizer skips a step by a flag, as on a GPU.
    """

    def __init__(
        self,
        ranks: Ranks = Ranks(),
        *,
        rule: Rule | None = None,
        decides_on_device: bool = False,
        ema: bool = False,
        **guard: Any,
    ) -> None:
        torch.manual_seed(0)
        norm = BatchNorm(6) if rule is None else nn.Identity()
        network = nn.Sequential(Linear(4, 6), norm, LIF(threshold=0.3), Dropout(0.3), Linear(6, 3))
        self.rule = SLTT() if rule is None else rule
        self.rule.attach(network)
        plain = Plain(
            network,
            lambda network: torch.optim.SGD(
                network.parameters(), lr=0.1, momentum=0.9, fused=decides_on_device
            ),
        )
        self.backend: Backend = EMABackend(plain, decay=0.9) if ema else plain
        assert self.backend.skips_on_device is decides_on_device
        self.told: list[tuple[int, str]] = []
        self.guard = AnomalyGuard(
            self.backend, self.rule, ranks, on_skip=lambda *told: self.told.append(told), **guard
        )

    def batch(
        self, step: int, *, scale: float = 1.0, bad: bool = False, meters: NoMeters = NoMeters()
    ) -> None:
        torch.manual_seed(step)  # of dropout, too
        x_BC, target_B = torch.randn(8, 4), torch.randint(3, (8,))
        x_BC = x_BC.fill_(math.nan) if bad else x_BC * scale
        batches = [(step, [MicroBatch(repeat(x_BC, 3), target_B, range(8), 1.0)])]
        train(self.rule, self.backend, batches, meters, self.guard)

    def values(self) -> dict[str, Tensor]:
        momentum = self.backend.optimizer.state_dict()["state"]
        return {
            **{name: value.clone() for name, value in self.backend.network.state_dict().items()},
            **{f"momentum {index}": state["momentum_buffer"] for index, state in momentum.items()},
            **{f"rule {name}": value.clone() for name, value in self.rule.state_dict().items()},
            **{f"average {name}": value for name, value in self.averages().items()},
        }

    def averages(self) -> dict[str, Tensor]:
        return clone_tensors(self.backend.average) if isinstance(self.backend, EMABackend) else {}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RULES: dict[str, Callable[[], Rule | None]] = {
    "SLTT": lambda: None,
    "OPZO": OPZO,
    "DFA": lambda: OPZO("random"),
    "HLOP(OPZO)": lambda: HLOP(OPZO(), rows=((2, 3), (1, 1))),
}


@pytest.mark.parametrize("decides_on_device", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [0, 2])
def test_a_bad_batch_leaves_no_trace(rule: str, bad: int, decides_on_device: bool) -> None:
    """Of the rule either, which may have made its matrices for the very first."""
    about: Any = {"decides_on_device": decides_on_device, "ema": True}
    whole = Trained(rule=RULES[rule](), **about)
    for step in (step for step in range(6) if step != bad):
        whole.batch(step)
    hit = Trained(rule=RULES[rule](), **about)
    for step in range(6):
        before = hit.rule.metrics()
        hit.batch(step, bad=step == bad)
        assert step != bad or decides_on_device or hit.rule.metrics() == before
    hit.guard.settle()
    for trained in (hit, whole):
        trained.rule.metrics()  # HLOP writes down what it is asked for
    assert same(hit.values(), whole.values())
    assert hit.told == [
        (bad, "its gradient is not finite on 1 of 1 worker")
    ]  # spikes hide it from the loss
    assert all(p.grad is None for p in hit.backend.network.parameters())


def test_what_is_copied_before_a_batch_is_charged_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """HLOP's and OPZO's state is large."""
    made, original, clock, meters = Trained(), guard.clone_tensors, Clock(), NoMeters()
    monkeypatch.setattr(guard, "clone_tensors", lambda values: time.sleep(0.05) or original(values))
    monkeypatch.setattr(meters, "batch", lambda step: clock.batch())
    monkeypatch.setattr(meters, "part", clock.part)
    made.batch(0, meters=meters)
    [seconds] = clock.take()
    assert seconds["metrics"] >= 0.05 and made.guard._kept is None


def test_a_gradient_that_is_not_finite_is_bad_though_the_loss_is() -> None:
    hit = Trained()
    hit.batch(0)
    before = hit.values()
    hit.backend.network[0].weight.register_hook(lambda g: g * math.inf)  # type: ignore[index]
    hit.batch(1)
    assert same(hit.values(), before)
    assert hit.told == [(1, "its gradient is not finite on 1 of 1 worker")]


def test_a_device_that_decides_is_read_one_batch_later() -> None:
    hit = Trained(decides_on_device=True, max_skips=1, spike=3.0)
    hit.batch(0, bad=True)
    assert [step for step, _ in hit.told] == [0]  # nothing was trained before
    hit.batch(1)
    hit.batch(2, bad=True)
    assert [step for step, _ in hit.told] == [0]
    hit.batch(3)
    assert [step for step, _ in hit.told] == [0, 2]
    hit.batch(4, bad=True)
    assert hit.guard.state_dict()["in_a_row"] == 1  # a checkpoint reads what is left
    assert [step for step, _ in hit.told] == [0, 2, 4]
    hit.batch(5, bad=True)
    with pytest.raises(Rollback, match="batch 5: its gradient is not finite"):
        hit.batch(6)


def test_too_many_in_a_row_lead_back() -> None:
    hit = Trained(max_skips=2)
    for step in range(5):
        hit.batch(step, bad=step != 2)  # a good one in between
    with pytest.raises(Rollback, match="batch 5: its gradient is not finite") as back:
        hit.batch(5, bad=True)
    assert back.value.step == 5 and [step for step, _ in hit.told] == [0, 1, 3, 4]

    hit = Trained(can_undo=False)  # where nothing can be taken back the first leads back
    hit.batch(0)
    with pytest.raises(Rollback, match="batch 1"):
        hit.batch(1, bad=True)


@pytest.mark.parametrize("decides_on_device", [False, True])
def test_a_loss_that_leaps_is_bad_once_there_is_something_to_hold_it_against(
    decides_on_device: bool,
) -> None:
    hit = Trained(spike=3.0, decides_on_device=decides_on_device)
    hit.batch(0, scale=1e4)  # nothing is usual yet
    for step in range(1, WINDOW):
        hit.batch(step)
    before = hit.values()
    network: Any = hit.backend.network
    network[4].bias.data.copy_(torch.tensor([60.0, 0.0, 0.0]))
    leapt = hit.values()
    usual = hit.guard.state_dict()["losses"]
    hit.batch(WINDOW)
    hit.guard.settle()
    assert same(hit.values(), leapt) and not same(before, leapt)
    [(step, reason)] = hit.told
    assert step == WINDOW and re.fullmatch(
        rf"its loss of \d+\.\d+ is more than 3 times the median of {statistics.median(usual):.4g}",
        reason,
    )


def test_what_it_has_seen_is_part_of_a_checkpoint_and_forgotten_at_a_new_task() -> None:
    one = Trained(max_skips=2)
    one.batch(0)
    one.batch(1, bad=True)
    seen = one.guard.state_dict()
    assert (seen["in_a_row"], len(seen["losses"])) == (1, 1)
    other = Trained(max_skips=2, state=seen)
    assert other.guard.state_dict() == seen
    other.batch(2, bad=True)
    with pytest.raises(Rollback):
        other.batch(3, bad=True)
    one.guard.begin_task()
    assert one.guard.state_dict() == {"in_a_row": 0, "losses": []}
    for step in (2, 3):
        one.batch(step, bad=True)
    assert [step for step, _ in one.told] == [1, 2, 3]


def _one_rank_meets_it(rank: int, size: int) -> dict[str, Any]:
    hit = Trained(Ranks(rank, size))
    for step in range(3):
        hit.batch(step, bad=(rank, step) == (1, 1))
    return {"told": hit.told, "weights": hit.values()["0.weight"].tolist()}


@pytest.mark.distributed
def test_every_rank_skips_what_one_rank_met(tmp_path: Path) -> None:
    one, other = run_ranks(_one_rank_meets_it, 2, tmp_path)
    assert one["told"] == other["told"] == [(1, "its gradient is not finite on 1 of 2 workers")]
    assert one["weights"] == other["weights"]
