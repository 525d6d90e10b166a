"""Predicts the memory and time of each rule on other machines before anything is launched.

    step = compute + teacher + communication + optimizer

It is a model, not a measurement. Work and memory are counted at full size on tensors without
values (`counts.py`); no data set is needed. The model assumes that loaders keep up.

A card takes the longer of two times: its roofline time (`devices.py`) over its efficiency, and the
time to launch all kernels. For machines like this one, small batches of every rule are timed, with
the recipe's own backend and as many processes as workers. The seconds per batch grow linearly with
its samples, so two sizes determine them:

    t(B) = t(b) + (t(b) - t(a)) / (b - a) (B - b)

Both sizes are small, because the operations of `b` samples are limited. If one sample exceeds that
limit, its seconds are multiplied by B. The teacher is timed likewise.

DeepSpeed 0.19.8 holds and moves the following bytes, for parameters P, gradients G and optimizer
state O on a ring of N workers with n backward calls per batch:

    ZeRO-0   holds P + G + O                       moves 2 (N-1)/N G
    ZeRO-1   holds P + G + (O + P) / N + bucket    moves 2 (N-1)/N G + (N-1)/N P
    ZeRO-2   holds P + (G + O + P) / N + bucket    moves 2 (N-1)/N n G + (N-1)/N P

Gradients are reduced in a bucket, which is as large as all of them. P / N is the master copy of a
worker's part. A rule that updates the weights at every time step communicates at every time step.
"""

# N workers, T time steps

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from pipeline.core.checks import require
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import Precision, check_precision
from pipeline.core.units import counted as count_of
from pipeline.data.base import DataError
from pipeline.forecast.bench import (
    RESERVE,
    RULES,
    measure_teacher,
    rules_by_label,
    samples_per_epoch,
    step_inputs,
)
from pipeline.forecast.counts import (
    Counts,
    FakeBench,
    TeacherCounts,
    Traffic,
    counted,
    counted_optimizer,
    counted_teacher,
)
from pipeline.forecast.devices import Device
from pipeline.forecast.interleaved import Timed, rule_seconds, run_processes
from pipeline.measure.memory import device_here, format_hardware, free_bytes, hardware
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.backend.collectives import group_of_one
from pipeline.train.build import check_recipe

# Floating-point operations of the larger timed batch on machines like this one.
LIMIT = {"cpu": 3e9, "cuda": 3e12}
TIMED = (3, 50)  # minimum and maximum of timed batches; 10 at the limit


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that a plan is made for."""

    workers: int
    device: Device | None = None  # None: machines like this one
    per_node: int = 8
    node_link: float = 50e9  # between nodes, in bytes per second and direction; 400 Gb/s
    price: float | None = None  # of one worker for one hour
    threads: int = 1  # per worker, on a machine like this one

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a ring of cards. A ring is as fast as its slowest link."""
        assert self.device is not None, "the link between machines like this one is measured"
        link = self.device.link
        return link if self.workers <= self.per_node else min(link, self.node_link)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The prediction for one rule."""

    rule: str
    written: Mapping[str, Any]  # the rule as in recipe.json; its label lacks some keywords
    zero: int
    micro_batch: int
    accumulation: int
    saved_bytes: int
    memory_bytes: float  # peak per worker: held bytes, kept bytes, and the batch itself
    # for one micro-batch on one worker, without the optimizer:
    flops: int
    moved_bytes: int
    kernels: int
    forecast_note: str  # how the rule was counted, if its work depends on values
    compute_s: float  # per batch, as are the following:
    teacher_s: float  # the teacher's answers; 0 without a teacher
    communication_s: float
    optimizer_s: float
    images_per_s: float
    # of training, without evaluations; None if the samples per epoch are unknown:
    hours: float | None
    kwh: float | None
    cost: float | None

    @property
    def step_s(self) -> float:
        return self.compute_s + self.teacher_s + self.communication_s + self.optimizer_s


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predictions for one recipe."""

    recipe: str
    cluster: Cluster
    device: str  # the cluster's, or the device here
    timed: tuple[int, ...]  # samples of the batches that were timed here; empty for a card
    samples: int | None  # per epoch; None if the data are not here and no number is given
    teacher: str | None  # the teacher; its time and bytes are part of every rule's figures
    teacher_bytes: int
    rules: tuple[Planned, ...]
    refused: Mapping[str, str]  # the reasons by rule: it cannot train the network or does not fit


