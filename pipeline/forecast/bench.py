"""A recipe's network and one batch of its data, on which rules are tried before any training.

Every rule gets the same network with the same weights, those that training starts from, which rest,
and the same batch, through the loop that trains. Recipes with a teacher are tried with its labels
alone (asked.py has what it needs beside), and those of several tasks in their first.
"""

# T time, B batch

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.allocator import release_freed_memory
from pipeline.core.torch_settings import compute_in, settle
from pipeline.core.units import counted
from pipeline.forecast.batches import first_batch, noise
from pipeline.measure.fidelity import gradients
from pipeline.measure.memory import (
    device_here,
    is_out_of_memory,
    memory_now_bytes,
    peak_device_bytes,
    peak_rss_bytes,
    reset_peak_device_bytes,
    reset_peak_rss,
)
from pipeline.measure.memory_breakdown import Held, bytes_of, held
from pipeline.measure.meters import Instrument, Meters
from pipeline.measure.time_parts import REST
from pipeline.measure.totals import Totals
from pipeline.measure.traffic import Traffic
from pipeline.recipe import is_baseline
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.rules.spide import SPIDE
from pipeline.spiking.encode import over_steps
from pipeline.train.assemble import build_backend
from pipeline.train.backend.base import Backend
from pipeline.train.backend.plain import Plain
from pipeline.train.build import build_network
from pipeline.train.elastic import seed_everything
from pipeline.train.guards.anomaly import Unguarded
from pipeline.train.loop import MicroBatch, train
from pipeline.train.objective import Loss
from pipeline.train.optimizer import build_optimizer
from pipeline.train.tasks import tasks_of
from pipeline.train.weights import load_start

