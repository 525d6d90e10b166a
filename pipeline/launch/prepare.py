"""The folder of a run: `prepare` makes it, with all files that a resume needs."""

import tempfile
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
from pipeline.launch.cluster import Cluster, check_hang_minutes
from pipeline.recipe import own_code
from pipeline.recipe.recipe import Recipe, read_json, write_json
from pipeline.recipe.spec import arguments_of
from pipeline.recipe.suite import how_to_resume, targets_of
from pipeline.train.checkpoint import Owner, absolute, owner_of, store_at
from pipeline.train.job import Job
from pipeline.train.tasks import build_data, fingerprint_of
from pipeline.train.weights import study_inputs

NOT_SAVED = ("run", "trust", "store_token")  # Fields of a job that are not in job.json


def prepare(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    parent: str | None = None,
    suite: str | None = None,
    family: str | None = None,
    adopt_checkpoints: bool = False,
    trust: tuple[str, ...] = (),
) -> Job:
    """Make the run's folder with its recipe, its job and its cluster.

    Args:
        name: the name of the folder. None: the recipe's name and the time.
        parent: the id of the suite's launch. None: the run belongs to no suite.
        suite: the name of this suite's folder.
        family: the MLflow experiment of this suite. None: the experiment of the recipe.
        adopt_checkpoints: whether to continue from checkpoints that an earlier run of this name
            has left at `cluster.checkpoints`.

    Raises:
        ValueError: the data set or the weights that `init` names are missing, the name is taken or
            refused, or checkpoints of this name are refused (`_store_of_run`).
    """
    recipe = recipe.resolved()
    trust = own_code.needed(trust, targets_of(recipe))
    fingerprint = fingerprint_of(recipe)
    study = recipe.study_key(study_inputs(recipe, fingerprint))
    runs = runs.absolute()
    if name is None:
        folder = free_folder(runs / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    else:
        folder = folder_named(runs, name)
    data = None if recipe.phases else build_data(recipe)
    job = Job(
        run=str(folder),
        study=study,
        data_fingerprint=fingerprint,
        class_names=getattr(data, "class_names", ()),
        picture_options=getattr(data, "picture_options", None),
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
        address, run_id = _store_of_run(
            cluster.checkpoints, folder, study, adopt_checkpoints=adopt_checkpoints
        )
        job = replace(job, checkpoints=address, run_id=run_id or job.run_id)
    with atomic_folder(folder) as hidden:
        files = RunFolder(hidden)
        write_json(files.recipe, recipe.to_json())
        own_code.write(hidden, trust)
        write_json(files.cluster, asdict(cluster))
        write_job(job, hidden)
    return job


def _store_of_run(
    checkpoints: str, run: Path, study: str, *, adopt_checkpoints: bool
) -> tuple[str, str | None]:
    """The address of the run's store below the address `checkpoints`, and the run_id of the store's
    owner; None: the store has no owner.

    Raises:
        ValueError: the store has checkpoints or an owner, and `adopt_checkpoints` is False; the
            owner is of another study; or the address cannot be opened.
    """
    address, names, owner = open_store(checkpoints, run)
    found = names[-1] if names else f"the store of {owner}"
    require(
        adopt_checkpoints or (not names and not owner),
        f"launch: {address} must have no checkpoints and no owner; got {found}: choose another"
        " --name, or continue with --or-resume",
    )
    if owner is None:
        return address, None
    require(
        owner.study == study,
        "launch: --or-resume continues from checkpoints of the same study; got"
        f" {owner.study} in {address}",
    )
    return address, owner.run_id


def open_store(checkpoints: str, run: Path) -> tuple[str, list[str], Owner | None]:
    """The address of a run's store below the address `checkpoints`, the names of the checkpoints
    there, and the store's owner.

    Raises:
        ValueError: the address cannot be opened.
    """
    address = f"{absolute(checkpoints).rstrip('/')}/{run.name}"
    store = store_at(address, run)
    try:
        return address, store.names(), owner_of(store)
    except Exception as error:  # each kind of store raises its own errors
        raise ValueError(
            f"launch: {address} must be readable for this user; got {type(error).__name__}: {error}"
        ) from error


def write_job(job: Job, folder: Path | None = None) -> None:
    """Write job.json, which a resume reads, to `folder`. None: to the run's folder.

    `trust` is not saved: the user who resumes has to give it again. `store_token` is not saved:
    each start of the driver gets another one.
    """
    write_json(
        RunFolder(folder or job.run).job,
        {name: value for name, value in asdict(job).items() if name not in NOT_SAVED},
    )


def read_job(folder: Path, *, trust: tuple[str, ...] = ()) -> Job:
    """Read job.json. The folder may have been moved since job.json was written.

    Raises:
        ValueError: the file is missing or damaged, or a value is refused.
    """
    file = RunFolder(folder).job
    fields = arguments_of(Job, read_json(file), subject=str(file), besides=NOT_SAVED)
    fields["class_names"] = tuple(fields.get("class_names", ()))
    job = Job(**fields, run=str(folder.absolute()), trust=trust)
    refuse_unless_counts(str(file), {"threads": job.threads, "loader_threads": job.loader_threads})
    check_hang_minutes(str(file), job.hang_minutes)
    # Both become parts of paths.
    for name, value in (("suite", job.suite), ("family", job.family)):
        require(
            value is None or is_name(value),
            f"{file}: {name} must be a valid name of a folder; got {value!r}",
        )
    return job


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Make a hidden folder to write to, and rename it to `folder` at the end. So `folder` is
    complete or absent. A process that is killed leaves at most the hidden folder.

    Raises:
        ValueError: the name is taken.
    """
    refuse_taken(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
    ) as parent:
        hidden = Path(parent) / folder.name
        hidden.mkdir()  # with the user's permissions; only its owner may read `parent`
        yield hidden
        try:
            hidden.rename(folder)
        except OSError:
            refuse_taken(folder)  # another launch was faster
            raise


def folder_named(runs: Path, name: str) -> Path:
    """The folder of this name in the folder of runs. It need not exist.

    Raises:
        ValueError: the name is a path, or no valid name of a folder.
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
    """The folder itself. If it exists, the first of NAME-2, NAME-3, ... that does not exist."""
    alternatives = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], alternatives) if not path.exists())
