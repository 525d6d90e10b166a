"""Rules that take turns on one batch, in as many processes at once as a run has workers.

Runs of a study take hours, in which a machine gets slower and faster by more than some rules
differ. Here each round trains a few batches by every rule, behind the backend that the recipe names
and on a copy of the network whose weights rest, and each begins with another, so that what drifts
falls on all alike. What does not drift, such as where a process has its memory, is another one in
each of several starts.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.core.code_version import commit
from pipeline.forecast.bench import Bench, rotated, rules_by_label
from pipeline.measure.processes import run_processes, wait_for_all
from pipeline.recipe.recipe import Recipe, Spec

STARTS = 5


@dataclass(frozen=True)
class InterleavedTimes:
    """Seconds of a batch in each start, the mean over its processes and rounds."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    processes: int  # that computed at once
    samples: int  # that each of them held
    threads: int  # of each of them
    # that each rule called, as its runs do: an engine that is called at each time step costs some
    # rules more than others
    backend: str
    commit: str

    @property
    def compute_s(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(self.forward_s, self.backward_s, strict=True)))


def measure_interleaved(
    recipe: Recipe,
    rules: Sequence[Spec],
    *,
    workers: int,
    samples: int | None = None,
    threads: int = 1,
    starts: int = STARTS,
) -> dict[str, InterleavedTimes]:
    """Of each rule by its label; weights rest. As many processes compute at once as `workers`,
    cards or cores admit.

    Each start goes round as often as there are rules, so that every rule is once in every place.

    Args:
        samples: of a batch; None: as one of `workers` holds at a time.

    Raises: ValueError for a batch that does not divide, and what a process ended in.
    """
    labelled, samples = (
        rules_by_label(rules, rules[0]),
        samples or recipe.split(workers).micro_batch,
    )
    on: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    processes = min(
        workers, torch.cuda.device_count() or max(1, len(os.sched_getaffinity(0)) // threads)
    )
    given = recipe, labelled, samples, threads
    told = [
        run_processes("interleaved", _seconds, *given, processes=processes, on=on)
        for _ in range(starts)
    ]

    def means(label: str, part: str) -> tuple[float, ...]:
        return tuple(statistics.fmean(each[label][part] for each in start) for start in told)

    about = {
        "processes": processes,
        "samples": samples,
        "threads": threads,
        "backend": recipe.backend,
        "commit": commit(),
    }
    return {
        label: InterleavedTimes(means(label, "forward_s"), means(label, "backward_s"), **about)
        for label in labelled
    }


def _seconds(
    device: torch.device, recipe: Recipe, rules: Mapping[str, Spec], samples: int, threads: int
) -> dict[str, dict[str, float]]:
    """Of each part of a batch, by rule, the mean over rounds."""
    bench = Bench(recipe, batch_size=samples, threads=threads)
    seconds: dict[str, dict[str, list[float]]] = {
        label: {"forward_s": [], "backward_s": []} for label in rules
    }
    for order in rotated(rules, len(rules)):
        for label in order:
            # DeepSpeed's engines are cycles: that of the rule before would lie in memory beside
            # this one's
            gc.collect()
            wait_for_all(device)
            cost = bench.cost(rules[label], behind="own backend")
            seconds[label]["forward_s"].append(cost.forward_s)
            seconds[label]["backward_s"].append(cost.backward_s)
    return {
        label: {part: statistics.fmean(each) for part, each in of_rule.items()}
        for label, of_rule in seconds.items()
    }
