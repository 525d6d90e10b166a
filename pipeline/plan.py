"""Predicts, before anything is launched, what each rule needs on machines that are not here: a model, not a measurement.

    bytes, seconds of a batch of B samples and T time steps        a + b B + c T + d B T        fitted to four small batches
    step = compute + optimizer + communication + loading
    communication = 2 (N - 1) / N  gradient bytes / bandwidth      a ring; under ZeRO-2 at each backward call, else once

Here the seconds of the four batches are the machine's own. For a card of the table they are its roofline (`measure/traffic.py`),
divided by EFFICIENCY, and no less than the launches of its kernels take.

Memory of a worker is what it holds (parameters P, gradients G, optimizer O) and what a rule keeps of a batch:

    ZeRO-0   P + G + O           ZeRO-1   P + G + O / N           ZeRO-2   P + G / N + O / N
"""

# N workers, B samples of a worker, T time steps

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.bench import RULES, Bench
from pipeline.measure.held import Held
from pipeline.measure.link import ring_s
from pipeline.measure.memory import free_bytes
from pipeline.measure.traffic import Device
from pipeline.recipe import Recipe, Spec
from pipeline.tasks import Loaders, tasks_of
from pipeline.worker import check_recipe

EFFICIENCY = 0.4
"""of the roofline that training reaches: an assumption, of published training runs' order, and to be replaced by a measurement"""
RESERVE = 0.1
"""of a card's memory that is left to fragments, workspaces and the driver"""
STAGES = (0, 1, 2)


@dataclass(frozen=True)
class Bilinear:
    """a + b B + c T + d B T through four points."""

    a: float
    b: float
    c: float
    d: float

    @classmethod
    def through(cls, B: tuple[int, int], T: tuple[int, int], values: Mapping[tuple[int, int], float]) -> Bilinear:
        """`values` at each (B, T)."""
        (B1, B2), (T1, T2) = B, T
        slope = {T_: (values[B2, T_] - values[B1, T_]) / (B2 - B1) for T_ in T}
        d = (slope[T2] - slope[T1]) / (T2 - T1)
        b = slope[T1] - d * T1
        at_0 = {T_: values[B1, T_] - slope[T_] * B1 for T_ in T}
        c = (at_0[T2] - at_0[T1]) / (T2 - T1)
        return cls(at_0[T1] - c * T1, b, c, d)

    def __call__(self, B: float, T: float) -> float:
        return self.a + self.b * B + self.c * T + self.d * B * T


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one worker was seen to need, or a card would, at four small batches of one rule."""

    rule: str
    saved_bytes: Bilinear
    state_bytes: Bilinear
    compute_s: Bilinear
    """forward and backward"""
    backward_calls: Bilinear


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

    @property
    def bandwidth(self) -> float | None:
        """Of a ring over all workers, which is as fast as its slowest link; None: here, to be measured."""
        if self.device is None:
            return None
        return self.device.link if self.workers <= self.per_node else min(self.device.link, self.node_link)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One rule at the size that was asked for."""

    rule: str
    zero: int
    micro_batch: int
    accumulation: int
    saved_bytes: float
    memory_bytes: float
    """of a worker at its peak: held, kept, and the batch itself"""
    compute_s: float
    communication_s: float
    optimizer_s: float
    loading_s: float
    images_per_s: float
    hours: float
    kwh: float | None
    cost: float | None

    @property
    def step_s(self) -> float:
        return self.compute_s + self.communication_s + self.optimizer_s + self.loading_s


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
    """Plan `rules`, and the recipe's own, on `cluster`; `samples` are those of an epoch (None: the data's).

    Raises: ValueError for a recipe that does not fit together or a precision that the card's sheet does not give; what the data
    refuse.
    """
    check_recipe(recipe.with_untrained_teacher(), cluster.workers)
    card = cluster.device
    if card is not None and recipe.precision not in card.flops:
        given = ", ".join(card.flops)
        raise ValueError(f"plan: {card.name}: precision must be {given}; got {recipe.precision}")
    samples = _samples(recipe) if samples is None else samples
    sizes, times = _sizes(recipe, cluster.workers)
    benches = {(B, T): Bench(replace(recipe, time_steps=T), batch_size=B, source=source) for B in sizes for T in times}
    share = _Share(recipe, cluster, benches[sizes[1], times[1]])
    planned, refused = [], {}
    for label, rule in {rule.build().label: rule for rule in (*rules, recipe.rule)}.items():
        try:
            planned.append(_planned(_profile(rule, benches, recipe, card), share, recipe, cluster, samples))
        except ValueError as error:
            refused[label] = str(error)
    return Plan(
        recipe=recipe.name,
        cluster=cluster,
        samples=samples,
        profiled=(sizes, times),
        source=source,
        rules=tuple(planned),
        refused=refused,
    )


def _samples(recipe: Recipe) -> int:
    with closing(Loaders(tasks_of(recipe), recipe, recipe.split(1)).train(0)) as train_set:
        return train_set.samples


