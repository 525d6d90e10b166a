"""Time training steps of alternating rules, in as many processes as a run has workers.

The runs of a study take hours. In this time, a machine's speed varies more than some rules differ.
Here each round trains a few batches with every rule, on the recipe's own backend and on a copy of
the network whose weights do not change. Each round begins with the next rule, so drift affects all
rules equally. Times also differ between processes, for example by the location of their memory.
Times are averaged over the processes of a start, and several starts show how the averages vary.

Cores share caches, memory and clock rates. Like the workers of a run, processes that compute at the
same time are therefore slower than a single one.
"""

import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from pipeline.core.checks import require
from pipeline.core.code_version import commit
from pipeline.forecast.bench import Bench, in_turns, rules_by_label
from pipeline.measure.clock import synchronize
from pipeline.measure.memory import device_here
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.backend.collectives import BACKENDS

STARTS = 5
# Seconds by rule and part of a batch, and the reasons why other rules cannot train the network.
Timings = tuple[dict[str, dict[str, float]], dict[str, str]]


@dataclass(frozen=True)
class InterleavedTimes:
    """One rule's seconds per batch in each start, averaged over processes and rounds."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    processes: int  # processes that compute at the same time
    samples: int  # per process
    threads: int  # per process
    # The backend of every rule, as in its runs. An engine that is called at each time step slows
    # some rules more than others.
    backend: str
    commit: str


def measure_interleaved(
    recipe: Recipe,
    rules: Sequence[Spec],
    *,
    workers: int,
    samples: int | None = None,
    threads: int = 1,
    starts: int = STARTS,
) -> dict[str, InterleavedTimes]:
    """Measure each rule in `workers` processes, or in fewer if there are too few GPUs or cores.

    The results are by rule label. Each start has as many rounds as rules, so every rule has
    every position once.

    Args:
        samples: samples per batch; None: the micro-batch of a worker.

    Raises:
        ValueError: the batch cannot be divided among `workers`, a process failed, or a rule cannot
            be timed.
    """
    labelled = rules_by_label(rules, rules[0])
    samples = samples or recipe.split(workers).micro_batch
    processes = min(
        workers,
        torch.cuda.device_count() or max(1, len(os.sched_getaffinity(0)) // threads),
    )
    seconds: list[Mapping[str, Mapping[str, float]]] = []
    for _ in range(starts):
        seconds_of_start, refused = run_processes(
            "interleaved", rule_seconds, recipe, labelled, samples, threads, processes=processes
        )
        require(not refused, f"interleaved: {'; '.join(refused.values())}")
        seconds.append(seconds_of_start)
    return {
        label: InterleavedTimes(
            forward_s=tuple(start[label]["forward"] for start in seconds),
            backward_s=tuple(start[label]["backward"] for start in seconds),
            processes=processes,
            samples=samples,
            threads=threads,
            backend=recipe.backend,
            commit=commit(),
        )
        for label in labelled
    }


def rule_seconds(
    device: torch.device,
    recipe: Recipe,
    rules: Mapping[str, Spec],
    samples: int,
    threads: int,
) -> Timings:
    """Measure `Bench.seconds` of each rule in every round, and average over rounds. Collective.

    There are as many rounds as rules.

    Raises: as `Bench`.
    """
    bench = Bench(recipe, batch_size=samples, threads=threads)

    def measure(rule: Spec) -> dict[str, float]:
        # An engine of DeepSpeed is in a reference cycle, and would stay in memory.
        gc.collect()
        _wait_for_all(device)
        return bench.seconds(rule)  # raises on every rank, or on none

    seconds, refused = in_turns(rules, measure, len(rules))
    return {label: _mean_of_parts(each) for label, each in seconds.items()}, refused


def _mean_of_parts(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.fmean(each[part] for each in seconds) for part in seconds[0]}


# --------------------------------------------------------------------------------------- processes


def run_processes(
    error_prefix: str, work: Callable[..., Timings], *arguments: object, processes: int
) -> Timings:
    """Run `work(device, *arguments)` in new processes. Return the mean of their seconds.

    The processes share a process group: nccl with one GPU per process if there are GPUs, otherwise
    gloo.

    Args:
        work: a top-level function of a module. The environment variables of a launch (RANK,
            LOCAL_RANK, WORLD_SIZE) are set.

    Raises:
        ValueError: a process failed, and the others were terminated. The message is `error_prefix`
            with the last line of the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(_run_rank, (processes, work, arguments, folder), nprocs=processes)
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:
            raise ValueError(f"{error_prefix}: {str(error).strip().splitlines()[-1]}") from error
        ranks = [json.loads(Path(folder, f"{rank}").read_text()) for rank in range(processes)]
    first, refused = ranks[0]
    return {label: _mean_of_parts([each[label] for each, _ in ranks]) for label in first}, refused


def _run_rank(
    rank: int,
    processes: int,
    work: Callable[..., Timings],
    arguments: tuple[object, ...],
    folder: str,
) -> None:
    device_type = device_here().type
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", rank)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    os.environ |= {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "WORLD_SIZE": f"{processes}",
        "DS_ACCELERATOR": device_type,  # DeepSpeed reads it
    }
    distributed.init_process_group(
        BACKENDS[device_type],
        store=distributed.FileStore(f"{folder}/rendezvous", processes),
        rank=rank,
        world_size=processes,
    )
    Path(folder, f"{rank}").write_text(json.dumps(work(device, *arguments)))
    _wait_for_all(device)
    distributed.destroy_process_group()


def _wait_for_all(device: torch.device) -> None:
    distributed.barrier()
    synchronize(device)  # on a GPU the barrier is a kernel, which the host does not wait for
