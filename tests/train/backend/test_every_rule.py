"""Every rule on two DeepSpeed ranks, ZeRO-0/1/2, against plain torch on the joint batch: weights
and the rule's own state.
"""

# T time, B batch

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule, World
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.guards.replica_check import drifted
from pipeline.train.objective import CrossEntropy
from tests.helpers.processes import run_ranks
from tests.helpers.rule_cases import CASES, Case
from tests.helpers.rule_networks import batch
from tests.helpers.silent import micro_batches, train

pytestmark = pytest.mark.distributed

TIME, BATCH, RANKS, STEPS, STAGES = 4, 8, 2, 3, (0, 1, 2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    x_TBC, target_B = batch(TIME, size=BATCH * STEPS)
    rows = slice(step * BATCH, (step + 1) * BATCH)
    return x_TBC[:, rows].float(), target_B[rows]


def reference(case: Case) -> tuple[nn.Module, Rule]:
    model, rule = case.model().float(), case.rule()
    rule.attach(model, world=World(seed=7), over_time=rule.over_time_choices[0])
    optimizer = sgd(model)
    for step in range(STEPS):
        x_TB, target_B = global_batch(step)
        for objective in rule.loss_terms(model, x_TB, CrossEntropy()(target_B), step=step):
            if objective.backward is not None:
                objective.backward.backward()
            if rule.update == "step":
                optimizer.step()
                optimizer.zero_grad()
        rule.end_of_batch()
        if rule.update == "batch":
            optimizer.step()
            optimizer.zero_grad()
    return model, rule


def on_deepspeed(case: Case, rank: int, *, zero: int, accumulation: int) -> tuple[nn.Module, Rule]:
    model, rule = case.model().float(), case.rule()
    world = World(seed=7, rank=rank, size=RANKS, mean=Ranks(rank, RANKS).mean)
    rule.attach(model, world=world, over_time=rule.over_time_choices[0])
    micro = BATCH // RANKS // accumulation
    backend = DeepSpeed(model, sgd, micro_batch=micro, zero=zero)

    split = {"rank": rank, "ranks": RANKS, "accumulation": accumulation}
    batches = ((step, micro_batches(*global_batch(step), **split)) for step in range(STEPS))
    train(rule, backend, batches)
    return model, rule


def distance(one: nn.Module, other: nn.Module) -> float:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    return max(
        (float((a[key].double() - b[key].double()).abs().max()) for key in a if a[key].numel()),
        default=0.0,
    )


def _ranks(rank: int, ranks: int) -> dict[tuple[str, int, int], float]:
    found = {}
    for case in CASES:
        expected, expected_rule = reference(case)
        moved = distance(case.model().float(), expected)
        assert moved > 1e-4, f"{case.name} learnt nothing"
        for zero in STAGES:
            for accumulation in (1, 2) if expected_rule.update == "batch" else (1,):
                model, rule = on_deepspeed(case, rank, zero=zero, accumulation=accumulation)
                apart = drifted(
                    (*model.parameters(), *rule.buffers()), Ranks(rank, ranks)
                )  # to the bit, as a run compares them
                gaps = distance(model, expected), distance(rule, expected_rule), float(len(apart))
                found[case.name, zero, accumulation] = max(gaps)
    return found


@pytest.mark.timeout(600)
def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path) -> None:
    found = run_ranks(_ranks, RANKS, tmp_path)
    assert {name for name, _, _ in found[0]} == {case.name for case in CASES}
    wrong = {case: gap for result in found for case, gap in result.items() if not gap <= 1e-6}
    assert not wrong