def plan(
    recipe: Recipe, cluster: Cluster, *, samples: int | None = None, rules: Sequence[Spec] = RULES
) -> Plan:
    """Plan `rules` and the recipe's own rule on `cluster`.

    `samples`: per epoch. None: the number in the data, if the data are here.

    Raises:
        ValueError: the recipe contradicts itself or has phases, the card's data sheet lacks the
            precision, an epoch has no whole batch, or this machine has fewer cores or cards than
            workers.
    """
    say_stage("building the network")
    check_recipe(recipe.with_untrained_teacher(), cluster.workers)
    _check(recipe, cluster)
    samples = _samples(recipe) if samples is None else samples
    if samples is not None and samples < recipe.batch_size:
        least = count_of(recipe.batch_size, "sample")
        raise ValueError(f"plan: an epoch must have a batch of {least} at least; got {samples}")
    planner = _Planner(recipe, cluster)
    fits: dict[str, _Fit] = {}
    refused: dict[str, str] = {}
    for label, rule in rules_by_label(rules, recipe.rule).items():
        say_stage(f"counting a step of {label}")
        try:
            fits[label] = planner.fit(rule)
        except ValueError as error:
            refused[label] = str(error)
    timed: tuple[int, ...] = ()
    if cluster.device is None:
        timed, seconds, untimed = planner.seconds_here(fits)
        refused |= untimed
    else:
        seconds = {label: planner.seconds_on(cluster.device, fit) for label, fit in fits.items()}
    teacher = planner.teacher
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        device=planner.device,
        timed=timed,
        samples=samples,
        teacher=None if teacher is None else teacher.teacher,
        teacher_bytes=0 if teacher is None else teacher.bytes,
        rules=tuple(planner.planned(fits[label], each, samples) for label, each in seconds.items()),
        refused=refused,
    )


def plan_inputs(recipe: Recipe) -> tuple[object, ...]:
    """Everything that determines a plan, except the rule."""
    length = (recipe.epochs, recipe.stop_after)
    return (*step_inputs(recipe), recipe.optimizer, recipe.ema_decay, recipe.zero, *length)


def _check(recipe: Recipe, cluster: Cluster) -> None:
    card, cores = cluster.device, len(os.sched_getaffinity(0))
    workers = count_of(cluster.workers, "worker")
    if recipe.phases:
        got = count_of(len(recipe.phases), "phase")
        raise ValueError(f"plan: the recipe must be of one task; got {got}")
    if card is not None and recipe.precision not in card.flops:
        known = ", ".join(card.flops)
        raise ValueError(f"plan: {card.name}: precision must be {known}; got {recipe.precision}")
    if card is None:
        check_precision("recipe", recipe.precision, device_here())
    if card is None and device_here().type == "cuda":
        cards = torch.cuda.device_count()
        require(
            cluster.workers <= cards,
            f"plan: every worker takes a card, of which machines like this one have {cards}; "
            f"got {workers}; name the card with --device, or fewer",
        )
    elif card is None and cluster.workers * cluster.threads > cores:
        raise ValueError(
            f"plan: machines like this one have {count_of(cores, 'core')}, of which every worker "
            f"takes {cluster.threads}; got {workers}; name a card, or fewer"
        )


def _samples(recipe: Recipe) -> int | None:
    try:
        return samples_per_epoch(recipe)
    except DataError:
        return None


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How a rule's training fits on a worker."""

    rule: Spec
    counts: Counts  # for one micro-batch
    micro_batch: int
    accumulation: int
    zero: int
    updates: int  # updates of the weights per batch
    sums: int  # sums of gradients over all workers per update, if each backward sums them


class _Seconds(NamedTuple):
    """Seconds of one batch."""

    compute: float
    teacher: float
    communication: float
    optimizer: float


