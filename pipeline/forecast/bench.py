"""A network and one batch, for trying rules before training.

Every rule gets a copy of the network with its initial weights, and the same batch. Costs are
measured in the training loop of a run, at a learning rate of 0. A recipe with a teacher uses only
the loss of the labels. A recipe with several tasks uses only the first task.

A teacher costs the same for every rule and T: one forward pass per batch, without a graph. It is
measured separately and with random weights, so that nothing is downloaded.
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pipeline.core.torch_settings import (
    Precision,
    compute_in,
    configure_torch,
    release_freed_memory,
)
from pipeline.core.units import counted, first_few
from pipeline.data.base import Batch, DataError, Loader
from pipeline.measure.clock import charge_collectives, seconds_of
from pipeline.measure.constants import REST
from pipeline.measure.gradient_similarity import gradients
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
from pipeline.measure.saved_bytes import storage_bytes
from pipeline.models.teachers.base import Teacher
from pipeline.recipe import is_baseline
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.rules import bptt, dsr, hlop, ide, opzo, ottt, sltt, spide
from pipeline.rules.base import OverTime, Rule, World
from pipeline.spiking.encode import to_time_first
from pipeline.train.assemble import build_backend
from pipeline.train.backend.base import Backend
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.plain import Plain
from pipeline.train.build import build_network, build_optimizer, check_recipe
from pipeline.train.elastic import seed_everything
from pipeline.train.guards.anomaly import AnomalyGuard, can_undo
from pipeline.train.loop import Guard, MicroBatch, train_batch
from pipeline.train.objective import Loss
from pipeline.train.part_checks import check_first_batch, check_loader
from pipeline.train.recovery import Rollback
from pipeline.train.tasks import tasks_of
from pipeline.train.teaching import build_teacher
from pipeline.train.transfer import move_batch, move_network
from pipeline.train.weights import load_start, weights_file

# T time, B batch

Result = TypeVar("Result")

RULES = (
    spec(bptt.BPTT),
    spec(bptt.BPTT, chunk=1),
    spec(bptt.BPTT, recompute=True),
    spec(sltt.SLTT),
    spec(sltt.SLTT, k=1),
    spec(ottt.OTTT),
    spec(opzo.OPZO),
    spec(dsr.DSR),
    spec(ide.IDE),
    spec(spide.SPIDE),
)
UNTIMED = 3  # batches for warm-up, for the count of bytes, and for the count of operations
WARM_UP = 2  # batches before the measurement of `Bench.seconds`
TIMED = 5  # batches
# Share of memory that remains free for fragmentation, workspaces, the driver, and the difference
# between a small batch and a large one.
RESERVE = 0.1
RULE_BATCHES = 16  # batches that train a rule's own matrices before its gradient is measured
DRAWS = 8  # gradients of a rule that draws time steps
ROUNDS = 3  # rounds in which rules alternate to compare their times


@dataclass(frozen=True, kw_only=True)
class RuleBytes:
    """The bytes of one rule on one batch."""

    rule: str
    peak_saved_bytes: int
    state_bytes: int  # of states, without those saved for backward
    rule_bytes: int  # the rule's own parameters and records

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for backward and from one time step to the next. Each storage counts once."""
        return self.peak_saved_bytes + self.state_bytes

    @property
    def all_bytes(self) -> int:
        return self.kept_bytes + self.rule_bytes


@dataclass(frozen=True, kw_only=True)
class Cost(RuleBytes):
    """The cost of one rule on one batch."""

    # The peak increase of resident memory in a batch; on a GPU, of the allocator's memory. It
    # includes gradients and workspaces, but neither the network nor the batch. None if Linux cannot
    # reset the peak.
    peak_memory_bytes: int | None
    # Median seconds of a batch, without collectives and the optimizer.
    forward_s: float
    backward_s: float
    loop_s: float  # the rest of the loop: transfer, metrics, and time outside all parts
    operations: Mapping[str, Mapping[str, float]]  # by purpose, for training on one sample
    not_counted: tuple[str, ...] = ()  # torch operations whose products were not counted

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


