"""Memory and time of each rule against the number of time steps T, and the largest batch that fits.

The peak of training grows linearly with the batch, bytes(B) = a + b B, so two sizes determine it.
The optimizer's state, a teacher and the batch itself are added. The result is an estimate that
leaves a part of the memory free. On request the batch is trained. If it fits, larger batches are
tried, up to the reserve; if not, smaller ones. The largest that fits is reported.
"""

import gc
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from pipeline.core.checks import are_counts, require
from pipeline.core.code_version import commit
from pipeline.core.stages import say_stage
from pipeline.forecast.bench import (
    RESERVE,
    RULES,
    Bench,
    Cost,
    DoesNotFit,
    TeacherCost,
    fastest_baseline,
    measure_costs,
    measure_teacher,
    median_cost,
    rules_by_label,
    samples_per_epoch,
)
from pipeline.measure.memory import device_here, free_bytes, hardware
from pipeline.measure.saved_bytes import held_bytes
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe
from pipeline.train.tasks import build_data

STEPS = (1, 2, 4, 8, 16)
# Bytes. Pages and caches make a process's resident memory this imprecise; a GPU's allocator counts
# exactly.
COARSE = 2**20
# Attempts to find a larger batch between a trained one and one that did not fit.
REFINED = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule at one number of time steps."""

    time_steps: int
    cost: Cost
    # samples per second of forward and backward, without loading, optimizer and collectives
    images_per_compute_s: float
    # An estimate, or the largest trained batch; None without a memory limit.
    largest_batch: int | None
    at_largest: Cost | None = None  # of one batch of that size, if it was trained


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The points of one recipe."""

    recipe: str
    samples: int
    points: tuple[Point, ...]  # by rule, then by time steps
    # By rule and T: the reason why the rule cannot train the network, or why the data have too few
    # samples for its largest batch.
    refused: Mapping[str, Mapping[int, str]]
    memory_bytes: int | None  # the limit for the largest batch and all else that training holds
    at_largest: bool  # whether largest batches were to be trained
    teacher: TeacherCost | None  # part of no rule's cost; largest batches leave room for it
    hardware: Mapping[str, object]

    def of(self, rule: str) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.cost.rule == rule)

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(point.cost.rule for point in self.points))

    @property
    def time_baselines(self) -> dict[int, Cost]:
        """The faster BPTT at each T, folded over time or step by step: the reference of times."""
        costs: dict[int, list[Cost]] = {}
        for point in sorted(self.points, key=lambda point: point.time_steps):
            costs.setdefault(point.time_steps, []).append(point.cost)
        return {T: cost for T, each in costs.items() if (cost := fastest_baseline(each))}

    def growth(self, rule: str) -> float:
        """Saved bytes at the largest T over those at the smallest T."""
        points = self.of(rule)
        return points[-1].cost.peak_saved_bytes / max(1, points[0].cost.peak_saved_bytes)

    def to_json(self) -> dict[str, Any]:
        """The output of `sweep --format json`.

        It includes the commit, and the label of the reference of times at each T.
        """
        return {
            "commit": commit(),
            **asdict(self),
            "time_baselines": {str(T): cost.rule for T, cost in self.time_baselines.items()},
        }


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
    """Measure `rules` and the recipe's own rule at each of `steps`.

    Args:
        batch_size: samples; None: the micro-batch of a single worker.
        memory_bytes: find the largest batch that fits into this memory, or into the free memory;
            None: do not search.
        at_largest: also train each rule's largest batch, then larger ones if it fits and smaller
            ones if it does not. The time for this grows with `memory_bytes`.

    Raises:
        ValueError: the recipe contradicts itself, the data are recordings (whose T is fixed),
            `steps` is empty, or no rule can train the network.
        DataError: the data cannot be read.
    """
    check_recipe(recipe.with_untrained_teacher(), 1)
    require(are_counts(steps), f"sweep: steps must be numbers of time steps, from 1; got {steps!r}")
    shape = build_data(recipe).shape
    require(
        len(shape) != 4,
        "sweep: a recording has time steps of its own, so the data must be still images; got shape"
        f" {shape}",
    )
    require(
        not at_largest or memory_bytes is not None,
        "sweep: at_largest needs memory_bytes, to find a largest batch; got None",
    )
    limit = free_bytes(device_here()) if memory_bytes == "free" else memory_bytes
    say_stage("reading a batch; the first one compiles what reads the data")
    benches = [
        Bench(replace(recipe, time_steps=each), batch_size=batch_size, threads=threads)
        for each in steps
    ]
    with benches[0].running(f"{recipe.name}'s teacher"):
        teacher = measure_teacher(recipe, benches[0].x_B)
    free = None if limit is None else limit - (0 if teacher is None else teacher.bytes)
    points: list[Point] = []
    refused: dict[str, dict[int, str]] = {}
    for bench in benches:
        time_steps = bench.recipe.time_steps
        say_stage(f"measuring each rule at T = {time_steps}")
        room = None if free is None else _Room(bench, free, threads)
        found, why = _points(bench, rules_by_label(rules, recipe.rule), room, at_largest)
        points += found
        for label, reason in why.items():
            refused.setdefault(label, {})[time_steps] = reason
    reasons = dict.fromkeys(why for at_T in refused.values() for why in at_T.values())
    require(points, "sweep: no rule can train this network; " + "; ".join(reasons))
    order = [point.cost.rule for point in points]
    points.sort(key=lambda point: (order.index(point.cost.rule), point.time_steps))
    return Sweep(
        recipe=recipe.name,
        samples=benches[0].samples,
        points=tuple(points),
        refused=refused,
        memory_bytes=limit,
        at_largest=at_largest,
        teacher=teacher,
        hardware=hardware(device_here()),
    )


