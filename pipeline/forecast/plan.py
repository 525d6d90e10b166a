"""Predicts each rule's memory and time on GPUs of a known type, or on machines like this one.

    step = compute + teacher + communication + optimizer

The sum is a model, not a measurement. Work and memory are counted at full size on tensors without
values (`step_counts.py`); no data set is needed. The model assumes no waiting for data.

A card takes the longer of two times: its roofline time over its efficiency, and the time to launch
all kernels. The roofline has no caches: each kernel reads the previous kernel's output again from
memory. Kernels that fuse several operations are faster.

    roofline = sum over operations of max(flops / peak flops, bytes / peak bandwidth)

For machines like this one, small batches of every rule are timed, with the recipe's own backend and
as many processes as workers. The seconds per batch grow linearly with the samples, so two sizes
determine the line. With the timed sizes a < b, the micro-batch B and the seconds t:

    t(B) = t(b) + (t(b) - t(a)) / (b - a) (B - b)

Both sizes are small, because the operations of `b` samples are limited. If `b` is 1, only that size
is timed, and its seconds are multiplied by B. The teacher is timed at the same sizes, in one
process.

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

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from pipeline.core.checks import require
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import Precision, check_precision
from pipeline.core.units import counted
from pipeline.data.base import DataError
from pipeline.forecast.bench import (
    RESERVE,
    RULES,
    measure_teacher,
    rules_by_label,
    samples_per_epoch,
    step_inputs,
    untrained_teacher,
)
from pipeline.forecast.rule_timing import rule_seconds, run_processes
from pipeline.forecast.step_counts import (
    Counts,
    FakeBench,
    KernelLog,
    Operation,
    count_optimizer,
    count_rule,
    count_teacher,
)
from pipeline.measure.memory import device_here, format_hardware, free_bytes, hardware
from pipeline.measure.saved_bytes import storage_bytes
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.backend.collectives import group_of_one
from pipeline.train.build import check_recipe

# Maximum floating-point operations of a timed batch, unless one sample has more.
LIMIT = {"cpu": 3e9, "cuda": 3e12}
# Minimum and maximum number of timed batches of a rule and size. Between them, the batches together
# have at most 10 LIMIT operations.
TIMED = (3, 50)


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
    """The machines that a plan is made for."""

    workers: int
    device: Device | None = None  # None: machines like this one
    per_node: int = 8
    node_link: float = 50e9  # between nodes, in bytes per second and direction; 400 Gb/s
    price: float | None = None  # of one worker for one hour
    threads: int = 1  # per worker, on a machine like this one


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
    kwh: float | None  # also None on machines like this one
    cost: float | None  # also None without a price

    @property
    def step_s(self) -> float:
        return self.compute_s + self.teacher_s + self.communication_s + self.optimizer_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predictions for one recipe."""

    recipe: str
    cluster: Cluster
    device: str  # the name of the card, or the hardware of this machine
    timed: tuple[int, ...]  # sizes in samples of the batches timed here; empty for a card
    samples: int | None  # per epoch; None if the data are not here and the user set no number
    teacher: str | None  # the teacher; its time and bytes are part of every rule's figures
    teacher_bytes: int
    rules: tuple[Planned, ...]
    refused: Mapping[str, str]  # by rule: why it cannot train or be timed, or does not fit


