"""A recipe's network and one batch of its data, on which rules are tried before any training.

Every rule gets a copy of one network, with the weights that training starts from, and the same
batch. It trains through the loop of a run, at a learning rate of 0. A recipe with a teacher is
tried with its labels alone (`asked.py` measures the teacher); a recipe of several tasks is tried
on its first.
"""

# T time, B batch

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.allocator import release_freed_memory
from pipeline.core.torch_settings import compute_in, settle
from pipeline.core.units import counted
from pipeline.data.base import Batch, Data, Loader
from pipeline.measure.constants import REST
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
from pipeline.measure.meters import Meters
from pipeline.measure.tensor_bytes import HeldBytes, bytes_of, held_bytes
from pipeline.measure.totals import Totals
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
from pipeline.train.build import build_network, check_recipe
from pipeline.train.elastic import seed_everything
from pipeline.train.guards.anomaly import Unguarded
from pipeline.train.loop import MicroBatch, train
from pipeline.train.objective import Loss
from pipeline.train.optimizer import build_optimizer
from pipeline.train.part_checks import check_batch, checked_loader
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
# of memory that is left to fragments, to workspaces and the driver, and to what a small batch does
# not tell of a large one
RESERVE = 0.1
LEARNS_BY_ITSELF = (
    16  # batches that a rule with matrices of its own sees before its gradient is taken
)
DRAWS = 8
ROUNDS = 3  # rounds in which rules take turns, where their seconds are compared
Behind = Literal["plain torch", "own backend"]
T_ = TypeVar("T_")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one rule on one batch."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int  # of what the network remembers and backward does not keep as well
    # how far the process's resident memory, on a GPU what its allocator holds, rises in a batch:
    # with gradients and what kernels take for their work, without the network and the batch itself;
    # None where the kernel does not begin its peak anew
    peak_memory_bytes: int | None
    rule_bytes: int  # of what the rule learns by itself, and notes of a batch
    forward_s: float
    # of a batch, the median over batches; collectives and the optimizer are in neither
    backward_s: float
    # of what the loop does beside: transfer, metrics, and what no part is charged for
    loop_s: float
    operations: Mapping[str, Mapping[str, float]]  # for each purpose, of training on one sample
    # operations of torch that make products, which are in no count
    not_counted: tuple[str, ...] = ()

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


class Bench:
    """`recipe` with a batch of `batch_size` samples, as a worker would have it.

    `batch_size`: None takes what one worker would hold at a time.

    Raises:
        ValueError: a network that does not fit the data or the weights that it starts from.
        DoesNotFit: the batch does not fit into memory.
        DataError: what the data refuse.
    """

    def __init__(self, recipe: Recipe, *, batch_size: int | None = None, threads: int = 1) -> None:
        device = device_here()
        settle(threads, device)
        compute_in(recipe.precision, device)
        seed_everything(recipe.seed)
        self._describe(recipe, batch_size or recipe.split(1).micro_batch)
        self.network = self._fresh_network().to(device)
        with self.in_memory(recipe.name):
            batch = first_batch(recipe, self.samples)
            self._set_batch(batch.x.to(device), batch.target.to(device))

    def _describe(self, recipe: Recipe, samples: int) -> None:
        self.recipe = replace(recipe, teacher=None, objective=_of_labels(recipe))
        self.samples = samples
        self.loss: Loss = self.recipe.objective.build()

    def _fresh_network(self) -> nn.Module:
        network = build_network(self.recipe, tasks_of(self.recipe))
        if self.recipe.init is not None:
            load_start(network, Path(self.recipe.init))
        return network

    def _set_batch(self, x_B: Tensor, target_B: Tensor) -> None:
        self.x_B, self.target_B = x_B, target_B
        self.x_TB = over_steps(x_B, self.recipe.time_steps)

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
            **bytes_of_batch(made, totals),
            peak_memory_bytes=None if before is None else peak - before,
            forward_s=median_s("forward"),
            backward_s=median_s("backward"),
            loop_s=median_s("transfer", "metrics", REST),
            operations=totals.operations_per_sample(),
            not_counted=tuple(totals.not_counted),
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

    def held(self) -> HeldBytes:
        """What training holds beside what a rule keeps of a batch."""
        network, optimizer = self.stepped()
        return held_bytes(network, optimizer)

    def stepped(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the network with gradients of 0, and its optimizer after a first step."""
        network = self.copy_of_network()
        optimizer = build_optimizer(self.recipe, network, self.recipe.rule.build())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # which makes its state
        return network, optimizer

    def copy_of_network(self) -> nn.Module:
        return copy.deepcopy(self.network)

    @contextmanager
    def running(self, who: str) -> Iterator[None]:
        """What surrounds a batch that is counted (`counts.py`)."""
        with self.in_memory(who):
            yield

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
        """A copy of the network, and the rule on it, calibrated.

        Raises: ValueError where the rule cannot train it.
        """
        network, made = self.copy_of_network(), self._made(rule)
        made.attach(network, world=World(self.recipe.seed), over_time=self.recipe.over_time)
        if made.calibration_batches:
            self.calibrate(made, network)
        return network, made

    def calibrate(self, rule: Rule, network: nn.Module) -> None:
        rule.calibrate(network, [self.x_TB])

    def own_backend(self, network: nn.Module, rule: Rule) -> Backend:
        """The recipe's backend at a learning rate of 0."""
        backend = build_backend(self.recipe, network, rule, self.recipe.split(1))
        for group in backend.optimizer.param_groups:
            group["lr"] = 0.0
        return backend

    def meters(self, network: nn.Module) -> Meters:
        """Meters that count bytes on the second batch and operations on the third."""
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
        self, rule: Spec, *, batches: int, behind: Behind
    ) -> tuple[Rule, Meters, int | None]:
        """Train on the batch so many times; the weights rest.

        Third, the bytes that memory held when its peak began anew, before the timed batches: what
        is loaded at its first use was there by then. None where no peak can begin anew.
        """
        network, made = self.attached(rule)
        meters = self.meters(network)
        is_plain = behind == "plain torch"
        backend = self.plain(network) if is_plain else self.own_backend(network, made)
        before: int | None = None

        def steps() -> Iterator[tuple[int, list[MicroBatch]]]:
            nonlocal before
            for step in range(batches):
                if step == UNTIMED:
                    before = self._begin_peak()
                yield step, self.micro_batches()

        with self.in_memory(made.label):
            train(made, backend, lambda step: None, steps(), self.loss, meters, Unguarded())
        return made, meters, before

    def plain(self, network: nn.Module) -> Plain:
        """A backend of plain torch at a learning rate of 0."""
        return Plain(network, _resting, precision=self.recipe.precision)

    def _begin_peak(self) -> int | None:
        """What memory holds from which its peak begins anew; None where it does not."""
        release_freed_memory()
        reset_peak_device_bytes(self.x_B.device)
        return memory_now_bytes(self.x_B.device) if reset_peak_rss() or self.x_B.is_cuda else None


