"""Predicts each rule's memory and time on GPUs of a known type.

    step = compute + teacher + communication + optimizer

The sum is a model, not a measurement. Work and memory are counted at full size on tensors without
values (`step_counts.py`); no data set is needed. The model assumes no waiting for data.

A card takes the longer of two times: its roofline time over its efficiency, and the time to launch
all kernels. The roofline has no caches: each kernel reads the previous kernel's output again from
memory. Kernels that fuse several operations are faster.

    roofline = sum over operations of max(flops / peak flops, bytes / peak bandwidth)

DeepSpeed 0.19.8 holds and moves the following bytes, for parameters P, gradients G and optimizer
state O on a ring of N workers with n backward calls per batch:

    ZeRO-0   holds P + G + O                       moves 2 (N-1)/N G
    ZeRO-1   holds P + G + (O + P) / N + bucket    moves 2 (N-1)/N G + (N-1)/N P
    ZeRO-2   holds P + (G + O + P) / N + bucket    moves 2 (N-1)/N n G + (N-1)/N P

Gradients are reduced in a bucket, which is as large as all of them. P / N is a worker's part of
the master copy of the parameters. A rule that updates the weights at every time step communicates
at every time step.

Source: Williams, Waterman & Patterson 2009 (doi 10.1145/1498765.1498785) for the roofline.
"""

# N workers, T time steps

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from pipeline.core.checks import require
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import Precision
from pipeline.core.units import counted
from pipeline.data.base import DataError
from pipeline.forecast.bench import (
    RESERVE,
    RULES,
    rules_by_label,
    samples_per_epoch,
    step_inputs,
    untrained_teacher,
)
from pipeline.forecast.step_counts import (
    Counts,
    FakeBench,
    KernelLog,
    Operation,
    count_optimizer,
    count_rule,
    count_teacher,
)
from pipeline.measure.saved_bytes import storage_bytes
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe


@dataclass(frozen=True, kw_only=True)
class Device:
    """The data sheet of a card. Its figures are for dense matrices, without structured sparsity."""

    name: str
    flops: Mapping[str, float]  # per second, by precision; a multiply-add counts as two
    bandwidth: float  # of its memory, in bytes per second
    memory: float  # bytes
    link: float  # to the other cards of its node, in bytes per second and direction
    watts: float
    efficiency: float = 0.4  # share of the roofline that training reaches: an assumption
    launch: float = 5e-6  # seconds from one kernel launch to the next, in Python
    source: str

    def busy_s(self, operations: Iterable[Operation], precision: Precision) -> float:
        """Seconds by the roofline model at an efficiency of 1."""
        return sum(
            max(each.flops / self.flops[precision], each.bytes / self.bandwidth)
            for each in operations
        )


