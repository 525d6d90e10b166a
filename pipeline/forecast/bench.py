"""A recipe's network and one batch of its data, on which rules are tried before training.

Every rule gets a copy of the network, with the weights that training starts from, and the same
batch. It trains in the loop of a run, at a learning rate of 0. A recipe with a teacher is tried on
its labels alone (`teacher_cost.py` measures the teacher), and a recipe of several tasks on its
first.
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
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.allocator import release_freed_memory
from pipeline.core.torch_settings import compute_in, configure_torch
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
from pipeline.train.build import build_network, build_optimizer, check_recipe
from pipeline.train.elastic import seed_everything
from pipeline.train.loop import Guard, MicroBatch, train_batch
from pipeline.train.objective import Loss
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
UNTIMED = 3  # batches: the first warms up, the second counts bytes, the third operations
TIMED = 5
# Share of memory that is left free for fragments, workspaces, the driver, and the difference
# between a small batch and a large one.
RESERVE = 0.1
WARM_UP_BATCHES = 16  # that a rule with trained matrices sees before its gradient is taken
DRAWS = 8
ROUNDS = 3  # rounds in which rules alternate, where their times are compared
Behind = Literal["plain torch", "own backend"]
T_ = TypeVar("T_")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one rule on one batch."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int  # of states that backward does not save as well
    # The rise of the process's resident memory in a batch, on a GPU that of the allocator. It
    # includes gradients and workspaces, but neither the network nor the batch. None where the
    # kernel cannot reset the peak.
    peak_memory_bytes: int | None
    rule_bytes: int  # of the rule's own parameters and records
    # Median seconds of a batch, without collectives and the optimizer.
    forward_s: float
    backward_s: float
    loop_s: float  # of the rest of the loop: transfer, metrics, and time outside of all parts
    operations: Mapping[str, Mapping[str, float]]  # by purpose, of training on one sample
    not_counted: tuple[str, ...] = ()  # operations of torch with products that are not counted

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for backward and from one time step to the next; each storage once."""
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
    """A batch does not fit into memory."""


