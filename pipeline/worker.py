"""The composition root of one process: recipe -> data, network, rule, backend, tracker -> loop."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.attempt import Attempt
from pipeline.backend.averaged import Averaged
from pipeline.backend.base import Backend
from pipeline.backend.plain import Plain
from pipeline.checkpoint import Checkpoints, place_at, read_trainer
from pipeline.cores import own_cores
from pipeline.damaged import Damage, LeftOut
from pipeline.data.base import Data
from pipeline.data.care import ONE_IN, Care
from pipeline.data.damage import DamagedPages, Page
from pipeline.data.mixing import Mixing
from pipeline.elastic import check_accumulation, check_sizes, seed_everything, steady
from pipeline.fitting import Smaller, fitted, halve, limit_of
from pipeline.guard import GoBack, Skipped
from pipeline.job import REFUSAL, Job, Place
from pipeline.malloc import keep_freed_memory
from pipeline.measure.clock import Clock
from pipeline.measure.collectives import collectives_on
from pipeline.measure.meters import Meters
from pipeline.nearness import Nearness
from pipeline.objective import Loss
from pipeline.parts import Parts
from pipeline.phases import Stretch, stretch_at, timetable
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe, Spec, Split, read_json, write_json
from pipeline.record import refuse_another_recipe
from pipeline.refused import Diverged, Refused, Unbounded, refusal_of
from pipeline.rules.base import Rule, World
from pipeline.spiking.binary import latent_parameters
from pipeline.spiking.encode import over_steps
from pipeline.tasks import Loaders, Task, tasks_of
from pipeline.teaching import build_teacher, open_teaching
from pipeline.track.base import Tracker
from pipeline.watchdog import Watchdog
from pipeline.weights import load_start
from pipeline.writer import journal, only_writer


def run(job: Job, place: Place, *, attempt_of: Callable[[Parts], Attempt] = Attempt) -> dict[str, Any] | None:
    """Train a run from wherever its folder stands to its end; the summary (on rank 0), or None when it was asked to stop.

    `attempt_of` makes the attempt; benchmarks look over its shoulder.

    Raises:
        Refused: something that the user has to change.
    """
    began = time.time()
    settle(job.threads)
    ranks = Ranks(place.rank, place.workers, place.device)
    clock = Clock(ranks.device)
    with ExitStack() as held:
        if job.own_cores and ranks.device.type == "cpu":
            ranks.together(lambda: held.enter_context(own_cores(job.threads)))
        return _run(job, place, ranks, clock, began, attempt_of)


def _run(
    job: Job, place: Place, ranks: Ranks, clock: Clock, began: float, attempt_of: Callable[[Parts], Attempt]
) -> dict[str, Any] | None:
    folder = Path(job.run)
    watchdog = Watchdog(folder, rank=ranks.rank, patience_s=60 * job.hang_minutes)
    with only_writer(folder, ranks), collectives_on(clock), watchdog:
        while True:
            try:
                with journal(folder, ranks) as tracker:
                    ranks.together(lambda: raise_refusal(folder))
                    return _attempt(job, place, ranks, tracker, watchdog, clock, began, attempt_of)
            except (GoBack, Smaller):
                pass  # every rank begins again
            except LeftOut:
                if ranks.size > 1:
                    raise  # the others wait for this rank: only its death frees them
            clock.take()  # batches that are rolled back, and that nobody has asked for yet
            gc.collect()  # the attempt that ended goes, and what it held
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            began = time.time()


def _attempt(
    job: Job,
    place: Place,
    ranks: Ranks,
    tracker: Tracker,
    watchdog: Watchdog,
    clock: Clock,
    began: float,
    attempt_of: Callable[[Parts], Attempt],
) -> dict[str, Any] | None:
    try:
        attempt = attempt_of(compose(job, place, ranks, tracker, watchdog, clock, began))
    except ValueError as error:
        ranks.raise_if_gone(error)
        raise refusal_of(error) from error
    try:
        return _run_in_memory(attempt, ranks, tracker)
    except Refused:
        raise  # every rank knows
    except ValueError as error:
        ranks.raise_if_gone(error)
        if ranks.size > 1:  # the others wait for this rank: only its death frees them, and then the note speaks to all
            note_refusal(Path(job.run), error)
            raise
        raise refusal_of(error) from error


def _run_in_memory(attempt: Attempt, ranks: Ranks, tracker: Tracker) -> dict[str, Any] | None:
    try:
        return _run_on_whole_pages(attempt)
    except torch.OutOfMemoryError as error:
        samples = halve(Path(attempt.parts.job.run), attempt.parts.split)
        tracker.event("smaller", step=attempt.step, micro_batch=samples, reason=str(error))
        if ranks.size > 1:
            raise  # the others wait for this rank: only its death frees them
        raise Smaller from None  # without the frames, which hold what has to go


def _run_on_whole_pages(attempt: Attempt) -> dict[str, Any] | None:
    try:
        return attempt.run()
    except DamagedPages as found:
        if not found.may_go:
            raise
        parts = attempt.parts
        parts.damage.after(found.pages, most=parts.recipe.max_damaged_pages).write(Path(parts.job.run))
        raise LeftOut(str(found)) from found


def settle(threads: int) -> None:
    """How torch computes in a worker: so many threads, the same bits after a restart, on memory that it keeps."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True  # costs speed where cuDNN has a faster kernel


