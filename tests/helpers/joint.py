"""Ranks against plain torch on the joint batch: the reference, and how far a network is from it."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule
from pipeline.train.backend.base import Backend
from pipeline.train.objective import CrossEntropy
from tests.helpers.processes import run_ranks
from tests.helpers.silent import micro_batches, train

Batch = tuple[Tensor, Tensor]


def sgd(model: nn.Module, *, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def by_hand(
    rule: Rule,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[int, Batch]],
    *,
    clip: float = 0.0,
    forward: nn.Module | None = None,
    reduce: Callable[[nn.Module], object] = lambda model: None,
) -> None:
    """Train on each (step, global batch) in plain torch: no loop, no backend, no shares."""

    def move() -> None:
        reduce(model)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    for step, (x_TB, target_B) in batches:
        loss_fn = CrossEntropy()(target_B)
        for term in rule.loss_terms(forward or model, x_TB, loss_fn, step=step):
            if term.backward is not None:
                term.backward.backward()
            if rule.update == "step":
                move()
        rule.end_of_batch()
        if rule.update == "batch":
            move()


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two states."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    gaps = (float((a[key].double() - b[key].double()).abs().max()) for key in a if a[key].numel())
    return max(gaps, default=0.0)


def found_alike(
    work: Callable[..., dict[Any, float]], folder: Path, cases: Iterable[Any], *, ranks: int = 2
) -> None:
    """Check that on every rank `work` finds a gap of at most 1e-6 in each of the cases."""
    wanted = set(cases)
    for found in run_ranks(work, ranks, folder):
        assert found.keys() == wanted
        assert {case: gap for case, gap in found.items() if not gap <= 1e-6} == {}


def learn(
    rule: Rule,
    backend: Backend,
    batches: Iterable[tuple[int, Batch]],
    *,
    rank: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
) -> None:
    """Train on this rank's rows of each (step, global batch), by the product's own loop."""
    split = {"rank": rank, "ranks": ranks, "accumulation": accumulation}
    train(rule, backend, ((step, micro_batches(*batch, **split)) for step, batch in batches))


def steps(batch: Callable[[int], Batch], count: int, first: int = 0) -> Iterator[tuple[int, Batch]]:
    """(step, batch) of each step from `first` on, up to, without, `count`."""
    return ((step, batch(step)) for step in range(first, count))
