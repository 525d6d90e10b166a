"""Predicts, before anything is launched, what each rule needs on machines that are not here: a
model, not a measurement.

    step = compute + teacher + communication + optimizer + loading

Compute and memory come from a profile of small batches (`profile.py`). Here its seconds are the
machine's own, and those of a move of the weights too (`moving.py`), times what its workers slow one
another down (`measure/contention.py`); for a card of the table compute is the longer of its
roofline (`measure/traffic.py`) divided by EFFICIENCY, and the launches of its kernels.

What DeepSpeed 0.19.8 holds and moves of parameters P, gradients G and the optimizer's state O on N
workers, a ring, with n backward calls in a batch:

    ZeRO-0   holds P + G + O                       moves 2 (N-1)/N G
    ZeRO-1   holds P + G + (O + P) / N + bucket    moves 2 (N-1)/N G + (N-1)/N P
    ZeRO-2   holds P + (G + O + P) / N + bucket    moves 2 (N-1)/N n G + (N-1)/N P

with the bucket in which gradients are reduced, as large as all of them, and P / N for the master
copy of a worker's part. A rule that moves the weights at every time step does all of it so many
times.
"""

# N workers, B samples of a worker, T time steps

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.forecast.batches import loading_s
from pipeline.forecast.bench import RESERVE, RULES, Bench, DoesNotFit, by_label
from pipeline.forecast.moving import moving_s
from pipeline.forecast.profile import (
    EFFICIENCY,
    Profile,
    TeacherProfile,
    profile_of,
    sizes_for,
    teacher_profile,
    times_for,
)
from pipeline.forecast.rounds import ROUNDS, in_rounds
from pipeline.measure.contention import ALONE, neighbours
from pipeline.measure.memory import device_here, free_bytes
from pipeline.measure.memory_breakdown import Held
from pipeline.measure.traffic import Device
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe
from pipeline.train.tasks import Loaders, tasks_of

RAY_SHARE = 0.07
"""of a core that Ray's own processes take from each worker where no core is spare: `top` on two
workers, Ray 2.60
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a plan is for."""

    workers: int
    device: Device | None = None
    """None: machines like this one"""
    per_node: int = 8
    node_link: float = 50e9
    """from node to node, bytes per second and direction; 400 Gb/s"""
    price: float | None = None
    """of an hour of one worker"""
    threads: int = 1
    """of a worker, on a machine like this one"""

    @property
    def bandwidth(self) -> float | None:
        """Of a ring over all workers, which is as fast as its slowest link; None: here, to be
        measured.
        """
        if self.device is None:
            return None
        return (
            self.device.link
            if self.workers <= self.per_node
            else min(self.device.link, self.node_link)
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One rule at the size that was asked for."""

    rule: str
    written: Mapping[str, Any]
    """the rule as recipe.json writes it: a label does not tell all"""
    zero: int
    micro_batch: int
    accumulation: int
    saved_bytes: float
    memory_bytes: float
    """of a worker at its peak: held, kept, and the batch itself"""
    compute_s: float
    teacher_s: float
    """of asking a teacher once a batch; 0 without one"""
    communication_s: float
    optimizer_s: float
    """of moving the weights; here with a look at the gradients before"""
    loading_s: float
    """that no computation covers"""
    images_per_s: float
    hours: float
    """of training; evaluations are not in it"""
    kwh: float | None
    cost: float | None

    @property
    def step_s(self) -> float:
        return (
            self.compute_s
            + self.teacher_s
            + self.communication_s
            + self.optimizer_s
            + self.loading_s
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Of one recipe."""

    recipe: str
    cluster: Cluster
    samples: int
    """of an epoch"""
    profiled: tuple[tuple[int, ...], tuple[int, ...]]
    """sizes of batches, and numbers of time steps, that were profiled"""
    source: Literal["data", "noise"]
    """what they held"""
    teacher: str | None
    """that the figures of every rule have in them: its time, and the bytes of its weights"""
    teacher_bytes: float
    rules: tuple[Planned, ...]
    refused: Mapping[str, str]
    """rules that cannot train the network, or do not fit at any size, and why"""


def plan(
    recipe: Recipe,
    cluster: Cluster,
    *,
    samples: int | None = None,
    source: Literal["data", "noise"] = "data",
    rules: Sequence[Spec] = RULES,
) -> Plan:
    """Plan `rules`, and the recipe's own, on `cluster`; `samples` are those of an epoch (None: the
    data's).

    Raises: ValueError for a recipe that does not fit together or has phases, a precision that the
    card's sheet does not give, more workers than this machine has cores or cards, where it is
    meant, or an epoch without a whole batch; what the data refuse."""
    check_recipe(recipe.with_untrained_teacher(), cluster.workers)
    _check(recipe, cluster)
    samples = _samples(recipe) if samples is None else samples
    if samples < recipe.batch_size:
        raise ValueError(
            f"plan: an epoch must have a batch of {counted(recipe.batch_size, 'sample')} at least;"
            f" got {samples}"
        )
    sizes = sizes_for(recipe, cluster.workers, card=cluster.device)
    say_stage("building the network")
    # Counts of bytes and operations are the same in fp32 and TF32, and this machine may have no
    # TF32.
    priced = (
        recipe
        if cluster.device is None or recipe.precision != "tf32"
        else replace(recipe, precision="fp32")
    )
    made = cache(
        lambda B, T: Bench(
            replace(priced, time_steps=T), batch_size=B, source=source, threads=cluster.threads
        )
    )
    bench = made(sizes[1], recipe.time_steps)
    with bench.in_memory(f"{recipe.name}'s teacher"):
        teacher = teacher_profile(recipe, bench.x_B, sizes, cluster.device)
    move_s = _moving_s(made, sizes[0], recipe.time_steps) if cluster.device is None else 0.0
    share = _Share(recipe, cluster, bench, source, teacher, move_s)
    planned, refused = [], {}
    profiled: set[int] = set()
    for label, rule in by_label(rules, recipe.rule).items():
        say_stage(f"profiling {label}")
        try:
            times = times_for(recipe, rule.build())
            needs = {(B, T): made(B, T).needs(rule) for B in sizes for T in times}
            seconds = (
                _seconds({place: made(*place) for place in needs}, rule)
                if cluster.device is None
                else None
            )
            planned.append(
                _planned(
                    rule,
                    profile_of(rule.build(), needs, seconds, recipe, cluster.device),
                    share,
                    recipe,
                    cluster,
                    samples,
                )
            )
            profiled.update(times)
        except ValueError as error:
            refused[label] = str(error)
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        samples=samples,
        profiled=(sizes, tuple(sorted(profiled))),
        source=source,
        teacher=None if share.teacher is None else share.teacher.label,
        teacher_bytes=share.teacher_bytes,
        rules=tuple(planned),
        refused=refused,
    )


