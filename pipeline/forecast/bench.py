"""A recipe's network and one batch of its data, for trying rules before training.

Every rule gets a copy of the network with its initial weights, and the same batch. It trains in the
loop of a run, at a learning rate of 0. A recipe with a teacher is tried on the labels alone, and a
recipe of several tasks on its first task.

A teacher costs the same for every rule and T: one answer per batch, without a graph. It is measured
separately and with random weights, so that nothing is downloaded.
"""

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pipeline.core.torch_settings import compute_in, configure_torch, release_freed_memory
from pipeline.core.units import counted
from pipeline.data.base import Batch, Data, DataError, Loader
from pipeline.measure.clock import charge_collectives, seconds_of
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
from pipeline.measure.saved_bytes import HeldBytes, bytes_of, held_bytes
from pipeline.models.teachers.base import Teacher
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
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.plain import Plain
from pipeline.train.build import build_network, build_optimizer, check_recipe
from pipeline.train.elastic import seed_everything
from pipeline.train.guards.anomaly import AnomalyGuard, can_undo
from pipeline.train.loop import Guard, MicroBatch, train_batch
from pipeline.train.objective import Loss
from pipeline.train.part_checks import check_batch, checked_loader
from pipeline.train.recovery import Rollback
from pipeline.train.tasks import tasks_of
from pipeline.train.teaching import build_teacher
from pipeline.train.weights import load_start

