"""HLOP in its second task on two DeepSpeed ranks, ZeRO-0/1/2, against plain torch on the joint
batch.

`test_every_rule.py` has it in its first, where nothing is projected yet. Here the hooks that
project, and those that keep vectors still, stand in front of DeepSpeed's own, which collect the
gradient.
"""

# T time, B batch

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from pipeline.rules.base import World
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.deepspeed import DeepSpeed
from tests.helpers.joint import by_hand, distance, found_alike, learn, sgd
from tests.helpers.rule_networks import lif_network
from tests.train.backend.test_every_rule import BATCH, RANKS, STAGES, STEPS, global_batch

pytestmark = pytest.mark.distributed

INNER = (BPTT, SLTT, OTTT)
SECOND_TASK = STEPS - 2  # two batches of it, so that its momentum acts, and none of the task before


def attached(inner: type, ranks: Ranks) -> tuple[nn.Module, HLOP]:
    model, rule = lif_network().float(), HLOP(inner(), rows=((3, 4, 3), (1, 2, 2)))
    rule.attach(model, world=World(seed=7, rank=ranks.rank, size=ranks.size, mean=ranks.mean))
    return model, rule


def trained(
    model: nn.Module, rule: HLOP, batch: Callable[[int], object], forget: Callable[[], object]
) -> float:
    """Train two tasks; returns how far the last batch moved weights within the frozen subspace,
    and biases at all. It must have learnt something.
    """
    before: dict[str, Tensor] = {}
    for step in range(STEPS):
        if step == SECOND_TASK:
            rule.start_task(model, 1)
            forget()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batch(step)
    changes = {name: value - before[name] for name, value in model.state_dict().items()}
    assert min(changes[f"{name}.weight"].abs().max() for name in ("0", "2", "4")) > 1e-4
    inside = [
        changes[f"{name}.weight"] @ rule.subspaces[index].get_buffer("old").T
        for index, name in enumerate(("0", "2", "4"))
    ]
    parts = (*inside, *(changes[f"{name}.bias"] for name in ("0", "2", "4")))
    return max(float(part.abs().max()) for part in parts)


def reference(inner: type) -> tuple[nn.Module, HLOP]:
    model, rule = attached(inner, Ranks())
    optimizers = [sgd(model)]
    wrong = trained(
        model,
        rule,
        lambda step: by_hand(rule, model, optimizers[-1], [(step, global_batch(step))]),
        lambda: optimizers.append(sgd(model)),
    )
    assert wrong < 1e-7
    return model, rule


def _ranks(rank: int, ranks: int) -> dict[tuple[str, int, int], float]:
    found = {}
    for inner in INNER:
        expected, expected_rule = reference(inner)
        for zero, accumulation in itertools.product(STAGES, (1, 2)):
            model, rule = attached(inner, Ranks(rank, ranks))
            backend = DeepSpeed(model, sgd, micro_batch=BATCH // ranks // accumulation, zero=zero)
            about = {"rank": rank, "ranks": ranks, "accumulation": accumulation}

            def batch(step: int, rule=rule, backend=backend, about=about) -> None:
                learn(rule, backend, [(step, global_batch(step))], **about)

            wrong = trained(model, rule, batch, backend.forget)
            gaps = distance(model, expected), distance(rule, expected_rule), 10 * wrong
            found[inner.__name__, zero, accumulation] = max(gaps)
    return found


def test_two_ranks_project_as_one(tmp_path: Path) -> None:
    cases = itertools.product([inner.__name__ for inner in INNER], STAGES, (1, 2))
    found_alike(_ranks, tmp_path, cases, ranks=RANKS)