def _seconds(benches: Mapping[tuple[int, int], Bench], rule: Spec) -> dict[tuple[int, int], float]:
    """Of a batch at each (B, T), the median of several rounds: where a machine gets slower, it does
    so for all of them.
    """
    rounds = [
        {place: benches[place].cost(rule) for place in order}
        for order in in_rounds(benches, ROUNDS)
    ]
    return {
        place: statistics.median(each[place].compute_s + each[place].loop_s for each in rounds)
        for place in benches
    }


def _moving_s(made: Callable[[int, int], Bench], B: int, T: int) -> float:
    """Of batches of B samples, which hardly matter; of one where they do not fit, which is no
    answer about the other rules.
    """
    try:
        return moving_s(made(B, T))
    except DoesNotFit:
        return moving_s(made(1, T))


def _check(recipe: Recipe, cluster: Cluster) -> None:
    card, cores = cluster.device, len(os.sched_getaffinity(0))
    if recipe.phases:
        raise ValueError(
            f"plan: the recipe must be of one task; got {counted(len(recipe.phases), 'phase')}"
        )
    if card is not None and recipe.precision not in card.flops:
        raise ValueError(
            f"plan: {card.name}: precision must be {', '.join(card.flops)}; got {recipe.precision}"
        )
    if card is None and device_here().type == "cuda":
        cards = torch.cuda.device_count()
        if cluster.workers > cards:
            raise ValueError(
                f"plan: every worker takes a card, of which machines like this one have {cards}; "
                f"got {counted(cluster.workers, 'worker')}; name the card with --device, or fewer"
            )
    elif card is None and cluster.workers * cluster.threads > cores:
        raise ValueError(
            f"plan: machines like this one have {counted(cores, 'core')}, of which every worker"
            f" takes {cluster.threads}; got {counted(cluster.workers, 'worker')}; name a card, or"
            " fewer"
        )


def _samples(recipe: Recipe) -> int:
    with closing(Loaders(tasks_of(recipe), recipe, recipe.split(1)).train(0)) as train_set:
        return train_set.samples


