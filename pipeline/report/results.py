"""Results as one frame: a row for each run, a column for each quantity.

    frame = pipeline.results("runs/")        # or sqlite:///runs/mlflow.db, or a server's address
    frame.groupby("rule")["top1"].mean()

The first columns describe the run. The others are the quantities that `metrics.py` declares.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted
from pipeline.measure.constants import PARTS, REST, SECTIONS
from pipeline.recipe.suite import is_suite
from pipeline.report import history
from pipeline.report.history import History, number
from pipeline.report.metrics import METRICS, Metric, metric
from pipeline.track.events import Event, Finish, Start, Step, Stopped
from pipeline.track.journal import Record, last, read, read_events
from pipeline.track.run_state import State, conditions_of, state_of, trained_on

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN_RULE = "unknown rule"  # the label of a run without a rule
UNKNOWN = "not known"


class ReportError(ValueError):
    """A run cannot be found, read or compared. The message is one line for a user."""


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested objects to one, with dotted paths as keys."""
    flattened: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        flattened |= flat(item, f"{name}.") if isinstance(item, Mapping) else {name: item}
    return flattened


def metrics_of(runs: "Iterable[Run]") -> list[Metric]:
    """All metrics. A `*` is replaced by each matching key in the summaries of these runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.numbers))
    metrics: list[Metric] = []
    for each in METRICS:
        if "*" not in each.name:
            metrics.append(each)
            continue
        pattern = re.escape(each.name).replace(r"\*", "(.+)")
        metrics += [
            replace(each, name=match[0], title=each.title.format(match[1]))
            for match in (re.fullmatch(pattern, name) for name in names)
            if match
        ]
    return metrics


# ------------------------------------------------------------------------------------------- runs


_LAYER: dict[str, Callable[[Any], Any]] = {
    "name": str,
    "neurons": int,
    "samples": int,  # samples whose spikes were counted
    "rates": lambda values: list(map(float, values)),  # spikes per neuron at each time step
    "silent": float,  # share of silent neurons, in 0..1
    "saturated": float,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a row of the frame, with its history, which is read on first use.

    Fields that are not known have their defaults.
    """

    name: str
    state: State
    rule: str = UNKNOWN_RULE  # its label in tables
    seed: int = 0
    study: str = ""  # the study key: runs with equal keys and conditions are comparable
    recipe: Mapping[str, Any] = field(default_factory=dict)  # fields of recipe.json
    summary: Mapping[str, Any] | None = None  # None until the run has finished
    trained_on: tuple[Mapping[str, Any], ...] = ()  # `provenance.trained_on`, oldest first
    commits: tuple[str, ...] = ()
    step: int | None = None  # batches done
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    started: float = 0.0  # unix seconds
    ended: float = 0.0
    last_heard: float | None = None  # time of the newest report of a run that MLflow calls running
    folder: Path = Path()  # the folder that the run was read from
    damage: str = ""  # why the run cannot be used, if one of its files is damaged
    curve_every: int = 1  # the curve has every n-th point of the journal
    redone: Literal["dropped", "kept"] = "dropped"  # as in `history.read_history`
    journal: Callable[[], Sequence[Event]] = field(default=list, repr=False, compare=False)
    layers: Callable[[], Sequence[Any] | None] = field(default=list, repr=False, compare=False)

    @property
    def is_finished(self) -> bool:
        return self.state == "finished" and self.summary is not None

    @property
    def protocol(self) -> str:
        return str(self.recipe.get("protocol", "shared"))

    @property
    def workers(self) -> int | None:
        return self.trained_on[-1]["world_size"] if self.trained_on else None

    @property
    def hardware(self) -> Mapping[str, Any]:
        return self.trained_on[-1]["hardware"] if self.trained_on else {}

    @cached_property
    def history(self) -> History:
        return history.read_history(self.journal(), redone=self.redone)

    @cached_property
    def parts(self) -> Mapping[str, float]:
        """Mean seconds per batch in each part of the clock.

        For a finished run, the parts include evaluations and checkpoints, but not start-up. For
        any other run, the mean covers the batches whose parts are in the journal.
        """
        if self.summary is None:
            return history.parts(self.journal())
        batches = self.value("timed_batches") or self.value("steps")
        if not batches:
            return {}
        seconds = {name: self.value(f"{name}_s") for name in (*PARTS, REST, *SECTIONS)}
        return {name: total / batches for name, total in seconds.items() if total is not None}

    @cached_property
    def activity(self) -> list[dict[str, Any]]:
        """The layers of neurons in the last evaluation, with the fields in `_LAYER`."""
        try:
            return [
                {name: convert(layer[name]) for name, convert in _LAYER.items()}
                for layer in self.layers() or ()
            ]
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ReportError(
                f"activity.json: each layer must have {', '.join(_LAYER)}; got"
                f" {type(error).__name__}: {error}"
            ) from error

    @cached_property
    def numbers(self) -> dict[str, float]:
        values = {name: number(value) for name, value in flat(self.summary or {}).items()}
        return {name: value for name, value in values.items() if value is not None}

    def value(self, name: str) -> float | None:
        """A metric, or the number at a dotted path of the summary."""
        return metric(name).value(self.numbers)


