"""Builds everything that an attempt needs for training: data, network, rule, backend and the state
of the newest checkpoint.
"""

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.code_version import check_same_code, code_digest
from pipeline.core.errors import UserError
from pipeline.core.files import check_shared
from pipeline.core.run_folder import RunFolder
from pipeline.core.torch_settings import compute_in
from pipeline.data.ffcv.page_checks import ONE_IN
from pipeline.data.mixing import Mixing
from pipeline.measure.clock import Clock
from pipeline.measure.gradient_similarity import Fidelity, fidelity, gradients
from pipeline.measure.meters import Meters
from pipeline.recipe import own_code
from pipeline.recipe.json import differing, listed
from pipeline.recipe.phases import Stretch, timetable
from pipeline.recipe.recipe import Recipe, Split
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.norm import batch_norms
from pipeline.spiking.state import set_temporarily
from pipeline.track import events
from pipeline.track.journal import Tracker, read_events
from pipeline.train.backend.base import Backend
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.ema import EMABackend
from pipeline.train.backend.plain import Plain
from pipeline.train.build import (
    attach_rule,
    build_network,
    build_optimizer,
    build_schedule,
)
from pipeline.train.checkpoint import Checkpoints, expected_step, read_trainer, step_name, store_at
from pipeline.train.checkpoint.checkpoints import LONGEST_S
from pipeline.train.elastic import build_mixing, fit_to_sizes, seed_everything
from pipeline.train.guards.storage_outage import OUTAGE_TIMEOUT_S, retry_during_outage
from pipeline.train.guards.watchdog import Watchdog
from pipeline.train.job import Job, RankInfo
from pipeline.train.objective import Loss
from pipeline.train.recovery import Decisions
from pipeline.train.tasks import Loaders, build_data, check_data, tasks_of
from pipeline.train.teaching import Teaching, open_teaching
from pipeline.train.transfer import move_batch, move_network
from pipeline.train.weights import load_start, weights_file

T_ = TypeVar("T_")


