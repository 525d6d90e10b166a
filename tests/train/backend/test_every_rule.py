"""Two DeepSpeed ranks, ZeRO-0/1/2, against plain torch on the joint batch: weights and the rule's
own state of every rule, 1-bit weights, HLOP in its second task, and still images.
"""

# T time, B batch, C channels, H W pixels

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pipeline.models.transforms import binarized
from pipeline.recipe.recipe import spec
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.hlop import HLOP
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.synapse import Conv2d
from pipeline.train.backend.base import OptimizerOf
from pipeline.train.backend.collectives import Ranks, drifted
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.build import build_optimizer
from pipeline.train.loop import MicroBatch
from pipeline.train.transfer import channels_last, use_channels_last
from tests.helpers.joint import by_hand, distance, found_alike, learn, sgd, steps
from tests.helpers.rule_cases import CASES, Case
from tests.helpers.rule_networks import batch, lif_network
from tests.helpers.silent import train
from tests.helpers.small import small_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIME, BATCH, RANKS, STEPS, STAGES = 4, 8, 2, 3, (0, 1, 2)
# Stages of ZeRO, each with the micro-batches that a batch is accumulated over. The few have every
# stage, and accumulation where a rank holds only a part of the state.
Splits = tuple[tuple[int, int], ...]
FEW: Splits = ((0, 1), (1, 2), (2, 2))
ALL: Splits = tuple(itertools.product(STAGES, (1, 2)))
few_or_all = pytest.mark.parametrize(
    "splits", [FEW, pytest.param(ALL, marks=pytest.mark.full)], ids=len
)
RECIPE = small_recipe(
    optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9, weight_decay=0.05)
)


def binary_network() -> nn.Module:
    return binarized(lif_network().float(), part="all_but_ends", weights="learnable")


BINARY = Case("1-bit weights", SLTT, SLTT, binary_network, {})


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    x_TBC, target_B = batch(TIME, size=BATCH * STEPS)
    rows = slice(step * BATCH, (step + 1) * BATCH)
    return x_TBC[:, rows].float(), target_B[rows]


def attached(case: Case, world: World) -> tuple[nn.Module, Rule, OptimizerOf]:
    model, rule = case.model().float(), case.rule()
    rule.attach(model, world=world, over_time=rule.over_time_choices[0])
    # A recipe's optimizer has settings of its own for the scales of 1-bit weights.
    return model, rule, partial(build_optimizer, RECIPE, rule=rule) if case is BINARY else sgd


def splits_of(rule: Rule, splits: Splits) -> list[tuple[int, int]]:
    """The splits of a rule. One that updates weights at every time step accumulates nothing."""
    most = 2 if rule.update == "batch" else 1
    return sorted({(zero, min(accumulation, most)) for zero, accumulation in splits})


def _rules(rank: int, ranks: int, *, splits: Splits) -> dict[tuple[str, int, int], float]:
    found, world = {}, World(seed=7, rank=rank, size=ranks, mean=Ranks(rank, ranks).mean)
    for case in (*CASES, BINARY):
        expected, expected_rule, optimizer_of = attached(case, World(seed=7))
        before = {name: p.detach().clone() for name, p in expected.named_parameters()}
        by_hand(expected_rule, expected, optimizer_of(expected), steps(global_batch, STEPS))
        moved = {n for n, p in expected.named_parameters() if (p - before[n]).abs().max() > 1e-4}
        assert moved, f"{case.name} learnt nothing"
        assert case is not BINARY or {"2.weight", "2.binarizer.scale"} <= moved
        for zero, accumulation in splits_of(expected_rule, splits):
            model, rule, optimizer_of = attached(case, world)
            micro = BATCH // ranks // accumulation
            backend = DeepSpeed(model, optimizer_of, micro_batch=micro, zero=zero)
            about = {"rank": rank, "ranks": ranks, "accumulation": accumulation}
            learn(rule, backend, steps(global_batch, STEPS), **about)
            # to the bit, as a run compares them
            apart = drifted((*model.parameters(), *rule.buffers()), Ranks(rank, ranks))
            gaps = distance(model, expected), distance(rule, expected_rule), float(len(apart))
            found[case.name, zero, accumulation] = max(gaps)
    return found


@few_or_all
def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path, splits: Splits) -> None:
    cases = [
        (case.name, *split) for case in (*CASES, BINARY) for split in splits_of(case.rule(), splits)
    ]
    found_alike(partial(_rules, splits=splits), tmp_path, cases, ranks=RANKS)


# ----------------------------------------------------------------------- HLOP in its second task

# In the first task nothing is projected yet. In the second the hooks that project, and those that
# keep vectors still, stand in front of DeepSpeed's own, which collect the gradient.

INNER = (BPTT, SLTT, OTTT)
SECOND_TASK = STEPS - 2  # two batches of it, so that its momentum acts, and none of the task before


def attached_hlop(inner: type, ranks: Ranks) -> tuple[nn.Module, HLOP]:
    model, rule = lif_network().float(), HLOP(inner(), rows=((3, 4, 3), (1, 2, 2)))
    rule.attach(model, world=World(seed=7, rank=ranks.rank, size=ranks.size, mean=ranks.mean))
    return model, rule