def run_of(
    name: str,
    *,
    state: State,
    starts: Sequence[Record],
    summary: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Run:
    """A run from its files.

    Args:
        starts: the `start` events of its journal, oldest first.
        summary, recipe: the content of summary.json and recipe.json; None without the file.
        fields: further fields of `Run`.
    """
    finished = summary if state == "finished" else None
    newest = {**(starts[-1] if starts else {}), **(finished or {})}
    recipe_fields = (recipe or {}).get("recipe", recipe)
    conditions = conditions_of(finished, starts) if finished else trained_on(starts, steps=None)
    commits = [event["commit"] for event in starts if event.get("commit")]
    return Run(
        name=name,
        state=state,
        rule=str(newest.get("rule") or UNKNOWN_RULE),
        seed=newest.get("seed") or 0,
        study=str(newest.get("study") or ""),
        recipe=recipe_fields if isinstance(recipe_fields, Mapping) else {},
        summary=finished,
        trained_on=tuple({**each, "hardware": each["hardware"] or {}} for each in conditions),
        commits=tuple(dict.fromkeys(commits or (finished or {}).get("commits") or ())),
        total_steps=newest.get("total_steps") or newest.get("steps"),
        steps_per_epoch=newest.get("steps_per_epoch"),
        **fields,
    )


def read_run(folder: Path) -> Run:
    """A run from its folder.

    Raises:
        ReportError: summary.json or recipe.json is damaged.
    """
    files = RunFolder(folder)
    summary = load(files.summary)
    refuse_damaged_summary(summary or {}, str(files.summary))
    return _read(folder, summary=summary, recipe=load(files.recipe))


def read_runs(runs_dir: Path) -> list[Run]:
    """All runs in a folder, sorted by name. `damage` is set for a run with a damaged file."""
    runs: list[Run] = []
    for folder in folders_in(runs_dir):
        try:
            runs.append(read_run(folder))
        except ReportError as error:
            runs.append(_read(folder, damage=str(error)))
    return runs


def _read(folder: Path, *, summary: Any = None, recipe: Any = None, damage: str = "") -> Run:
    files, state = RunFolder(folder), state_of(folder)
    journal = files.journal
    starts = read(journal, Start.kind)
    # Read as records, because another version may have written the events.
    finish = last(journal, Finish.kind) if state == "finished" else None
    newest = finish or last(journal, Step.kind, Start.kind, Stopped.kind) or {}
    return run_of(
        folder.name,
        state=state,
        starts=starts,
        summary=summary,
        recipe=recipe,
        step=(summary or {}).get("steps") or newest.get("step"),
        started=float(starts[0]["time"]) if starts else folder.stat().st_mtime,
        ended=finish["time"] if finish else folder.stat().st_mtime,
        folder=folder,
        damage=damage,
        journal=lambda: read_events(journal),
        layers=lambda: load(files.activity, list),
    )


def frame(runs: Iterable[Run]) -> "pd.DataFrame":
    """One row for each run.

    The columns are the identity and state of the run, the objects `recipe` and `summary` as in
    their files, and each metric, with NaN if it was not measured.

    Raises:
        ReportError: a run has a damaged file.
    """
    import pandas as pd

    runs = list(runs)
    for run in runs:
        refuse_damage(run)
    metrics = metrics_of(runs)
    identities = pd.DataFrame(
        map(_identity, runs), columns=list(_identity(Run(name="", state="new")))
    )
    values = [[each.value(run.numbers) for each in metrics] for run in runs]
    numbers = pd.DataFrame(values, columns=[each.name for each in metrics], dtype=float)
    return pd.concat([identities, numbers], axis=1)


def refuse_damage(run: Run) -> None:
    if run.damage:
        raise ReportError(run.damage)


def _identity(run: Run) -> dict[str, Any]:
    return {
        "run": run.name,
        "rule": run.rule,
        "seed": run.seed,
        "study": run.study,
        "protocol": run.protocol,
        "state": run.state,
        "workers": run.workers,
        "machine": describe_machine(run.hardware),
        "commit": ", ".join(run.commits),
        "step": run.step,
        "total_steps": run.total_steps,
        "started": run.started,
        "recipe": run.recipe,
        "summary": run.summary,
    }


# ------------------------------------------------------------------------------------------- files

# The types of the summary fields that readers rely on.
_SUMMARY_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "trained_on": (list, "a list of objects"),
    "commits": (list, "a list"),
    "hardware": (dict, "an object"),
    "conditions": (dict, "an object"),
    **dict.fromkeys(("seed", "total_steps", "steps_per_epoch"), (int, "a whole number")),
    **dict.fromkeys(("steps", "images_per_s", "peak_saved_bytes"), ((int, float), "a number")),
}


