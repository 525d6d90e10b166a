"""An optimizer that was made to forget is a new one, in plain torch and in every ZeRO stage on two
ranks; unused heads stay.
"""

# T time, B batch, C channels, K classes

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pipeline.models.mlp import mlp
from pipeline.models.transforms import multi_head, select_head
from pipeline.rules.base import World
from pipeline.rules.sltt import SLTT
from pipeline.train.backend.base import Backend
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.backend.plain import Plain
from tests.helpers.joint import by_hand, distance, found_alike, learn, steps

TIME, BATCH, RANKS, STEPS, TASKS = 2, 8, 2, 3, 3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"opt": "momentum", "lr": 0.2, "momentum": 0.9},
    "adamw": {"opt": "adamw", "lr": 0.01},
    "adagrad": {"opt": "adagrad", "lr": 0.05},
    "lamb": {"opt": "lamb", "lr": 0.02},
    "lookahead": {"opt": "lookahead_momentum", "lr": 0.2, "momentum": 0.9},
}
# Not LAMB: its trust ratio is one for each parameter in plain torch, and one for each rank's share
# under ZeRO.
SHARED = ("momentum", "adamw", "adagrad")


def network() -> nn.Module:
    torch.manual_seed(0)
    return multi_head(mlp(3, in_features=6, hidden=(8,)), heads=TASKS)


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return 2 * torch.randn(TIME, BATCH, 6, generator=draw), torch.randint(
        3, (BATCH,), generator=draw
    )


def optimizer_of(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: create_optimizer_v2(model, weight_decay=0.0, **OPTIMIZERS[name])


def reference(name: str, *, renewed: bool = True) -> nn.Module:
    """Plain torch on the joint batch; each task has its head and, where it is `renewed`, an
    optimizer that nobody has used.
    """
    model, rule = network(), SLTT()
    rule.attach(model, world=World())
    optimizer = optimizer_of(name)(model)
    for task in range(TASKS):
        select_head(model, task)
        if renewed:
            optimizer = optimizer_of(name)(model)
        by_hand(rule, model, optimizer, steps(batch, (task + 1) * STEPS, task * STEPS))
    return model


def ours(backend_of: Callable[[nn.Module], Backend], rank: int, ranks: int) -> nn.Module:
    """The product's loop on this rank's rows, one backend throughout."""
    model, rule = network(), SLTT()
    rule.attach(model, world=World(rank=rank, size=ranks))
    backend = backend_of(model)
    for task in range(TASKS):
        select_head(model, task)
        if task:
            backend.reset_optimizer()
        given = steps(batch, (task + 1) * STEPS, task * STEPS)
        learn(rule, backend, given, rank=rank, ranks=ranks)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_torch_goes_on_as_with_a_new_optimizer(name: str) -> None:
    assert (
        distance(ours(lambda model: Plain(model, optimizer_of(name)), 0, 1), reference(name)) == 0
    )
    assert distance(reference(name, renewed=False), reference(name)) > 1e-3, (
        "the reference does not see what is remembered"
    )


def test_settings_that_an_optimizer_changed_are_those_it_was_made_with() -> None:
    backend = Plain(network(), optimizer_of("momentum"))
    settings = lambda: [
        {key: value for key, value in group.items() if key != "params"}
        for group in backend.optimizer.param_groups
    ]
    before = settings()
    for group in backend.optimizer.param_groups:
        group["lr"], group["counted"] = 7.0, 3
    backend.reset_optimizer()
    assert settings() == before


def test_a_head_that_was_not_selected_keeps_its_bits() -> None:
    model = network()
    first = {key: value.clone() for key, value in model.state_dict().items()}
    select_head(model, 1)
    rule = SLTT()
    rule.attach(model)
    learn(rule, Plain(model, optimizer_of("adamw")), steps(batch, 1))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, first[key])}
    assert moved == {key for key in first if "heads.0" not in key and "heads.2" not in key}


def _ranks(rank: int, ranks: int) -> dict[tuple[str, str], float]:
    found = {}
    for name in SHARED:
        expected = reference(name)
        backends: dict[str, Callable[[nn.Module], Backend]] = {
            f"zero-{zero}": partial(
                DeepSpeed, optimizer_of=optimizer_of(name), micro_batch=BATCH // RANKS, zero=zero
            )
            for zero in (0, 1, 2)
        }
        backends["plain"] = partial(Plain, optimizer_of=optimizer_of(name))
        for stage, backend_of in backends.items():
            found[name, stage] = distance(ours(backend_of, rank, ranks), expected)
    return found


@pytest.mark.distributed
def test_two_ranks_go_on_as_plain_torch_with_a_new_optimizer(tmp_path: Path) -> None:
    cases = itertools.product(SHARED, ("zero-0", "zero-1", "zero-2", "plain"))
    found_alike(_ranks, tmp_path, cases, ranks=RANKS)
