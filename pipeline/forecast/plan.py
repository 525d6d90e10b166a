"""Predicts the memory and time of each rule on other machines before anything is launched.

    step = compute + teacher + communication + optimizer

It is a model, not a measurement. Work and memory are counted at full size on tensors without
values (`counts.py`); no data set is read. A device takes the longer of two times: its roofline
(`measure/traffic.py`) over its efficiency, and the launches of all kernels. For machines like this
one the rates are measured (`devices.py`), and so is the contention between workers
(`measure/processes.py`). The model assumes that loaders keep up.

DeepSpeed 0.19.8 holds and moves the following bytes of parameters P, gradients G and the
optimizer's state O on a ring of N workers, with n backward calls in a batch:

    ZeRO-0   holds P + G + O                       moves 2 (N-1)/N G
    ZeRO-1   holds P + G + (O + P) / N + bucket    moves 2 (N-1)/N G + (N-1)/N P
    ZeRO-2   holds P + (G + O + P) / N + bucket    moves 2 (N-1)/N n G + (N-1)/N P

The bucket in which gradients are reduced is as large as all of them. P / N is the master copy of a
worker's part. A rule that updates the weights at every time step communicates at every time step.
"""

# N workers, T time steps

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import Precision, check_precision
from pipeline.core.units import counted as count_of
from pipeline.data.base import DataError
from pipeline.forecast.bench import RESERVE, RULES, rules_by_label, samples_per_epoch, step_inputs
from pipeline.forecast.counts import (
    Counts,
    FakeBench,
    TeacherCounts,
    counted,
    counted_optimizer,
    counted_teacher,
)
from pipeline.forecast.devices import measured_here
from pipeline.measure.memory import device_here
from pipeline.measure.processes import measure_contention
from pipeline.measure.traffic import Device, Traffic
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines that a plan is made for."""

    workers: int
    device: Device | None = None  # None: machines like this one
    per_node: int = 8
    node_link: float = 50e9  # from node to node, bytes per second and direction; 400 Gb/s
    price: float | None = None  # of an hour of one worker
    threads: int = 1  # of a worker, on a machine like this one

    @property
    def bandwidth(self) -> float:
        """Bytes per second of a ring of cards, which is as fast as its slowest link."""
        assert self.device is not None, "the link between machines like this one is measured"
        link = self.device.link
        return link if self.workers <= self.per_node else min(link, self.node_link)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The prediction for one rule."""

    rule: str
    written: Mapping[str, Any]  # the rule as in recipe.json: its label does not show all keywords
    zero: int
    micro_batch: int
    accumulation: int
    saved_bytes: int
    memory_bytes: float  # peak of a worker: held bytes, kept bytes, and the batch itself
    # of one micro-batch on one worker, without the optimizer:
    flops: int
    moved_bytes: int
    kernels: int
    forecast_note: str  # how the rule was counted, where its work depends on values
    compute_s: float  # of a batch; likewise:
    teacher_s: float  # of a teacher's answers; 0 without one
    communication_s: float
    optimizer_s: float
    images_per_s: float
    # of training, without evaluations; None where the samples of an epoch are unknown:
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
    device: Device  # the cluster's, or the measured device here
    samples: int | None  # of an epoch; None where the data are not here and no number is given
    teacher: str | None  # whose time and bytes are part of every rule's figures
    teacher_bytes: int
    rules: tuple[Planned, ...]
    refused: Mapping[str, str]  # rules that cannot train the network or do not fit, and why