RULES = (
    spec(BPTT),
    spec(BPTT, chunk=1),
    spec(BPTT, recompute=True),
    spec(SLTT),
    spec(SLTT, k=1),
    spec(OTTT),
    spec(OPZO),
    spec(DSR),
    spec(IDE),
    spec(SPIDE),
)
UNTIMED = 3  # the first batch warms up, on the second bytes are counted, on the third operations
TIMED = 5
RESERVE = 0.1
"""of memory that is left to fragments, to workspaces and the driver, and to what a small batch does
not tell of a large one
"""
LEARNS_BY_ITSELF = (
    16  # batches that a rule with matrices of its own sees before its gradient is taken
)
DRAWS = 8
Behind = Literal["plain torch", "own backend"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one rule on one batch."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int
    """of what the network remembers and backward does not keep as well"""
    peak_memory_bytes: int | None
    """how far the process's resident memory, on a GPU what its allocator holds, rises in a batch:
    with gradients and what kernels take for their work, without the network and the batch itself;
    None where the kernel does not begin its peak anew"""
    rule_bytes: int
    """of what the rule learns by itself, and notes of a batch"""
    forward_s: float
    backward_s: float
    """of a batch, the median over batches; collectives and the optimizer are in neither"""
    loop_s: float
    """of what the loop does beside: transfer, metrics, and what no part is charged for"""
    operations: Mapping[str, Mapping[str, float]]
    """for each purpose, of training on one sample"""
    not_counted: tuple[str, ...] = ()
    """operations of torch that make products, which are in no count"""

    @property
    def kept_bytes(self) -> int:
        """For backward, and from one time step to the next: no storage twice."""
        return self.peak_saved_bytes + self.state_bytes

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def multiplications(self) -> float:
        return sum(work["multiplications"] for work in self.operations.values())

    @property
    def additions(self) -> float:
        return sum(work["additions"] for work in self.operations.values())


class DoesNotFit(ValueError):
    """Memory ended."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one rule needs of a machine on one batch; nothing is timed."""

    peak_saved_bytes: int
    state_bytes: int
    """of what the network remembers and backward does not keep as well"""
    rule_bytes: int
    """of what the rule learns by itself, and notes of a batch"""
    backward_calls: float
    traffic: Traffic


class Bench:
    """`recipe` with a batch of `batch_size` samples (None: what one worker would hold at a time),
    as a worker would have it.

    `source="noise"` makes the batch up, normal and of random classes, where the data need not be
    here: sizes are right then, and sparsity is not.

    Raises: ValueError for a network that does not fit the data or the weights that it starts from;
    DoesNotFit where the batch does not fit into memory; what the data refuse.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        batch_size: int | None = None,
        source: Literal["data", "noise"] = "data",
        threads: int = 1,
    ) -> None:
        self.recipe = replace(recipe, teacher=None, objective=_of_labels(recipe))
        self.samples = batch_size or recipe.split(1).micro_batch
        device = device_here()
        settle(threads, device)
        compute_in(recipe.precision, device)
        seed_everything(recipe.seed)
        network = build_network(self.recipe, tasks_of(self.recipe))
        if recipe.init is not None:
            load_start(network, Path(recipe.init))
        self.network = network.to(device)
        self.loss: Loss = self.recipe.objective.build()
        with self.in_memory(recipe.name):
            batch = (
                first_batch(recipe, self.samples)
                if source == "data"
                else noise(recipe, self.samples)
            )
            self.x_B = batch.x.to(device)
            self.x_TB = over_steps(self.x_B, recipe.time_steps)
            self.target_B = batch.target.to(device)

    def cost(self, rule: Spec, *, behind: Behind = "plain torch") -> Cost:
        """What it costs, by itself, or behind the backend that the recipe names, whose process
        group must exist.

        Raises: ValueError where the rule cannot train the network; DoesNotFit where its batch does
        not fit into memory."""
        made, meters, before = self._trained(rule, batches=UNTIMED + TIMED, behind=behind)
        peak = peak_device_bytes(self.x_B.device) if self.x_B.is_cuda else peak_rss_bytes()
        timed, totals = meters.clock.take()[UNTIMED:], meters.totals

        def median_s(*parts: str) -> float:
            return statistics.median(sum(seconds[part] for part in parts) for seconds in timed)

        return Cost(
            rule=made.label,
            **_bytes_of(made, totals),
            peak_memory_bytes=None if before is None else peak - before,
            forward_s=median_s("forward"),
            backward_s=median_s("backward"),
            loop_s=median_s("transfer", "metrics", REST),
            operations=totals.operations_per_sample(),
            not_counted=tuple(totals.not_counted),
        )

    def needs(self, rule: Spec) -> Needs:
        """Raises: ValueError as `cost`."""
        traffic = Traffic()
        made, meters, _ = self._trained(rule, batches=UNTIMED + 1, on_the_last=traffic)
        totals = meters.totals
        return Needs(
            **_bytes_of(made, totals),
            backward_calls=totals.backward_calls / totals.batches,
            traffic=traffic,
        )

    def gradients(self, rule: Spec) -> list[dict[str, Tensor]]:
        """What the rule gives each synapse, in fp32; of one that draws time steps, in several
        draws.

        They are kept off the card, where the next rule has to fit.

        Raises: ValueError where the rule refuses the network; DoesNotFit where its batch does not
        fit into memory."""
        made = self._made(rule)
        decides = made.inner if isinstance(made, HLOP) else made
        draws = DRAWS if isinstance(decides, SLTT) and decides.k is not None else 1
        batches = LEARNS_BY_ITSELF if isinstance(made, OPZO) else 1
        about = {
            "world": World(self.recipe.seed),
            "over_time": self.recipe.over_time,
            "batches": batches,
        }
        loss_for = partial(self.loss, self.target_B)
        found: list[dict[str, Tensor]] = []
        with self.in_memory(f"{made.label}'s gradient"):
            for step in range(draws):
                given = gradients(
                    self.network, self._made(rule), self.x_TB, loss_for, step=step, **about
                )
                found.append({name: g.cpu() for name, g in given.items()})
        return found

    def held(self) -> Held:
        """What training holds beside what a rule keeps of a batch."""
        network = copy.deepcopy(self.network)
        optimizer = build_optimizer(self.recipe, network, self.recipe.rule.build())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # which makes its state
        return held(network, optimizer)

    @contextmanager
    def in_memory(self, who: str) -> Iterator[None]:
        """Raises: DoesNotFit where memory ends inside."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"{who}: a batch must fit into memory; {counted(self.samples, 'sample')} at T ="
                f" {self.recipe.time_steps} do not"
            ) from None

    @property
    def batch_bytes(self) -> int:
        return bytes_of([self.x_TB, self.target_B])

    def attached(self, rule: Spec) -> tuple[nn.Module, Rule]:
        """A copy of the network, and the rule on it.

        Raises: ValueError where the rule cannot train it.
        """
        network, made = copy.deepcopy(self.network), self._made(rule)
        made.attach(network, world=World(self.recipe.seed), over_time=self.recipe.over_time)
        if made.calibration_batches:
            made.calibrate(network, [self.x_TB])
        return network, made

    def own_backend(self, network: nn.Module, rule: Rule) -> Backend:
        """The recipe's, as a launch makes it, but that its moves leave the weights where they
        are.
        """
        backend = build_backend(self.recipe, network, rule, self.recipe.split(1))
        for group in backend.optimizer.param_groups:
            group["lr"] = 0.0
        return backend

    def meters(self, network: nn.Module) -> Meters:
        """That count bytes on the second batch and operations on the third, and never again."""
        about = {"batch_size": self.samples, "device": self.x_TB.device}
        return Meters(network, **about, memory_every=10**9, operations_every=10**9)

    def micro_batches(self) -> list[MicroBatch]:
        """The batch, as the loop takes it."""
        return [MicroBatch(self.x_TB, self.target_B, range(self.samples), 1.0)]

    def _made(self, rule: Spec) -> Rule:
        made: Rule = rule.build()
        made.check_steps(self.recipe.time_steps)
        return made

    def _trained(
        self,
        rule: Spec,
        *,
        batches: int,
        behind: Behind = "plain torch",
        on_the_last: Instrument | None = None,
    ) -> tuple[Rule, Meters, int | None]:
        """So many batches with weights at rest, the last of them seen by `on_the_last`.

        Third, the bytes that memory held before the timed ones, from where its peak began anew:
        what is loaded when it is first needed was there by then. None where no peak can be begun
        anew.
        """
        network, made = self.attached(rule)
        meters = self.meters(network)
        is_plain = behind == "plain torch"
        backend = (
            Plain(network, _resting, precision=self.recipe.precision)
            if is_plain
            else self.own_backend(network, made)
        )
        before: int | None = None

        def steps() -> Iterator[tuple[int, list[MicroBatch]]]:
            nonlocal before
            for step in range(batches):
                if step == UNTIMED:
                    before = self._begin_peak()
                if step == batches - 1 and on_the_last is not None:
                    meters.watch(on_the_last)
                yield step, self.micro_batches()

        with self.in_memory(made.label):
            train(made, backend, lambda step: None, steps(), self.loss, meters, Unguarded())
        return made, meters, before

    def _begin_peak(self) -> int | None:
        """What memory holds from which its peak begins anew; None where it does not."""
        release_freed_memory()
        reset_peak_device_bytes(self.x_B.device)
        return memory_now_bytes(self.x_B.device) if reset_peak_rss() or self.x_B.is_cuda else None


def fastest_baseline(costs: Iterable[Cost]) -> Cost | None:
    """Of BPTT folded over time and step by step the one that computes faster; None where there is
    neither.
    """
    return min(
        (cost for cost in costs if is_baseline(cost.rule)),
        key=lambda cost: cost.compute_s,
        default=None,
    )


def by_label(rules: Sequence[Spec], own: Spec) -> dict[str, Spec]:
    """`rules` by their labels, with the recipe's own in the place of one that has its label."""
    return {rule.build().label: rule for rule in (*rules, own)}


def _bytes_of(made: Rule, totals: Totals) -> dict[str, int]:
    """What a rule that has trained keeps of a batch, and by itself."""
    assert totals.peak_saved_bytes is not None and totals.state_bytes is not None, (
        "no batch is skipped"
    )
    return {
        "peak_saved_bytes": totals.peak_saved_bytes,
        "state_bytes": totals.state_bytes,
        "rule_bytes": made.bytes(),
    }


def _of_labels(recipe: Recipe) -> Spec:
    return recipe.objective if recipe.teacher is None else spec(_labels, of=recipe.objective)


def _labels(of: Loss) -> Loss:
    return of.labels


def _resting(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.0)
