"""The data that a run writes about itself: at the start of an attempt, in each checkpoint, and at
the end.

The conditions of a run are read from its built parts, so they include values that a recipe does not
set.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core.code_version import installed_version
from pipeline.core.run_folder import RunFolder
from pipeline.core.torch_settings import exactness
from pipeline.measure.memory import combine_hardware, hardware
from pipeline.measure.meters import Totals
from pipeline.measure.saved_bytes import held_bytes, storage_bytes
from pipeline.recipe.phases import stretch_at
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.spiking.kernels.operators import kernels_of
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm, foreign_norms
from pipeline.track.events import NO_ATTEMPT, Event, FirstBatch, Rollback, Skipped, Start, from_dict
from pipeline.track.journal import read
from pipeline.track.run_state import trained_on
from pipeline.train.assemble import TrainContext
from pipeline.train.backend.collectives import Ranks
from pipeline.train.evaluation import Evaluation
from pipeline.train.tasks import TaskResults


def start_event(context: TrainContext, *, step: int) -> Start:
    """The event of an attempt that starts with batch `step`. Collective."""
    job, recipe, split = context.job, context.recipe, context.split
    samples, steps_per_epoch = context.loaders.lengths[stretch_at(context.stretches, step).index]
    return Start(
        run=Path(job.run).name,
        run_id=job.run_id,
        recipe=recipe.name,
        rule=context.rule.label,
        study=job.study,
        study_parent=job.parent,
        suite=job.suite,
        family=job.family,
        seed=recipe.seed,
        world_size=split.workers,
        batch_size=recipe.batch_size,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        parameters=sum(p.numel() for p in context.backend.network.parameters()),
        steps_per_epoch=steps_per_epoch,
        total_steps=context.stretches[-1].end,
        epochs=sum(task.epochs for task in context.loaders.tasks),
        samples=samples,
        dropped_per_epoch=samples - steps_per_epoch * recipe.batch_size,
        step=step,
        began=context.began,
        time_steps=recipe.time_steps,
        precision=recipe.precision,
        zero=recipe.zero,
        commit=job.commit,
        hardware=hardware_of(context.ranks),
        versions={
            name: installed_version(name)
            for name in ("torch", "deepspeed", "ray", "ffcv", "mlflow", "timm", "numpy", "numba")
        },
        data_fingerprint=job.data_fingerprint,
        params=recipe.flat(),
        loader_threads=job.loader_threads,
        own_cores=sorted(os.sched_getaffinity(0)) if _has_own_cores(context) else None,
        resume_command=job.resume_command,
    )


def hardware_of(ranks: Ranks) -> dict[str, Any]:
    """The hardware of all workers. Collective."""
    return combine_hardware(ranks.all_gather_object(hardware(ranks.device)))


def rule_metrics(rule: Rule, ranks: Ranks, saved: Mapping[str, float]) -> dict[str, float]:
    """The means over ranks of the rule's metrics of the last batch. Collective.

    A metric is NaN if no batch of this attempt has set it. The result then has the value in
    `saved`, the metrics of the restored checkpoint. If `saved` lacks the metric, the result lacks
    it, too.
    """
    metrics = rule.metrics()
    if not metrics:
        return {}
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=ranks.device)
    means = dict(zip(metrics, ranks.mean(values).tolist(), strict=True))
    known = {**saved, **{name: mean for name, mean in means.items() if not math.isnan(mean)}}
    return {name: known[name] for name in metrics if name in known}


def checkpoint_metadata(
    context: TrainContext,
    *,
    step: int,
    score: float | None,
    is_epoch_end_due: bool,
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `trainer.json`: the progress of the run after `step` steps, and its identity.

    Args:
        score: the score of the evaluation at this step; None: no score.
        is_epoch_end_due: `Trainer._end_epoch` of this step is not done yet.
        state: the state of the trainer.
    """
    job, recipe, folder = context.job, context.recipe, Path(context.job.run)
    stretch = stretch_at(context.stretches, step)
    epoch = stretch.epoch(step)
    return {
        "run": folder.name,
        "run_id": job.run_id,
        "study": job.study,
        "commit": job.commit,
        "phase": stretch.index,
        "epoch": epoch,
        "sample": (step - stretch.epoch_start(epoch)) * recipe.batch_size,
        "seed": recipe.seed,
        "world_size": context.ranks.size,
        "zero": recipe.zero,
        "data_fingerprint": job.data_fingerprint,
        "score": score,
        "is_epoch_end_due": is_epoch_end_due,
        "recipe": recipe.to_json(),
        "decisions": asdict(context.decisions),
        **state,
    }


