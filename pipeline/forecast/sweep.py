"""Memory and time of each rule against the number of time steps T, and the largest batch that fits.

The peak of training grows linearly with the batch, bytes(B) = a + b B, so two sizes determine it.
The optimizer's state, a teacher and the batch itself are added. The result is an estimate that
leaves a part of the memory free, the reserve. On request, a batch of the estimated size is trained.
If it fits, larger batches are tried, which may use the reserve. If it does not fit, smaller batches
are tried. The result is then the largest of the tried batches that fits.
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
    BatchBench,
    Bench,
    Cost,
    DoesNotFit,
    TeacherCost,
    fastest_baseline,
    in_turns,
    measure_teacher,
    median_cost,
    rules_by_label,
    samples_per_epoch,
)
from pipeline.measure.memory import device_here, free_bytes, hardware
from pipeline.measure.saved_bytes import HeldBytes, held_bytes
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe
from pipeline.train.tasks import build_data

STEPS = (1, 2, 4, 8, 16)
# Bytes by which pages and caches change a process's resident memory. A GPU's allocator counts
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
    teacher: TeacherCost | None  # not part of any rule's cost, but of the memory limit
    hardware: Mapping[str, object]

    def of(self, rule: str) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.cost.rule == rule)

    @property
    def rules(self) -> list[str]:
        return list(dict.fromkeys(point.cost.rule for point in self.points))

    @property
    def time_baselines(self) -> dict[int, Cost]:
        """The reference of times at each T.

        The reference is the fastest of BPTT folded over time and BPTT in slices of time.
        """
        costs: dict[int, list[Cost]] = {}
        for point in sorted(self.points, key=lambda point: point.time_steps):
            costs.setdefault(point.time_steps, []).append(point.cost)
        return {T: cost for T, each in costs.items() if (cost := fastest_baseline(each))}

    def growth(self, rule: str) -> float:
        """Saved bytes at the largest T, divided by those at the smallest T."""
        points = self.of(rule)
        return points[-1].cost.peak_saved_bytes / max(1, points[0].cost.peak_saved_bytes)

    def to_json(self) -> dict[str, Any]:
        """The output of `sweep --format json`.

        The output includes the commit, and the label of the reference of times at each T.
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
        at_largest: also train batches of the estimated size and of others, to find the largest one
            that fits. The time for this grows with `memory_bytes`.

    Raises:
        ValueError: the recipe contradicts itself, the data are recordings (their T is fixed),
            `steps` is empty or has a value that is no whole number from 1, `at_largest` is set
            without `memory_bytes`, the batch is too small (1 sample) to estimate the largest one,
            the batch does not fit into memory, or no rule can train the network.
        DataError: the data cannot be read.
    """
    check_recipe(recipe.with_untrained_teacher(), 1)
    require(are_counts(steps), f"sweep: steps must be numbers of time steps, from 1; got {steps!r}")
    shape = build_data(recipe).shape
    require(
        len(shape) != 4,
        "sweep: the data must be still images, because the T of a recording is fixed; got shape"
        f" {shape}",
    )
    require(
        not at_largest or memory_bytes is not None,
        "sweep: at_largest needs memory_bytes, to find a largest batch; got None",
    )
    limit = free_bytes(device_here()) if memory_bytes == "free" else memory_bytes
    say_stage("reading a batch; a machine's first start compiles the data loader")
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
        batch_search = None if free is None else _BatchSearch(bench, free, threads)
        points_of_T, reasons_at_T = _points(
            bench, rules_by_label(rules, recipe.rule), batch_search, at_largest
        )
        points += points_of_T
        for label, reason in reasons_at_T.items():
            refused.setdefault(label, {})[time_steps] = reason
    reasons = dict.fromkeys(reason for by_T in refused.values() for reason in by_T.values())
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
    bench: Bench, rules: Mapping[str, Spec], batch_search: "_BatchSearch | None", at_largest: bool
) -> tuple[list[Point], dict[str, str]]:
    """The points of all rules at one T, and the reasons, by rule, for a missing point or size."""
    points: list[Point] = []
    rounds, reasons_at_T = in_turns(rules, bench.cost)
    for label, costs_of_rule in rounds.items():
        cost = median_cost(costs_of_rule)
        try:
            point = Point(
                time_steps=bench.recipe.time_steps,
                cost=cost,
                images_per_compute_s=bench.samples / cost.compute_s,
                largest_batch=None
                if batch_search is None
                else batch_search.estimate(cost, rules[label]),
            )
            points.append(point)
            if at_largest and batch_search is not None:
                points[-1] = batch_search.train_largest(point, rules[label])
        except ValueError as error:
            reasons_at_T[label] = str(error)
    return points, reasons_at_T


class LargestBatch:
    """Estimates the largest batch of a rule that fits into a given memory.

    Args:
        half_bench: the same network with half of the bench's samples.
        size: the memory in bytes.
        held: bytes that training holds besides a rule's bytes of a batch.
        copies: the number of copies of the weights.
    """

    def __init__(
        self,
        bench: BatchBench,
        half_bench: BatchBench,
        size: int,
        held: HeldBytes,
        *,
        copies: int = 1,
    ) -> None:
        self.bench, self.half_bench, self.bytes, self.held = bench, half_bench, size, held
        self.resolution = 0 if bench.x_TB.is_cuda else COARSE
        self.other_bytes = copies * held.parameters + held.buffers + held.optimizer

    def estimate(self, cost: Cost, rule: Spec) -> int:
        """Estimate the largest batch from the cost of the bench's batch and of half that batch.

        The result is 0 if not even one sample fits.
        """
        bench, half_bench = self.bench, self.half_bench
        half_cost = half_bench.cost(rule)
        growth_bytes = cost.kept_bytes - half_cost.kept_bytes
        if cost.peak_memory_bytes is not None and half_cost.peak_memory_bytes is not None:
            measured = cost.peak_memory_bytes - half_cost.peak_memory_bytes
            growth_bytes = max(growth_bytes, measured if measured >= self.resolution else 0)
        growth_bytes += bench.batch_bytes - half_bench.batch_bytes
        per_sample = max(growth_bytes / (bench.samples - half_bench.samples), 1.0)
        left = (1 - RESERVE) * self.bytes - self.needed_bytes(bench, cost)
        return max(0, bench.samples + int(left // per_sample))

    def needed_bytes(self, bench: BatchBench, cost: Cost) -> int:
        """Bytes of training on the bench's batch: the larger of the measured peak and the count.

        The measured peak includes a rule's records of a batch, so the records count twice. The
        result is then too large, never too small.
        """
        at_peak = max(
            cost.kept_bytes + self.held.gradients, (cost.peak_memory_bytes or 0) - self.resolution
        )
        return at_peak + self.other_bytes + cost.rule_bytes + bench.batch_bytes


class _BatchSearch(LargestBatch):
    """Finds the largest batch of a rule that fits into a given memory."""

    def __init__(self, bench: Bench, size: int, threads: int) -> None:
        require(
            bench.samples >= 2,
            "sweep: the batch must have at least 2 samples, to estimate the largest batch; got"
            f" {bench.samples}",
        )
        self.recipe, self.bench_of = bench.recipe, partial(Bench, bench.recipe, threads=threads)
        half_bench = self.bench_of(batch_size=bench.samples // 2)
        super().__init__(
            bench,
            half_bench,
            size,
            held_bytes(*bench.stepped()),
            copies=2 if bench.recipe.ema_decay else 1,
        )

    def train_largest(self, point: Point, rule: Spec) -> Point:
        """Train batches to find the largest one that fits; 0 if one sample does not fit.

        If the estimated batch fits, a batch that uses the reserve is tried next. Otherwise half the
        size is tried, until a batch fits. Then sizes between a batch that fits and one that does
        not fit are tried.
        """
        estimate = point.largest_batch or 0
        max_samples = min(max(1, int(estimate / (1 - RESERVE))), samples_per_epoch(self.recipe))

        def cost_of(samples: int) -> Cost | None:
            """The cost of a batch; None if it does not fit."""
            with suppress(DoesNotFit):
                bench = self.bench_of(batch_size=samples)
                cost = bench.cost(rule)
                return cost if self.needed_bytes(bench, cost) <= self.bytes else None
            gc.collect()  # a reference cycle may hold the batch that did not fit
            return None

        fits, too_large, cost = estimate, estimate + 1, None
        while fits and (cost := cost_of(fits)) is None:
            fits, too_large = fits // 2, fits
        sizes: list[int] = []
        if fits == estimate < max_samples:
            sizes, too_large = [max_samples], max_samples + 1
        for _ in range(REFINED + len(sizes)):
            size = sizes.pop() if sizes else (fits + too_large) // 2
            if size == fits:
                break
            if (cost_of_size := cost_of(size)) is None:
                too_large = size
            else:
                fits, cost = size, cost_of_size
        return replace(point, largest_batch=fits, at_largest=cost)
