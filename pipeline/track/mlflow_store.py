"""An MLflow tracking store: its client, its errors, and the experiment and the parent of a run.

    experiment   one for each family, such as fashion; it holds parents and runs
      parent     one launch of a suite (several recipes); its status follows from the status of its
                 runs, and its artifact is the suite's report
        child    one training run

MLflow (3.17.2) creates an experiment or a run in several steps. If two callers create one at the
same time, both calls may fail, or both may succeed. So callers hold the lock `one_at_a_time`.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.files import is_name, lock_within
from pipeline.core.secrets import without_secrets
from pipeline.recipe.suite import how_to_resume, is_suite, runs_of, sources_in
from pipeline.track.journal import Record
from pipeline.track.run_state import is_driven

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
_LOGIN = re.compile(r"//(?:[^/\s:]*:\S*|[^/\s]*)@")


class TrackingError(RuntimeError):
    """MLflow cannot be used. The message is one line for the user."""


def connect(uri: str) -> "MlflowClient":
    """A client of a store. A missing SQLite file is created, which takes seconds."""
    defaults = {
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # 3.17.2 retries 7 times with a timeout of 120 s. In this project, the caller retries.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # mlflow may have been imported earlier
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger(name).level))
    return MlflowClient(tracking_uri=uri)


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for another kind of store."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def without_password(text: str) -> str:
    """The text without user names and passwords in addresses.

    A password follows a colon and ends at the last @ of the word. It may contain an unquoted /. So
    `//host:5000/a@b` becomes `//b`: the text up to the @ may be a password.
    """
    return _LOGIN.sub("//", text)


def reason(uri: str, error: Exception) -> str:
    """The class and the first line of a store's error, without secrets. If the password in `uri`
    has an unquoted / ? or #, advice to quote these characters replaces the line.
    """
    login = _LOGIN.search(uri)
    if login is not None and re.search("[/?#]", login[0].removeprefix("//")):
        # MLflow's client (3.17.2) ends the host at such a character. Its error then contains parts
        # of the password.
        text = "/ ? and # in the password of an address must be written %2F %3F and %23"
    else:  # shorten after the secrets are removed: a shortened address may not be recognized
        lines = without_password(without_secrets(str(error))).strip().splitlines()
        text = lines[0][:300] if lines else ""
    return f"{type(error).__name__}: {text}"


def one_line(uri: str, error: Exception) -> str:
    """A store's error in one line for the user."""
    if isinstance(error, TrackingError):
        return str(error)
    return f"MLflow at {without_password(uri)} cannot be used ({reason(uri, error)})"


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Turn any error inside the context into a TrackingError of one line."""
    try:
        yield
    except Exception as error:
        raise TrackingError(one_line(uri, error)) from error


RUN_TAG = "spiketrain.run_id"
PARENT_TAG = "spiketrain.study_parent"
KIND_TAG = "spiketrain.kind"
DIVERGED_TAG = "spiketrain.diverged"
PARENT_OF = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"  # the description, in Markdown
RESUME = "Resume: "  # the beginning of the last line of a description
LOCK_TIMEOUT_S = 120.0  # another delivery takes seconds, unless its process is suspended


def experiment_of(client: "MlflowClient", start: Record, *, uri: str, runs_dir: Path) -> str:
    """The id of a run's experiment. If the experiment does not exist, it is created."""
    name = str(start.get("family") or start.get("recipe") or "spiketrain")
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return client.create_experiment(name, artifact_location=_artifacts(uri, runs_dir, name))
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} must not be deleted; restore it with: mlflow experiments"
            f" restore {experiment.experiment_id}"
        )
    return experiment.experiment_id


def _artifacts(uri: str, runs_dir: Path, name: str) -> str | None:
    """The URI of an experiment's artifacts: a folder beside a local store, because MLflow's default
    would be in the working directory; None: the server's default.
    """
    if is_server(uri):
        return None
    file, folder = sqlite_file(uri), name.replace("/", "-")
    if not is_name(folder):
        raise TrackingError(
            f"{runs_dir}: the family of a run must be a valid folder name; got {name!r}"
        )
    return ((runs_dir if file is None else file.parent).resolve() / "mlartifacts" / folder).as_uri()