def train_two_tasks(
    model: nn.Module, rule: HLOP, batch: Callable[[int], object], forget: Callable[[], object]
) -> float:
    """Returns how far the last batch moved weights within the frozen subspace, and biases at all.
    It must have learnt something.
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


def joint_hlop(inner: type) -> tuple[nn.Module, HLOP]:
    model, rule = attached_hlop(inner, Ranks())
    optimizers = [sgd(model)]
    wrong = train_two_tasks(
        model,
        rule,
        lambda step: by_hand(rule, model, optimizers[-1], [(step, global_batch(step))]),
        lambda: optimizers.append(sgd(model)),
    )
    assert wrong < 1e-7
    return model, rule


def _hlop(rank: int, ranks: int, *, splits: Splits) -> dict[tuple[str, int, int], float]:
    found = {}
    for inner in INNER:
        expected, expected_rule = joint_hlop(inner)
        for zero, accumulation in splits:
            model, rule = attached_hlop(inner, Ranks(rank, ranks))
            backend = DeepSpeed(model, sgd, micro_batch=BATCH // ranks // accumulation, zero=zero)
            about = {"rank": rank, "ranks": ranks, "accumulation": accumulation}

            def batch(step: int, rule=rule, backend=backend, about=about) -> None:
                learn(rule, backend, [(step, global_batch(step))], **about)

            wrong = train_two_tasks(model, rule, batch, backend.reset_optimizer)
            gaps = distance(model, expected), distance(rule, expected_rule), 10 * wrong
            found[inner.__name__, zero, accumulation] = max(gaps)
    return found


@few_or_all
def test_two_ranks_project_as_one(tmp_path: Path, splits: Splits) -> None:
    cases = [(inner.__name__, *split) for inner in INNER for split in splits]
    found_alike(partial(_hlop, splits=splits), tmp_path, cases, ranks=RANKS)


# ----------------------------------------------------------------------------------- still images

ROWS = ((0, 5), (5, 8))  # the ranks hold unequal shares
# of ZeRO, and of the channels in the memory of images and weights
STILL_CASES = tuple(itertools.product(STAGES, ("channels first", "channels last")))
RULES: dict[str, Callable[[], Rule]] = {
    "SLTT": SLTT,
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
    "truncated": lambda: BPTT(truncate=2),
}


def still_network(between: Literal["rank", "world"]) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        StaticInput(Conv2d(2, 6, 3, padding=1), BatchNorm(6, between=between)),
        LIF(),
        Conv2d(6, 4, 3, stride=2, padding=1),
        LIF(threshold=0.3),
        nn.Flatten(2),
        nn.Linear(36, 5),
    )


def images(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    x_BCHW = torch.randn(BATCH, 2, 6, 6, generator=draw)
    return repeat(x_BCHW, TIME), torch.randint(5, (BATCH,), generator=draw)


def _still_images(rank: int, ranks: int) -> dict[tuple[str, int, str], float]:
    """The first layer runs once for all time steps; plain torch gets a recording."""
    found, (first, end) = {}, ROWS[rank]

    def micro_batch(step: int, order: str) -> MicroBatch:
        x_TB, target_B = images(step)
        x_B = x_TB[0, first:end]
        x_TB = repeat(channels_last(x_B) if order == "channels last" else x_B, TIME)
        return MicroBatch(x_TB, target_B[first:end], range(first, end), (end - first) / BATCH)

    for name, rule_of in RULES.items():
        expected, rule = still_network("rank"), rule_of()
        rule.attach(expected, world=World(seed=7))
        recordings = ((step, (x_TB.contiguous(), y_B)) for step, (x_TB, y_B) in steps(images, 2))
        by_hand(rule, expected, sgd(expected, lr=0.2), recordings)
        assert distance(expected, still_network("rank")) > 1e-3
        for zero, order in STILL_CASES:
            model, calls, rule = still_network("world"), Counter[str](), rule_of()
            if order == "channels last":
                use_channels_last(model)
            rule.attach(model, world=World(seed=7, rank=rank, size=ranks))
            count = lambda *_, calls=calls: calls.update(forward=1)
            model.get_submodule("0.0").register_forward_hook(count)
            backend = DeepSpeed(model, partial(sgd, lr=0.2), micro_batch=4, zero=zero)
            train(rule, backend, ((step, [micro_batch(step, order)]) for step in range(2)))
            assert calls == {"forward": 2}, f"the first layer of {name} ran {calls} in two batches"
            is_last = not model.get_parameter("2.weight").is_contiguous()
            assert is_last == (order == "channels last" and zero == 0)
            found[name, zero, order] = distance(model, expected)
    return found


def test_still_images_on_two_ranks_equal_recordings_of_the_joint_batch(tmp_path: Path) -> None:
    cases = [(name, zero, order) for name in RULES for zero, order in STILL_CASES]
    found_alike(_still_images, tmp_path, cases, ranks=RANKS)