class _Planner:
    """The batch, and the bytes that a worker holds and moves. All rules share them."""

    def __init__(self, recipe: Recipe, cluster: Cluster) -> None:
        self.recipe, self.cluster = recipe, cluster
        self.whole = recipe.batch_size // cluster.workers
        self.wanted = recipe.split(cluster.workers).micro_batch
        self.bench: Callable[[int], FakeBench] = cache(lambda size: FakeBench(recipe, size))
        self.held, self.optimizer = counted_optimizer(self.bench(self.wanted))
        self.teacher_of: Callable[[int], TeacherCounts | None] = cache(
            lambda size: counted_teacher(recipe, self.bench(size))
        )
        self.teacher = self.teacher_of(self.wanted)
        if (card := cluster.device) is None:
            here = device_here()
            self.device, memory = format_hardware(hardware(here)), free_bytes(here)
            if here.type == "cpu":
                memory //= cluster.workers
        else:
            if self.teacher is not None:
                require(
                    self.teacher.precision in card.flops,
                    f"plan: {card.name}: the teacher's precision must be {', '.join(card.flops)};"
                    f" got {self.teacher.precision}",
                )
            self.device, memory = card.name, card.memory
        self.memory = (1 - RESERVE) * memory

    def planned(self, fit: _Fit, seconds: _Seconds, samples: int | None) -> Planned:
        recipe, cluster, counts = self.recipe, self.cluster, fit.counts
        step_s = sum(seconds)
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
            memory_bytes=self._peak_bytes(counts.kept_bytes, fit.micro_batch, fit.zero),
            flops=counts.traffic.flops,
            moved_bytes=counts.traffic.bytes,
            kernels=counts.traffic.kernels,
            forecast_note=counts.forecast_note,
            compute_s=seconds.compute,
            teacher_s=seconds.teacher,
            communication_s=seconds.communication,
            optimizer_s=seconds.optimizer,
            images_per_s=recipe.batch_size / step_s,
            hours=hours,
            kwh=kwh,
            cost=cost,
        )

    # ------------------------------------------------------------------------------------- seconds

    def seconds_on(self, card: Device, fit: _Fit) -> _Seconds:
        """Seconds per batch by a card's data sheet."""

        def seconds(traffic: Traffic, precision: Precision) -> float:
            busy = card.busy_s(traffic.operations, precision)
            return max(busy / card.efficiency, traffic.kernels * card.launch)

        teacher = self.teacher_of(fit.micro_batch)
        teacher_s = 0.0 if teacher is None else seconds(teacher.traffic, teacher.precision)
        # A card's optimizer updates many parameters in one kernel, so launches are not added.
        optimizer_s = card.busy_s(self.optimizer.operations, self.recipe.precision)
        return _Seconds(
            compute=seconds(fit.counts.traffic, self.recipe.precision) * fit.accumulation,
            teacher=teacher_s * fit.accumulation,
            communication=fit.updates
            * self._sent_bytes(fit.zero, fit.sums)
            / self.cluster.bandwidth,
            optimizer=fit.updates * optimizer_s / card.efficiency,
        )

    def seconds_here(
        self, fits: Mapping[str, _Fit]
    ) -> tuple[tuple[int, ...], dict[str, _Seconds], dict[str, str]]:
        """Time small batches here, and extrapolate to the seconds per batch of each rule.

        Returns the sizes of the timed batches, the seconds, and the reasons why other rules could
        not be timed.

        Raises: ValueError if a process failed.
        """
        if not fits:
            return (), {}, {}
        sizes, batches = self._timed_sizes(fits.values())
        rules = {label: fit.rule for label, fit in fits.items()}
        of_size, of_teacher, refused = [], [], {}
        for size in sizes:
            say_stage(f"timing batches of {count_of(size, 'sample')} with {', '.join(rules)}")
            seconds, why = self._time(rules, size, batches)
            of_size.append(seconds)
            refused |= why
            x_B = torch.rand(size, *self.bench(self.wanted).x_B.shape[1:], device=device_here())
            teacher = measure_teacher(self.recipe, x_B)
            of_teacher.append(0.0 if teacher is None else teacher.seconds)
        found = {
            label: self._extrapolated(fit, sizes, [each[label] for each in of_size], of_teacher)
            for label, fit in fits.items()
            if label not in refused
        }
        return sizes, found, refused

    def _timed_sizes(self, fits: Iterable[_Fit]) -> tuple[tuple[int, ...], int]:
        """Samples of the timed batches, and the number of batches."""
        of_a_sample = max(1, *(fit.counts.traffic.flops / fit.micro_batch for fit in fits))
        limit, (least, most) = LIMIT[device_here().type], TIMED
        large = min(max(1, int(limit // of_a_sample)), self.wanted)
        batches = int(10 * limit / (large * of_a_sample))
        return tuple(sorted({max(1, large // 4), large})), min(max(least, batches), most)

    def _time(self, rules: Mapping[str, Spec], size: int, batches: int) -> Timed:
        cluster, how = self.cluster, {"rounds": 1, "batches": batches, "needs_data": False}
        given = self.recipe, rules, size, cluster.threads
        if cluster.workers == 1:
            with group_of_one(device_here().type):
                return rule_seconds(device_here(), *given, **how)
        work = partial(rule_seconds, **how)
        return run_processes("plan", work, *given, processes=cluster.workers)

    def _extrapolated(
        self,
        fit: _Fit,
        sizes: Sequence[int],
        measured: Sequence[Mapping[str, float]],
        teacher: Sequence[float],
    ) -> _Seconds:
        micro = fit.micro_batch
        compute = [each["forward"] + each["backward"] + each["loop"] for each in measured]
        # A timed step has one micro-batch, so it sums gradients for one micro-batch or one update.
        timed_sums = fit.sums // fit.accumulation if fit.updates == 1 else 1
        once = self._sent_bytes(self.recipe.zero, timed_sums)
        more = self._sent_bytes(fit.zero, fit.sums) / once if once else 1.0
        return _Seconds(
            compute=_at(micro, sizes, compute) * fit.accumulation,
            teacher=_at(micro, sizes, teacher) * fit.accumulation,
            communication=measured[-1]["communication"] * more,
            optimizer=measured[-1]["optimizer"],
        )

    # ------------------------------------------------------------------------------- bytes, by ZeRO

    def fit(self, rule: Spec) -> _Fit:
        """The recipe's micro-batch at the lowest ZeRO stage that fits.

        If no stage fits, the largest micro-batch that fits at any stage is used.

        Raises: ValueError if the rule cannot train the network, or no micro-batch fits.
        """
        updates_each_step = rule.build().update == "step"
        counts, micro, zero = self._fitting(rule, updates_each_step)
        accumulation = self.whole // micro
        return _Fit(
            rule=rule,
            counts=counts,
            micro_batch=micro,
            accumulation=accumulation,
            zero=zero,
            updates=counts.backward_calls if updates_each_step else 1,
            sums=1 if updates_each_step else counts.backward_calls * accumulation,
        )

    def _fitting(self, rule: Spec, updates_each_step: bool) -> tuple[Counts, int, int]:
        """Counts, micro-batch and ZeRO stage of the prediction."""
        recipe, workers = self.recipe, self.cluster.workers
        only = recipe.backend == "plain" or workers == 1
        stages = (recipe.zero,) if only else tuple(range(recipe.zero, 3))

        def stage_of(kept: float, size: int) -> int | None:
            fits = (zero for zero in stages if self._peak_bytes(kept, size, zero) <= self.memory)
            return next(fits, None)

        wanted = self.wanted
        counts = counted(self.bench(wanted), rule)
        if (zero := stage_of(counts.kept_bytes, wanted)) is not None:
            return counts, wanted, zero
        smaller = [size for size in range(wanted - 1, 0, -1) if self.whole % size == 0]
        if updates_each_step:  # with accumulation, the rule would update at every micro-batch
            smaller = []
        kept: dict[int, float] = {wanted: counts.kept_bytes}
        if smaller:  # kept bytes grow linearly with the batch
            least = counted(self.bench(smaller[-1]), rule).kept_bytes
            slope = (counts.kept_bytes - least) / (wanted - smaller[-1])
            kept |= {size: least + slope * (size - smaller[-1]) for size in smaller}
        for size in smaller:
            if stage_of(kept[size], size) is not None:
                counts = counted(self.bench(size), rule)
                if (zero := stage_of(counts.kept_bytes, size)) is not None:
                    return counts, size, zero
        needs = min(
            self._peak_bytes(each, size, zero) for size, each in kept.items() for zero in stages
        )
        raise ValueError(
            f"{counts.rule}: a worker must fit into {self.memory / 1e9:.3g} GB; it needs"
            f" {needs / 1e9:.3g} GB at least"
        )

    def _peak_bytes(self, kept: float, micro: int, zero: int) -> float:
        """Peak bytes per worker."""
        held, workers = self.held, self.cluster.workers
        bytes_ = held.parameters + held.buffers + kept
        bytes_ += self.bench(self.wanted).batch_bytes * micro / self.wanted
        bytes_ += held.parameters if self.recipe.ema_decay else 0
        bytes_ += 0 if self.teacher is None else self.teacher.bytes
        if zero == 0:
            return bytes_ + held.gradients + held.optimizer
        gradients = held.gradients / (workers if zero == 2 else 1)
        master = (held.optimizer + held.parameters) / workers
        return bytes_ + gradients + master + held.gradients

    def _sent_bytes(self, zero: int, backward_calls: int) -> float:
        """Bytes that a worker sends per update."""
        sums = backward_calls if zero == 2 else 1
        gathered = 0.0 if zero == 0 else self._ring(self.held.parameters) / 2
        return sums * self._ring(self.held.gradients) + gathered

    def _ring(self, size: float) -> float:
        """Bytes that a worker sends to sum `size` bytes over all workers."""
        workers = self.cluster.workers
        return 2 * (workers - 1) / workers * size


def _at(samples: int, sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of a batch of `samples`, from the seconds of one or two sizes."""
    if len(sizes) == 1:
        return seconds[0] * samples / sizes[0]
    (small, large), (first, last) = sizes, seconds
    of_a_sample = max(0.0, (last - first) / (large - small))
    return last + of_a_sample * (samples - large)