def plan(
    recipe: Recipe, cluster: Cluster, *, samples: int | None = None, rules: Sequence[Spec] = RULES
) -> Plan:
    """Plan `rules` and the recipe's own rule on `cluster`.

    `samples`: per epoch. None: the number in the data, if the data are here.

    Raises:
        ValueError: the recipe contradicts itself or has phases, the device does not support the
            precision of the recipe or of its teacher, an epoch has no whole batch, this machine has
            too few cores or cards for the workers, or a timing process failed.
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
    fits: dict[str, _Fit] = {}
    refused: dict[str, str] = {}
    for label, rule in rules_by_label(rules, recipe.rule).items():
        say_stage(f"counting a step of {label}")
        try:
            fits[label] = planner.fit(rule)
        except ValueError as error:
            refused[label] = str(error)
    timed, seconds = (), {}
    if cluster.device is not None:
        seconds = {label: planner.seconds_on(cluster.device, fit) for label, fit in fits.items()}
    elif fits:
        timed, seconds, untimed = planner.seconds_here(fits)
        refused |= untimed
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        device=planner.device,
        timed=timed,
        samples=samples,
        teacher=None if planner.teacher is None else planner.teacher.label,
        teacher_bytes=planner.teacher_bytes,
        rules=tuple(planner.planned(fits[label], each, samples) for label, each in seconds.items()),
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
    if (card := cluster.device) is not None:
        require(
            recipe.precision in card.flops,
            f"plan: {card.name}: precision must be {', '.join(card.flops)}; got {recipe.precision}",
        )
        return
    check_precision("recipe", recipe.precision, device_here())
    if device_here().type == "cuda":
        needs = "a GPU"
        available = maximum = torch.cuda.device_count()
    else:
        needs = counted(cluster.threads, "logical core")
        available = len(os.sched_getaffinity(0))
        maximum = available // cluster.threads
    require(
        cluster.workers <= maximum,
        f"plan: each worker needs {needs}; machines like this one have {available}; got"
        f" {counted(cluster.workers, 'worker')}: reduce them, or name a GPU with --device",
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
    """Plans each rule. It holds the values that all rules share.

    Seconds per batch are keyed by the names of fields of `Planned`.
    """

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
        if (card := cluster.device) is None:
            here = device_here()
            memory = free_bytes(here) // (cluster.workers if here.type == "cpu" else 1)
            self.device = format_hardware(hardware(here))
        else:
            memory, self.device = card.memory, card.name
            if self.teacher is not None:
                require(
                    self.teacher.precision in card.flops,
                    f"plan: {card.name}: the teacher's precision must be {', '.join(card.flops)};"
                    f" got {self.teacher.precision}",
                )
        self.usable_bytes = (1 - RESERVE) * memory

    def planned(self, fit: _Fit, seconds: Mapping[str, float], samples: int | None) -> Planned:
        recipe, cluster, counts = self.recipe, self.cluster, fit.counts
        step_s = sum(seconds.values())
        hours = kwh = cost = None
        if samples is not None:
            steps = samples // recipe.batch_size * recipe.epochs
            hours = min(steps, recipe.stop_after or steps) * step_s / 3600
            worker_hours = hours * cluster.workers
            kwh = None if cluster.device is None else cluster.device.watts * worker_hours / 1e3
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

    def seconds_on(self, card: Device, fit: _Fit) -> dict[str, float]:
        """Seconds per batch by a card's data sheet."""

        def seconds(kernel_log: KernelLog, precision: Precision) -> float:
            busy_s = card.busy_s(kernel_log.operations, precision) / card.efficiency
            return max(busy_s, kernel_log.kernels * card.launch) * fit.accumulation

        teacher, cluster = self.teacher, self.cluster
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

    def seconds_here(
        self, fits: Mapping[str, _Fit]
    ) -> tuple[tuple[int, ...], dict[str, dict[str, float]], dict[str, str]]:
        """Time small batches here, and extrapolate to the seconds per batch of each rule.

        Returns the sizes of the timed batches, the seconds by rule, and the reasons why other rules
        could not be timed.

        Raises: ValueError if a process failed.
        """
        here, workers, threads = device_here(), self.cluster.workers, self.cluster.threads
        sizes, batches = self._timed_sizes(fits.values())
        rules = {label: fit.rule for label, fit in fits.items()}
        measure = partial(rule_seconds, rounds=1, batches=batches, needs_data=False)
        measured: list[Mapping[str, Mapping[str, float]]] = []
        teacher_seconds: list[float] = []
        refused: dict[str, str] = {}
        for size in sizes:
            say_stage(f"timing batches of {counted(size, 'sample')} with {', '.join(rules)}")
            arguments = self.recipe, rules, size, threads
            if workers == 1:
                with group_of_one(here.type):
                    seconds, reasons = measure(here, *arguments)
            else:
                seconds, reasons = run_processes("plan", measure, *arguments, processes=workers)
            measured.append(seconds)
            refused |= reasons
            x_B = torch.rand(size, *self.bench(self.micro_batch).x_B.shape[1:], device=here)
            teacher = measure_teacher(self.recipe, x_B)
            teacher_seconds.append(0.0 if teacher is None else teacher.seconds)
        return (
            sizes,
            {
                label: self._extrapolated(
                    fit, sizes, [each[label] for each in measured], teacher_seconds
                )
                for label, fit in fits.items()
                if label not in refused
            },
            refused,
        )

    def _timed_sizes(self, fits: Iterable[_Fit]) -> tuple[tuple[int, ...], int]:
        """Samples of the timed batches, and the number of batches."""
        per_sample = max(1, *(fit.counts.kernel_log.flops / fit.micro_batch for fit in fits))
        limit = LIMIT[device_here().type]
        large = min(max(1, int(limit // per_sample)), self.micro_batch)
        batches = int(10 * limit / (large * per_sample))
        return tuple(sorted({max(1, large // 4), large})), min(max(TIMED[0], batches), TIMED[1])

    def _extrapolated(
        self,
        fit: _Fit,
        sizes: Sequence[int],
        measured: Sequence[Mapping[str, float]],
        teacher: Sequence[float],
    ) -> dict[str, float]:
        compute = [each["forward"] + each["backward"] + each["loop"] for each in measured]
        # A timed step has one micro-batch, so its update has the backward calls of one micro-batch.
        timed_calls = fit.backward_calls // fit.accumulation if fit.updates == 1 else 1
        timed_bytes = self._sent_bytes(self.recipe.zero, timed_calls)
        bytes_ratio = (
            self._sent_bytes(fit.zero, fit.backward_calls) / timed_bytes if timed_bytes else 1.0
        )
        return {
            "compute_s": _seconds_at(fit.micro_batch, sizes, compute) * fit.accumulation,
            "teacher_s": _seconds_at(fit.micro_batch, sizes, teacher) * fit.accumulation,
            "communication_s": measured[-1]["communication"] * bytes_ratio,
            "optimizer_s": measured[-1]["optimizer"],
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


def _seconds_at(samples: int, sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of a batch of `samples`, from the seconds of one or two sizes.

    With one size, the seconds are proportional to the samples. With two sizes, they lie on the line
    through both, whose slope is not negative.
    """
    per_sample = seconds[0] / sizes[0]
    if len(sizes) == 2:
        per_sample = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return seconds[-1] + per_sample * (samples - sizes[-1])