class _Share:
    """What every rule needs alike: what a worker holds, moves and says to the others."""

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        bench: Bench,
        source: str,
        teacher: TeacherProfile | None,
        move_s: float,
    ) -> None:
        """`move_s`: of a move of the weights on a machine like this one."""
        self.held: Held = bench.held()
        self.batch_bytes_of_a_sample = bench.batch_bytes / bench.samples
        self.average_bytes = self.held.parameters if recipe.ema_decay else 0
        self.teacher, self.teacher_bytes = teacher, 0.0 if teacher is None else teacher.bytes
        self.workers, card = cluster.workers, cluster.device
        if card is None:
            on = "cuda" if device_here().type == "cuda" else "cpu"
            self.memory = (
                (1 - RESERVE) * free_bytes(device_here()) / (1 if on == "cuda" else cluster.workers)
            )
            self.loading_s_of_a_sample = (
                loading_s(recipe, bench.samples) / bench.samples if source == "data" else 0.0
            )
            self.loads_beside = len(os.sched_getaffinity(0)) > cluster.workers * cluster.threads
            found = neighbours(cluster.workers, self.held.gradients, threads=cluster.threads, on=on)
            crowded = found.slowdown / (1.0 if self.loads_beside else 1 - RAY_SHARE)
            self.slowdown = (
                ALONE.slowdown if on == "cuda" else crowded
            )  # cards share neither caches nor clocks
            self.optimizer_s = move_s * self.slowdown
            self.word_s, self.s_of_a_byte = (
                found.word_s,
                found.ring_s / max(1.0, self._ring(self.held.gradients)),
            )
        else:
            self.memory = (1 - RESERVE) * card.memory
            # The optimizer reads parameters, gradients and its state, and writes all but the
            # gradients.
            moved = 2 * (self.held.parameters + self.held.optimizer) + self.held.gradients
            self.optimizer_s = moved / card.bandwidth / EFFICIENCY
            self.loading_s_of_a_sample, self.loads_beside = (
                0.0,
                True,
            )  # loaders that keep up: a matter of cores
            self.slowdown = ALONE.slowdown
            self.word_s, self.s_of_a_byte = 0.0, 1 / (cluster.bandwidth or math.inf)

    def held_bytes(self, zero: int) -> float:
        held, N = self.held, self.workers
        bytes_ = held.parameters + held.buffers + self.average_bytes + self.teacher_bytes
        if zero == 0:
            return bytes_ + held.gradients + held.optimizer
        gradients = held.gradients / (N if zero == 2 else 1)
        return bytes_ + gradients + (held.optimizer + held.parameters) / N + held.gradients

    def teacher_s(self, micro: int) -> float:
        """Of a micro-batch, on its worker."""
        return 0.0 if self.teacher is None else self.teacher(micro) * self.slowdown

    def communication_s(self, zero: int, backward_calls: float) -> float:
        """Of one move of the weights, before which workers hear whether the others' gradients are
        finite.
        """
        sums = backward_calls if zero == 2 else 1.0
        gathered = 0.0 if zero == 0 else self._ring(self.held.parameters) / 2
        return self.word_s + (sums * self._ring(self.held.gradients) + gathered) * self.s_of_a_byte

    def _ring(self, size: float) -> float:
        """Bytes that a worker sends to sum so many over all."""
        return 2 * (self.workers - 1) / self.workers * size


def _planned(
    of: Spec, profile: Profile, share: _Share, recipe: Recipe, cluster: Cluster, samples: int
) -> Planned:
    """With the micro-batch that the recipe wants at the least ZeRO stage that fits, or else the
    largest that fits at any.
    """
    T, rule, whole = recipe.time_steps, profile.rule, recipe.batch_size // cluster.workers
    moves_at_each_step = rule.update == "step"

    def needed(micro: int, zero: int) -> float:
        kept = profile.saved_bytes(micro, T) + profile.state_bytes(micro, T) + profile.rule_bytes
        return share.held_bytes(zero) + kept + share.batch_bytes_of_a_sample * micro

    wanted = recipe.split(cluster.workers).micro_batch
    sizes = [
        size
        for size in range(wanted, 0, -1)
        if whole % size == 0 and (size == whole or not moves_at_each_step)
    ]
    only = recipe.backend == "plain" or cluster.workers == 1
    stages = (recipe.zero,) if only else range(recipe.zero, 3)
    fitting = (
        (micro, zero) for micro in sizes for zero in stages if needed(micro, zero) <= share.memory
    )
    micro, zero = next(fitting, (0, 0))
    if micro == 0:
        least = min(needed(size, zero) for size in sizes or [whole] for zero in stages)
        raise ValueError(
            f"{rule.label}: a worker must fit into {share.memory / 1e9:.3g} GB; it needs"
            f" {least / 1e9:.3g} GB at least"
        )
    accumulation, calls = whole // micro, profile.backward_calls(micro, T)
    moves = calls if moves_at_each_step else 1.0
    compute = profile.compute_s(micro, T) * accumulation * share.slowdown
    teacher = share.teacher_s(micro) * accumulation
    communication = moves * share.communication_s(
        zero, 1.0 if moves_at_each_step else calls * accumulation
    )
    optimizer = moves * share.optimizer_s
    loading = share.loading_s_of_a_sample * whole
    exposed = max(0.0, loading - compute - teacher) if share.loads_beside else loading
    step = compute + teacher + communication + optimizer + exposed
    steps = samples // recipe.batch_size * recipe.epochs
    hours = (steps if recipe.stop_after is None else min(steps, recipe.stop_after)) * step / 3600
    return Planned(
        rule=rule.label,
        written=encode(of, paths=True),
        zero=zero,
        micro_batch=micro,
        accumulation=accumulation,
        saved_bytes=profile.saved_bytes(micro, T),
        memory_bytes=needed(micro, zero),
        compute_s=compute,
        teacher_s=teacher,
        communication_s=communication,
        optimizer_s=optimizer,
        loading_s=exposed,
        images_per_s=recipe.batch_size / step,
        hours=hours,
        kwh=(
            None if cluster.device is None else cluster.device.watts * cluster.workers * hours / 1e3
        ),
        cost=None if cluster.price is None else cluster.price * cluster.workers * hours,
    )