# T time, B batch


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
UNTIMED = 3  # batches: the first warms up, the second counts bytes, the third counts operations
WARM_UP = 2  # batches without any measurement
TIMED = 5
# Share of memory that remains free for fragmentation, workspaces, the driver, and the difference
# between a small batch and a large one.
RESERVE = 0.1
WARM_UP_BATCHES = 16  # batches that train a rule's own matrices before its gradient is taken
DRAWS = 8
ROUNDS = 3  # rounds in which rules alternate to compare their times
T_ = TypeVar("T_")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one rule on one batch."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int  # states that backward does not save as well
    # The rise of resident memory in a batch; on a GPU, of the allocator's memory. It includes
    # gradients and workspaces, but neither the network nor the batch. None if the kernel cannot
    # reset the peak.
    peak_memory_bytes: int | None
    rule_bytes: int  # the rule's own parameters and records
    # Median seconds of a batch, without collectives and the optimizer.
    forward_s: float
    backward_s: float
    loop_s: float  # the rest of the loop: transfer, metrics, and time outside all parts
    operations: Mapping[str, Mapping[str, float]]  # by purpose, for training on one sample
    not_counted: tuple[str, ...] = ()  # torch operations with uncounted products

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for backward and from one time step to the next. Each storage counts once."""
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
    """`recipe` with a batch of `batch_size` samples, as one worker would train on it.

    Args:
        batch_size: None: the micro-batch of a single worker.
        needs_data: False: use random samples if the data cannot be read.

    Raises:
        ValueError: the network does not fit the data or its initial weights.
        DoesNotFit: the batch does not fit into memory.
        DataError: the data cannot be read.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        batch_size: int | None = None,
        threads: int = 1,
        needs_data: bool = True,
    ) -> None:
        device = device_here()
        configure_torch(threads, device)
        compute_in(recipe.precision, device)
        seed_everything(recipe.seed)
        self._describe(recipe, batch_size or recipe.split(1).micro_batch)
        self.network = self._fresh_network().to(device)
        with self.in_memory(recipe.name):
            try:
                batch = first_batch(recipe, self.samples)
            except DataError:
                if needs_data:
                    raise
                batch = _random_batch(recipe, self.samples)
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

    def cost(self, rule: Spec) -> Cost:
        """Measure a rule in plain torch.

        Raises:
            ValueError: the rule cannot train the network.
            DoesNotFit: its batch does not fit into memory.
        """
        before: int | None = None

        def begin_peak(step: int, meters: Meters) -> None:
            # The untimed batches have already loaded everything that is loaded at first use.
            nonlocal before
            if step == UNTIMED:
                release_freed_memory()
                reset_peak_device_bytes(self.x_B.device)
                if reset_peak_rss() or self.x_B.is_cuda:
                    before = memory_now_bytes(self.x_B.device)

        made, meters = self.train(rule, UNTIMED + TIMED, begin_peak)
        peak = peak_device_bytes(self.x_B.device) if self.x_B.is_cuda else peak_rss_bytes()
        seconds = _seconds(meters.clock.take()[UNTIMED:], statistics.median)
        return Cost(
            **bytes_of_batch(made, meters),
            peak_memory_bytes=None if before is None else peak - before,
            forward_s=seconds["forward"],
            backward_s=seconds["backward"],
            loop_s=seconds["loop"],
            operations=meters.totals.operations_per_sample(),
            not_counted=tuple(meters.totals.not_counted),
        )

    def seconds(self, rule: Spec, *, batches: int = TIMED) -> dict[str, float]:
        """Mean seconds of the parts of a batch, as in a run.

        The parts are "forward", "backward", "loop" (the rest of the loop), "communication" and
        "optimizer". The recipe's own backend is used; its process group must exist. The mean is
        used because a delayed batch delays training, however rare it is.

        Raises: as `cost`.
        """
        _, meters = self.train(rule, WARM_UP + batches, as_in_a_run=True)
        return _seconds(meters.clock.take()[WARM_UP:], statistics.fmean)

    def train(
        self,
        rule: Spec,
        batches: int,
        before_batch: Callable[[int, Meters], None] = lambda step, meters: None,
        *,
        as_in_a_run: bool = False,
    ) -> tuple[Rule, Meters]:
        """Train on the batch `batches` times, at a learning rate of 0.

        `before_batch(step, meters)` is called before each batch. Training uses plain torch, and the
        meters count bytes on the second batch and operations on the third. `as_in_a_run` uses the
        recipe's own backend and a run's guard, and the meters then measure only time.

        Raises: as `cost`.
        """
        with self.running(rule.build().label):
            network, made = self.attached(rule)
            meters = Meters(
                network,
                batch_size=self.samples,
                device=self.x_TB.device,
                memory_every=None if as_in_a_run else 10**9,
                operations_every=None if as_in_a_run else 10**9,
            )

            with charge_collectives(meters.clock) if as_in_a_run else nullcontext():
                backend, guard = self._backend_and_guard(network, made, as_in_a_run=as_in_a_run)
                batch = [MicroBatch(self.x_TB, self.target_B, range(self.samples), 1.0)]
                schedule = lambda step: None
                try:
                    for step in range(batches):
                        before_batch(step, meters)
                        train_batch(made, backend, schedule, step, batch, self.loss, meters, guard)
                except Rollback as bad:
                    raise ValueError(f"{made.label}: cannot be timed; {bad}") from bad
        return made, meters

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks(distributed.get_rank(), distributed.get_world_size(), device_here().type)

    def _backend_and_guard(
        self, network: nn.Module, rule: Rule, *, as_in_a_run: bool
    ) -> tuple[Backend, Guard]:
        """Plain torch without a guard, or a run's backend and guard; at a learning rate of 0."""
        if not as_in_a_run:
            return Plain(network, _resting, precision=self.recipe.precision), Guard()
        backend = build_backend(self.recipe, network, rule, self.recipe.split(1))
        for group in backend.optimizer.param_groups:
            group["lr"] = 0.0
        undo = can_undo(self.recipe, rule)
        return backend, AnomalyGuard(backend, rule, self.ranks, max_skips=0, can_undo=undo)

    def gradients(self, rule: Spec) -> list[dict[str, Tensor]]:
        """The rule's gradient of each synapse in fp32; several draws if it draws time steps.

        They are kept in host memory, because the next rule has to fit on the card.

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
        """Bytes that training holds besides what a rule keeps of a batch."""
        return held_bytes(*self.stepped())

    def stepped(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the network with gradients of 0, and its optimizer after a first step."""
        network = self.copy_of_network()
        optimizer = build_optimizer(self.recipe, network, self.recipe.rule.build())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # creates its state
        return network, optimizer

    def copy_of_network(self) -> nn.Module:
        return copy.deepcopy(self.network)

    @contextmanager
    def running(self, who: str) -> Iterator[None]:
        """Surround the work on a batch. A bench without values overrides it (`counts.py`)."""
        with self.in_memory(who):
            yield

    @contextmanager
    def in_memory(self, who: str) -> Iterator[None]:
        """Raises: DoesNotFit if memory runs out inside."""
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

        Raises: ValueError if the rule cannot train it.
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


