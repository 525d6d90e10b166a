"""The composition root of one process: recipe -> data, network, rule, backend, tracker -> loop."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.attempt import Attempt, Parts
from pipeline.backend.base import Backend
from pipeline.backend.plain import Plain
from pipeline.checkpoint import Checkpoints
from pipeline.data.base import Data, Loader
from pipeline.job import Job, Place
from pipeline.measure.meters import Meters
from pipeline.ranks import Ranks, Refused
from pipeline.recipe import Recipe, Split
from pipeline.rules.base import Rule, World
from pipeline.spiking.encode import over_steps
from pipeline.track.base import Tracker
from pipeline.weights import load_start
from pipeline.writer import journal, only_writer


def run(job: Job, place: Place, *, attempt_of: Callable[[Parts], Attempt] = Attempt) -> dict[str, Any] | None:
    """Train a run from wherever its folder stands to its end; the summary (on rank 0), or None when it was asked to stop.

    `attempt_of` makes the attempt; benchmarks look over its shoulder.

    Raises:
        Refused: something that the user has to change.
    """
    began = time.time()
    torch.set_num_threads(job.threads)
    torch.backends.cudnn.deterministic = True  # the same bits after a restart; costs speed where cuDNN has a faster kernel
    ranks = Ranks(place.rank, place.workers, place.device)
    with only_writer(Path(job.run), ranks), journal(Path(job.run), ranks) as tracker:
        try:
            attempt = attempt_of(compose(job, place, ranks, tracker, began))
        except ValueError as error:
            raise Refused(str(error)) from error
        return attempt.run()


def compose(job: Job, place: Place, ranks: Ranks, tracker: Tracker, began: float) -> Parts:
    """Build everything that this process trains with, and restore the newest checkpoint into it; collective."""
    folder = Path(job.run)
    recipe = Recipe.read(folder / "recipe.json", trust=job.trust)
    split = recipe.split(ranks.size)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        attempt=ranks.agree(lambda: f"{os.getpid()}-{time.time_ns():x}"),
        keep=recipe.keep,
        rank=ranks.rank,
        on_quarantine=lambda path, reason: tracker.event("quarantine", path=str(path), reason=reason),
    )
    checkpoint = ranks.agree(checkpoints.newest)
    world = World(recipe.seed, ranks.rank, ranks.size, ranks.mean)
    # What can be refused on one machine alone comes first, and nobody talks to the others while it does.
    network, rule, train_set, val_set = ranks.together(
        lambda: _own_parts(job, place, recipe, split, world, tracker, is_fresh=checkpoint is None)
    )
    backend = ranks.together(lambda: build_backend(recipe, network, rule, split))
    seed_everything(recipe.seed + 1 + ranks.rank)  # dropout and its like: not the same on two ranks
    steps = total_steps(recipe, train_set.steps_per_epoch)
    return Parts(
        job=job,
        ranks=ranks,
        tracker=tracker,
        recipe=recipe,
        split=split,
        device=ranks.device,
        rule=rule,
        backend=backend,
        schedule=recipe.schedule.build(backend.optimizer, steps),
        train_set=train_set,
        val_set=val_set,
        meters=Meters(network, batch_size=recipe.batch_size, device=ranks.device),
        checkpoints=checkpoints,
        steps=steps,
        trainer=None if checkpoint is None else checkpoints.load(checkpoint, backend, rule),
        began=began,
    )


def _own_parts(
    job: Job, place: Place, recipe: Recipe, split: Split, world: World, tracker: Tracker, *, is_fresh: bool
) -> tuple[nn.Module, Rule, Loader, Loader]:
    """Network, rule and data of this process: every one of them may be refused here, and none of them is collective."""
    data: Data = recipe.data.build()
    check_data(data, job, every_page=place.local_rank == 0)
    seed_everything(recipe.seed)
    network = build_network(recipe, data)
    if recipe.init is not None and is_fresh:
        start = load_start(network, Path(recipe.init))
        tracker.event("init", file=start.file, fresh=list(start.fresh))
    network.to(place.device)
    rule = attached_rule(recipe, network, world)
    if is_fresh and rule.calibration_batches:
        rule.calibrate(network, first_batches(recipe, data, rule.calibration_batches, torch.device(place.device)))
    if rule.update == "objective" and split.accumulation > 1:
        raise ValueError(f"{recipe.rule.label}: moves the weights at every time step and refuses accumulation; got {split}")
    sizes = {"rank": world.rank, "world": world.size, "micro_batch": split.micro_batch, "threads": job.loader_threads}
    train_set = data.train(seed=recipe.seed, batch_size=recipe.batch_size, **sizes)
    return network, rule, train_set, data.val(**sizes)


def build_network(recipe: Recipe, data: Data) -> nn.Module:
    """The recipe's network, with fresh weights."""
    classes = recipe.model.kwargs.get("classes", data.classes)
    if classes != data.classes:
        raise ValueError(f"recipe: model and data must have the same classes; got {classes} and {data.classes}")
    return recipe.model.build()