def parent_of(
    client: "MlflowClient", experiment_id: str, start: Record, *, suite: Path | None
) -> str | None:
    """The id of the parent of a run; None if the run was not launched with a suite. If the parent
    does not exist, it is created.

    A new parent becomes the parent of all runs of the suite, because the user may have deleted the
    previous parent.
    """
    if not (uuid := start.get("study_parent")):
        return None
    kind_in_suite = f"tags.`{PARENT_TAG}` = '{uuid}' and tags.`{KIND_TAG}` = "
    if parents := client.search_runs([experiment_id], f"{kind_in_suite}'suite'"):
        return parents[0].info.run_id
    tags = {PARENT_TAG: str(uuid), KIND_TAG: "suite"}
    if suite is not None:
        tags[NOTE_TAG] = f"{RESUME}`{how_to_resume(suite)}`"
    parent_id = client.create_run(
        experiment_id,
        start_time=milliseconds(start),
        tags=tags,
        run_name=str(start.get("suite") or f"suite {str(uuid)[:8]}"),
    ).info.run_id
    for run in client.search_runs([experiment_id], f"{kind_in_suite}'run'"):
        client.set_tag(run.info.run_id, PARENT_OF, parent_id)
    return parent_id


def suite_of(run_dir: Path, start: Record) -> Path | None:
    """The folder of the suite with which a run was launched; None if the run was launched alone.

    Raises:
        TrackingError: the name of the suite in the journal is not a folder name. The journal may
            come from another user.
    """
    if not (name := start.get("suite")):
        return None
    if not is_name(str(name)):
        raise TrackingError(
            f"{run_dir}: the suite in the journal must be the name of a folder beside the run; got"
            f" {name!r}"
        )
    return run_dir.parent / str(name)


def set_parent_status(client: "MlflowClient", parent_id: str, *, suite: Path | None) -> None:
    """Set the status of a parent from the status of its runs.

    A run in the folder of the suite may be missing in MLflow, because it has not begun.
    """
    parent = client.get_run(parent_id)
    runs = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_OF}` = '{parent_id}'")
    folders = {} if suite is None or not is_suite(suite) else runs_of(suite)
    needed = {folders[name].name for name in sources_in(suite)} if suite and folders else set()
    statuses = {_status_in_suite(run, is_needed=run.info.run_name in needed) for run in runs}
    status = next((s for s in ("RUNNING", "FAILED", "KILLED") if s in statuses), "FINISHED")
    if status == "FINISHED" and suite is not None and len(runs) < len(folders):
        status = "RUNNING" if is_driven(suite) else "KILLED"
    if status != parent.info.status:
        set_status = client.update_run if status == "RUNNING" else client.set_terminated
        set_status(parent_id, status=status)


def _status_in_suite(run: "Run", *, is_needed: bool) -> str:
    """A run's status. A diverged run counts as finished, unless other runs need its weights."""
    has_diverged = run.info.status == "FAILED" and run.data.tags.get(DIVERGED_TAG) == "true"
    return "FINISHED" if has_diverged and not is_needed else run.info.status


@contextmanager
def one_at_a_time(runs_dir: Path) -> Iterator[None]:
    """Hold the lock of all deliveries from this folder of runs.

    Raises:
        TrackingError: another process still holds the lock after two minutes.
    """
    path = runs_dir / ".mlflow.lock"
    with path.open("ab") as file:
        if not lock_within(file, LOCK_TIMEOUT_S):
            raise TrackingError(
                f"{path}: the lock must be free to deliver to MLflow; another process still holds"
                f" it after {LOCK_TIMEOUT_S:.0f} s: wait for that process, or end it"
            )
        yield


def milliseconds(event: Record) -> int:
    """The time of an event in Unix milliseconds, the unit of MLflow."""
    return int(event["time"] * 1000)
