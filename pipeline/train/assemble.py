"""From a job to the parts that one process trains with: recipe -> data, network, rule, backend,
newest checkpoint; collective.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.code_version import check_same_code, code_digest
from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.core.shared_marker import check_shared
from pipeline.core.torch_settings import compute_in
from pipeline.data.base import Data
from pipeline.data.ffcv.page_checks import ONE_IN
from pipeline.measure.clock import Clock
from pipeline.measure.meters import Meters
from pipeline.recipe import own_code
from pipeline.recipe.phases import timetable
from pipeline.recipe.recipe import Recipe, Split
from pipeline.rules.base import Rule, World
from pipeline.spiking.encode import over_steps
from pipeline.track import events
from pipeline.track.journal import Tracker, read_events
from pipeline.train.backend.averaged import Averaged
from pipeline.train.backend.base import Backend
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.plain import Plain
from pipeline.train.build import attached_rule, build_mixing, build_network
from pipeline.train.checkpoint import Checkpoints, lost_step, place_at, read_trainer, step_name
from pipeline.train.checkpoint.background import LONGEST_S
from pipeline.train.context import TrainContext
from pipeline.train.decisions import adopt, decided
from pipeline.train.elastic import check_accumulation, check_sizes, seed_everything, steady
from pipeline.train.gradient_fidelity import Nearness
from pipeline.train.guards.anomaly import Skipped
from pipeline.train.guards.oom import fitted, limit_of
from pipeline.train.guards.storage import PATIENCE_S, patiently
from pipeline.train.guards.watchdog import Watchdog
from pipeline.train.job import Job, RankInfo
from pipeline.train.metadata import refuse_another_recipe, refuse_another_start
from pipeline.train.optimizer import build_optimizer, build_schedule
from pipeline.train.tasks import Loaders, build_data, check_data, tasks_of
from pipeline.train.teaching import Teaching, open_teaching
from pipeline.train.weights import load_start


def compose(
    job: Job,
    place: RankInfo,
    ranks: Ranks,
    tracker: Tracker,
    watchdog: Watchdog,
    clock: Clock,
    began: float,
) -> TrainContext:
    """Build everything that this process trains with, and restore the newest checkpoint into it;
    collective.

    Raises:
        UserError: something that the user has to change; every rank knows.
        ValueError: likewise, found by this rank alone.
    """
    watchdog.beat()
    folder = Path(job.run)
    if ranks.size > 1:
        check_same_code(socket.gethostname(), code_digest(), each=ranks.all_gather_object)
    written = ranks.all_or_raise(
        lambda: Recipe.read(RunFolder(folder).recipe, trust=job.trust)
    )  # a node may lack the user's package
    ranks.all_or_raise(lambda: compute_in(written.precision, ranks.device))
    if ranks.size > 1 and job.trust:
        own = ranks.all_or_raise(lambda: own_code.digest(folder, job.trust))
        check_same_code(
            socket.gethostname(),
            own,
            each=ranks.all_gather_object,
            of=f"the {', '.join(job.trust)}",
        )
    checkpoints, checkpoint = _found(job, written, ranks, tracker, watchdog)
    limit, skipped = patiently(
        ranks,
        lambda: (limit_of(folder), Skipped.read(folder)),
        beat=watchdog.beat,
        on_wait=partial(_tell_waiting, tracker),
    )
    recipe = fitted(written, limit)
    with watchdog.off():  # one worker of each machine reads all of the data
        ranks.all_or_raise(lambda: _check_data(recipe, job, place))
    world = World(recipe.seed, ranks.rank, ranks.size, ranks.mean)
    # What can be refused on one machine alone comes first, and nobody talks to the others while it
    # does.
    recipe, network, rule, loaders = ranks.all_or_raise(
        lambda: _own_parts(job, place, recipe, world, tracker, is_fresh=checkpoint is None)
    )
    watchdog.beat()
    split = recipe.split(ranks.size)
    mixing = ranks.all_or_raise(lambda: build_mixing(recipe, split))
    backend = ranks.all_or_raise(lambda: build_backend(recipe, network, rule, split))
    watchdog.beat()
    seed_everything(recipe.seed + 1 + ranks.rank)  # dropout and its like: not the same on two ranks
    lengths = [
        (task.epochs, steps)
        for task, (_, steps) in zip(loaders.tasks, loaders.lengths, strict=True)
    ]
    stretches = timetable(lengths, stop_after=recipe.stop_after)
    with watchdog.off():  # one worker may fit a head on all of the data
        teaching = _opened(
            job,
            recipe,
            loaders,
            split,
            ranks,
            tracker,
            steps=stretches[-1].end,
            is_fresh=checkpoint is None,
        )
    return TrainContext(
        job=job,
        ranks=ranks,
        tracker=tracker,
        watchdog=watchdog,
        recipe=recipe,
        split=split,
        device=ranks.device,
        rule=rule,
        backend=backend,
        schedule=build_schedule(recipe, backend.optimizer, stretches),
        loaders=loaders,
        stretches=stretches,
        mixing=mixing,
        teaching=teaching,
        nearness=ranks.all_or_raise(
            lambda: build_nearness(recipe, loaders, split, world, ranks.device)
        ),
        meters=Meters(network, batch_size=recipe.batch_size, device=ranks.device, clock=clock),
        checkpoints=checkpoints,
        skipped=skipped,
        decided=ranks.broadcast_object(lambda: decided(folder)),
        sizes=place.sizes or (ranks.size,),
        notice=place.notice,
        trainer=None if checkpoint is None else checkpoints.load(checkpoint, backend, rule),
        began=began,
    )


def _found(
    job: Job, recipe: Recipe, ranks: Ranks, tracker: Tracker, watchdog: Watchdog
) -> tuple[Checkpoints, Path | None]:
    """The run's checkpoints, and the one to go on from; storage that is away is waited for."""
    kept = ranks.all_or_raise(
        lambda: place_at(job.checkpoints, Path(job.run), token=job.place_token)
    )
    patient = partial(patiently, ranks, beat=watchdog.beat, on_wait=partial(_tell_waiting, tracker))
    if ranks.size > 1:
        patient(kept.sweep)  # first: what a killed attempt left may fill the disk
        check_shared(
            kept.staging, rank=ranks.rank, each=ranks.all_gather_object, beat=watchdog.beat
        )
    checkpoints = Checkpoints(
        kept,
        attempt=ranks.broadcast_object(lambda: f"{os.getpid()}-{time.time_ns():x}"),
        keep=recipe.checkpoints.keep,
        rank=ranks.rank,
        ranks=ranks.size,
        each=ranks.all_gather_object,
        on_quarantine=lambda address, reason: tracker.write(
            events.Quarantine(path=address, reason=reason)
        ),
        on_unwritten=lambda step, error: tracker.write(events.Unwritten(step=step, error=error)),
        beat=watchdog.beat,
    )
    with watchdog.patient(
        LONGEST_S
    ):  # while worker 0 fetches and verifies; as for one that is written
        return checkpoints, patient(lambda: _newest(checkpoints, recipe, job))