def summary_of(
    context: TrainContext,
    *,
    step: int,
    result: Evaluation,
    totals: Totals,
    task_results: TaskResults,
    rule_metrics: Mapping[str, float],
    inference: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of `summary.json` without the hardware; {} on ranks other than 0. Collective."""
    job, recipe, teaching = context.job, context.recipe, context.teaching
    folder, network = Path(job.run), context.backend.network
    held = asdict(held_bytes(network, context.backend.optimizer))
    if recipe.zero:  # the state of the optimizer is divided among the workers
        held["optimizer"] = sum(context.ranks.all_gather_object(held["optimizer"]))
    if context.ranks.rank:
        return {}
    records = read(RunFolder(folder).journal)
    teacher_metrics = {} if teaching is None else teaching.accuracy.metrics
    return {
        "run": folder.name,
        "run_id": job.run_id,
        "study": job.study,
        "rule": context.rule.label,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "world_size": context.ranks.size,
        "steps": step,
        "epochs": stretch_at(context.stretches, step).epoch(step - 1) + 1,
        "trained_on": trained_on(records, steps=step),
        **summarise(result, totals, list(map(from_dict, records))),
        **(task_results.summary(context.loaders.tasks) if recipe.phases else {}),
        **{
            f"teacher_{name}": value
            for name, value in teacher_metrics.items()
            if name in ("top1", "top5")
        },
        "conditions": conditions(network, context.rule, recipe, context.ranks.device),
        "held": {
            **held,
            "rule": context.rule.bytes(),
            "teacher": 0
            if teaching is None
            else storage_bytes((*teaching.teacher.parameters(), *teaching.teacher.buffers())),
        },
        "rule_metrics": dict(rule_metrics),
        "loader_threads": job.loader_threads,
        "own_cores": _has_own_cores(context),
        "commit": job.commit,
        "data_fingerprint": job.data_fingerprint,
        "inference": inference,
    }


def _has_own_cores(context: TrainContext) -> bool:
    # `own_cores` of a job has no effect on workers with a GPU.
    return context.job.own_cores and context.ranks.device.type == "cpu"


def summarise(result: Evaluation, totals: Totals, events: Sequence[Event]) -> dict[str, Any]:
    """The entries of a summary about accuracy, speed, memory and time. Units are seconds, bytes,
    joules and shares in 0..1.

    `events`: the run's whole journal.

    `steady_*` and `images_per_s` are averages without each attempt's first batch and without
    batches whose bytes or operations were counted; None if there was no other batch. Saved bytes
    and states are None if no batch with counted bytes was completed. `wall_s` is the time of all
    attempts (see `_attempt_seconds`). `startup_s` is the part of `wall_s` up to the end of each
    attempt's first batch (imports, compilation, that batch), without work between batches such as
    evaluations. `net_s` excludes start-up and work that was repeated after restarts.
    """
    starts = [event for event in events if isinstance(event, Start)]
    seconds = [
        _attempt_seconds(events, attempt)
        for attempt in {event.attempt for event in events} - {NO_ATTEMPT}
    ]
    return {
        **result.metrics,
        "evaluated_samples": result.samples,
        "images_per_s": totals.steady_samples / totals.steady_s if totals.steady_s else None,
        "steady_forward_s": totals.mean_steady_s("forward"),
        "steady_backward_s": totals.mean_steady_s("backward"),
        "wall_s": sum(wall_s for wall_s, _ in seconds),
        "startup_s": sum(startup_s for _, startup_s in seconds),
        "net_s": sum(totals.seconds.values()),
        "timed_batches": totals.timed_batches,
        "train_s": totals.train_s,
        **{f"{name}_s": value for name, value in totals.seconds.items()},
        "peak_saved_bytes": totals.peak_saved_bytes,
        "state_bytes": totals.state_bytes,
        "peak_device_bytes": totals.peak_device_bytes,
        "peak_reserved_bytes": totals.peak_reserved_bytes,
        "peak_rss_bytes": totals.peak_rss_bytes,
        "peak_pss_bytes": totals.peak_pss_bytes,
        "evaluation_peak_rss_bytes": totals.evaluation_peak_rss_bytes,
        "evaluation_peak_device_bytes": totals.evaluation_peak_device_bytes,
        "evaluation_peak_reserved_bytes": totals.evaluation_peak_reserved_bytes,
        "device_j": totals.device_j,
        "operations": totals.operations_per_sample(),
        "not_counted": totals.not_counted,
        "backward_calls_per_batch": totals.backward_calls / max(1, totals.batches),
        "restarts": len(starts) - 1,
        "rollbacks": sum(isinstance(event, Rollback) for event in events),
        "skipped_batches": len({event.step for event in events if isinstance(event, Skipped)}),
        "commits": sorted({start.commit for start in starts}),
    }


def _attempt_seconds(events: Sequence[Event], attempt: int) -> tuple[float, float]:
    """The seconds of an attempt from its start in the worker's code to its last event (for the
    current attempt: to now), and the seconds of its start-up.

    If the clock was set back between two events, no time counts between them. If the attempt ended
    before its first batch, its start-up is the time before its event "start", or all its time if it
    has no such event.
    """
    own_events = [event for event in events if event.attempt == attempt]
    start = next((event for event in own_events if isinstance(event, Start)), None)
    began = own_events[0].time if start is None else start.began
    times = [began, *(event.time for event in own_events)]
    if attempt == events[-1].attempt:
        times.append(time.time())
    wall_s = sum(max(0.0, later - earlier) for earlier, later in pairwise(times))
    startup_s = wall_s if start is None else max(0.0, start.time - start.began)
    for event in own_events:
        if isinstance(event, FirstBatch):
            startup_s = event.startup_s
    return wall_s, min(startup_s, wall_s)


def conditions(
    network: nn.Module, rule: Rule, recipe: Recipe, device: torch.device
) -> dict[str, str | int]:
    """The conditions of a training, for a summary. A text about neurons or norms is "none" if the
    network has none of them, and "a, b" if they differ.

    norm_over            `over` of each `BatchNorm`. A norm of another library is "time" with its
                         class, because it gets the time steps in the batch dimension
    exact                see `exactness`
    neuron_kernel        "numba", "triton" or "eager": the device's, or eager where a LIF has
                         `kernel="eager"`. A rule or a user's neuron may compute in its own way
    steps_per_forward    the time steps in one forward pass of the network, in 1..T
    """
    modules = list(network.modules())
    return {
        "reset_gradient": _kinds(
            module.reset_gradient for module in modules if isinstance(module, LIF)
        ),
        "norm_over": _kinds(
            [module.over for module in modules if isinstance(module, BatchNorm)]
            + [f"time ({type(norm).__name__})" for norm in foreign_norms(network).values()]
        ),
        "neuron_kernel": _kinds(
            "eager" if module.kernel == "eager" else kernels_of(device)
            for module in modules
            if isinstance(module, LIF)
        ),
        "precision": recipe.precision,
        "exact": exactness(device),
        "steps_per_forward": rule.steps_per_forward(recipe.time_steps),
    }


def _kinds(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values))) or "none"
