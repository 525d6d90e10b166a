"""Rules that take turns on one batch, in as many processes at once as a run has workers.

Runs of a study follow one another over hours, in which a machine gets slower and faster by more than some rules differ. Here each
round trains a few batches by every rule, and each begins with another, so that what drifts falls on all alike.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from pipeline.forecast.bench import Bench, by_label
from pipeline.recipe import Recipe, Spec

ROUNDS = 10


@dataclass(frozen=True)
class Turns:
    """Seconds of a batch in each round, the mean over processes."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    processes: int
    """that computed at once"""

    @property
    def compute_s(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(self.forward_s, self.backward_s, strict=True)))


def in_turn(recipe: Recipe, rules: Sequence[Spec], *, workers: int, rounds: int = ROUNDS) -> dict[str, Turns]:
    """Of each rule by its label, on as many samples as one of `workers` holds at a time; weights rest.

    As many of them compute at once as this machine has cards, or cores: one thread each.

    Raises: ValueError for a batch that does not divide, and what a process ended in.
    """
    labelled, samples = by_label(rules, rules[0]), recipe.split(workers).micro_batch
    processes = min(workers, torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_rank, (processes, recipe, labelled, samples, rounds, folder), nprocs=processes)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            raise ValueError(f"turns: {str(error).strip().splitlines()[-1]}") from error
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]

    def mean(label: str, part: str) -> tuple[float, ...]:
        return tuple(map(statistics.fmean, zip(*(each[label][part] for each in told), strict=True)))

    return {label: Turns(mean(label, "forward_s"), mean(label, "backward_s"), processes) for label in labelled}


def _rank(rank: int, processes: int, recipe: Recipe, rules: Mapping[str, Spec], samples: int, rounds: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(f"{folder}/rendezvous", processes), rank=rank, world_size=processes
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    bench = Bench(recipe, batch_size=samples)
    seconds: dict[str, dict[str, list[float]]] = {label: {"forward_s": [], "backward_s": []} for label in rules}
    labels = list(rules)
    for first in range(rounds):
        for label in (*labels[first % len(labels) :], *labels[: first % len(labels)]):
            distributed.barrier()
            cost = bench.cost(rules[label])
            seconds[label]["forward_s"].append(cost.forward_s)
            seconds[label]["backward_s"].append(cost.backward_s)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seconds))
    distributed.barrier()
    distributed.destroy_process_group()
