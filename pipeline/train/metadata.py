"""What a run says of itself: at the start of an attempt, in each checkpoint, and at its end.

Under which conditions a run's figures hold, read off what was built: a reader should not have to
trust a recipe's silence.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.core.run_folder import RunFolder
from pipeline.core.torch_settings import exactness
from pipeline.measure.memory import hardware, hardware_over
from pipeline.measure.tensor_bytes import HeldBytes, held_bytes
from pipeline.measure.totals import Totals
from pipeline.recipe.json import differing, listed
from pipeline.recipe.phases import stretch_at
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm, foreign_norms
from pipeline.track.delivery import read_note
from pipeline.track.events import Start
from pipeline.track.journal import read, read_events
from pipeline.track.provenance import trained_on
from pipeline.train.backend.collectives import Ranks
from pipeline.train.context import TrainContext
from pipeline.train.evaluation import Evaluation
from pipeline.train.summary import summarise, versions
from pipeline.train.tasks import Learnt


def start_event(parts: TrainContext, *, step: int) -> Start:
    """The event of an attempt that begins with batch `step`; collective."""
    job, recipe, split = parts.job, parts.recipe, parts.split
    samples, epoch_steps = parts.loaders.lengths[
        stretch_at(parts.stretches, step).index
    ]  # of the task at hand
    return Start(
        run=Path(job.run).name,
        run_id=job.run_id,
        recipe=recipe.name,
        rule=parts.rule.label,
        study=job.study,
        study_parent=job.parent,
        suite=job.suite,
        family=job.family,
        seed=recipe.seed,
        world_size=split.workers,
        batch_size=recipe.batch_size,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        parameters=sum(p.numel() for p in parts.backend.network.parameters()),
        steps_per_epoch=epoch_steps,
        total_steps=parts.stretches[-1].end,
        epochs=sum(task.epochs for task in parts.loaders.tasks),
        samples=samples,
        dropped_per_epoch=samples - epoch_steps * recipe.batch_size,
        step=step,
        began=parts.began,
        time_steps=recipe.time_steps,
        precision=recipe.precision,
        zero=recipe.zero,
        commit=job.commit,
        hardware=hardware_of(parts.ranks),
        versions=versions(),
        data_fingerprint=job.data_fingerprint,
        params=recipe.flat(),
        loader_threads=job.loader_threads,
        own_cores=sorted(os.sched_getaffinity(0)) if _has_own_cores(parts) else None,
        resume_command=job.resume_command,
    )


def hardware_of(ranks: Ranks) -> dict[str, Any]:
    """Of all workers; collective."""
    return hardware_over(ranks.all_gather_object(hardware(ranks.device)))


def told_in_checkpoint(
    parts: TrainContext,
    *,
    step: int,
    score: float | None,
    owes: bool,
    totals: Totals,
    figures: Mapping[str, float],
    learnt: Learnt,
    guard: Mapping[str, Any],
) -> dict[str, Any]:
    """`trainer.json`: where the run stands after `step` steps, and whose run it is.

    `owes`: these steps end an epoch, and what comes after one, its evaluation first, is still to
    come. `figures` are the rule's, of its last batch.
    """
    folder, job, recipe = Path(parts.job.run), parts.job, parts.recipe
    stretch = stretch_at(parts.stretches, step)
    epoch = stretch.epoch(step)
    return {
        "run": folder.name,
        "run_id": job.run_id,
        "mlflow": read_note(folder),
        "study": job.study,
        "commit": job.commit,
        "phase": stretch.index,
        "epoch": epoch,
        "sample": (step - stretch.epoch_start(epoch)) * recipe.batch_size,
        "seed": recipe.seed,
        "world_size": parts.ranks.size,
        "zero": recipe.zero,
        "data_fingerprint": job.data_fingerprint,
        "score": score,
        "owes_epoch_end": owes,
        "recipe": recipe.to_json(),
        "totals": asdict(totals),
        "figures": dict(figures),
        "learnt": asdict(learnt),
        "guard": dict(guard),
        "decided": parts.decided,
    }


def refuse_another_recipe(
    trainer: Mapping[str, Any], recipe: Recipe, *, trust: Collection[str]
) -> None:
    """Refuse to go on from a checkpoint with another recipe than led to it: recipe.json was changed
    meanwhile.

    Raises:
        ValueError: the fields that differ, as they were and as they are now.
    """
    if "recipe" not in trainer:  # written by a version that did not tell
        return
    was = Recipe.from_json(trainer["recipe"], trust=trust)
    _refuse(
        differing("", was.decisive(), recipe.decisive()), when=f"step {trainer['step']} was saved"
    )


def refuse_another_start(
    launched: Mapping[str, Any], recipe: Recipe, *, trust: Collection[str]
) -> None:
    """Refuse to begin with another recipe than was launched, by which the run is known and
    compared; likewise.

    What it begins from counts too, as long as no checkpoint has taken its place.

    Raises:
        ValueError: see `refuse_another_recipe`.
    """
    was = Recipe.from_json(launched, trust=trust)
    inits = differing("init", was.init, recipe.init)
    _refuse(
        [*differing("", was.decisive(), recipe.decisive()), *inits], when="the run was launched"
    )


def _refuse(differences: Iterable[tuple[str, Any, Any]], *, when: str) -> None:
    if found := list(differences):
        raise ValueError(
            f"resume: recipe.json must be as it was when {when}; it differs now: {listed(found)}"
        )


def held_without_zero(parts: TrainContext) -> HeldBytes:
    """What a worker would hold if ZeRO gave it no share of the optimizer's state, but all of it;
    collective.
    """
    found = held_bytes(parts.backend.network, parts.backend.optimizer)
    return (
        replace(found, optimizer=sum(parts.ranks.all_gather_object(found.optimizer)))
        if parts.recipe.zero
        else found
    )


def told_at_the_end(
    parts: TrainContext,
    *,
    step: int,
    result: Evaluation,
    totals: Totals,
    kept: HeldBytes,
    learnt: Learnt,
    figures: Mapping[str, float],
) -> dict[str, Any]:
    """`summary.json` without the hardware, and the event "finish"; `figures` are the rule's, of its
    last batch.
    """
    folder, job, recipe, taught = Path(parts.job.run), parts.job, parts.recipe, parts.teaching
    journal = RunFolder(folder).journal
    of_teacher = {} if taught is None else taught.accuracy.metrics
    return {
        "run": folder.name,
        "run_id": job.run_id,
        "study": job.study,
        "rule": parts.rule.label,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "world_size": parts.ranks.size,
        "steps": step,
        "epochs": stretch_at(parts.stretches, step).epoch(step - 1) + 1,
        "trained_on": trained_on(read(journal), steps=step),
        **summarise(result, totals, read_events(journal)),
        **(learnt.summary(parts.loaders.tasks) if recipe.phases else {}),
        **{f"teacher_{name}": of_teacher[name] for name in ("top1", "top5") if name in of_teacher},
        "conditions": conditions(parts.backend.network, parts.rule, recipe, parts.device),
        "held": {
            **asdict(kept),
            "rule": parts.rule.bytes(),
            "teacher": 0 if taught is None else taught.bytes,
        },
        "rule_metrics": dict(figures),
        "loader_threads": job.loader_threads,
        "own_cores": _has_own_cores(parts),
        "commit": job.commit,
        "data_fingerprint": job.data_fingerprint,
    }


def _has_own_cores(parts: TrainContext) -> bool:
    """On a GPU it has a card of its own in their place."""
    return parts.job.own_cores and parts.device.type == "cpu"


def conditions(
    network: nn.Module, rule: Rule, recipe: Recipe, device: torch.device
) -> dict[str, str | int]:
    """For a summary; `none` where the network has no such part, and `a, b` where it has parts of
    several kinds.

    `norm_over` of a norm that is not this project's is "time" with its class, as it sees time steps
    folded into the batch. `steps_per_forward` is T for what is folded over time, 1 for what goes
    step by step. `exact`: see `exactness`."""
    modules = list(network.modules())
    return {
        "reset_gradient": _kinds(
            module.reset_gradient for module in modules if isinstance(module, LIF)
        ),
        "norm_over": _kinds(
            [module.over for module in modules if isinstance(module, BatchNorm)]
            + [f"time ({type(norm).__name__})" for norm in foreign_norms(network).values()]
        ),
        "precision": recipe.precision,
        "exact": exactness(device),
        "steps_per_forward": min(rule.chunk or recipe.time_steps, recipe.time_steps),
    }


def _kinds(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values))) or "none"