def _random_batch(recipe: Recipe, size: int) -> Batch:
    """Random samples and classes with the data's shape and number of classes."""
    data, draw = _data(recipe), torch.Generator().manual_seed(recipe.seed)
    return Batch(
        torch.rand(size, *data.shape, generator=draw),
        torch.randint(data.classes, (size,), generator=draw),
        torch.arange(size),
    )


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
    """The faster of BPTT folded over time and BPTT step by step; None without either."""
    baselines = (cost for cost in costs if is_baseline(cost.rule))
    return min(baselines, key=lambda cost: cost.compute_s, default=None)


def rules_by_label(rules: Sequence[Spec], own: Spec) -> dict[str, Spec]:
    """`rules` by label. The recipe's own rule replaces a rule with the same label."""
    return {rule.build().label: rule for rule in (*rules, own)}


def group_by_network(
    recipes: Sequence[Recipe], inputs: Callable[[Recipe], object]
) -> Iterator[tuple[Recipe, tuple[Spec, ...]]]:
    """Group recipes that differ only in their rules: those with equal `inputs(recipe)`.

    It yields one recipe for each group, named after its members, with all their rules.

    Raises: ValueError, before the first group, if a recipe contradicts itself.
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
    """Everything that determines the cost of a batch, except the rule."""
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
    """The order of each round. Each begins with the next item, so drift affects all equally."""
    order = list(items)
    for each in range(rounds):
        first = each % len(order)
        yield [*order[first:], *order[:first]]


def measure_costs(
    bench: Bench, rules: Mapping[str, Spec]
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """The costs of each rule in every round, and the reasons why other rules cannot train."""
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
    """A rule's cost with median seconds. All other values are the same in each round."""
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


def _seconds(
    batches: Sequence[Mapping[str, float]], average: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """Average seconds of each part of a batch. The rest of the loop is the part "loop"."""

    def of(*parts: str) -> float:
        return average(sum(seconds[part] for part in parts) for seconds in batches)

    parts = ("forward", "backward", "communication", "optimizer")
    return {**{part: of(part) for part in parts}, "loop": of("transfer", "metrics", REST)}


def _labels(of: Loss) -> Loss:
    return of.labels


def _resting(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.0)


# B batch


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """The cost of a teacher's answers for one batch."""

    teacher: str
    bytes: int  # weights and statistics
    seconds: float  # median, without a cache

    def describe(self) -> str:
        """Describe it in one line, for below a table of rules."""
        return (
            f"the teacher, {self.teacher}, is in no row: beside every rule it holds "
            f"{self.bytes / 1e6:.4g} MB of weights "
            f"and answers for a batch in {self.seconds * 1e3:.4g} ms"
        )


@torch.no_grad()
def measure_teacher(recipe: Recipe, x_B: Tensor) -> TeacherCost | None:
    """Measure the recipe's teacher on a batch of images; None without a teacher."""
    if recipe.teacher is None:
        return None
    teacher = untrained_teacher(recipe).to(x_B.device)
    teacher(x_B)  # warms up
    seconds = [seconds_of(lambda: teacher(x_B), x_B.device) for _ in range(TIMED)]
    return TeacherCost(
        teacher=teacher.label, bytes=teacher_bytes(teacher), seconds=statistics.median(seconds)
    )


def untrained_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher with random weights. A head that would be fitted is random too.

    Raises: ValueError as `build_teacher`.
    """
    data = tasks_of(recipe)[0].data
    teacher = build_teacher(recipe.with_untrained_teacher(), data)
    if teacher.probe is not None:
        with torch.random.fork_rng(devices=[]):
            features = teacher.features(torch.zeros(1, *data.shape)).shape[-1]
            teacher.head = nn.Linear(features, data.classes)
    return teacher


def teacher_bytes(teacher: Teacher) -> int:
    """Bytes of the teacher's weights and statistics."""
    return bytes_of((*teacher.parameters(), *teacher.buffers()))