DEVICES = {
    "h100": Device(
        name="H100 SXM, 80 GB",
        flops={"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        watts=700,
        source="NVIDIA H100 Tensor Core GPU data sheet",
    ),
    "h200": Device(
        name="H200 SXM, 141 GB",
        flops={"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bandwidth=4.8e12,
        memory=141e9,
        link=450e9,
        watts=700,
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "a100": Device(
        name="A100 SXM, 80 GB",
        flops={"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        bandwidth=2.039e12,
        memory=80e9,
        link=300e9,
        watts=400,
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "v100": Device(
        name="V100 SXM2, 32 GB",
        flops={"fp32": 15.7e12},
        bandwidth=0.9e12,
        memory=32e9,
        link=150e9,
        watts=300,
        source="NVIDIA V100 Tensor Core GPU data sheet",
    ),
    "rtx4090": Device(
        name="GeForce RTX 4090, 24 GB",
        flops={"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
        bandwidth=1.008e12,
        memory=24e9,
        link=32e9,
        watts=450,
        source="NVIDIA Ada GPU architecture white paper; the link is PCIe 4.0 x16",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cards that a plan is made for: one for each worker."""

    workers: int
    device: Device
    per_node: int = 8
    node_link: float = 50e9  # between nodes, in bytes per second and direction; 400 Gb/s
    price: float | None = None  # of one worker for one hour


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The prediction for one rule."""

    rule: str
    written: Mapping[str, Any]  # the rule as in recipe.json; the label leaves out some keywords
    zero: int
    micro_batch: int
    accumulation: int
    saved_bytes: int
    memory_bytes: float  # peak per worker, of everything that training and the teacher hold
    # for one micro-batch on one worker, without the optimizer:
    flops: int
    moved_bytes: int
    kernels: int
    forecast_note: str  # how the rule was counted, if its work depends on values
    compute_s: float  # seconds per global batch; the next three likewise
    teacher_s: float  # the teacher's predictions; 0 without a teacher
    communication_s: float
    optimizer_s: float
    images_per_s: float
    # of training, without evaluations; None if the samples per epoch are unknown:
    hours: float | None
    kwh: float | None
    cost: float | None  # also None without a price

    @property
    def step_s(self) -> float:
        return self.compute_s + self.teacher_s + self.communication_s + self.optimizer_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predictions for one recipe."""

    recipe: str
    cluster: Cluster
    samples: int | None  # per epoch; None if the data are not here and the user set no number
    teacher: str | None  # the teacher; its time and bytes are part of every rule's figures
    teacher_bytes: int
    rules: tuple[Planned, ...]
    refused: Mapping[str, str]  # by rule: why it cannot train, or does not fit


def plan(
    recipe: Recipe, cluster: Cluster, *, samples: int | None = None, rules: Sequence[Spec] = RULES
) -> Plan:
    """Plan `rules` and the recipe's own rule on `cluster`.

    `samples`: per epoch. None: the number in the data, if the data are here.

    Raises:
        ValueError: the recipe contradicts itself or has phases, the card does not support the
            precision of the recipe or of its teacher, or an epoch has no whole batch.
    """
    say_stage("building the network")
    check_recipe(recipe.with_untrained_teacher(), cluster.workers)
    _check(recipe, cluster)
    if samples is None:
        with suppress(DataError):
            samples = samples_per_epoch(recipe)
    require(
        samples is None or samples >= recipe.batch_size,
        f"plan: an epoch must have at least one batch, {counted(recipe.batch_size, 'sample')}; got"
        f" {samples}",
    )
    planner = _Planner(recipe, cluster)
    planned: list[Planned] = []
    refused: dict[str, str] = {}
    for label, rule in rules_by_label(rules, recipe.rule).items():
        say_stage(f"counting a step of {label}")
        try:
            fit = planner.fit(rule)
        except ValueError as error:
            refused[label] = str(error)
        else:
            planned.append(planner.planned(fit, samples))
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        samples=samples,
        teacher=None if planner.teacher is None else planner.teacher.label,
        teacher_bytes=planner.teacher_bytes,
        rules=tuple(planned),
        refused=refused,
    )


def plan_inputs(recipe: Recipe) -> tuple[object, ...]:
    """Everything that determines a plan, except the rule and the seed."""
    return (
        *step_inputs(recipe),
        recipe.optimizer,
        recipe.clip_norm,
        recipe.ema_decay,
        recipe.backend,
        recipe.zero,
        recipe.epochs,
        recipe.stop_after,
    )


def _check(recipe: Recipe, cluster: Cluster) -> None:
    require(
        not recipe.phases,
        f"plan: the recipe must be of one task; got {counted(len(recipe.phases), 'phase')}",
    )
    card = cluster.device
    require(
        recipe.precision in card.flops,
        f"plan: {card.name}: precision must be {', '.join(card.flops)}; got {recipe.precision}",
    )


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """The micro-batch and the ZeRO stage with which a rule's training fits on a worker."""

    rule: Spec
    counts: Counts  # for one micro-batch
    micro_batch: int
    accumulation: int
    zero: int
    updates: int  # updates of the weights per batch
    backward_calls: int  # per update; at ZeRO-2 each one reduces the gradients


class _Planner:
    """Plans each rule. It holds the values that all rules share."""

    def __init__(self, recipe: Recipe, cluster: Cluster) -> None:
        self.recipe, self.cluster = recipe, cluster
        self.samples_per_worker = recipe.batch_size // cluster.workers
        self.micro_batch = recipe.split(cluster.workers).micro_batch
        self.bench: Callable[[int], FakeBench] = cache(partial(FakeBench, recipe))
        self.teacher_log: Callable[[Teacher, int], KernelLog] = cache(
            lambda teacher, size: count_teacher(teacher, self.bench(size))
        )
        self.held, self.optimizer_log = count_optimizer(self.bench(self.micro_batch))
        self.teacher, self.teacher_bytes = None, 0
        if recipe.teacher is not None:
            self.teacher = untrained_teacher(recipe)
            self.teacher_bytes = storage_bytes(
                (*self.teacher.parameters(), *self.teacher.buffers())
            )
            card = cluster.device
            require(
                self.teacher.precision in card.flops,
                f"plan: {card.name}: the teacher's precision must be {', '.join(card.flops)}; got"
                f" {self.teacher.precision}",
            )
        self.usable_bytes = (1 - RESERVE) * cluster.device.memory

    def planned(self, fit: _Fit, samples: int | None) -> Planned:
        recipe, cluster, counts = self.recipe, self.cluster, fit.counts
        seconds = self._seconds(fit)
        step_s = sum(seconds.values())
        hours = kwh = cost = None
        if samples is not None:
            steps = samples // recipe.batch_size * recipe.epochs
            hours = min(steps, recipe.stop_after or steps) * step_s / 3600
            worker_hours = hours * cluster.workers
            kwh = cluster.device.watts * worker_hours / 1e3
            cost = None if cluster.price is None else cluster.price * worker_hours
        return Planned(
            rule=counts.rule,
            written=encode(fit.rule, paths=True),
            zero=fit.zero,
            micro_batch=fit.micro_batch,
            accumulation=fit.accumulation,
            saved_bytes=counts.peak_saved_bytes,
            memory_bytes=self._peak_bytes(counts.all_bytes, fit.micro_batch, fit.zero),
            flops=counts.kernel_log.flops,
            moved_bytes=counts.kernel_log.bytes,
            kernels=counts.kernel_log.kernels,
            forecast_note=counts.forecast_note,
            **seconds,
            images_per_s=recipe.batch_size / step_s,
            hours=hours,
            kwh=kwh,
            cost=cost,
        )

    # ------------------------------------------------------------------------------------- seconds

    def _seconds(self, fit: _Fit) -> dict[str, float]:
        """Seconds per batch by the card's data sheet, by the names of fields of `Planned`."""
        teacher, cluster = self.teacher, self.cluster
        card = cluster.device

        def seconds(kernel_log: KernelLog, precision: Precision) -> float:
            busy_s = card.busy_s(kernel_log.operations, precision) / card.efficiency
            return max(busy_s, kernel_log.kernels * card.launch) * fit.accumulation

        # A ring of cards is as fast as its slowest link.
        link = card.link
        if cluster.workers > cluster.per_node:
            link = min(link, cluster.node_link)
        # A card's optimizer updates many parameters in one kernel, so launches are not added.
        optimizer_s = card.busy_s(self.optimizer_log.operations, self.recipe.precision)
        return {
            "compute_s": seconds(fit.counts.kernel_log, self.recipe.precision),
            "teacher_s": 0.0
            if teacher is None
            else seconds(self.teacher_log(teacher, fit.micro_batch), teacher.precision),
            "communication_s": fit.updates * self._sent_bytes(fit.zero, fit.backward_calls) / link,
            "optimizer_s": fit.updates * optimizer_s / card.efficiency,
        }

    # ------------------------------------------------------------------------------- bytes, by ZeRO

    def fit(self, rule: Spec) -> _Fit:
        """Choose the recipe's micro-batch, and the lowest ZeRO stage at which it fits.

        If it fits at no stage, choose the largest micro-batch that fits at any stage. A rule that
        updates the weights at each time step keeps the recipe's micro-batch.

        Raises: ValueError if the rule cannot train the network, or no micro-batch fits.
        """
        updates_at_each_step = rule.build().update == "step"
        is_fixed = self.recipe.backend == "plain" or self.cluster.workers == 1
        stages = [self.recipe.zero] if is_fixed else range(self.recipe.zero, 3)

        def stage_of(all_bytes: float, micro: int) -> int | None:
            return next(
                (z for z in stages if self._peak_bytes(all_bytes, micro, z) <= self.usable_bytes),
                None,
            )

        sizes = [
            size for size in range(self.micro_batch, 0, -1) if self.samples_per_worker % size == 0
        ]
        if updates_at_each_step:  # with accumulation, every micro-batch would update the weights
            sizes = sizes[:1]
        counts = count_rule(self.bench(self.micro_batch), rule)
        per_sample = counts.kept_bytes / self.micro_batch
        for micro in sizes:
            # A lower bound, because some saved bytes do not depend on the batch.
            if stage_of(counts.rule_bytes + micro * per_sample, micro) is None:
                continue
            if micro < self.micro_batch:
                counts = count_rule(self.bench(micro), rule)
            if (zero := stage_of(counts.all_bytes, micro)) is not None:
                accumulation, calls = self.samples_per_worker // micro, counts.backward_calls
                return _Fit(
                    rule=rule,
                    counts=counts,
                    micro_batch=micro,
                    accumulation=accumulation,
                    zero=zero,
                    updates=calls if updates_at_each_step else 1,
                    backward_calls=1 if updates_at_each_step else calls * accumulation,
                )
        all_bytes = count_rule(self.bench(sizes[-1]), rule).all_bytes
        needs = min(self._peak_bytes(all_bytes, sizes[-1], zero) for zero in stages)
        raise ValueError(
            f"{counts.rule}: training needs at least {needs / 1e9:.3g} GB per worker;"
            f" {self.usable_bytes / 1e9:.3g} GB are available"
        )

    def _peak_bytes(self, all_bytes: float, micro: int, zero: int) -> float:
        held, workers = self.held, self.cluster.workers
        averages = held.parameters if self.recipe.ema_decay else 0
        batch = self.bench(self.micro_batch).batch_bytes * micro / self.micro_batch
        peak = held.parameters + held.buffers + averages + self.teacher_bytes + all_bytes + batch
        if zero == 0:
            return peak + held.gradients + held.optimizer
        gradients = held.gradients / (workers if zero == 2 else 1)
        return peak + gradients + (held.optimizer + held.parameters) / workers + held.gradients

    def _sent_bytes(self, zero: int, backward_calls: int) -> float:
        """Bytes that a worker sends per update."""
        gradients = self.held.gradients * (backward_calls if zero == 2 else 1)
        gathered = self.held.parameters / 2 if zero else 0
        workers = self.cluster.workers
        return 2 * (workers - 1) / workers * (gradients + gathered)
