"""Memory and time against the number of time steps T, for each rule: what the papers' central figures show.

And the largest batch whose bytes fit. What backward keeps grows with the batch in a straight line, bytes(B) = a + b B, so two
sizes tell it; beside it lie the parameters with their gradients and the optimizer's state, a teacher, and the batch itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.build import check_recipe
from pipeline.counts import are_counts
from pipeline.forecast.asked import Asked, asked
from pipeline.forecast.bench import RULES, Bench, Cost, by_label, fastest_baseline
from pipeline.measure.memory import free_bytes, hardware
from pipeline.recipe import Recipe, Spec

STEPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule at one number of time steps."""

    time_steps: int
    cost: Cost
    images_per_compute_s: float
    """samples over the seconds of forward and backward alone: loading, the optimizer and collectives are not in it"""
    largest_batch: int | None
    """whose bytes fit into the memory that was asked for; None: nobody asked"""
    at_largest: Cost | None = None
    """of one batch of so many, where it was tried"""

    @property
    def images_per_compute_s_at_largest(self) -> float | None:
        return None if self.at_largest is None or not self.largest_batch else self.largest_batch / self.at_largest.compute_s


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Of one recipe."""

    recipe: str
    samples: int
    points: tuple[Point, ...]
    """by rule, then by time steps"""
    refused: Mapping[str, Mapping[int, str]]
    """rules that cannot train the network, or for whose largest batch the data have too few samples, at which T, and why"""
    memory_bytes: int | None
    """that a largest batch may take, with what lies beside it"""
    teacher: Asked | None
    """in no rule's cost; its bytes lie beside a largest batch"""
    hardware: Mapping[str, object]

    def of(self, rule: str) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.cost.rule == rule)

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(point.cost.rule for point in self.points))

    @property
    def time_baselines(self) -> dict[int, Cost]:
        """At each T the faster BPTT, folded over time or step by step: what seconds are divided by there."""
        steps = sorted({point.time_steps for point in self.points})
        found = {T: fastest_baseline(point.cost for point in self.points if point.time_steps == T) for T in steps}
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
        memory_bytes: find the largest batch that fits into so many, or into what is free; None: find none.
        at_largest: try each rule's own largest batch, too; the time that this takes grows with `memory_bytes`.

    Raises: ValueError for a recipe that does not fit together, for recordings (their T is their own), for no time steps, or
    where no rule can train the network; what the data refuse.
    """
    check_recipe(recipe.with_untrained_teacher(), 1)
    if not are_counts(steps):
        raise ValueError(f"sweep: steps must be numbers of time steps, from 1; got {steps!r}")
    if len(shape := recipe.data.build().shape) == 4:
        raise ValueError(f"sweep: a recording has time steps of its own, so the data must be still images; got shape {shape}")
    if at_largest and memory_bytes is None:
        raise ValueError("sweep: a largest batch is tried where there is one to find, with memory_bytes; got None")
    limit = free_bytes() if memory_bytes == "free" else memory_bytes
    points: list[Point] = []
    refused: dict[str, dict[int, str]] = {}
    benches = [Bench(replace(recipe, time_steps=each), batch_size=batch_size, threads=threads) for each in steps]
    teacher = asked(recipe, benches[0].x_B)
    room = None if limit is None else limit - (0 if teacher is None else teacher.bytes)
    for bench in benches:
        half = None if limit is None else _half(bench, threads)
        for label, rule in by_label(rules, recipe.rule).items():
            try:
                points.append(_point(bench, half, rule, room))
                if at_largest and points[-1].largest_batch:
                    points[-1] = _tried(points[-1], bench.recipe, rule, threads)
            except ValueError as error:
                refused.setdefault(label, {})[bench.recipe.time_steps] = str(error)
    if not points:
        said = dict.fromkeys(why for at_T in refused.values() for why in at_T.values())
        raise ValueError("sweep: no rule can train this network; " + "; ".join(said))
    order = list(dict.fromkeys(point.cost.rule for point in points))
    return Sweep(
        recipe=recipe.name,
        samples=benches[0].samples,
        points=tuple(sorted(points, key=lambda point: (order.index(point.cost.rule), point.time_steps))),
        refused=refused,
        memory_bytes=limit,
        teacher=teacher,
        hardware=hardware(),
    )


def _half(bench: Bench, threads: int) -> Bench:
    if bench.samples < 2:
        raise ValueError(f"sweep: a largest batch is found from two sizes, so the batch must be 2 or more; got {bench.samples}")
    return Bench(bench.recipe, batch_size=bench.samples // 2, threads=threads)


def _point(bench: Bench, half: Bench | None, rule: Spec, room: int | None) -> Point:
    cost = bench.cost(rule)
    largest = None if half is None or room is None else _largest(bench, cost, half, half.cost(rule), room)
    speed = bench.samples / cost.compute_s
    return Point(time_steps=bench.recipe.time_steps, cost=cost, images_per_compute_s=speed, largest_batch=largest)


def _tried(point: Point, recipe: Recipe, rule: Spec, threads: int) -> Point:
    return replace(point, at_largest=Bench(recipe, batch_size=point.largest_batch, threads=threads).cost(rule))


def _largest(bench: Bench, cost: Cost, half: Bench, half_cost: Cost, room: int) -> int:
    """From the bytes of two batches; 0 where not even one sample fits."""
    more = _bytes(bench, cost) - _bytes(half, half_cost)
    of_a_sample = more / (bench.samples - half.samples)
    fixed = _bytes(bench, cost) - of_a_sample * bench.samples + bench.held().total
    return max(0, int((room - fixed) / max(of_a_sample, 1.0)))


def _bytes(bench: Bench, cost: Cost) -> int:
    return cost.peak_saved_bytes + cost.state_bytes + bench.batch_bytes
