"""`spiketrain resume` of one run, and the checks of `launch --or-resume`.

`launch --or-resume` continues a run or suite only if it was launched with the same recipe and the
same options, except those in CHANGEABLE_FIELDS. `resume` may change the options in
`cluster.OPERATIONAL_FIELDS`, and saves them with the run or suite.
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
from pipeline.launch.cluster import OPERATIONAL_FIELDS, Cluster, differences
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

# Fields of `Cluster` that `launch --or-resume` may change.
CHANGEABLE_FIELDS = ("workers", "inline", "address", *OPERATIONAL_FIELDS)


def resume_run(
    folder: Path,
    *,
    workers: int | tuple[int, ...] | None,
    inline: bool,
    address: str | None,
    options: Mapping[str, Any],
    trust: tuple[str, ...] = (),
) -> Path:
    """Continue a run, and return its folder.

    Args:
        options: values of OPERATIONAL_FIELDS. They permanently replace those of the launch.

    Raises:
        ValueError: the folder is damaged, another process trains the run, or an option is refused.
        LaunchError: the run failed.
    """
    if state_of(folder) == "finished":
        say(new_console(), f"{folder.name} has finished")
        return folder
    require(
        options.get("side_by_side", 1) == 1,
        f"resume: --side-by-side must be 1 for one run; got {options.get('side_by_side')} for"
        f" {folder.name}",
    )
    launched = Cluster.from_json(read_json(RunFolder(folder).cluster))
    cluster = launched.resumed(workers=workers, inline=inline, address=address, options=options)
    say_stage("checking the run and where it continues")
    check_resumed(folder, cluster, launched, trust=trust)
    with driver_lock(folder):
        pass  # refuse a second driver before it starts a cluster
    with launcher_of(cluster) as launcher:
        save_options(folder, [folder], options, new_console())
        return train_alone(
            read_job(folder, trust=trust), launcher, address=cluster.resume_address(launched)
        )


def check_resumed(
    folder: Path, cluster: Cluster, launched: Cluster, *, trust: tuple[str, ...]
) -> None:
    """Check whether a run can continue with the numbers of workers of `cluster`.

    Raises:
        ValueError: the recipe cannot be read or cannot train with one of these numbers, or the
            newest checkpoint needs another number.
        OSError: the checkpoints cannot be read, and the cause is not temporary.
    """
    # This call also puts the user's code on the import path, which workers inherit.
    recipe = Recipe.read(RunFolder(folder).recipe, trust=trust)
    if cluster.sizes != launched.sizes:  # the launch has checked its own numbers
        # The file with the initial weights need not exist any more.
        check_recipe(replace(recipe.with_untrained_teacher(), init=None), *cluster.sizes)
    if zero := recipe_fields(folder).get("zero"):
        world_size = _newest_world_size(store_of(folder))
        require(
            world_size is None or cluster.sizes == (world_size,),
            f"resume: with ZeRO-{zero}, --workers must be {world_size}, as at the newest"
            f" checkpoint; got {format_sizes(cluster.sizes)}",
        )


def _newest_world_size(store: CheckpointStore) -> int | None:
    """The number of workers of the newest checkpoint.

    None: there is no checkpoint, or its storage does not answer. The workers wait for the storage.
    """
    try:
        for name in reversed(store.names()):
            # A damaged checkpoint has no `trainer`. The workers will move it to quarantine.
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
        ValueError: the recipe or the options differ, or the folder is damaged. The message lists
            the old and the new values.
    """
    error_prefix = f"launch: --or-resume continues {folder.name} as it was launched"
    old, new = ("a suite", "one recipe") if is_suite(folder) else ("one run", "a suite")
    require(is_suite(folder) == isinstance(made, Suite), f"{error_prefix}, as {old}; got {new}")
    if isinstance(made, Recipe):
        old_recipes, new_recipes = {"": recipe_fields(folder)}, {"": _json_fields(made.resolved())}
        launched = read_json(RunFolder(folder).cluster)
    else:
        suite_file = SuiteFile.read(folder, trust=trust)
        old_recipes, new_recipes = (
            {recipe.name: _json_fields(recipe) for recipe in suite.recipes}
            for suite in (suite_file.suite, made.resolved())
        )
        launched = suite_file.cluster
    changes = [("recipes", [*old_recipes], [*new_recipes])]
    if [*old_recipes] == [*new_recipes]:
        changes = [
            change
            for name in old_recipes
            for change in differing(name, old_recipes[name], new_recipes[name])
        ]
    require(not changes, f"{error_prefix}; got another recipe: {listed(changes)}")
    changed_options = [
        text
        for name, text in differences(Cluster.from_json(launched), cluster).items()
        if name not in CHANGEABLE_FIELDS
    ]
    require(not changed_options, f"{error_prefix}; got other options: {', '.join(changed_options)}")


def _json_fields(recipe: Recipe) -> Any:
    # As in recipe.json, tuples become lists.
    return json.loads(json.dumps(recipe.to_json()))["recipe"]


def save_options(
    folder: Path, runs: Iterable[Path], options: Mapping[str, Any], console: Console
) -> None:
    """Save values of OPERATIONAL_FIELDS with a run or a suite, and print the changes.

    cluster.json is written after job.json. If a driver is killed between the two, cluster.json is
    unchanged, and the same command writes both again.

    Args:
        folder: the folder of the run or suite.
        runs: the run, or the runs of the suite that have a folder and are not over. Later runs get
            the values from suite.json.

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
            old = Cluster.from_json(read_json(file))
            new = replace(old, **options)
            changes |= differences(old, new)
            write_job(replace(read_job(run), **new.worker_settings))
            write_json(file, asdict(new))
        if is_suite(folder):
            suite_json = read_json(folder / SUITE)
            old = Cluster.from_json(suite_json["cluster"])
            new = replace(old, **options)
            changes |= differences(old, new)
            write_json(folder / SUITE, {**suite_json, "cluster": asdict(new)})
    if changes:
        say(console, f"{folder.name}: {', '.join(changes.values())} from now on")