# -------------------------------------------------------------------------------------------- data


def first_batch(recipe: Recipe, size: int) -> Batch:
    """The first `size` samples that a run of the recipe would train on."""
    with closing(_loader(recipe, size)) as loader, loader.epoch(0) as batches:
        batch = next(iter(batches))
        check_batch(batch, _data(recipe), "train")
        return batch


def samples_per_epoch(recipe: Recipe) -> int:
    """Samples of an epoch."""
    with closing(_loader(recipe, 1)) as loader:
        return loader.samples


def _data(recipe: Recipe) -> Data:
    return tasks_of(recipe)[0].data


def _loader(recipe: Recipe, size: int) -> Loader:
    data = _data(recipe)
    sizes = {"batch_size": size, "micro_batch": size, "threads": 1}
    loader = data.train(seed=recipe.seed, rank=0, world=1, **sizes)
    return checked_loader(loader, data, "train")


# ------------------------------------------------------------------------------------------- rules


def fastest_baseline(costs: Iterable[Cost]) -> Cost | None:
    """BPTT folded over time or step by step, whichever is faster; None where there is neither."""
    return min(
        (cost for cost in costs if is_baseline(cost.rule)),
        key=lambda cost: cost.compute_s,
        default=None,
    )


def rules_by_label(rules: Sequence[Spec], own: Spec) -> dict[str, Spec]:
    """`rules` by their labels, with the recipe's own in the place of one that has its label."""
    return {rule.build().label: rule for rule in (*rules, own)}


def group_by_network(
    recipes: Sequence[Recipe], alike: Callable[[Recipe], object]
) -> Iterator[tuple[Recipe, tuple[Spec, ...]]]:
    """Group recipes that differ in their rules alone, as `alike` says: one recipe, and all rules.

    The recipe's name is made of the names of its group.

    Raises: ValueError where one of the recipes does not fit together, before the first is given.
    """
    groups: list[list[Recipe]] = []
    for recipe in recipes:
        check_recipe(recipe.with_untrained_teacher(), 1)
        group = next((each for each in groups if alike(each[0]) == alike(recipe)), None)
        if group is None:
            groups.append([recipe])
        else:
            group.append(recipe)
    for group in groups:
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        name = ", ".join(recipe.name for recipe in group[:3]) + more
        yield replace(group[0], name=name), tuple(recipe.rule for recipe in group)


def step_inputs(recipe: Recipe) -> tuple[object, ...]:
    """All that decides what a batch costs, beside the rule."""
    parts = (
        recipe.model,
        recipe.data,
        recipe.objective,
        recipe.teacher,
        recipe.phases,
        recipe.init,
    )
    sizes = (recipe.time_steps, recipe.over_time, recipe.batch_size, recipe.micro_batch)
    return (*parts, *sizes, recipe.precision)


def rotated(those: Iterable[T_], rounds: int) -> Iterator[list[T_]]:
    """The order of each round. Every round begins with another, so that drift falls on all
    alike.
    """
    order = list(those)
    for each in range(rounds):
        first = each % len(order)
        yield [*order[first:], *order[:first]]


def measure_costs(
    bench: Bench, rules: Mapping[str, Spec]
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """What each rule costs in every round, and why the others cannot train the network."""
    rounds: dict[str, list[Cost]] = {label: [] for label in rules}
    refused: dict[str, str] = {}
    for order in rotated(rules, ROUNDS):
        for label in order:
            if label in refused:
                continue
            try:
                rounds[label].append(bench.cost(rules[label]))
            except ValueError as error:
                refused[label] = str(error)
                del rounds[label]
    return rounds, refused


def median_cost(rounds: Sequence[Cost]) -> Cost:
    """Of one rule: the medians of its seconds. Bytes and operations are the same in each round."""
    seconds = {
        name: statistics.median(getattr(cost, name) for cost in rounds)
        for name in ("forward_s", "backward_s", "loop_s")
    }
    return replace(rounds[0], **seconds)


def bytes_of_batch(made: Rule, totals: Totals) -> dict[str, int]:
    """What a rule that has trained keeps of a batch, and of its own."""
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
