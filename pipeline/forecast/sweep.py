"""Memory and time against the number of time steps T, for each rule: what the papers' central
figures show.

And the largest batch that fits. What training takes at its peak grows with the batch in a straight
line, bytes(B) = a + b B, so two sizes tell it; beside it lie the optimizer's state, a teacher, and
the batch itself. That is an estimate, for which a part of the memory is left free. Who wants to
know has the batch trained: where it fits, larger ones are, up to what the free part would hold, and
where it does not, smaller ones; the largest of them that did is told.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.core.checks import are_counts
from pipeline.core.stages import say_stage
from pipeline.forecast.bench import (
    RESERVE,
    RULES,
    Bench,
    Cost,
    DoesNotFit,
    fastest_baseline,
    measure_costs,
    median_cost,
    rules_by_label,
    samples_per_epoch,
)
from pipeline.forecast.teacher_cost import TeacherCost, measure_teacher
from pipeline.measure.memory import device_here, free_bytes, hardware
from pipeline.measure.tensor_bytes import HeldBytes
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe
from pipeline.train.tasks import build_data

STEPS = (1, 2, 4, 8, 16)
# bytes: so far a process's resident memory tells of pages and caches, not of a batch; a GPU's
# allocator counts exactly
COARSE = 2**20
# times that the largest batch which fits is looked for between one that was trained and one that
# did not fit
REFINED = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule at one number of time steps."""

    time_steps: int
    cost: Cost
    # samples over the seconds of forward and backward alone: loading, the optimizer and collectives
    # are not in it
    images_per_compute_s: float
    # that fits into the memory that was asked for: an estimate, or the largest that was trained;
    # None: nobody asked
    largest_batch: int | None
    at_largest: Cost | None = None  # of one batch of so many, where it was trained

    @property
    def images_per_compute_s_at_largest(self) -> float | None:
        return (
            None
            if self.at_largest is None or not self.largest_batch
            else self.largest_batch / self.at_largest.compute_s
        )


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Of one recipe."""

    recipe: str
    samples: int
    points: tuple[Point, ...]  # by rule, then by time steps
    # rules that cannot train the network, which have no point, or for whose largest batch the data
    # have too few samples, at which T, and why
    refused: Mapping[str, Mapping[int, str]]
    memory_bytes: int | None  # that a largest batch may take, with what lies beside it
    at_largest: bool  # largest batches were to be trained, whether any fitted or not
    teacher: TeacherCost | None  # in no rule's cost; its bytes lie beside a largest batch
    hardware: Mapping[str, object]

    def of(self, rule: str) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.cost.rule == rule)

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(point.cost.rule for point in self.points))

    @property
    def time_baselines(self) -> dict[int, Cost]:
        """At each T the faster BPTT, folded over time or step by step: what seconds are divided by
        there.
        """
        steps = sorted({point.time_steps for point in self.points})
        found = {
            T: fastest_baseline(point.cost for point in self.points if point.time_steps == T)
            for T in steps
        }
        return {T: cost for T, cost in found.items() if cost is not None}

    def growth(self, rule: str) -> float:
        """Saved bytes at the largest T over those at the smallest."""
        points = self.of(rule)
        return points[-1].cost.peak_saved_bytes / max(1, points[0].cost.peak_saved_bytes)


def sweep(
    recipe: Recipe,
    *,
    steps: Sequence[int] = STEPS,
    batch_size: int | None = None,
    memory_bytes: int | Literal["free"] | None = None,
    at_largest: bool = False,
    threads: int = 1,
    rules: Sequence[Spec] = RULES,
) -> Sweep:
    """Try `rules`, and the recipe's own, at each of `steps`.

    Args:
        batch_size: samples; None: what one worker would hold at a time.
        memory_bytes: find the largest batch that fits into so many, or into what is free; None:
        find none. at_largest: train each rule's own largest batch, too, with larger ones where it
        fits and smaller ones where it does not;
            the time that this takes grows with `memory_bytes`.

    Raises: ValueError for a recipe that does not fit together, for recordings (their T is their
    own), for no time steps, or where no rule can train the network; what the data refuse.
    """
    check_recipe(recipe.with_untrained_teacher(), 1)
    if not are_counts(steps):
        raise ValueError(f"sweep: steps must be numbers of time steps, from 1; got {steps!r}")
    if len(shape := build_data(recipe).shape) == 4:
        raise ValueError(
            "sweep: a recording has time steps of its own, so the data must be still images; got"
            f" shape {shape}"
        )
    if at_largest and memory_bytes is None:
        raise ValueError(
            "sweep: a largest batch is tried where there is one to find, with memory_bytes; got"
            " None"
        )
    limit = free_bytes(device_here()) if memory_bytes == "free" else memory_bytes
    points: list[Point] = []
    refused: dict[str, dict[int, str]] = {}
    say_stage("reading a batch; the first one compiles what reads the data")
    benches = [
        Bench(replace(recipe, time_steps=each), batch_size=batch_size, threads=threads)
        for each in steps
    ]
    with benches[0].in_memory(f"{recipe.name}'s teacher"):
        teacher = measure_teacher(recipe, benches[0].x_B)
    for bench in benches:
        say_stage(f"measuring each rule at T = {bench.recipe.time_steps}")
        room = (
            None
            if limit is None
            else _Room(bench, limit - (0 if teacher is None else teacher.bytes), threads)
        )
        tried = rules_by_label(rules, recipe.rule)
        rounds, why = measure_costs(bench, tried)
        for label, of_one in rounds.items():
            try:
                points.append(_point(bench, median_cost(of_one), tried[label], room))
                if at_largest and room is not None:
                    points[-1] = room.trained(points[-1], tried[label])
            except ValueError as error:
                why[label] = str(error)
        for label, said in why.items():
            refused.setdefault(label, {})[bench.recipe.time_steps] = said
    if not points:
        said = dict.fromkeys(why for at_T in refused.values() for why in at_T.values())
        raise ValueError("sweep: no rule can train this network; " + "; ".join(said))
    order = list(dict.fromkeys(point.cost.rule for point in points))
    return Sweep(
        recipe=recipe.name,
        samples=benches[0].samples,
        points=tuple(
            sorted(points, key=lambda point: (order.index(point.cost.rule), point.time_steps))
        ),
        refused=refused,
        memory_bytes=limit,
        at_largest=at_largest,
        teacher=teacher,
        hardware=hardware(device_here()),
    )


def _point(bench: Bench, cost: Cost, rule: Spec, room: _Room | None) -> Point:
    return Point(
        time_steps=bench.recipe.time_steps,
        cost=cost,
        images_per_compute_s=bench.samples / cost.compute_s,
        largest_batch=None if room is None else room.estimate(cost, rule),
    )


class _Room:
    """The memory that batches of a bench's recipe must fit into."""

    def __init__(self, bench: Bench, size: int, threads: int) -> None:
        if bench.samples < 2:
            raise ValueError(
                "sweep: a largest batch is found from two sizes, so the batch must be 2 or more;"
                f" got {bench.samples}"
            )
        self.bench, self.bytes, self.threads = bench, size, threads
        self.half = self._bench_of(bench.samples // 2)
        self.held: HeldBytes = bench.held()
        self.coarse = 0 if bench.x_B.is_cuda else COARSE
        averages = self.held.parameters if bench.recipe.ema_decay else 0
        self.beside = self.held.parameters + self.held.buffers + self.held.optimizer + averages

    def estimate(self, cost: Cost, rule: Spec) -> int:
        """From the bytes of two batches, of which `cost` is one; 0 where not even one sample
        fits.
        """
        bench, half, half_cost = self.bench, self.half, self.half.cost(rule)
        grows = self._counted(cost) - self._counted(half_cost)
        if cost.peak_memory_bytes is not None and half_cost.peak_memory_bytes is not None:
            seen = cost.peak_memory_bytes - half_cost.peak_memory_bytes
            grows = max(grows, seen if seen >= self.coarse else 0)
        of_a_sample = (grows + bench.batch_bytes - half.batch_bytes) / (
            bench.samples - half.samples
        )
        left = (1 - RESERVE) * self.bytes - self.needed(bench, cost)
        return max(0, bench.samples + int(left // max(of_a_sample, 1.0)))

    def trained(self, point: Point, rule: Spec) -> Point:
        """With the largest batch that was trained, of sizes around its own, and fitted; 0 where not
        even one sample did.
        """
        assert point.largest_batch is not None

        def cost_of(samples: int) -> Cost | None:
            bench = self._bench_of(samples)
            cost = bench.cost(rule)
            return cost if self.needed(bench, cost) <= self.bytes else None

        without_reserve = max(1, int(point.largest_batch / (1 - RESERVE)))
        samples, cost = _largest_of(
            point.largest_batch, min(without_reserve, samples_per_epoch(self.bench.recipe)), cost_of
        )
        return replace(point, largest_batch=samples, at_largest=cost)

    def needed(self, bench: Bench, cost: Cost) -> int:
        """Of training on batches like the bench's: the peak that was seen, as far as it tells of a
        batch, or what is counted.

        What a rule notes of a batch is in a peak that was seen as well, and twice in this sum: so a
        batch fits rather than not."""
        at_peak = max(self._counted(cost), (cost.peak_memory_bytes or 0) - self.coarse)
        return at_peak + self.beside + cost.rule_bytes + bench.batch_bytes

    def _counted(self, cost: Cost) -> int:
        return cost.kept_bytes + self.held.gradients

    def _bench_of(self, samples: int) -> Bench:
        return Bench(self.bench.recipe, batch_size=samples, threads=self.threads)


def _largest_of(
    estimate: int, most: int, cost_of: Callable[[int], Cost | None]
) -> tuple[int, Cost | None]:
    """Where `estimate` fits `most`, else half of it and so on; then what fits between there and
    what did not, with its cost.
    """

    def tried(samples: int) -> Cost | None:
        try:
            return cost_of(samples)
        except DoesNotFit:
            pass
        gc.collect()  # the batch that did not fit, if a cycle holds it
        return None

    samples, too_many, cost = estimate, estimate + 1, None
    while samples and (cost := tried(samples)) is None:
        samples, too_many = samples // 2, samples
    if samples == estimate < most:
        if (found := tried(most)) is not None:
            return most, found
        too_many = most
    for _ in range(REFINED):
        between = (samples + too_many) // 2
        if between == samples:
            break
        if (found := tried(between)) is None:
            too_many = between
        else:
            samples, cost = between, found
    return samples, cost