class Bench:
    """`recipe` with a batch of `batch_size` samples, as one worker would have it.

    `batch_size`: None takes the micro-batch of a single worker.

    Raises:
        ValueError: the network does not fit the data, or the weights that it starts from.
        DoesNotFit: the batch does not fit into memory.
        DataError: the data cannot be read.
    """

    def __init__(self, recipe: Recipe, *, batch_size: int | None = None, threads: int = 1) -> None:
        device = device_here()
        configure_torch(threads, device)
        compute_in(recipe.precision, device)
        seed_everything(recipe.seed)
        self._describe(recipe, batch_size or recipe.split(1).micro_batch)
        self.network = self._fresh_network().to(device)
        with self.in_memory(recipe.name):
            batch = first_batch(recipe, self.samples)
            self._set_batch(batch.x.to(device), batch.target.to(device))

    def _describe(self, recipe: Recipe, samples: int) -> None:
        of_labels = (
            recipe.objective if recipe.teacher is None else spec(_labels, of=recipe.objective)
        )
        self.recipe = replace(recipe, teacher=None, objective=of_labels)
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

    @property
    def batch_bytes(self) -> int:
        return bytes_of([self.x_TB, self.target_B])

    def cost(self, rule: Spec, *, behind: Behind = "plain torch") -> Cost:
        """Measure a rule in plain torch, or behind the backend that the recipe names, whose process
        group must exist.

        Raises:
            ValueError: the rule cannot train the network.
            DoesNotFit: its batch does not fit into memory.
        """
        before: int | None = None

        def begin_peak(step: int, meters: Meters) -> None:
            # After the untimed batches, which load what is loaded at its first use.
            nonlocal before
            if step == UNTIMED:
                release_freed_memory()
                reset_peak_device_bytes(self.x_B.device)
                if reset_peak_rss() or self.x_B.is_cuda:
                    before = memory_now_bytes(self.x_B.device)

        made, meters = self.train(rule, UNTIMED + TIMED, begin_peak, behind=behind)
        peak = peak_device_bytes(self.x_B.device) if self.x_B.is_cuda else peak_rss_bytes()
        timed = meters.clock.take()[UNTIMED:]

        def median_s(*parts: str) -> float:
            return statistics.median(sum(seconds[part] for part in parts) for seconds in timed)

        return Cost(
            **bytes_of_batch(made, meters),
            peak_memory_bytes=None if before is None else peak - before,
            forward_s=median_s("forward"),
            backward_s=median_s("backward"),
            loop_s=median_s("transfer", "metrics", REST),
            operations=meters.totals.operations_per_sample(),
            not_counted=tuple(meters.totals.not_counted),
        )

    def train(
        self,
        rule: Spec,
        batches: int,
        before_batch: Callable[[int, Meters], None],
        *,
        behind: Behind = "plain torch",
    ) -> tuple[Rule, Meters]:
        """Train on the batch `batches` times, at a learning rate of 0, and call
        `before_batch(step, meters)` before each.

        The meters count bytes on the second batch and operations on the third.

        Raises: as `cost`.
        """
        with self.running(rule.build().label):
            network, made = self.attached(rule)
            meters = Meters(
                network,
                batch_size=self.samples,
                device=self.x_TB.device,
                memory_every=10**9,
                operations_every=10**9,
            )
            if behind == "plain torch":
                backend: Backend = Plain(network, _resting, precision=self.recipe.precision)
            else:
                backend = build_backend(self.recipe, network, made, self.recipe.split(1))
                for group in backend.optimizer.param_groups:
                    group["lr"] = 0.0

            batch = [MicroBatch(self.x_TB, self.target_B, range(self.samples), 1.0)]
            schedule = lambda step: None
            for step in range(batches):
                before_batch(step, meters)
                train_batch(made, backend, schedule, step, batch, self.loss, meters, Guard())
        return made, meters

    def gradients(self, rule: Spec) -> list[dict[str, Tensor]]:
        """The rule's gradient of each synapse in fp32, in several draws if it draws time steps.

        They are kept in host memory, because the next rule has to fit the card.

        Raises: as `cost`.
        """
        made = self._build(rule)
        decides = made.inner if isinstance(made, HLOP) else made
        draws = DRAWS if isinstance(decides, SLTT) and decides.k is not None else 1
        found: list[dict[str, Tensor]] = []
        with self.in_memory(f"{made.label}'s gradient"):
            for step in range(draws):
                given = gradients(
                    self.network,
                    self._build(rule),
                    self.x_TB,
                    partial(self.loss, self.target_B),
                    world=World(self.recipe.seed),
                    over_time=self.recipe.over_time,
                    batches=WARM_UP_BATCHES if isinstance(made, OPZO) else 1,
                    step=step,
                )
                found.append({name: g.cpu() for name, g in given.items()})
        return found

    def held(self) -> HeldBytes:
        """Bytes that training holds beside what a rule keeps of a batch."""
        return held_bytes(*self.stepped())

    def stepped(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the network with gradients of 0, and its optimizer after a first step."""
        network = self.copy_of_network()
        optimizer = build_optimizer(self.recipe, network, self.recipe.rule.build())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes its state
        return network, optimizer

    def copy_of_network(self) -> nn.Module:
        return copy.deepcopy(self.network)

    @contextmanager
    def running(self, who: str) -> Iterator[None]:
        """Surround the work on a batch; a bench without values overrides it (`counts.py`)."""
        with self.in_memory(who):
            yield

    @contextmanager
    def in_memory(self, who: str) -> Iterator[None]:
        """Raises: DoesNotFit where memory runs out inside."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"{who}: a batch must fit into memory; {counted(self.samples, 'sample')} at T ="
                f" {self.recipe.time_steps} do not"
            ) from None

    def attached(self, rule: Spec) -> tuple[nn.Module, Rule]:
        """A copy of the network with the rule attached and calibrated.

        Raises: ValueError where the rule cannot train it.
        """
        network, made = self.copy_of_network(), self._build(rule)
        made.attach(network, world=World(self.recipe.seed), over_time=self.recipe.over_time)
        if made.calibration_batches:
            self.calibrate(made, network)
        return network, made

    def calibrate(self, rule: Rule, network: nn.Module) -> None:
        rule.calibrate(network, [self.x_TB])

    def _build(self, rule: Spec) -> Rule:
        made: Rule = rule.build()
        made.check_steps(self.recipe.time_steps)
        return made


