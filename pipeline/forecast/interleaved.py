"""Rules timed in alternation on one batch, in as many processes as a run has workers.

The runs of a study take hours, in which the speed of a machine varies by more than some rules
differ. Here each round trains a few batches with every rule, behind the backend that the recipe
names and on a copy of the network whose weights do not change. Each round begins with the next
rule, so drift affects all rules equally. Differences between processes, such as the location of
their memory, are averaged over several starts.
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
    """One rule's seconds of a batch in each start: the mean over processes and rounds."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    processes: int  # that computed at the same time
    samples: int  # of each process
    threads: int  # of each process
    # The backend of every rule, as in its runs. An engine that is called at each time step costs
    # some rules more than others.
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
    """Measure each rule, by its label, in `workers` processes, or as many as cards or cores allow.

    Each start has as many rounds as there are rules, so every rule comes once in every place.

    Args:
        samples: in a batch; None: the micro-batch of one of `workers`.

    Raises:
        ValueError: the batch does not divide, or a process failed.
    """
    labelled, samples = (
        rules_by_label(rules, rules[0]),
        samples or recipe.split(workers).micro_batch,
    )
    on: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    most = torch.cuda.device_count() or max(1, len(os.sched_getaffinity(0)) // threads)
    processes = min(workers, most)
    given = recipe, labelled, samples, threads
    seconds = [
        run_processes("interleaved", _seconds, *given, processes=processes, on=on)
        for _ in range(starts)
    ]

    def means(label: str, part: str) -> tuple[float, ...]:
        return tuple(statistics.fmean(each[label][part] for each in start) for start in seconds)

    return {
        label: InterleavedTimes(
            means(label, "forward_s"),
            means(label, "backward_s"),
            processes=processes,
            samples=samples,
            threads=threads,
            backend=recipe.backend,
            commit=commit(),
        )
        for label in labelled
    }


def _seconds(
    device: torch.device, recipe: Recipe, rules: Mapping[str, Spec], samples: int, threads: int
) -> dict[str, dict[str, float]]:
    """Mean seconds over rounds, by rule and part of a batch."""
    bench = Bench(recipe, batch_size=samples, threads=threads)
    seconds: dict[str, dict[str, list[float]]] = {
        label: {"forward_s": [], "backward_s": []} for label in rules
    }
    for order in rotated(rules, len(rules)):
        for label in order:
            # DeepSpeed's engines are reference cycles: the previous rule's would stay in memory.
            gc.collect()
            wait_for_all(device)
            cost = bench.cost(rules[label], behind="own backend")
            for part, values in seconds[label].items():
                values.append(getattr(cost, part))
    return {
        label: {part: statistics.fmean(each) for part, each in of_rule.items()}
        for label, of_rule in seconds.items()
    }