def _sizes(recipe: Recipe, workers: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sizes of batches and two numbers of time steps, below those of the recipe where that is possible."""
    micro = recipe.split(workers).micro_batch
    larger = max(2, micro // 2)
    steps = recipe.time_steps
    return (max(1, larger // 2), larger), ((steps // 3, 2 * steps // 3) if steps >= 3 else (1, 2))


def _profile(rule: Spec, benches: Mapping[tuple[int, int], Bench], recipe: Recipe, card: Device | None) -> Profile:
    saved, states, seconds, calls = {}, {}, {}, {}
    for place, bench in benches.items():
        totals, traffic = bench.needs(rule)
        saved[place], states[place] = totals.peak_saved_bytes, totals.state_bytes
        calls[place] = totals.backward_calls / totals.batches
        if card is None:
            seconds[place] = bench.cost(rule).compute_s
        else:
            busy = traffic.busy(card, precision=recipe.precision) / EFFICIENCY
            seconds[place] = max(busy, traffic.kernels * card.launch)
    B, T = (tuple(sorted({place[axis] for place in benches})) for axis in (0, 1))
    fit = lambda values: Bilinear.through(B, T, values)  # type: ignore[arg-type]  # two of each
    return Profile(
        rule=rule.build().label,
        saved_bytes=fit(saved),
        state_bytes=fit(states),
        compute_s=fit(seconds),
        backward_calls=fit(calls),
    )


class _Share:
    """What every rule needs alike: what a worker holds, moves and says to the others."""

    def __init__(self, recipe: Recipe, cluster: Cluster, bench: Bench) -> None:
        self.held: Held = bench.held()
        self.batch_bytes_of_a_sample = bench.batch_bytes / bench.samples
        card = cluster.device
        self.memory = (1 - RESERVE) * (free_bytes() if card is None else card.memory)
        if card is None:
            self.optimizer_s = bench.optimizer_s()
            self.loading_s_of_a_sample = bench.loading_s() / bench.samples
            self.reduction_s = ring_s(cluster.workers, self.held.gradients)
        else:
            # The optimizer reads parameters, gradients and its state, and writes all but the gradients.
            moved = 2 * (self.held.parameters + self.held.optimizer) + self.held.gradients
            self.optimizer_s = moved / card.bandwidth
            self.loading_s_of_a_sample = 0.0  # loaders that keep up: a matter of cores, which a card does not tell
            ring = 2 * (cluster.workers - 1) / cluster.workers * self.held.gradients
            self.reduction_s = ring / (cluster.bandwidth or math.inf)

    def held_bytes(self, zero: int, workers: int) -> float:
        gradients = self.held.gradients / (workers if zero == 2 else 1)
        optimizer = self.held.optimizer / (workers if zero >= 1 else 1)
        return self.held.parameters + self.held.buffers + gradients + optimizer


def _planned(profile: Profile, share: _Share, recipe: Recipe, cluster: Cluster, samples: int) -> Planned:
    """With the micro-batch that the recipe wants at the least ZeRO stage that fits, or else the largest that fits at any."""
    T, workers = recipe.time_steps, cluster.workers
    whole = recipe.batch_size // workers

    def needed(micro: int, zero: int) -> float:
        kept = profile.saved_bytes(micro, T) + profile.state_bytes(micro, T)
        return share.held_bytes(zero, workers) + kept + share.batch_bytes_of_a_sample * micro

    wanted = recipe.split(workers).micro_batch
    sizes = [size for size in range(wanted, 0, -1) if whole % size == 0]
    stages = (recipe.zero,) if cluster.workers == 1 else tuple(stage for stage in STAGES if stage >= recipe.zero)
    fitting = ((micro, zero) for micro in sizes for zero in stages if needed(micro, zero) <= share.memory)
    micro, zero = next(fitting, (0, 0))
    if micro == 0:
        least = needed(1, stages[-1])
        raise ValueError(
            f"{profile.rule}: one sample on a worker must fit into {share.memory / 1e9:.3g} GB; it needs {least / 1e9:.3g} GB"
        )
    accumulation = whole // micro
    calls = profile.backward_calls(micro, T) if zero == 2 else 1.0
    compute = profile.compute_s(micro, T) * accumulation
    communication = share.reduction_s * (calls * accumulation if zero == 2 else 1)
    loading = share.loading_s_of_a_sample * whole
    step = compute + communication + share.optimizer_s + loading
    hours = samples // recipe.batch_size * recipe.epochs * step / 3600
    return Planned(
        rule=profile.rule,
        zero=zero,
        micro_batch=micro,
        accumulation=accumulation,
        saved_bytes=profile.saved_bytes(micro, T),
        memory_bytes=needed(micro, zero),
        compute_s=compute,
        communication_s=communication,
        optimizer_s=share.optimizer_s,
        loading_s=loading,
        images_per_s=recipe.batch_size / step,
        hours=hours,
        kwh=None if cluster.device is None else cluster.device.watts * workers * hours / 1e3,
        cost=None if cluster.price is None else cluster.price * workers * hours,
    )