def _tell_waiting(tracker: Tracker, error: str) -> None:
    tracker.write(events.Waiting(what="storage", error=error, most_s=PATIENCE_S))


def _newest(checkpoints: Checkpoints, recipe: Recipe, job: Job) -> Path | None:
    """The checkpoint to go on from; None: the run begins at step 0, as none was saved or all of
    them are in quarantine.

    What it tells of the run's decisions is written down where the folder was lost.

    Raises:
        UserError: the journal knows of one that nobody has found damaged, and none is there: to
        begin
            anew would lose what was learnt, where a disk is not mounted. Or it is of another
            recipe; or none is, and another one was launched.
    """
    folder, found = Path(job.run), checkpoints.newest()
    if found is not None:
        trainer = read_trainer(found)
        refuse_another_recipe(trainer, recipe, trust=job.trust)
        adopt(folder, trainer.get("decided", {}))
    elif (
        step := lost_step(read_events(RunFolder(folder).journal), keep=recipe.checkpoints.keep)
    ) is not None:
        raise UserError(
            f"checkpoint: {checkpoints.place.address(step_name(step))} must be there, as the"
            " journal says; got no checkpoint: mount or restore its storage, or begin anew under"
            " another --name"
        )
    else:
        refuse_another_start(job.recipe, recipe, trust=job.trust)
    return found


def _check_data(recipe: Recipe, job: Job, place: RankInfo) -> None:
    """One worker of each machine reads every page: machines may hold copies of their own."""
    check_data(
        build_data(recipe), fingerprint=job.data_fingerprint, every_page=place.local_rank == 0
    )