def note_refusal(folder: Path, error: ValueError) -> None:
    """Write down, for the next attempt, what one rank found that a restart would only find again: a solve that diverges."""
    write_json(folder / REFUSAL, {"said": str(error), "diverged": isinstance(error, Unbounded)})


def raise_refusal(folder: Path) -> None:
    """Raise what the last attempt wrote down. The driver clears it when the user launches or resumes."""
    if (folder / REFUSAL).exists():
        noted = read_json(folder / REFUSAL)
        raise (Diverged if noted["diverged"] else Refused)(noted["said"])


def compose(job: Job, place: Place, ranks: Ranks, tracker: Tracker, watchdog: Watchdog, clock: Clock, began: float) -> Parts:
    """Build everything that this process trains with, and restore the newest checkpoint into it; collective."""
    watchdog.beat()
    folder = Path(job.run)
    written = Recipe.read(folder / "recipe.json", trust=job.trust)
    recipe = fitted(written, ranks.agree(lambda: limit_of(folder)))
    checkpoints = Checkpoints(
        ranks.together(lambda: place_at(job.checkpoints, folder)),
        attempt=ranks.agree(lambda: f"{os.getpid()}-{time.time_ns():x}"),
        keep=recipe.keep,
        rank=ranks.rank,
        ranks=ranks.size,
        each=ranks.each,
        on_quarantine=lambda address, reason: tracker.event("quarantine", path=address, reason=reason),
        beat=watchdog.beat,
    )
    checkpoint = ranks.agree(lambda: _newest(checkpoints, written, trust=job.trust))
    skipped = ranks.agree(lambda: Skipped.read(folder))
    with watchdog.off():  # one worker of each machine reads all of the data
        damage = find_damage(recipe, job, place, ranks)
    world = World(recipe.seed, ranks.rank, ranks.size, ranks.mean)
    # What can be refused on one machine alone comes first, and nobody talks to the others while it does.
    recipe, network, rule, loaders = ranks.together(
        lambda: _own_parts(job, place, recipe, damage, world, tracker, is_fresh=checkpoint is None)
    )
    watchdog.beat()
    split = recipe.split(ranks.size)
    mixing = ranks.together(lambda: build_mixing(recipe, split))
    backend = ranks.together(lambda: build_backend(recipe, network, rule, split))
    watchdog.beat()
    seed_everything(recipe.seed + 1 + ranks.rank)  # dropout and its like: not the same on two ranks
    lengths = [(task.epochs, steps) for task, (_, steps) in zip(loaders.tasks, loaders.lengths, strict=True)]
    stretches = timetable(lengths, stop_after=recipe.stop_after)
    teaching = None
    if recipe.teacher is not None:
        about = {"folder": folder, "steps": stretches[-1].end, "threads": job.loader_threads}
        with watchdog.off():  # one worker may fit a head on all of the data
            teaching = open_teaching(recipe, loaders.tasks[0].data, split, ranks=ranks, tracker=tracker, **about)
        if checkpoint is None:
            found = teaching.accuracy
            figures = {"top1": found.top1, "top5": found.top5, "loss": found.loss, "samples": found.samples}
            tracker.event("teacher", teacher=teaching.teacher.label, **figures)
    return Parts(
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
        nearness=ranks.together(lambda: build_nearness(recipe, loaders, split, world, ranks.device)),
        meters=Meters(network, batch_size=recipe.batch_size, device=ranks.device, clock=clock),
        checkpoints=checkpoints,
        skipped=skipped,
        damage=damage,
        sizes=place.sizes or (ranks.size,),
        notice=place.notice,
        trainer=None if checkpoint is None else checkpoints.load(checkpoint, backend, rule),
        began=began,
    )


def _newest(checkpoints: Checkpoints, recipe: Recipe, *, trust: tuple[str, ...]) -> Path | None:
    found = checkpoints.newest()
    if found is not None:
        refuse_another_recipe(read_trainer(found), recipe, trust=trust)
    return found