# -------------------------------------------------------------------------------------------- data


def first_batch(recipe: Recipe, size: int) -> Batch:
    """The first `size` samples that a run of the recipe would train on."""
    with closing(_loader(recipe, size)) as loader, loader.epoch(0) as batches:
        batch = next(iter(batches))
        check_batch(batch, _data(recipe), "train")
        return batch


def samples_per_epoch(recipe: Recipe) -> int:
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
    """The faster of BPTT folded over time and step by step; None without either."""
    baselines = (cost for cost in costs if is_baseline(cost.rule))
    return min(baselines, key=lambda cost: cost.compute_s, default=None)


def rules_by_label(rules: Sequence[Spec], own: Spec) -> dict[str, Spec]:
    """`rules` by their labels; the recipe's own replaces the one with the same label."""
    return {rule.build().label: rule for rule in (*rules, own)}


def group_by_network(
    recipes: Sequence[Recipe], inputs: Callable[[Recipe], object]
) -> Iterator[tuple[Recipe, tuple[Spec, ...]]]:
    """Group recipes that differ only in their rules: those with equal `inputs(recipe)`.

    Yields one recipe for each group, named after its members, with all their rules.

    Raises: ValueError, before the first group, where a recipe contradicts itself.
    """
    groups: list[list[Recipe]] = []
    for recipe in recipes:
        check_recipe(recipe.with_untrained_teacher(), 1)
        group = next((each for each in groups if inputs(each[0]) == inputs(recipe)), None)
        if group is None:
            groups.append([recipe])
        else:
            group.append(recipe)
    for group in groups:
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        name = ", ".join(recipe.name for recipe in group[:3]) + more
        yield replace(group[0], name=name), tuple(recipe.rule for recipe in group)


def step_inputs(recipe: Recipe) -> tuple[object, ...]:
    """Everything that decides the cost of a batch, except the rule."""
    return (
        recipe.model,
        recipe.data,
        recipe.objective,
        recipe.teacher,
        recipe.phases,
        recipe.init,
        recipe.time_steps,
        recipe.over_time,
        recipe.batch_size,
        recipe.micro_batch,
        recipe.precision,
    )


def rotated(items: Iterable[T_], rounds: int) -> Iterator[list[T_]]:
    """The order of each round. Each begins with the next item, so that drift affects all
    equally.
    """
    order = list(items)
    for each in range(rounds):
        first = each % len(order)
        yield [*order[first:], *order[:first]]


def measure_costs(
    bench: Bench, rules: Mapping[str, Spec]
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """The costs of each rule in every round, and why the other rules cannot train the network."""
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
    """A rule's cost with the median of its seconds; the rest is the same in each round."""
    seconds = {
        name: statistics.median(getattr(cost, name) for cost in rounds)
        for name in ("forward_s", "backward_s", "loop_s")
    }
    return replace(rounds[0], **seconds)


def bytes_of_batch(made: Rule, meters: Meters) -> dict[str, Any]:
    """Label and bytes of a rule after `Bench.train`, as fields of `Cost` and `Counts`."""
    totals = meters.totals
    assert totals.peak_saved_bytes is not None and totals.state_bytes is not None
    return {
        "rule": made.label,
        "peak_saved_bytes": totals.peak_saved_bytes,
        "state_bytes": totals.state_bytes,
        "rule_bytes": made.bytes(),
    }


def _labels(of: Loss) -> Loss:
    return of.labels


def _resting(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.0)
