"""Every rule on two DeepSpeed ranks, ZeRO-0/1/2, against plain torch on the joint batch: weights
and the rule's own state.
"""

# T time, B batch

from pathlib import Path

import pytest
from torch import Tensor, nn

from pipeline.rules.base import Rule, World
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.guards.replica_check import drifted
from tests.helpers.joint import by_hand, distance, found_alike, learn, sgd, steps
from tests.helpers.rule_cases import CASES, Case
from tests.helpers.rule_networks import batch

pytestmark = pytest.mark.distributed

TIME, BATCH, RANKS, STEPS, STAGES = 4, 8, 2, 3, (0, 1, 2)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    x_TBC, target_B = batch(TIME, size=BATCH * STEPS)
    rows = slice(step * BATCH, (step + 1) * BATCH)
    return x_TBC[:, rows].float(), target_B[rows]


def attached(case: Case, world: World) -> tuple[nn.Module, Rule]:
    model, rule = case.model().float(), case.rule()
    rule.attach(model, world=world, over_time=rule.over_time_choices[0])
    return model, rule


def accumulations(rule: Rule) -> tuple[int, ...]:
    return (1, 2) if rule.update == "batch" else (1,)


def _ranks(rank: int, ranks: int) -> dict[tuple[str, int, int], float]:
    found, world = {}, World(seed=7, rank=rank, size=ranks, mean=Ranks(rank, ranks).mean)
    for case in CASES:
        expected, expected_rule = attached(case, World(seed=7))
        by_hand(expected_rule, expected, sgd(expected), steps(global_batch, STEPS))
        moved = distance(case.model().float(), expected)
        assert moved > 1e-4, f"{case.name} learnt nothing"
        for zero in STAGES:
            for accumulation in accumulations(expected_rule):
                model, rule = attached(case, world)
                micro = BATCH // ranks // accumulation
                backend = DeepSpeed(model, sgd, micro_batch=micro, zero=zero)
                about = {"rank": rank, "ranks": ranks, "accumulation": accumulation}
                learn(rule, backend, steps(global_batch, STEPS), **about)
                # to the bit, as a run compares them
                apart = drifted((*model.parameters(), *rule.buffers()), Ranks(rank, ranks))
                gaps = distance(model, expected), distance(rule, expected_rule), float(len(apart))
                found[case.name, zero, accumulation] = max(gaps)
    return found


@pytest.mark.timeout(600)
def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path) -> None:
    cases = [
        (case.name, zero, accumulation)
        for case in CASES
        for zero in STAGES
        for accumulation in accumulations(case.rule())
    ]
    found_alike(_ranks, tmp_path, cases, ranks=RANKS)