def _own_parts(
    job: Job, place: Place, recipe: Recipe, damage: Damage, world: World, tracker: Tracker, *, is_fresh: bool
) -> tuple[Recipe, nn.Module, Rule, Loaders]:
    """Network, rule and data of this process, and the recipe with the micro-batches that suit them.

    Every one of them may be refused here, and none of them is collective.
    """
    check_sizes(recipe, place.sizes or (world.size,))
    tasks = tasks_of(recipe, Care(one_in=ONE_IN[job.verify], left_out=damage.samples))
    seed_everything(recipe.seed)
    network = build_network(recipe, tasks)
    if recipe.init is not None and is_fresh:
        start = load_start(network, Path(recipe.init))
        tracker.event("init", file=start.file, fresh=list(start.fresh))
    network.to(place.device)
    rule = attached_rule(recipe, network, world)
    recipe = steady(recipe, network, place.sizes or (world.size,))
    check_accumulation(recipe, rule, (world.size,))
    if is_fresh and rule.calibration_batches:
        rule.calibrate(network, first_batches(recipe, tasks[0].data, rule.calibration_batches, torch.device(place.device)))
    loaders = Loaders(tasks, recipe, recipe.split(world.size), rank=world.rank, threads=job.loader_threads)
    return recipe, network, rule, loaders


def build_network(recipe: Recipe, tasks: Sequence[Task]) -> nn.Module:
    """The recipe's network, with fresh weights, ready for its first task."""
    classes = _written_classes(recipe.model)
    for task in tasks:
        recipe.check_time_steps(task.data.shape)
        if classes not in (None, task.data.classes):
            where = f" in {task.name}" if recipe.phases else ""
            raise ValueError(f"recipe: model and data must have the same classes; got {classes} and {task.data.classes}{where}")
    network = recipe.model.build()
    for task in reversed(tasks):
        task.choose_head(network)
    return network


def _written_classes(part: Spec) -> int | None:
    """What a model, or the model that it is built around, is told about classes."""
    inside = [_written_classes(value) for value in part.kwargs.values() if isinstance(value, Spec)]
    return part.kwargs.get("classes") or next(filter(None, inside), None)


def attached_rule(recipe: Recipe, network: nn.Module, world: World) -> Rule:
    """The recipe's rule on its network; refuses what does not fit together."""
    rule: Rule = recipe.rule.build()
    rule.check_steps(recipe.time_steps)
    rule.attach(network, world=world, over_time=recipe.over_time)
    rule.check_tasks(network, max(1, len(recipe.phases)))
    check_objective(recipe, rule)
    return rule


def check_objective(recipe: Recipe, rule: Rule) -> None:
    """Whether the objective fits the teacher, the rule, and how the rule asks for losses."""
    objective: Loss = recipe.objective.build()
    objective.check(taught=recipe.teacher is not None, over_time=recipe.over_time, time_steps=recipe.time_steps)
    if objective.remembers and not rule.one_loss_a_step:
        raise ValueError(
            f"{rule.label}: asks for more than one loss a step, so the objective must keep nothing between them; "
            f"got {recipe.objective.label}"
        )


def first_batches(recipe: Recipe, data: Data, count: int, device: torch.device) -> list[Tensor]:
    """The inputs `x_TB` of the first `count` global batches, whole: the same on every rank, whatever the number of ranks."""
    whole = {"rank": 0, "world": 1, "batch_size": recipe.batch_size, "micro_batch": recipe.batch_size, "threads": 1}
    loader = data.train(seed=recipe.seed, **whole)
    try:
        with loader.epoch(0) as batches:
            return [over_steps(batch.x.to(device), recipe.time_steps) for batch in itertools.islice(batches, count)]
    finally:
        loader.close()


def check_recipe(recipe: Recipe, *sizes: int) -> nn.Module:
    """Refuse what does not fit together, before anything is launched; needs no data file. The network that was made for it.

    `sizes` are the numbers of workers that the run may have.
    """
    check_sizes(recipe, sizes)
    tasks = tasks_of(recipe)
    network = build_network(recipe, tasks)
    if recipe.init is not None:
        load_start(network, Path(recipe.init))
    rule = attached_rule(recipe, network, World(recipe.seed, size=sizes[-1]))
    cut = steady(recipe, network, sizes)
    check_accumulation(cut, rule, sizes)
    for size in sizes:
        build_mixing(recipe, cut.split(size))
    if recipe.teacher is not None:
        build_teacher(recipe, tasks[0].data)
    if recipe.fidelity_every:
        Nearness.check(recipe, lambda: build_network(recipe, tasks))
    recipe.schedule.build(build_optimizer(recipe, network, rule), 1000)
    return network