def _own_parts(
    job: Job, place: RankInfo, recipe: Recipe, world: World, tracker: Tracker, *, is_fresh: bool
) -> tuple[Recipe, nn.Module, Rule, Loaders]:
    """Network, rule and data of this process, and the recipe with the micro-batches that suit them.

    Every one of them may be refused here, and none of them is collective.
    """
    check_sizes(recipe, place.sizes or (world.size,))
    tasks = tasks_of(recipe, one_in=ONE_IN[job.verify])
    seed_everything(recipe.seed)
    network = build_network(recipe, tasks)
    if recipe.init is not None and is_fresh:
        start = load_start(network, Path(recipe.init))
        tracker.write(events.Init(file=str(start.file), fresh=list(start.fresh)))
    network.to(place.device)
    rule = attached_rule(recipe, network, world)
    recipe = steady(recipe, network, place.sizes or (world.size,))
    check_accumulation(recipe, rule, (world.size,))
    if is_fresh and rule.calibration_batches:
        rule.calibrate(
            network,
            first_batches(
                recipe, tasks[0].data, rule.calibration_batches, torch.device(place.device)
            ),
        )
    loaders = Loaders(
        tasks, recipe, recipe.split(world.size), rank=world.rank, threads=job.loader_threads
    )
    return recipe, network, rule, loaders


def first_batches(recipe: Recipe, data: Data, count: int, device: torch.device) -> list[Tensor]:
    """The inputs `x_TB` of the first `count` global batches, whole: the same on every rank,
    whatever the number of ranks.
    """
    whole = {
        "rank": 0,
        "world": 1,
        "batch_size": recipe.batch_size,
        "micro_batch": recipe.batch_size,
        "threads": 1,
    }
    loader = data.train(seed=recipe.seed, **whole)
    try:
        with loader.epoch(0) as batches:
            return [
                over_steps(batch.x.to(device), recipe.time_steps)
                for batch in itertools.islice(batches, count)
            ]
    finally:
        loader.close()


def build_backend(recipe: Recipe, network: nn.Module, rule: Rule, split: Split) -> Backend:
    backend = _plain_or_deepspeed(recipe, network, rule, split)
    return Averaged(backend, decay=recipe.ema_decay) if recipe.ema_decay else backend


def _plain_or_deepspeed(recipe: Recipe, network: nn.Module, rule: Rule, split: Split) -> Backend:
    def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(recipe, network, rule)

    if recipe.backend == "plain":
        return Plain(network, optimizer_of, precision=recipe.precision, clip_norm=recipe.clip_norm)
    from pipeline.train.backend.deepspeed import DeepSpeed

    return DeepSpeed(
        network,
        optimizer_of,
        micro_batch=split.micro_batch,
        zero=recipe.zero,
        precision=recipe.precision,
        clip_norm=recipe.clip_norm,
    )


def _opened(
    job: Job,
    recipe: Recipe,
    loaders: Loaders,
    split: Split,
    ranks: Ranks,
    tracker: Tracker,
    *,
    steps: int,
    is_fresh: bool,
) -> Teaching | None:
    """The recipe's teacher, where it has one, whose accuracy a run that begins tells."""
    if recipe.teacher is None:
        return None
    about = {"folder": Path(job.run), "steps": steps, "threads": job.loader_threads}
    teaching = open_teaching(
        recipe, loaders.tasks[0].data, split, ranks=ranks, tracker=tracker, **about
    )
    if is_fresh:
        found = teaching.accuracy
        figures: dict[str, Any] = {"samples": found.samples, **found.metrics}
        figures.pop("firing_rate")  # a teacher need not spike
        tracker.write(events.Teacher(teacher=teaching.teacher.label, figures=figures))
    return teaching


def build_nearness(
    recipe: Recipe, loaders: Loaders, split: Split, world: World, device: torch.device
) -> Nearness | None:
    """What compares gradients, on rank 0 alone: the others wait for it where they next meet."""
    if recipe.evaluation.fidelity_every == 0 or world.rank:
        return None
    with closing(loaders.train(0)) as loader, loader.epoch(0) as batches:
        batch = next(iter(batches))
    fresh = lambda: build_network(recipe, loaders.tasks).to(device)
    x_TB = over_steps(batch.x.to(device), recipe.time_steps)
    return Nearness(recipe, fresh, recipe.objective.build().labels, x_TB, batch.target.to(device))