class BatchBench:
    """A network, and one batch on which it trains in a single process.

    Args:
        network: copied for each rule.
        x_TB: the input, on the network's device.
        target_B: the targets of `loss`.
        seed: determines the random draws of rules.
    """

    precision: Precision = "fp32"
    calibrates = True  # rules that calibrate thresholds do so on the batch

    def __init__(
        self,
        network: nn.Module,
        x_TB: Tensor,
        target_B: Tensor,
        loss: Loss,
        *,
        seed: int = 0,
        over_time: OverTime = "steps",
    ) -> None:
        self.network, self.x_TB, self.target_B, self.loss = network, x_TB, target_B, loss
        self.time_steps, self.samples = x_TB.shape[:2]
        self.seed = seed
        self.over_time: OverTime = over_time

    @property
    def batch_bytes(self) -> int:
        return storage_bytes([self.x_TB, self.target_B])

    def cost(self, rule: Spec) -> Cost:
        """Measure a rule in plain torch.

        Raises:
            ValueError: the rule cannot train the network.
            DoesNotFit: its batch does not fit into memory.
        """
        device = self.x_TB.device
        with self.training(rule) as (built_rule, meters, train_once):
            for _ in range(UNTIMED):  # the first one also loads what is loaded at first use
                train_once()
            release_freed_memory()
            reset_peak_device_bytes(device)
            is_known = reset_peak_rss() or self.x_TB.is_cuda
            before = memory_now_bytes(device)
            for _ in range(TIMED):
                train_once()
            peak = peak_device_bytes(device) if self.x_TB.is_cuda else peak_rss_bytes()
        seconds = _seconds(meters.clock.take()[UNTIMED:], statistics.median)
        return Cost(
            **bytes_of_batch(built_rule, meters),
            peak_memory_bytes=peak - before if is_known else None,
            forward_s=seconds["forward"],
            backward_s=seconds["backward"],
            loop_s=seconds["loop"],
            operations=meters.totals.operations_per_sample(),
            not_counted=tuple(meters.totals.not_counted),
        )

    @contextmanager
    def training(
        self, rule: Spec, *, as_in_a_run: bool = False, accumulation: int = 1
    ) -> Iterator[tuple[Rule, Meters, Callable[[], None]]]:
        """Yield the attached rule, its meters, and a function that trains once on the batch.

        With `accumulation`, that many such batches are the micro-batches of a global batch.

        The learning rate is 0. Training uses plain torch, and the meters count bytes on the second
        batch and operations on the third. `as_in_a_run` uses the recipe's own backend and a run's
        guard, and the meters then measure only time.

        Raises: as `cost`.
        """
        with self.running(rule.build().label):
            network, built_rule = self.copy_of_network(), self._build(rule)
            built_rule.attach(network, world=World(self.seed), over_time=self.over_time)
            if built_rule.calibration_batches and self.calibrates:
                built_rule.calibrate(network, [self.x_TB])
            every = None if as_in_a_run else 10**9
            meters = Meters(
                network,
                batch_size=self.samples,
                device=self.x_TB.device,
                memory_every=every,
                operations_every=every,
            )
            with charge_collectives(meters.clock) if as_in_a_run else nullcontext():
                backend, guard = self.backend_of(network, built_rule, as_in_a_run=as_in_a_run)
                rows, share = range(self.samples), 1 / accumulation
                batch = [MicroBatch(self.x_TB, self.target_B, rows, share)] * accumulation
                schedule, steps = (lambda step: None), itertools.count()

                def train_once() -> None:
                    train_batch(
                        built_rule, backend, schedule, next(steps), batch, self.loss, meters, guard
                    )

                try:
                    yield built_rule, meters, train_once
                except Rollback as error:
                    raise ValueError(f"{built_rule.label}: cannot be timed; {error}") from error

    def backend_of(
        self, network: nn.Module, rule: Rule, *, as_in_a_run: bool
    ) -> tuple[Backend, Guard]:
        """The backend and the guard of `training`."""
        return Plain(
            network,
            lambda module: torch.optim.SGD(module.parameters(), lr=0.0),
            precision=self.precision,
        ), Guard()

    def gradients_of(self, rule: Spec) -> list[dict[str, Tensor]]:
        """The rule's gradient by layer in fp32; `DRAWS` gradients if the rule draws time steps.

        They are kept in host memory, because the next rule needs the memory of the GPU.

        Raises: as `cost`.
        """
        built_rule = self._build(rule)
        inner_rule = built_rule.inner if isinstance(built_rule, hlop.HLOP) else built_rule
        draws = DRAWS if isinstance(inner_rule, sltt.SLTT) and inner_rule.k is not None else 1
        gradients_of_draws = (
            gradients(
                self.network,
                self._build(rule),
                self.x_TB,
                partial(self.loss, self.target_B),
                world=World(self.seed),
                over_time=self.over_time,
                batches=RULE_BATCHES if isinstance(inner_rule, opzo.OPZO) else 1,
                step=step,
            )
            for step in range(draws)
        )
        with self.running(f"{built_rule.label}'s gradient"):
            return [{name: g.cpu() for name, g in each.items()} for each in gradients_of_draws]

    def copy_of_network(self) -> nn.Module:
        return copy.deepcopy(self.network)

    @contextmanager
    def running(self, subject: str) -> Iterator[None]:
        """Raise DoesNotFit if memory runs out inside the block."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(
                f"{subject}: a batch must fit into memory; {counted(self.samples, 'sample')} at T ="
                f" {self.time_steps} do not"
            ) from None

    def _build(self, rule: Spec) -> Rule:
        built_rule: Rule = rule.build()
        built_rule.check_steps(self.time_steps)
        return built_rule


class Bench(BatchBench):
    """The network of a recipe, and one batch of its data on which a single worker trains.

    Args:
        batch_size: samples; None: the micro-batch of a single worker.
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
        self._set_recipe(recipe, batch_size or recipe.split(1).micro_batch)
        move_network(self.network, device)
        data = tasks_of(recipe)[0].data
        with self.running(recipe.name):
            try:
                with closing(check_loader(_loader(recipe, self.samples), data, "train")) as loader:
                    batch = check_first_batch(loader, data, "train")
                    assert batch is not None, "a training set has batches"
                    self._set_batch(move_batch(batch, device))
            except DataError:
                if needs_data:
                    raise
                draw = torch.Generator().manual_seed(recipe.seed)
                batch = Batch(
                    torch.rand(self.samples, *data.shape, generator=draw),
                    torch.randint(data.classes, (self.samples,), generator=draw),
                    torch.arange(self.samples),
                )
                self._set_batch(move_batch(batch, device))

    def _set_recipe(self, recipe: Recipe, samples: int) -> None:
        if recipe.teacher is not None:
            recipe = replace(
                recipe, teacher=None, objective=spec(_label_loss, distillation=recipe.objective)
            )
        self.recipe, self.samples, self.time_steps = recipe, samples, recipe.time_steps
        self.precision = recipe.precision
        self.network = build_network(self.recipe, tasks_of(self.recipe))
        if self.recipe.init is not None:
            load_start(self.network, weights_file(Path(self.recipe.init)))

    def _set_batch(self, batch: Batch) -> None:
        self.x_B = batch.x
        super().__init__(
            self.network,
            to_time_first(batch.x, self.time_steps),
            batch.target,
            self.recipe.objective.build(),
            seed=self.recipe.seed,
            over_time=self.recipe.over_time,
        )

    def seconds(
        self, rule: Spec, *, batches: int = TIMED, accumulation: int = 1
    ) -> dict[str, float]:
        """Mean seconds of the parts of a global batch, as in a run.

        The parts are "forward", "backward", "loop" (the rest of the loop), "communication" and
        "optimizer". The recipe's own backend is used, and a process group must exist. The mean
        is used, not the median, because a rare slow batch also delays training.

        Raises: as `cost`.
        """
        training = self.training(rule, as_in_a_run=True, accumulation=accumulation)
        with training as (_, meters, train_once):
            for _ in range(WARM_UP + batches):
                train_once()
        return _seconds(meters.clock.take()[WARM_UP:], statistics.fmean)

    def backend_of(
        self, network: nn.Module, rule: Rule, *, as_in_a_run: bool
    ) -> tuple[Backend, Guard]:
        if not as_in_a_run:
            return super().backend_of(network, rule, as_in_a_run=False)
        backend = build_backend(self.recipe, network, rule, self.recipe.split(1))
        for group in backend.optimizer.param_groups:
            group["lr"] = 0.0
        ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), device_here().type)
        undoes = can_undo(self.recipe, rule)
        return backend, AnomalyGuard(backend, rule, ranks, max_skips=0, can_undo=undoes)

    def stepped(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A copy of the network, and its optimizer after one step with gradients of 0."""
        network = self.copy_of_network()
        optimizer = build_optimizer(self.recipe, network, self.recipe.rule.build())
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # creates the optimizer's state
        return network, optimizer


def samples_per_epoch(recipe: Recipe) -> int:
    with closing(_loader(recipe, 1)) as loader:
        return loader.samples


def _loader(recipe: Recipe, size: int) -> Loader:
    return tasks_of(recipe)[0].data.train(
        batch_size=size, micro_batch=size, threads=1, seed=recipe.seed, rank=0, world=1
    )


# ------------------------------------------------------------------------------------------- rules


def fastest_baseline(costs: Iterable[Cost]) -> Cost | None:
    """The fastest of BPTT folded over time and BPTT in slices of time; None without any."""
    return min(
        (cost for cost in costs if is_baseline(cost.rule)),
        key=lambda cost: cost.compute_s,
        default=None,
    )


def rules_by_label(rules: Sequence[Spec], own: Spec) -> dict[str, Spec]:
    """`rules` and `own`, the recipe's rule, by label.

    The recipe's rule replaces one with the same label.
    """
    return {rule.build().label: rule for rule in (*rules, own)}


def group_by_inputs(
    recipes: Sequence[Recipe], inputs: Callable[[Recipe], object]
) -> Iterator[tuple[Recipe, tuple[Spec, ...]]]:
    """Group recipes with equal `inputs(recipe)`.

    Recipes of a group may differ in their rules, and in all else that `inputs` omits. The function
    yields one recipe for each group, named after its members, with the rules of all members.

    Raises: ValueError, before the first group, if a recipe contradicts itself.
    """
    groups: dict[object, list[Recipe]] = {}
    for recipe in recipes:
        check_recipe(recipe.with_untrained_teacher(), 1)
        groups.setdefault(inputs(recipe), []).append(recipe)
    for group in groups.values():
        yield (
            replace(group[0], name=first_few([recipe.name for recipe in group], max_names=3)),
            tuple(recipe.rule for recipe in group),
        )


def step_inputs(recipe: Recipe) -> tuple[object, ...]:
    """Everything that determines the cost of a batch, except the rule and the seed."""
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


def interleave(labels: Iterable[str], rounds: int) -> list[str]:
    """The order of labels over all rounds.

    Each round begins with the next label, so drift affects all labels about equally.
    """
    order = list(labels)
    return [order[(turn + i) % len(order)] for turn in range(rounds) for i in range(len(order))]


def in_turns(
    rules: Mapping[str, Spec], measure: Callable[[Spec], Result], rounds: int | None = None
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """Each rule's results of `measure` in all rounds, and the reasons why others were refused.

    `rounds`: None: `ROUNDS`.
    """
    results: dict[str, list[Result]] = {label: [] for label in rules}
    refused: dict[str, str] = {}
    for label in interleave(rules, rounds or ROUNDS):
        if label not in refused:
            try:
                results[label].append(measure(rules[label]))
            except ValueError as error:
                refused[label] = str(error)
                del results[label]
    return results, refused


def median_cost(rounds: Sequence[Cost]) -> Cost:
    """A rule's cost with median seconds. All other values are those of the first round."""
    return replace(
        rounds[0],
        forward_s=statistics.median(cost.forward_s for cost in rounds),
        backward_s=statistics.median(cost.backward_s for cost in rounds),
        loop_s=statistics.median(cost.loop_s for cost in rounds),
    )


def bytes_of_batch(built_rule: Rule, meters: Meters) -> dict[str, Any]:
    """The fields of `RuleBytes` after training on a batch."""
    totals = meters.totals
    assert totals.peak_saved_bytes is not None and totals.state_bytes is not None
    return {
        "rule": built_rule.label,
        "peak_saved_bytes": totals.peak_saved_bytes,
        "state_bytes": totals.state_bytes,
        "rule_bytes": built_rule.bytes(),
    }


def _seconds(
    batches: Sequence[Mapping[str, float]], average: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """Average seconds of each part of a batch. The rest of the loop is the part "loop"."""
    rest = [each["transfer"] + each["metrics"] + each[REST] for each in batches]
    return {
        part: average(each[part] for each in batches)
        for part in ("forward", "backward", "communication", "optimizer")
    } | {"loop": average(rest)}


def _label_loss(distillation: Loss) -> Loss:
    """The loss on labels alone, of an objective that also distils a teacher."""
    return distillation.labels


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """The cost of a teacher's predictions for one batch."""

    teacher: str
    bytes: int  # weights and statistics
    seconds: float  # median, without a cache

    def describe(self) -> str:
        """A sentence for the text below a table of rules."""
        return (
            f"no row includes the teacher, {self.teacher}: it holds {self.bytes / 1e6:.4g} MB of"
            f" weights, and its predictions for a batch take {self.seconds * 1e3:.4g} ms"
        )


@torch.no_grad()
def measure_teacher(recipe: Recipe, x_B: Tensor) -> TeacherCost | None:
    """Measure the recipe's teacher on a batch of images; None without a teacher."""
    if recipe.teacher is None:
        return None
    teacher = untrained_teacher(recipe).to(x_B.device)
    teacher(x_B)  # warms up
    return TeacherCost(
        teacher=teacher.label,
        bytes=storage_bytes((*teacher.parameters(), *teacher.buffers())),
        seconds=statistics.median(
            seconds_of(lambda: teacher(x_B), x_B.device) for _ in range(TIMED)
        ),
    )


def untrained_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher with random weights. The head of a linear probe is random too.

    Raises: ValueError as `build_teacher`.
    """
    data = tasks_of(recipe)[0].data
    teacher = build_teacher(recipe.with_untrained_teacher(), data)
    if teacher.probe is not None:
        with torch.random.fork_rng(devices=[]):
            width = teacher.features(torch.zeros(1, *data.shape)).shape[-1]
            teacher.head = nn.Linear(width, data.classes)
    return teacher
