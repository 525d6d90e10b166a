"""From a recipe to a run's folder, with all that it takes to resume it."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.core.checks import refuse_unless_counts
from pipeline.core.code_version import commit
from pipeline.core.files import is_name
from pipeline.core.run_folder import RunFolder
from pipeline.launch.cluster import Cluster, refuse_unless_watchable
from pipeline.launch.folder import named, numbered, whole_folder
from pipeline.recipe import own_code
from pipeline.recipe.recipe import Recipe, read_json, write_json
from pipeline.recipe.spec import arguments_of
from pipeline.recipe.suite import targets_of
from pipeline.train.checkpoint import absolute, owner_of, place_at
from pipeline.train.checkpoint.owner import Owner
from pipeline.train.job import Job
from pipeline.train.part_checks import fingerprint_of
from pipeline.train.tasks import build_data
from pipeline.train.weights import study_inputs

UNWRITTEN = ("run", "trust", "place_token")
"""fields of a job that its file does not hold"""


def prepare(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    parent: str | None = None,
    suite: str | None = None,
    family: str | None = None,
    adopts: bool = False,
    trust: tuple[str, ...] = (),
) -> Job:
    """Make the run's folder, with all that it takes to resume it: its recipe, its job and where it
    trains.

    `parent`, `suite` (its folder's name) and `family` are those of the suite that it belongs to.
    `adopts`: checkpoints that a run of this name has left in the cluster's place for them, whose
    folder is gone, are gone on with, as that run.

    Raises:
        ValueError: the data set is missing, the weights that `init` names are missing, or the name
        is taken.
    """
    recipe = recipe.resolved()
    trust = own_code.needed(trust, targets_of(recipe))
    fingerprint = fingerprint_of(build_data(recipe))
    study = recipe.study_key(study_inputs(recipe, fingerprint))
    folder = named(
        runs.absolute(), f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name
    )
    if name is None:
        folder = next(path for path in numbered(folder) if not path.exists())
    job = Job(
        run=str(folder),
        study=study,
        data_fingerprint=fingerprint,
        commit=commit(),
        recipe=recipe.to_json(),
        parent=parent,
        suite=suite,
        family=family or recipe.family or recipe.name,
        run_id=uuid.uuid4().hex,
        trust=trust,
        **cluster.of_workers,
    )
    if cluster.checkpoints is not None:
        address, run_id = _own_place(cluster.checkpoints, folder, study, adopts=adopts)
        job = replace(job, checkpoints=address, run_id=run_id or job.run_id)
    with whole_folder(folder) as hidden:
        files = RunFolder(hidden)
        write_json(files.recipe, recipe.to_json())
        own_code.write(hidden, trust)
        write_json(files.cluster, asdict(cluster))
        write_json(files.job, _to_json(job))
    return job


def _own_place(place: str, run: Path, study: str, *, adopts: bool) -> tuple[str, str | None]:
    """The address of a run's checkpoints, beneath `place`, and whose it is; None: nobody's, which
    it must be unless `adopts`.

    Raises:
        ValueError: it is another's, of another study where it is adopted, or the address cannot be
        opened.
    """
    address, names, owner = open_place(place, run)
    if not adopts and (names or owner):
        raise ValueError(
            f"launch: {address} must hold no checkpoints yet; got"
            f" {names[-1] if names else f'those to come of {owner}'}: another --name, or"
            " --or-resume to go on with them"
        )
    if owner is None:
        return address, None
    if owner.study != study:
        raise ValueError(
            f"launch: --or-resume goes on with checkpoints of the same study; got {owner.study} in"
            f" {address}"
        )
    return address, owner.run_id


def open_place(place: str, run: Path) -> tuple[str, list[str], Owner | None]:
    """The address of a run's checkpoints beneath `place`, those that are there, and whose they are.

    Raises:
        ValueError: the address cannot be opened.
    """
    address = f"{absolute(place).rstrip('/')}/{run.name}"
    found = place_at(address, run)
    try:
        return address, found.names(), owner_of(found)
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            f"launch: {address} must be open to this user; got {type(error).__name__}: {error}"
        ) from error


def write_job(job: Job) -> None:
    """Beside the recipe, for a resume."""
    write_json(RunFolder(job.run).job, _to_json(job))


def _to_json(job: Job) -> dict[str, Any]:
    """Whom the user trusts is not written down: the next user says it anew. Nor is a token, which
    each start of a driver has.
    """
    return {name: value for name, value in asdict(job).items() if name not in UNWRITTEN}


def read_job(folder: Path, *, trust: tuple[str, ...] = ()) -> Job:
    """What `write_job` wrote; a folder that was moved is where it is now.

    Raises:
        ValueError: it is missing or damaged, or its suite, or what MLflow keeps of its family,
        would lie in another folder.
    """
    file = RunFolder(folder).job
    told = arguments_of(Job, read_json(file), who=str(file), besides=UNWRITTEN)
    job = Job(**told, run=str(folder.absolute()), trust=trust)
    refuse_unless_counts(str(file), {"threads": job.threads, "loader_threads": job.loader_threads})
    refuse_unless_watchable(str(file), job.hang_minutes)
    if job.suite is not None and not is_name(job.suite):
        raise ValueError(
            f"{file}: suite must be the name of a folder beside this one; got {job.suite!r}"
        )
    if job.family is not None and not is_name(job.family):
        raise ValueError(
            f"{file}: family becomes a folder's name and must be one; got {job.family!r}"
        )
    return job