@dataclass(frozen=True, kw_only=True)
class Process:
    """A worker process at the start of an attempt."""

    job: Job
    rank_info: RankInfo
    ranks: Ranks
    tracker: Tracker
    watchdog: Watchdog  # already started
    clock: Clock
    began: float  # unix seconds at the start of the attempt

    def retry_during_outage(self, act: Callable[[], T_]) -> T_:
        """Rank 0's result of `act`, on every rank. Waits during a storage outage. Collective."""
        return retry_during_outage(
            self.ranks,
            act,
            beat=self.watchdog.beat,
            on_wait=lambda error: self.tracker.write(
                events.Waiting(what="storage", error=error, most_s=OUTAGE_TIMEOUT_S)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class TrainContext(Process):
    """Everything that an attempt needs for training: the process, and the parts of the recipe."""

    recipe: Recipe
    split: Split
    rule: Rule
    backend: Backend
    schedule: Callable[[int], None]
    loaders: Loaders
    stretches: tuple[Stretch, ...]  # the steps of each task
    mixing: Mixing | None
    teaching: Teaching | None
    # compares gradients on one micro-batch; None without `fidelity_every`, or on a rank above 0
    compare_gradients: Callable[..., Fidelity] | None
    meters: Meters
    checkpoints: Checkpoints
    decisions: Decisions
    # `trainer.json` of the restored checkpoint; None if the run starts at step 0
    restored: dict[str, Any] | None

    @contextmanager
    def published(self) -> Iterator[None]:
        """Inside the block, the network has the values that are evaluated and published: its
        weights (averaged over steps if the recipe sets `ema_decay`) and its running statistics
        averaged over ranks.
        """
        with self.backend.published(), self.ranks.averaged_buffers(self.backend.network):
            yield


def assemble(process: Process) -> TrainContext:
    """Build everything that this process needs for training, and restore the newest checkpoint.
    Collective.

    Raises:
        UserError: the user has to change something. Every rank raises it.
        ValueError: the user has to change something. Only this rank raises it.
    """
    job, ranks, watchdog = process.job, process.ranks, process.watchdog
    watchdog.beat()
    recipe = _read_recipe(process)
    checkpoints = _open_checkpoints(process, recipe)
    with watchdog.patient(LONGEST_S):  # rank 0 may fetch and verify for this long
        checkpoint = process.retry_during_outage(lambda: _newest(checkpoints, recipe, job))
    is_fresh = checkpoint is None
    decisions = process.retry_during_outage(lambda: Decisions.read(Path(job.run)))
    recipe = decisions.fit(recipe)
    with watchdog.off():
        # One worker of each machine reads every page, because a machine may have its own copy.
        ranks.all_or_raise(
            lambda: check_data(
                build_data(recipe),
                fingerprint=job.data_fingerprint,
                every_page=process.rank_info.local_rank == 0,
            )
        )
    world = World(recipe.seed, ranks.rank, ranks.size, ranks.mean)
    # No rank waits for another in this step, so a part may fail on one machine alone.
    recipe, network, rule, loaders = ranks.all_or_raise(
        lambda: _build_local_parts(process, recipe, world, is_fresh=is_fresh)
    )
    watchdog.beat()
    split = recipe.split(ranks.size)
    mixing = ranks.all_or_raise(lambda: build_mixing(recipe, split))
    backend = ranks.all_or_raise(lambda: build_backend(recipe, network, rule, split))
    watchdog.beat()
    seed_everything(recipe.seed + 1 + ranks.rank)  # so that dropout differs between ranks
    stretches = timetable(
        [
            (task.epochs, steps)
            for task, (_, steps) in zip(loaders.tasks, loaders.lengths, strict=True)
        ],
        stop_after=recipe.stop_after,
    )
    teaching = None
    if recipe.teacher is not None:
        with watchdog.off():  # one worker may train the teacher's head on all of the data
            teaching = open_teaching(
                recipe,
                loaders.tasks[0].data,
                split,
                folder=Path(job.run),
                steps=stretches[-1].end,
                ranks=ranks,
                tracker=process.tracker,
                threads=job.loader_threads,
                is_fresh=is_fresh,
            )
    compare_gradients = ranks.all_or_raise(
        lambda: _build_fidelity(recipe, loaders, world, ranks.device)
    )
    schedule = build_schedule(recipe, backend.optimizer, stretches)
    # This comes last: a schedule starts from the optimizer's own rates, not from restored ones.
    restored = None if checkpoint is None else checkpoints.load(checkpoint, backend, rule)
    return TrainContext(
        **vars(process),
        recipe=recipe,
        split=split,
        rule=rule,
        backend=backend,
        schedule=schedule,
        loaders=loaders,
        stretches=stretches,
        mixing=mixing,
        teaching=teaching,
        compare_gradients=compare_gradients,
        meters=Meters(
            network, batch_size=recipe.batch_size, device=ranks.device, clock=process.clock
        ),
        checkpoints=checkpoints,
        decisions=decisions,
        restored=restored,
    )


def _read_recipe(process: Process) -> Recipe:
    job, ranks, host = process.job, process.ranks, socket.gethostname()
    if ranks.size > 1:
        check_same_code(host, code_digest(), gather=ranks.all_gather_object)
    # A machine may lack the user's package.
    recipe = ranks.all_or_raise(lambda: Recipe.read(RunFolder(job.run).recipe, trust=job.trust))
    ranks.all_or_raise(lambda: compute_in(recipe.precision, ranks.device))
    if ranks.size > 1 and job.trust:
        digest = ranks.all_or_raise(lambda: own_code.digest(job.trust))
        check_same_code(
            host, digest, gather=ranks.all_gather_object, of=f"the {', '.join(job.trust)}"
        )
    return recipe


def _open_checkpoints(process: Process, recipe: Recipe) -> Checkpoints:
    job, ranks, tracker, beat = process.job, process.ranks, process.tracker, process.watchdog.beat
    store = ranks.all_or_raise(
        lambda: store_at(job.checkpoints, Path(job.run), token=job.store_token)
    )
    if ranks.size > 1:
        # This comes first, because files of a killed attempt may fill the disk.
        process.retry_during_outage(store.sweep)
        check_shared(store.staging, rank=ranks.rank, gather=ranks.all_gather_object, beat=beat)
    return Checkpoints(
        store,
        attempt=ranks.broadcast_object(lambda: f"{os.getpid()}-{time.time_ns():x}"),
        keep=recipe.checkpoints.keep,
        rank=ranks.rank,
        ranks=ranks.size,
        each=ranks.all_gather_object,
        on_quarantine=lambda address, reason: tracker.write(
            events.Quarantine(path=address, reason=reason)
        ),
        on_unwritten=lambda step, error: tracker.write(events.Unwritten(step=step, error=error)),
        beat=beat,
    )


def _newest(checkpoints: Checkpoints, recipe: Recipe, job: Job) -> Path | None:
    """The checkpoint to continue from; None if the run starts at step 0, because no checkpoint was
    saved or all are in quarantine.

    Its decisions are added to the run's folder, in case the folder was lost.

    Raises:
        UserError: there is no checkpoint, although the journal names one that is not in quarantine.
            Perhaps a disk is not mounted. A new start would lose the checkpoint.
        ValueError: recipe.json has another study than the checkpoint or, without a checkpoint, than
            the launch. `init` is compared with that of the launch only.
    """
    checkpoint = checkpoints.newest()
    trainer = None if checkpoint is None else read_trainer(checkpoint)
    expected_json, origin = job.recipe, "at the launch"
    if trainer is not None:
        expected_json, origin = trainer["recipe"], f"at step {trainer['step']}"
    elif step := expected_step(
        read_events(RunFolder(job.run).journal), keep=recipe.checkpoints.keep
    ):
        raise UserError(
            f"checkpoint: {checkpoints.store.address(step_name(step))} must exist, because the"
            " journal names it; got no checkpoint: mount or restore its storage, or start a new run"
            " under another --name"
        )
    expected = Recipe.from_json(expected_json, trust=job.trust)
    differences = [*differing("", expected.decisive(), recipe.decisive())]
    if trainer is None:
        differences += differing("init", expected.init, recipe.init)
    require(
        not differences,
        f"resume: recipe.json must be the same as {origin}; it differs in {listed(differences)}",
    )
    if trainer is not None:
        Decisions.adopt(Path(job.run), trainer["decisions"])
    return checkpoint


def _build_local_parts(
    process: Process, recipe: Recipe, world: World, *, is_fresh: bool
) -> tuple[Recipe, nn.Module, Rule, Loaders]:
    job, device, sizes = process.job, process.ranks.device, process.rank_info.possible_sizes
    tasks = tasks_of(recipe, one_in=ONE_IN[job.verify], device=device)
    seed_everything(recipe.seed)
    network = build_network(recipe, tasks)
    if recipe.init is not None and is_fresh:
        file = weights_file(Path(recipe.init))
        not_loaded = load_start(network, file)
        process.tracker.write(events.Init(file=str(file), fresh=[*not_loaded]))
    move_network(network, device)
    rule = attach_rule(recipe, network, world)
    recipe = fit_to_sizes(recipe, network, rule, sizes)
    if is_fresh and rule.calibration_batches:
        # Each rank reads the first global batches whole, as a single rank would.
        size = recipe.batch_size
        whole = {"rank": 0, "world": 1, "batch_size": size, "micro_batch": size, "threads": 1}
        with (
            closing(tasks[0].data.train(seed=recipe.seed, **whole)) as loader,
            loader.epoch(0) as batches,
        ):
            rule.calibrate(
                network,
                [
                    to_time_first(move_batch(batch, device).x, recipe.time_steps)
                    for batch in itertools.islice(batches, rule.calibration_batches)
                ],
            )
    return (
        recipe,
        network,
        rule,
        Loaders(
            tasks, recipe, recipe.split(world.size), rank=world.rank, threads=job.loader_threads
        ),
    )


def build_backend(recipe: Recipe, network: nn.Module, rule: Rule, split: Split) -> Backend:
    make_backend: Callable[..., Backend] = Plain
    if recipe.backend == "deepspeed":
        from pipeline.train.backend.deepspeed import DeepSpeed

        make_backend = partial(DeepSpeed, micro_batch=split.micro_batch, zero=recipe.zero)
    backend = make_backend(
        network,
        partial(build_optimizer, recipe, rule=rule),
        precision=recipe.precision,
        clip_norm=recipe.clip_norm,
    )
    return EMABackend(backend, decay=recipe.ema_decay) if recipe.ema_decay else backend


def _build_fidelity(
    recipe: Recipe, loaders: Loaders, world: World, device: torch.device
) -> Callable[..., Fidelity] | None:
    if recipe.evaluation.fidelity_every == 0 or world.rank:
        return None  # the other ranks wait for rank 0 in their next collective
    with closing(loaders.train(0)) as loader, loader.epoch(0) as batches:
        batch = move_batch(next(iter(batches)), device)
    return partial(
        compare_gradients,
        recipe,
        lambda: move_network(build_network(recipe, loaders.tasks), device),
        recipe.objective.build().labels,
        to_time_first(batch.x, recipe.time_steps),
        batch.target,
    )


def compare_gradients(
    recipe: Recipe,
    make_network: Callable[[], nn.Module],
    loss: Loss,
    x_TB: Tensor,
    target_B: Tensor,
    network_state: Mapping[str, Tensor],
    rule_state: Mapping[str, Tensor],
    *,
    step: int,
) -> Fidelity:
    """Compare the gradients of the rules on one batch.

    Args:
        make_network: builds the recipe's network, without a rule.
        loss: the loss on labels alone, without a teacher.
        network_state: the state dict of the network.
        rule_state: the state dict of the recipe's rule.
        step: the step of the run. It determines the rule's random draws.
    """
    network = make_network()
    network.load_state_dict(network_state)

    def gradients_of(rule: Rule, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return gradients(
            network,
            rule,
            x_TB,
            lambda: loss(target_B),
            world=World(recipe.seed),  # one rank, because the other ranks do not compare
            over_time=recipe.over_time,
            rule_state=state,
            step=step,
        )

    rule: Rule = recipe.rule.build()
    # Batch norm must not wait for the other ranks, which do not compare.
    with set_temporarily(batch_norms(network), "between", "rank"):
        by_rule = {"BPTT": gradients_of(BPTT()), "SLTT": gradients_of(SLTT())}
        if rule.label not in by_rule:
            by_rule[rule.label] = gradients_of(rule, rule_state)
    return fidelity(
        by_rule["BPTT"],
        by_rule["SLTT"],
        {label: [by_rule[label]] for label in ("SLTT", rule.label)},
    )