def build_optimizer(recipe: Recipe, network: nn.Module, rule: Rule) -> torch.optim.Optimizer:
    try:
        optimizer = recipe.optimizer.build(network)
    except (TypeError, AssertionError, RuntimeError) as error:  # timm passes on what it does not know, and complains in many ways
        raise ValueError(f"{recipe.optimizer.label}: {error}") from error
    spare_from_decay(optimizer, latent_parameters(network))
    rule.check_optimizer(optimizer)
    decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    if decay and any(phase.head is not None for phase in recipe.phases):
        raise ValueError(f"recipe: weight_decay must be 0 where phases have heads, for it shrinks the others too; got {decay}")
    return optimizer


def spare_from_decay(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take `parameters` out of weight decay, whatever built the optimizer and its groups: they get groups of their own.

    timm reads names from a network's `no_weight_decay` instead, of the outermost network alone, and only where it makes the
    groups itself (1.0.31).
    """
    spared = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        is_spared = [id(parameter) in spared for parameter in group["params"]]
        if not group.get("weight_decay") or not any(is_spared):
            continue
        if all(is_spared):
            group["weight_decay"] = 0.0
            continue
        columns = {name: list(group[name]) for name in ("params", "param_names") if name in group}
        inside = {name: list(itertools.compress(column, is_spared)) for name, column in columns.items()}
        group.update({name: [x for x, out in zip(column, is_spared, strict=True) if not out] for name, column in columns.items()})
        optimizer.add_param_group({**group, **inside, "weight_decay": 0.0})


def build_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, stretches: Sequence[Stretch]) -> Callable[[int], None]:
    """The recipe's schedule of learning rates, begun anew in each phase."""
    rates = [group["lr"] for group in optimizer.param_groups]
    schedules = []
    for stretch in stretches:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # a schedule with a warm-up sets it as soon as it is made
        schedules.append(recipe.schedule.build(optimizer, stretch.steps))

    def schedule(step: int) -> None:
        stretch = stretch_at(stretches, step)
        schedules[stretch.index](step - stretch.first)

    return schedule


def build_backend(recipe: Recipe, network: nn.Module, rule: Rule, split: Split) -> Backend:
    backend = _plain_or_deepspeed(recipe, network, rule, split)
    return Averaged(backend, decay=recipe.ema_decay) if recipe.ema_decay else backend


def _plain_or_deepspeed(recipe: Recipe, network: nn.Module, rule: Rule, split: Split) -> Backend:
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


def build_nearness(recipe: Recipe, loaders: Loaders, split: Split, world: World, device: torch.device) -> Nearness | None:
    """What compares gradients, on rank 0 alone: the others wait for it where they next meet."""
    if recipe.fidelity_every == 0 or world.rank:
        return None
    with closing(loaders.train(0)) as loader, loader.epoch(0) as batches:
        batch = next(iter(batches))
    fresh = lambda: build_network(recipe, loaders.tasks).to(device)
    x_TB = over_steps(batch.x.to(device), recipe.time_steps)
    return Nearness(recipe, fresh, recipe.objective.build().labels, x_TB, batch.target.to(device))


def build_mixing(recipe: Recipe, split: Split) -> Mixing | None:
    if recipe.mixing is None:
        return None
    mixing: Mixing = recipe.mixing.build()
    mixing.check(micro_batch=split.micro_batch)
    return mixing


def find_damage(recipe: Recipe, job: Job, place: Place, ranks: Ranks) -> Damage:
    """What the run does without: what it did without before, and what any machine finds now; collective.

    Raises:
        Refused: more than the recipe allows, or other data than the run was launched on.
    """
    folder = Path(job.run)

    def found() -> tuple[Page, ...]:
        try:
            check_data(recipe.data.build(), job, every_page=place.local_rank == 0)
        except DamagedPages as damaged:
            if not damaged.may_go:
                raise
            return damaged.pages
        return ()

    def noted() -> Damage:
        before = Damage.read(folder)
        damage = before.after(pages, most=recipe.max_damaged_pages)
        if damage != before:
            damage.write(folder)
        return damage

    pages = [page for each in ranks.each(ranks.together(found)) for page in each]
    return ranks.agree(noted)


def check_data(data: Data, job: Job, *, every_page: bool) -> None:
    """The data set's content against what the run was launched on, and every page against its checksum, once on a machine."""
    if data.fingerprint() != job.data_fingerprint:
        raise ValueError(
            f"data: this run was launched on content {job.data_fingerprint[:12]}; got {data.fingerprint()[:12]}: "
            "another file lies where the recipe points"
        )
    if every_page:
        data.check()