def _points(
    bench: Bench, rules: Mapping[str, Spec], room: "_Room | None", at_largest: bool
) -> tuple[list[Point], dict[str, str]]:
    """The points of all rules at one T, and the reasons for missing points or largest batches."""
    points: list[Point] = []
    rounds, why = measure_costs(bench, rules)
    for label, of_one in rounds.items():
        cost = median_cost(of_one)
        try:
            point = Point(
                time_steps=bench.recipe.time_steps,
                cost=cost,
                images_per_compute_s=bench.samples / cost.compute_s,
                largest_batch=None if room is None else room.estimate(cost, rules[label]),
            )
            points.append(point)
            if at_largest and room is not None:
                points[-1] = room.trained(point, rules[label])
        except ValueError as error:
            why[label] = str(error)
    return points, why


class _Room:
    """The memory that batches of a bench's recipe must fit into."""

    def __init__(self, bench: Bench, size: int, threads: int) -> None:
        require(
            bench.samples >= 2,
            "sweep: a largest batch is found from two sizes, so the batch must be 2 or more;"
            f" got {bench.samples}",
        )
        self.bench, self.bytes = bench, size
        self.bench_of = partial(Bench, bench.recipe, threads=threads)
        self.half = self.bench_of(batch_size=bench.samples // 2)
        # besides what a rule keeps of a batch
        self.held = held = held_bytes(*bench.stepped())
        self.coarse = 0 if bench.x_B.is_cuda else COARSE
        copies = 2 if bench.recipe.ema_decay else 1  # of the weights
        self.beside = copies * held.parameters + held.buffers + held.optimizer

    def estimate(self, cost: Cost, rule: Spec) -> int:
        """The largest batch, from the bytes of `cost` and of half its batch.

        It is 0 if not even one sample fits.
        """
        bench, half, half_cost = self.bench, self.half, self.half.cost(rule)
        grows = cost.kept_bytes - half_cost.kept_bytes
        if cost.peak_memory_bytes is not None and half_cost.peak_memory_bytes is not None:
            measured = cost.peak_memory_bytes - half_cost.peak_memory_bytes
            grows = max(grows, measured if measured >= self.coarse else 0)
        grows += bench.batch_bytes - half.batch_bytes
        of_a_sample = max(grows / (bench.samples - half.samples), 1.0)
        left = (1 - RESERVE) * self.bytes - self.needed(bench, cost)
        return max(0, bench.samples + int(left // of_a_sample))

    def trained(self, point: Point, rule: Spec) -> Point:
        """The point with the largest batch that was trained and fits; 0 if one sample does not.

        If the estimate fits, a batch without the reserve is tried next; otherwise half the
        estimate, and so on. Then the sizes between a batch that fits and one that does not are
        tried.
        """
        estimate = point.largest_batch or 0
        most = min(max(1, int(estimate / (1 - RESERVE))), samples_per_epoch(self.bench.recipe))

        def cost_of(samples: int) -> Cost | None:
            """The cost of a batch, if it fits."""
            with suppress(DoesNotFit):
                bench = self.bench_of(batch_size=samples)
                cost = bench.cost(rule)
                return cost if self.needed(bench, cost) <= self.bytes else None
            gc.collect()  # frees the batch that did not fit, if a reference cycle holds it
            return None

        fits, too_many, cost = estimate, estimate + 1, None
        while fits and (cost := cost_of(fits)) is None:
            fits, too_many = fits // 2, fits
        sizes: list[int] = []
        if fits == estimate < most:
            sizes, too_many = [most], most + 1
        for _ in range(REFINED + len(sizes)):
            size = sizes.pop() if sizes else (fits + too_many) // 2
            if size == fits:
                break
            if (found := cost_of(size)) is None:
                too_many = size
            else:
                fits, cost = size, found
        return replace(point, largest_batch=fits, at_largest=cost)

    def needed(self, bench: Bench, cost: Cost) -> int:
        """Bytes of training on the bench's batch: the larger of the measured peak and the count.

        A rule's records of a batch are also in the measured peak, so they count twice. The error is
        on the safe side.
        """
        at_peak = max(
            cost.kept_bytes + self.held.gradients, (cost.peak_memory_bytes or 0) - self.coarse
        )
        return at_peak + self.beside + cost.rule_bytes + bench.batch_bytes
