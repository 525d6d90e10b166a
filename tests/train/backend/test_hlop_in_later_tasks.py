"""HLOP in its second task on two DeepSpeed ranks, ZeRO-0/1/2, against plain torch on the joint
batch.

`test_every_rule.py` has it in its first, where nothing is projected yet. Here the hooks that
project, and those that keep vectors still, stand in front of DeepSpeed's own, which collect the
gradient.
"""

# T time, B batch

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.rules.base import World
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.objective import CrossEntropy
from tests.helpers.processes import run_ranks
from tests.helpers.rule_networks import learn, lif_network
from tests.helpers.silent import micro_batches, train
from tests.train.backend.test_every_rule import BATCH, RANKS, STAGES, STEPS, distance, global_batch

pytestmark = pytest.mark.distributed

INNER = (BPTT, SLTT, OTTT)
SECOND_TASK = STEPS - 2  # two batches of it, so that its momentum acts, and none of the task before


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def attached(inner: type, ranks: Ranks) -> tuple[nn.Module, HLOP]:
    model, rule = lif_network().float(), HLOP(inner(), rows=((3, 4, 3), (1, 2, 2)))
    rule.attach(model, world=World(seed=7, rank=ranks.rank, size=ranks.size, mean=ranks.mean))
    return model, rule


def reference(inner: type) -> tuple[nn.Module, HLOP]:
    model, rule = attached(inner, Ranks())
    optimizer, before = sgd(model), {}
    for step in range(STEPS):
        before = begin(rule, model, step)
        if step == SECOND_TASK:
            optimizer = sgd(model)
        x_TB, target_B = global_batch(step)
        learn(rule.loss_terms(model, x_TB, CrossEntropy()(target_B), step=step))
        rule.end_of_batch()
        optimizer.step()
        optimizer.zero_grad()
    assert moved_where_it_must_not(model, rule, before) < 1e-7
    return model, rule


def on_deepspeed(
    inner: type, rank: int, *, zero: int, accumulation: int
) -> tuple[nn.Module, HLOP, float]:
    model, rule = attached(inner, Ranks(rank, RANKS))
    micro, before = BATCH // RANKS // accumulation, {}
    backend = DeepSpeed(model, sgd, micro_batch=micro, zero=zero)

    split = {"rank": rank, "ranks": RANKS, "accumulation": accumulation}
    for step in range(STEPS):
        before = begin(rule, model, step)
        if step == SECOND_TASK:
            backend.forget()
        train(rule, backend, [(step, micro_batches(*global_batch(step), **split))])
    return model, rule, moved_where_it_must_not(model, rule, before)


def begin(rule: HLOP, model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    if step == SECOND_TASK:
        rule.start_task(model, 1)
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved_where_it_must_not(model: nn.Module, rule: HLOP, before: dict[str, torch.Tensor]) -> float:
    """Of the last batch: how far weights moved within the frozen subspace, and biases at all. It
    must have learnt something.
    """
    changes = {name: value - before[name] for name, value in model.state_dict().items()}
    assert min(changes[f"{name}.weight"].abs().max() for name in ("0", "2", "4")) > 1e-4
    inside = [
        changes[f"{name}.weight"] @ rule.subspaces[index].get_buffer("old").T
        for index, name in enumerate(("0", "2", "4"))
    ]
    return max(
        float(part.abs().max())
        for part in (*inside, *(changes[f"{name}.bias"] for name in ("0", "2", "4")))
    )


def _ranks(rank: int, ranks: int) -> dict[tuple[str, int, int], float]:
    found = {}
    for inner in INNER:
        expected, expected_rule = reference(inner)
        for zero in STAGES:
            for accumulation in (1, 2):
                model, rule, wrong = on_deepspeed(inner, rank, zero=zero, accumulation=accumulation)
                found[inner.__name__, zero, accumulation] = max(
                    distance(model, expected), distance(rule, expected_rule), 10 * wrong
                )
    return found


def test_two_ranks_project_as_one(tmp_path: Path) -> None:
    found = run_ranks(_ranks, RANKS, tmp_path)
    assert len(found[0]) == len(INNER) * len(STAGES) * 2
    wrong = {case: gap for result in found for case, gap in result.items() if not gap <= 1e-6}
    assert not wrong
