"""Checkpoints as external models of MLflow: a name, the step and a URI. Nothing is uploaded.

A run has a model for its last and for its best checkpoint (which may be one), noted whenever an attempt ends; the tag
`spiketrain.which` says which it is by now. What was the last or the best of an earlier attempt stays as `superseded`: its
checkpoint may have been pruned since. MLflow itself tells what there is, so none is made twice. Where no checkpoint is found, as
on storage that is not mounted here, nothing is changed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.track.base import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

WHICH_TAG = "spiketrain.which"
URI_PARAM = "uri"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    alias: str
    uri: str
    """where the checkpoint is"""


class Kept(Protocol):
    """A run's checkpoints, as `pipeline.checkpoint.Place` has them."""

    def names(self) -> list[str]: ...
    def address(self, name: str) -> str: ...
    def trainer(self, name: str) -> Mapping[str, Any]: ...


KeptOf = Callable[[Path], Kept | None]
"""where the checkpoints of a run's folder are; None: not known here"""


@dataclass(frozen=True)
class _Inside:
    folder: Path

    def names(self) -> list[str]:
        return [path.name for path in sorted(self.folder.glob("step_*"))]

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def trainer(self, name: str) -> Mapping[str, Any]:
        return json.loads((self.folder / name / "trainer.json").read_bytes())


def inside(run_dir: Path) -> Kept | None:
    """RUN/checkpoints, for who knows no other places; None where the run keeps them elsewhere."""
    job = run_dir / "job.json"
    elsewhere = job.exists() and json.loads(job.read_bytes()).get("checkpoints")
    return None if elsewhere else _Inside(run_dir / "checkpoints")


def note_checkpoints(client: MlflowClient, run: Run, run_dir: Path, kept_of: KeptOf) -> None:
    """Make the models of the run's last and best checkpoint that are not there, and tag all of them."""
    try:
        kept = kept_of(run_dir)
        found = {} if kept is None else _last_and_best(kept)
        wanted = {} if kept is None else {_uri(kept.address(name)): (name, which) for name, which in found.items()}
    except Exception:  # storage out of reach, each with errors of its own, or job.json is damaged: the rest is delivered
        return
    if not wanted:
        return
    models = _models(client, run)
    for uri, (name, which) in wanted.items():
        if uri not in models or str(models[uri].status) != "READY":
            models[uri] = _make(client, run, name, uri, models.get(uri), which)
    for uri, model in models.items():
        _, which = wanted.get(uri, ("", "superseded"))
        if model.tags.get(WHICH_TAG) != which:
            client.set_logged_model_tags(model.model_id, {WHICH_TAG: which})


def register_checkpoint(client: MlflowClient, run: Run, checkpoint: Path, *, name: str, alias: str) -> Registered:
    """Make a checkpoint a version of the registered model `name`, unless it is one, and point the alias at it."""
    from mlflow.exceptions import MlflowException

    uri = _uri(str(checkpoint))
    model = _models(client, run).get(uri)
    if model is None or str(model.status) != "READY":
        model = _make(client, run, checkpoint.name, uri, model, alias)
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{name}'")
        # SQL registries of 3.17.2 keep no model_id, and ask the store of the process, not the client's, for `models:/ID`.
        version = next((each for each in versions if each.source == model.artifact_location), None)
        if version is None:
            version = client.create_model_version(
                name, model.artifact_location, run.info.run_id, tags={URI_PARAM: uri}, model_id=model.model_id
            )
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise TrackingError(f"register: MLflow refuses the name {name!r}: {error.message}") from error
    return Registered(name=name, version=str(version.version), alias=alias, uri=uri)


def _last_and_best(kept: Kept) -> dict[str, str]:
    """Names of checkpoints, and which they are; whole ones, as one is there under its name or not at all."""
    scores: dict[str, float | None] = {}
    for name in kept.names():
        try:
            scores[name] = kept.trainer(name).get("score")
        except (OSError, ValueError, AttributeError):
            continue  # damaged: a resume moves it away, by name
    if not scores:
        return {}
    last = max(scores)
    best = max((step for step in scores if scores[step] is not None), key=lambda step: (scores[step], step), default=None)
    if best is None or best == last:
        return {last: "last" if best is None else "last and best"}
    return {last: "last", best: "best"}


def _models(client: MlflowClient, run: Run) -> dict[str, LoggedModel]:
    """By the address of their checkpoint: a step that is saved again in a bucket has another, under the same name."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'", max_results=1000)
    return {model.params.get(URI_PARAM, model.name): model for model in found}


def _uri(address: str) -> str:
    return address if "://" in address else Path(address).resolve().as_uri()


def _make(client: MlflowClient, run: Run, name: str, uri: str, begun: LoggedModel | None, which: str) -> LoggedModel:
    """As mlflow.create_external_model does (3.17.2), which keeps its address and its run for the whole process."""
    from mlflow.models import Model

    external: Mapping[str, str] = {"mlflow.model.isExternal": "true", WHICH_TAG: which}
    params = {URI_PARAM: uri, "step": str(int(name.removeprefix("step_")))}
    model = begun or client.create_logged_model(
        run.info.experiment_id, name, run.info.run_id, tags=dict(external), params=params, model_type="checkpoint"
    )
    # A description alone, which the registry asks for.
    about = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        model_id=model.model_id,
        run_id=run.info.run_id,
        metadata={"mlflow.model.isExternal": True, URI_PARAM: model.params.get(URI_PARAM)},
    )
    with tempfile.TemporaryDirectory() as folder:
        about.save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(model.model_id, folder)
    return client.finalize_logged_model(model.model_id, "READY")