def plan(
    recipe: Recipe, cluster: Cluster, *, samples: int | None = None, rules: Sequence[Spec] = RULES
) -> Plan:
    """Plan `rules`, and the recipe's own, on `cluster`.

    `samples`: of an epoch. None takes the data's number, if the data are here.

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
    planner = _Planner(recipe, cluster, samples)
    planned, refused = [], {}
    for label, rule in rules_by_label(rules, recipe.rule).items():
        say_stage(f"counting a step of {label}")
        try:
            planned.append(planner.planned(rule))
        except ValueError as error:
            refused[label] = str(error)
    teacher = planner.teacher
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        device=planner.device,
        samples=samples,
        teacher=None if teacher is None else teacher.teacher,
        teacher_bytes=0 if teacher is None else teacher.bytes,
        rules=tuple(planned),
        refused=refused,
    )


def plan_inputs(recipe: Recipe) -> tuple[object, ...]:
    """Everything that decides a plan, except the rule."""
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
        if cluster.workers > cards:
            raise ValueError(
                f"plan: every worker takes a card, of which machines like this one have {cards}; "
                f"got {workers}; name the card with --device, or fewer"
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


class _Planner:
    """The device, the batch, and the bytes that a worker holds and moves, shared by all rules."""

    def __init__(self, recipe: Recipe, cluster: Cluster, samples: int | None) -> None:
        self.recipe, self.cluster, self.samples = recipe, cluster, samples
        self.whole = recipe.batch_size // cluster.workers
        self.wanted = recipe.split(cluster.workers).micro_batch
        self.bench: Callable[[int], FakeBench] = cache(lambda size: FakeBench(recipe, size))
        bench = self.bench(self.wanted)
        self.held, optimizer = counted_optimizer(bench)
        self._teachers: Callable[[int], TeacherCounts | None] = cache(
            lambda size: counted_teacher(recipe, self.bench(size))
        )
        self.teacher = self._teachers(self.wanted)
        precisions: set[Precision] = {recipe.precision}
        if self.teacher is not None:
            precisions.add(self.teacher.precision)
        self.slowdown, self.word_s = 1.0, 0.0
        if (card := cluster.device) is None:
            say_stage("measuring this machine")
            self.device = measured_here(precisions, threads=cluster.threads)
            self.memory = (1 - RESERVE) * self.device.memory
            on = "cuda" if device_here().type == "cuda" else "cpu"
            found = measure_contention(
                cluster.workers, self.held.gradients, threads=cluster.threads, on=on
            )
            if on == "cpu":  # cards share neither caches, clocks nor memory
                self.slowdown = found.slowdown
                self.memory /= cluster.workers
            self.word_s = found.word_s
            self.s_of_a_byte = found.ring_s / max(1.0, self._ring(self.held.gradients))
            self.optimizer_s = self._seconds(optimizer) * self.slowdown
        else:
            if self.teacher is not None and self.teacher.precision not in card.flops:
                raise ValueError(
                    f"plan: {card.name}: the teacher's precision must be {', '.join(card.flops)};"
                    f" got {self.teacher.precision}"
                )
            self.device, self.memory = card, (1 - RESERVE) * card.memory
            self.s_of_a_byte = 1 / cluster.bandwidth
            # A card's optimizer updates many parameters in one kernel: no launch for each of them.
            self.optimizer_s = optimizer.busy(card, precision=recipe.precision) / card.efficiency

    def planned(self, rule: Spec) -> Planned:
        """The prediction for a rule, with the recipe's micro-batch at the lowest ZeRO stage that
        fits, or else with the largest micro-batch that fits at any stage.

        Raises: ValueError where the rule cannot train the network, or no micro-batch fits.
        """
        recipe, cluster = self.recipe, self.cluster
        updates_each_step = rule.build().update == "step"
        counts, micro, zero = self._fitting(rule, updates_each_step)
        accumulation = self.whole // micro
        updates = counts.backward_calls if updates_each_step else 1
        sums = 1 if updates_each_step else counts.backward_calls * accumulation
        compute_s = self._seconds(counts.traffic) * accumulation * self.slowdown
        teacher_s = self._teacher_s(micro) * accumulation
        communication_s = updates * self._communication_s(zero, sums)
        optimizer_s = updates * self.optimizer_s
        step_s = compute_s + teacher_s + communication_s + optimizer_s
        hours = kwh = cost = None
        if self.samples is not None:
            steps = self.samples // recipe.batch_size * recipe.epochs
            hours = min(steps, recipe.stop_after or steps) * step_s / 3600
            worker_hours = hours * cluster.workers
            kwh = None if cluster.device is None else cluster.device.watts * worker_hours / 1e3
            cost = None if cluster.price is None else cluster.price * worker_hours
        return Planned(
            rule=counts.rule,
            written=encode(rule, paths=True),
            zero=zero,
            micro_batch=micro,
            accumulation=accumulation,
            saved_bytes=counts.peak_saved_bytes,
            memory_bytes=self._needed(counts.kept_bytes, micro, zero),
            flops=counts.traffic.flops,
            moved_bytes=counts.traffic.bytes,
            kernels=counts.traffic.kernels,
            forecast_note=counts.forecast_note,
            compute_s=compute_s,
            teacher_s=teacher_s,
            communication_s=communication_s,
            optimizer_s=optimizer_s,
            images_per_s=recipe.batch_size / step_s,
            hours=hours,
            kwh=kwh,
            cost=cost,
        )

    def _fitting(self, rule: Spec, updates_each_step: bool) -> tuple[Counts, int, int]:
        """Counts, micro-batch and ZeRO stage of the prediction."""
        recipe, workers = self.recipe, self.cluster.workers
        only = recipe.backend == "plain" or workers == 1
        stages = (recipe.zero,) if only else tuple(range(recipe.zero, 3))

        def stage_of(kept: float, size: int) -> int | None:
            fits = (zero for zero in stages if self._needed(kept, size, zero) <= self.memory)
            return next(fits, None)

        wanted = self.wanted
        counts = counted(self.bench(wanted), rule)
        if (zero := stage_of(counts.kept_bytes, wanted)) is not None:
            return counts, wanted, zero
        smaller = [size for size in range(wanted - 1, 0, -1) if self.whole % size == 0]
        if updates_each_step:  # with accumulation, it would update at every micro-batch
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
            self._needed(each, size, zero) for size, each in kept.items() for zero in stages
        )
        raise ValueError(
            f"{counts.rule}: a worker must fit into {self.memory / 1e9:.3g} GB; it needs"
            f" {needs / 1e9:.3g} GB at least"
        )

    def _needed(self, kept: float, micro: int, zero: int) -> float:
        """Peak bytes of a worker."""
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

    def _teacher_s(self, micro: int) -> float:
        """Seconds of the teacher on a micro-batch."""
        if (teacher := self._teachers(micro)) is None:
            return 0.0
        return self._seconds(teacher.traffic, teacher.precision) * self.slowdown

    def _seconds(self, traffic: Traffic, precision: str | None = None) -> float:
        device = self.device
        busy = traffic.busy(device, precision=precision or self.recipe.precision)
        return max(busy / device.efficiency, traffic.kernels * device.launch)

    def _communication_s(self, zero: int, backward_calls: int) -> float:
        """Seconds of one update, with the exchange of whether all gradients are finite."""
        sums = backward_calls if zero == 2 else 1
        gathered = 0.0 if zero == 0 else self._ring(self.held.parameters) / 2
        moved = sums * self._ring(self.held.gradients) + gathered
        return self.word_s + moved * self.s_of_a_byte

    def _ring(self, size: float) -> float:
        """Bytes that a worker sends to sum `size` bytes over all workers."""
        workers = self.cluster.workers
        return 2 * (workers - 1) / workers * size
