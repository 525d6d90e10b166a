"""`spiketrain resume` of one run, and `launch --or-resume`: allowed changes, and refusals.

`launch --or-resume` continues a run only if it was launched in the same way. `resume` accepts other
operational options (`cluster.OPERATIONAL`). They are saved with the run or suite.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.launch.cluster import OPERATIONAL, Cluster, differences
from pipeline.launch.driver import driver_lock, launcher_of, train_alone
from pipeline.launch.prepare import read_job, write_job
from pipeline.recipe.json import differing, listed, recipe_fields
from pipeline.recipe.recipe import Recipe, read_json, write_json
from pipeline.recipe.suite import FILE as SUITE
from pipeline.recipe.suite import Suite, SuiteFile, is_suite
from pipeline.track.run_state import state_of
from pipeline.train.build import check_recipe
from pipeline.train.checkpoint import CheckpointStore, trainer_of
from pipeline.train.elastic import format_sizes
from pipeline.train.guards.storage_outage import may_be_temporary
from pipeline.train.weights import store_of

# Fields of `Cluster` in which a launch may differ from the one that it continues.
MAY_DIFFER = ("workers", "inline", "address", *OPERATIONAL)


def resume_run(
    folder: Path,
    *,
    workers: int | tuple[int, ...] | None,
    inline: bool,
    address: str | None,
    options: Mapping[str, Any],
    trust: tuple[str, ...] = (),
) -> Path:
    """Continue a run. `options` are saved with it. Returns its folder."""
    if state_of(folder) == "finished":
        say(new_console(), f"{folder.name} has finished")
        return folder
    require(
        options.get("side_by_side", 1) == 1,
        f"resume: --side-by-side is for a suite; got {options.get('side_by_side')} with"
        f" {folder.name} alone",
    )
    launched = Cluster.from_json(read_json(RunFolder(folder).cluster))
    cluster = launched.resumed(workers=workers, inline=inline, address=address, options=options)
    say_stage("checking the run and where it continues")
    check_resumed(folder, cluster, launched, trust=trust)
    with driver_lock(folder):
        pass  # a second driver is refused before it starts a cluster
    with launcher_of(cluster) as launcher:
        save_options(folder, [folder], options, new_console())
        return train_alone(
            read_job(folder, trust=trust), launcher, address=cluster.resume_address(launched)
        )


def check_resumed(
    folder: Path, cluster: Cluster, launched: Cluster, *, trust: tuple[str, ...]
) -> None:
    """Check whether a run can continue at these numbers of workers.

    Raises:
        ValueError: its recipe cannot be read or does not train at one of them, or its newest
            checkpoint loads at another number only.
    """
    # This puts code of the user on the path, which workers inherit.
    recipe = Recipe.read(RunFolder(folder).recipe, trust=trust)
    if cluster.sizes != launched.sizes:  # those were checked at the launch
        # The file that the run began from need not exist any more.
        check_recipe(replace(recipe.with_untrained_teacher(), init=None), *cluster.sizes)
    if zero := recipe_fields(folder).get("zero"):
        wrote = _workers_of_newest(store_of(folder))
        require(
            wrote is None or cluster.sizes == (wrote,),
            f"resume: ZeRO-{zero} needs the number of workers of its newest checkpoint,"
            f" {wrote}; got {format_sizes(cluster.sizes)}",
        )


def _workers_of_newest(store: CheckpointStore) -> int | None:
    """The number of workers that wrote the newest checkpoint.

    None: there is no checkpoint, or its storage is away, which the workers wait for.
    """
    try:
        for name in reversed(store.names()):
            # The workers move a damaged checkpoint to quarantine.
            if trainer := trainer_of(store, name):
                return trainer["world_size"]
    except OSError as error:
        if not may_be_temporary(error):
            raise
    return None


def refuse_unless_launched_so(
    folder: Path, made: Recipe | Suite, cluster: Cluster, *, trust: tuple[str, ...]
) -> None:
    """Refuse to continue a run or suite that was launched with another recipe or other options.

    Raises:
        ValueError: the recipe or the options differ, or the folder is damaged. The message has the
            old and the new values.
    """
    rule = f"launch: --or-resume continues {folder.name} as it was launched"
    if is_suite(folder) != isinstance(made, Suite):
        there, asked = ("a suite", "one recipe") if is_suite(folder) else ("one run", "a suite")
        raise ValueError(f"{rule}; it is {there}, and now {asked} is asked for")
    if isinstance(made, Recipe):
        was, now = {"": recipe_fields(folder)}, {"": _as_read(made.resolved())}
        launched = read_json(RunFolder(folder).cluster)
    else:
        written = SuiteFile.read(folder, trust=trust)
        was, now = (
            {each.name: _as_read(each) for each in suite.recipes}
            for suite in (written.suite, made.resolved())
        )
        launched = written.cluster
    differ = [("recipes", [*was], [*now])]
    if [*was] == [*now]:
        differ = [each for name in was for each in differing(name, was[name], now[name])]
    require(not differ, f"{rule}; its recipe differs now: {listed(differ)}")
    changed = [
        text
        for name, text in differences(Cluster.from_json(launched), cluster).items()
        if name not in MAY_DIFFER
    ]
    require(not changed, f"{rule}; its options differ now: {', '.join(changed)}")


def _as_read(recipe: Recipe) -> Any:
    return json.loads(json.dumps(recipe.to_json()))["recipe"]


def save_options(
    folder: Path, runs: Iterable[Path], options: Mapping[str, Any], console: Console
) -> None:
    """Save fields of OPERATIONAL with the runs of `folder`, a run or a suite; print the changes.

    Later runs of a suite are made from its suite.json. job.json is written before cluster.json: if
    a driver is killed between the two, cluster.json is unchanged, and the same command writes both
    again.

    Raises:
        UserError: another process trains the run or suite.
        ValueError: a file is damaged.
    """
    if not options:
        return
    changes: dict[str, str] = {}
    with driver_lock(folder):
        for run in runs:
            file = RunFolder(run).cluster
            was = Cluster.from_json(read_json(file))
            now = replace(was, **options)
            changes |= differences(was, now)
            write_job(replace(read_job(run), **now.worker_settings))
            write_json(file, asdict(now))
        if is_suite(folder):
            written = read_json(folder / SUITE)
            was = Cluster.from_json(written["cluster"])
            now = replace(was, **options)
            changes |= differences(was, now)
            write_json(folder / SUITE, {**written, "cluster": asdict(now)})
    if changes:
        say(console, f"{folder.name}: {', '.join(changes.values())} from here on")