def attached_rule(recipe: Recipe, network: nn.Module, world: World) -> Rule:
    """The recipe's rule on its network; refuses what does not fit together."""
    rule: Rule = recipe.rule.build()
    rule.check_steps(recipe.time_steps)
    rule.attach(network, world=world, over_time=recipe.over_time)
    return rule


def first_batches(recipe: Recipe, data: Data, count: int, device: torch.device) -> list[Tensor]:
    """The inputs `x_TB` of the first `count` global batches, whole: the same on every rank, whatever the number of ranks."""
    whole = {"rank": 0, "world": 1, "batch_size": recipe.batch_size, "micro_batch": recipe.batch_size, "threads": 1}
    loader = data.train(seed=recipe.seed, **whole)
    try:
        with loader.epoch(0) as batches:
            return [over_steps(batch.x.to(device), recipe.time_steps) for batch in itertools.islice(batches, count)]
    finally:
        loader.close()


def check_recipe(recipe: Recipe, workers: int) -> nn.Module:
    """Refuse what does not fit together, before anything is launched; needs no data file. The network that was made for it."""
    recipe.split(workers)
    network = build_network(recipe, recipe.data.build())
    if recipe.init is not None:
        load_start(network, Path(recipe.init))
    rule = attached_rule(recipe, network, World(recipe.seed, size=workers))
    recipe.schedule.build(build_optimizer(recipe, network, rule), 1000)
    return network


def build_optimizer(recipe: Recipe, network: nn.Module, rule: Rule) -> torch.optim.Optimizer:
    try:
        optimizer = recipe.optimizer.build(network)
    except (TypeError, AssertionError, RuntimeError) as error:  # timm passes on what it does not know, and complains in many ways
        raise ValueError(f"{recipe.optimizer.label}: {error}") from error
    rule.check_optimizer(optimizer)
    return optimizer


def build_backend(recipe: Recipe, network: nn.Module, rule: Rule, split: Split) -> Backend:
    def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(recipe, network, rule)

    if recipe.backend == "plain":
        return Plain(network, optimizer_of, precision=recipe.precision, clip_norm=recipe.clip_norm)
    from pipeline.backend.deepspeed import DeepSpeed

    return DeepSpeed(
        network,
        optimizer_of,
        micro_batch=split.micro_batch,
        zero=recipe.zero,
        precision=recipe.precision,
        clip_norm=recipe.clip_norm,
    )


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    steps = recipe.epochs * steps_per_epoch
    return steps if recipe.stop_after is None else min(steps, recipe.stop_after)


def check_data(data: Data, job: Job, *, every_page: bool) -> None:
    """The data set's content against what the run was launched on, and every page against its checksum, once on a machine."""
    if every_page:
        data.check()
    if data.fingerprint() != job.data_fingerprint:
        raise ValueError(
            f"data: this run was launched on content {job.data_fingerprint[:12]}; got {data.fingerprint()[:12]}: "
            "another file lies where the recipe points"
        )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what a user's own parts may draw from)
    torch.manual_seed(seed)