def folders_in(runs_dir: str | os.PathLike[str], *, suites: bool = False) -> list[Path]:
    """The folders of runs, and with `suites` also of suites, sorted by name.

    Hidden folders are skipped: launches that were killed early leave them behind.
    """
    if not Path(runs_dir).is_dir():
        return []
    visible = sorted(each for each in Path(runs_dir).iterdir() if not each.name.startswith("."))
    return [folder for folder in visible if is_run(folder) or (suites and is_suite(folder))]


def load(path: Path, expected: type = dict) -> Any:
    """Read a JSON object or list from a file; None if the file does not exist.

    Raises:
        ReportError: the file is not JSON, or has a value of another type than `expected`.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    return parsed(text, str(path), expected)


def parsed(text: str | bytes, where: str, expected: type) -> Any:
    """Parse a JSON object or list; `where` is its source, for messages.

    Raises:
        ReportError: the text is not JSON, or has a value of another type than `expected`.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ReportError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, expected):
        name = "a JSON object" if expected is dict else "a JSON list"
        raise ReportError(f"{where} must contain {name}; got {type(value).__name__}")
    return value


def refuse_damaged_summary(summary: Mapping[str, Any], where: str) -> None:
    """Raise ReportError if a field has an unexpected type; the message names `where`."""
    for name, (expected, description) in _SUMMARY_TYPES.items():
        if (value := summary.get(name)) is not None and not isinstance(value, expected):
            raise ReportError(f"{where}: {name} must be {description}; got {value!r}")
    for each in summary.get("trained_on") or ():
        if not isinstance(each, dict):
            raise ReportError(f"{where}: trained_on must be a list of objects; got {each!r} in it")
        refuse_damaged_summary(each, where)


def is_run(folder: Path) -> bool:
    files = RunFolder(folder)
    return files.recipe.is_file() or files.journal.is_file()


# ------------------------------------------------------------------- machines and workers as text


def describe_machine(hardware: Mapping[str, Any]) -> str:
    """The GPU of each worker, or the CPU with its cores and the threads of torch."""
    if not hardware:
        return "an unknown machine"
    if hardware.get("gpu") not in (None, "none"):
        return str(hardware["gpu"])
    counts = [
        counted(hardware[name], name[:-1])
        for name in ("cores", "threads")
        if isinstance(hardware.get(name), int)
    ]
    return ", ".join([str(hardware.get("cpu", "a CPU")), *counts])


def describe_conditions(run: Run, *, between: str = ", ", names_loaders: bool = False) -> str:
    """Machines and workers, such as `a cpu, 2 cores, 2 workers, then a cpu, 2 cores, 1 worker`.

    Loader threads are named if `names_loaders`, or if they changed during the run.
    """
    names_loaders |= len({conditions["loader_threads"] for conditions in run.trained_on}) > 1
    texts: list[str] = []
    for conditions in run.trained_on:
        workers, threads = conditions["world_size"], conditions["loader_threads"]
        details = [
            "" if workers is None else counted(workers, "worker"),
            f"in micro-batches of {conditions['micro_batch']}"
            if _accumulation(run, conditions) > 1
            else "",
            "each on its own cores" if conditions["own_cores"] else "",
            f"with {counted(threads, 'loader thread')}" if names_loaders and threads else "",
        ]
        place = (describe_machine(conditions["hardware"]), ", ".join(filter(None, details)))
        texts.append(between.join(filter(None, place)))
    return ", then ".join(texts) or describe_machine({})


def micro_batches(run: Run) -> str:
    """Samples per micro-batch of a worker, and micro-batches per batch: `128`, `64 × 2`."""
    sizes = [(each["micro_batch"], _accumulation(run, each)) for each in run.trained_on]
    texts = [f"{size} × {times}" if times > 1 else str(size or UNKNOWN) for size, times in sizes]
    return ", then ".join(dict.fromkeys(texts)) or UNKNOWN


def _accumulation(run: Run, conditions: Mapping[str, Any]) -> int:
    """Micro-batches of a worker per batch; 1 if the recipe or the conditions are not known."""
    batch_size = run.recipe.get("batch_size")
    factors = (conditions["world_size"], conditions["micro_batch"])
    return batch_size // math.prod(factors) if batch_size and all(factors) else 1


# A driver reports its machine's load to MLflow, by default every 10 s. Without these reports,
# MLflow receives only points of the curve, evaluations and checkpoints, which can be minutes apart.
SILENT_S = 900.0


def describe_state(state: str, last_heard: float | None) -> str:
    """A state such as `running, no report for 25 min`: a killed driver cannot report its end.

    Args:
        last_heard: the time of the newest report in unix seconds; None if the state is certain.
    """
    if last_heard is None or not is_silent(state, last_heard):
        return state
    minutes = int((time.time() - last_heard) // 60)
    duration = f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
    return f"{state}, no report for {duration}"


def is_silent(state: str, last_heard: float) -> bool:
    return state == "running" and time.time() - last_heard >= SILENT_S


def comparison_key(run: Run) -> str:
    """A key that is equal for comparable runs.

    Comparable runs have the same study key and the same training conditions at each step: workers,
    micro-batch, machine, loader threads, and whether cores were reserved.
    """
    return json.dumps([run.study, run.trained_on], sort_keys=True, default=str)
