"""Make the folder of a run, with everything that a resume needs, and read it again."""

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.core.code_version import commit
from pipeline.core.files import is_name
from pipeline.core.run_folder import RunFolder
from pipeline.launch.cluster import Cluster, refuse_unless_watchable
from pipeline.recipe import own_code
from pipeline.recipe.printed_commands import how_to_resume
from pipeline.recipe.recipe import Recipe, read_json, write_json
from pipeline.recipe.spec import arguments_of
from pipeline.recipe.suite import targets_of
from pipeline.train.checkpoint import Owner, absolute, owner_of, store_at
from pipeline.train.job import Job
from pipeline.train.tasks import fingerprint_of
from pipeline.train.weights import study_inputs

NOT_SAVED = ("run", "trust", "store_token")  # Fields of a job that job.json does not hold


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
    """Make the run's folder: its recipe, its job and its cluster.

    Args:
        parent, suite, family: of the suite that the run belongs to; `suite` is its folder's name.
        adopts: continue from checkpoints of an earlier run of this name whose folder is gone. They
            are in the cluster's place for checkpoints.

    Raises:
        ValueError: the data set is missing, the weights that `init` names are missing, or the name
            is taken.
    """
    recipe = recipe.resolved()
    trust = own_code.needed(trust, targets_of(recipe))
    fingerprint = fingerprint_of(recipe)
    study = recipe.study_key(study_inputs(recipe, fingerprint))
    runs = runs.absolute()
    if name is None:
        folder = free_folder(runs / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    else:
        folder = named(runs, name)
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
        **cluster.worker_settings,
    )
    if cluster.checkpoints is not None:
        address, run_id = _own_store(cluster.checkpoints, folder, study, adopts=adopts)
        job = replace(job, checkpoints=address, run_id=run_id or job.run_id)
    with atomic_folder(folder) as hidden:
        files = RunFolder(hidden)
        write_json(files.recipe, recipe.to_json())
        own_code.write(hidden, trust)
        write_json(files.cluster, asdict(cluster))
        write_job(job, hidden)
    return job


def _own_store(place: str, run: Path, study: str, *, adopts: bool) -> tuple[str, str | None]:
    """The address of the run's checkpoints below `place`, and the run_id of their owner, if any.

    Raises:
        ValueError: there is an owner and not `adopts`, the owner is of another study, or the
            address cannot be opened.
    """
    address, names, owner = open_store(place, run)
    require(
        adopts or (not names and not owner),
        f"launch: {address} must hold no checkpoints yet; got"
        f" {names[-1] if names else f'those to come of {owner}'}: another --name, or"
        " --or-resume to continue from them",
    )
    if owner is None:
        return address, None
    require(
        owner.study == study,
        "launch: --or-resume continues from checkpoints of the same study; got"
        f" {owner.study} in {address}",
    )
    return address, owner.run_id


def open_store(place: str, run: Path) -> tuple[str, list[str], Owner | None]:
    """The address of a run's checkpoints below `place`, their names there, and their owner.

    Raises:
        ValueError: the address cannot be opened.
    """
    address = f"{absolute(place).rstrip('/')}/{run.name}"
    checkpoints = store_at(address, run)
    try:
        return address, checkpoints.names(), owner_of(checkpoints)
    except Exception as error:  # each store has errors of its own
        raise ValueError(
            f"launch: {address} must be open to this user; got {type(error).__name__}: {error}"
        ) from error


def write_job(job: Job, folder: Path | None = None) -> None:
    """Write job.json, which a resume reads, to the run's folder or to `folder`.

    Trust is not saved: the user who resumes has to state it again. The token is not saved: it
    belongs to one start of the driver.
    """
    write_json(
        RunFolder(folder or job.run).job,
        {name: value for name, value in asdict(job).items() if name not in NOT_SAVED},
    )


def read_job(folder: Path, *, trust: tuple[str, ...] = ()) -> Job:
    """Read what `write_job` wrote. The folder may have been moved since.

    Raises:
        ValueError: the file is missing or damaged, or its suite or family is not a folder's name.
    """
    file = RunFolder(folder).job
    fields = arguments_of(Job, read_json(file), subject=str(file), besides=NOT_SAVED)
    job = Job(**fields, run=str(folder.absolute()), trust=trust)
    refuse_unless_counts(str(file), {"threads": job.threads, "loader_threads": job.loader_threads})
    refuse_unless_watchable(str(file), job.hang_minutes)
    require(
        job.suite is None or is_name(job.suite),
        f"{file}: suite must be the name of a folder beside this one; got {job.suite!r}",
    )
    require(
        job.family is None or is_name(job.family),
        f"{file}: family becomes a folder's name and must be one; got {job.family!r}",
    )
    return job


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write into a hidden folder, which gets its name at the end. The folder is complete or absent.
    A process that is killed leaves at most the hidden folder.

    Raises:
        ValueError: the name is taken.
    """
    refuse_taken(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    hidden.mkdir()
    try:
        yield hidden
        try:
            hidden.rename(folder)
        except OSError:
            refuse_taken(folder)  # another launch was faster
            raise
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def named(runs: Path, name: str) -> Path:
    """The folder of this name in the folder of runs.

    Raises:
        ValueError: the name leads to another folder.
    """
    require(is_name(name), f"launch: --name must be a name in {runs}; got {name!r}")
    return runs / name


def refuse_taken(folder: Path) -> None:
    if folder.exists():
        raise ValueError(
            f"launch: --name must be new in {folder.parent}; got {folder.name}, which"
            f" `{how_to_resume(folder)}` continues"
        )


def free_folder(folder: Path) -> Path:
    """The folder itself or, if it is taken, the first of NAME-2, NAME-3, ... that is free."""
    further = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], further) if not path.exists())
