"""The events of a run's journal: one frozen dataclass for each kind of event.

A class declares everything that depends on the kind: the fields, their use in MLflow (`mlflow.py`)
and Prometheus (`prometheus.py`), and the traits. Traits, such as `durable`, are keywords of the
class statement; `Event` lists them. `Event.to_dict` and `from_dict` convert events to and from
JSON. The name of a kind is the class name in lower case with underscores: the kind of `FirstBatch`
is `first_batch`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pipeline.core.checks import require
from pipeline.recipe.recipe import Role, roles

# The states of a run.
State = Literal["new", "running", "finished", "stopped", "failed", "diverged", "interrupted"]
Numbers = dict[str, float]
_TAGS_OF_RECIPE = tuple(name for name, role in roles().items() if Role.TAG in role)
NO_ATTEMPT = -1  # `attempt` of an event that the launcher writes between two attempts
KIND = "event"  # the key that holds the kind in the JSON form


@dataclass(frozen=True)
class Metric:
    """The field is a metric of MLflow. If it is a mapping, each number in it is a metric
    `name/key`.
    """

    name: str
    without: tuple[str, ...] = ()  # keys of the mapping that are not sent


@dataclass(frozen=True)
class Tag:
    """The field is a tag of MLflow, unless it is None. If it is a mapping, each key is a tag
    `name.key`.
    """

    name: str
    keys: tuple[str, ...] | None = None  # the only keys of the mapping that are sent


@dataclass(frozen=True)
class Gauge:
    """The field is a gauge of Prometheus. If it is a mapping, the gauge is its entry `key`."""

    name: str
    help: str
    key: str = ""


_Use = TypeVar("_Use", Metric, Tag, Gauge)
KINDS: dict[str, type["Event"]] = {}  # the class of each kind


@dataclass(frozen=True, kw_only=True)
class Event:
    """The base of all events. The journal sets both fields when it writes the event."""

    kind: ClassVar[str] = ""
    durable: ClassVar[bool] = False  # the event is flushed to the disk when it is written
    sends_journal: ClassVar[bool] = False  # the journal is sent to MLflow after this event
    # the state of the run if this is its last event that has a state, and no driver is alive
    state: ClassVar[State | None] = None
    # the status of the run in MLflow after this event; None: the status does not change
    status: ClassVar[Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] | None] = None
    count_tag: ClassVar[str] = ""  # the tag of MLflow that counts these events; "": none
    counted_field: ClassVar[str] = ""  # the field that `count_tag` sums; "": events are counted
    diverged: ClassVar[str | None] = None  # the value of MLflow's tag `spiketrain.diverged`
    # the event is no longer valid if the run returns to a step before it
    measures_weights: ClassVar[bool] = False
    # the run returns to a step before this event only if it moves a checkpoint to quarantine
    settles_weights: ClassVar[bool] = False

    time: float = 0.0  # Unix seconds
    attempt: int = NO_ATTEMPT  # number of the attempt, from 0

    def __init_subclass__(cls, **traits: Any) -> None:
        for name, value in traits.items():
            assert hasattr(cls, name), f"events have no trait {name}"
            setattr(cls, name, value)
        if not cls.__name__.startswith("_"):  # the base class of several kinds is no kind itself
            cls.kind = re.sub(r"(?<=.)(?=[A-Z])", "_", cls.__name__).lower()
            KINDS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the kind first."""
        return {KIND: self.kind, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class _AtStep(Event):
    step: int  # global batches done


# ------------------------------------------------------------------------------ start of an attempt


@dataclass(frozen=True, kw_only=True)
class Start(_AtStep, durable=True, sends_journal=True, state="interrupted", status="RUNNING"):
    """An attempt begins to train."""

    attempt: Annotated[int, Tag("spiketrain.attempt")] = NO_ATTEMPT  # number of the attempt, from 0
    run: str  # name of the run's folder
    run_id: str  # unique, chosen at the launch
    recipe: Annotated[str, Tag("spiketrain.recipe"), Tag("mlflow.source.name")]  # name
    rule: Annotated[str, Tag("spiketrain.rule")]  # label of the training rule
    # study key; runs with the same key may be compared
    study: Annotated[str, Tag("spiketrain.study")]
    study_parent: Annotated[str | None, Tag("spiketrain.study_parent")]  # id of the suite's launch
    suite: Annotated[str | None, Tag("spiketrain.suite")]  # name of the suite's folder
    family: Annotated[str | None, Tag("spiketrain.family")]  # name of the experiment in MLflow
    seed: Annotated[int, Tag("spiketrain.seed")]  # of the recipe
    world_size: Annotated[
        int, Tag("spiketrain.world_size"), Gauge("spiketrain_workers", "Number of workers.")
    ]  # number of workers
    batch_size: Annotated[int, Tag("spiketrain.batch_size")]  # samples of a global batch
    micro_batch: Annotated[int, Tag("spiketrain.micro_batch")]  # samples of a micro-batch
    accumulation: int  # micro-batches of a worker in a global batch
    parameters: int  # number of parameters of the network
    steps_per_epoch: int  # global batches of the current task
    total_steps: Annotated[
        int, Gauge("spiketrain_total_steps", "Global batches of the whole run.")
    ]  # global batches of the whole run
    epochs: int  # of all tasks
    samples: int  # of the current task's training set
    dropped_per_epoch: int  # samples left out because they do not fill a global batch
    began: float  # Unix seconds at which the worker's code began the attempt
    time_steps: int  # T
    precision: Annotated[str, Tag("spiketrain.precision")]  # such as bf16
    zero: Annotated[int, Tag("spiketrain.zero")]  # DeepSpeed's stage
    commit: Annotated[str, Tag("spiketrain.commit"), Tag("mlflow.source.git.commit")]  # git
    hardware: Annotated[dict[str, Any], Tag("hardware")]  # of all workers, by name
    versions: Annotated[dict[str, str], Tag("versions")]  # of libraries, by name
    data_fingerprint: Annotated[str, Tag("spiketrain.data_fingerprint")]  # hash of the data set
    params: Annotated[dict[str, Any], Tag("spiketrain", keys=_TAGS_OF_RECIPE)]  # the recipe
    loader_threads: int  # of each worker
    own_cores: list[int] | None  # the cores reserved for rank 0; None: no cores are reserved
    resume_command: str  # shell command


@dataclass(frozen=True, kw_only=True)
class FirstBatch(_AtStep):
    """The first batch that an attempt trains on is done."""

    startup_s: float  # seconds since `began` of the start event, without work between batches


@dataclass(frozen=True, kw_only=True)
class Init(Event):
    """The network starts from the weights in a file."""

    file: str  # path of the weights
    fresh: list[str]  # names of parameters that are not in the file


@dataclass(frozen=True, kw_only=True)
class Teacher(Event):
    """The teacher of a run was evaluated."""

    teacher: str  # label
    figures: dict[str, Any]  # samples, loss, and the accuracies top1 and top5 in 0..1


@dataclass(frozen=True, kw_only=True)
class Probe(Event):
    """A linear classifier was fitted to the teacher's features."""

    teacher: str  # label
    views: int  # number of augmented samples in the fit
    top1: float  # accuracy in 0..1 on these samples
    seconds: float  # duration of the fit


@dataclass(frozen=True, kw_only=True)
class Phase(_AtStep):
    """A task of a continual run begins."""

    phase: int  # number of the task, from 0
    of: int  # number of tasks
    name: str  # of the task
    head: int | None  # number of the task's output layer; None: all tasks share one
    steps: int  # global batches of the task
    epochs: int  # of the task


# ------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True, kw_only=True)
class Step(_AtStep):
    """Training metrics since the previous step event. Loss and accuracy are over all workers; times
    are those of rank 0.
    """

    epoch: int  # from 0, of the whole run
    metrics: Annotated[
        Numbers,
        Metric("train"),
        Gauge(
            "spiketrain_images_per_second",
            "Training samples of all workers per second.",
            key="images_per_s",
        ),
        Gauge("spiketrain_loss", "Mean training loss since the previous step event.", "loss"),
        Gauge(
            "spiketrain_top1_ratio",
            "Top-1 accuracy on the training samples since the previous step event.",
            key="top1",
        ),
        Gauge("spiketrain_learning_rate", "Learning rate of the first parameter group.", "lr"),
        Gauge("spiketrain_step_seconds", "Seconds per global batch on rank 0.", "step_s"),
        Gauge(
            "spiketrain_data_wait_seconds",
            "Seconds per global batch in which rank 0 waited for the loader.",
            key="data_wait_s",
        ),
    ]  # means: accuracies in 0..1, seconds per global batch, samples per second
    memory_bytes: Annotated[
        int | None,
        Metric("train/memory_bytes"),
        Gauge(
            "spiketrain_memory_bytes",
            "Memory of rank 0 in bytes: GPU memory, or resident memory without a GPU.",
        ),
    ]  # of rank 0: GPU memory, or resident memory without a GPU


@dataclass(frozen=True, kw_only=True)
class Evaluating(_AtStep):
    """An evaluation begins."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(_AtStep, durable=True, sends_journal=True, measures_weights=True):
    epoch: int  # the last epoch that has ended, from 0
    samples: int  # number of evaluated samples
    metrics: Annotated[
        Numbers,
        Metric("val"),
        Gauge(
            "spiketrain_evaluation_top1_ratio", "Top-1 accuracy of the newest evaluation.", "top1"
        ),
        Gauge("spiketrain_evaluation_loss", "Loss of the newest evaluation.", "loss"),
        Gauge(
            "spiketrain_firing_rate",
            "Spikes per neuron and time step in the newest evaluation.",
            key="firing_rate",
        ),
    ]  # accuracies in 0..1, the mean loss, spikes per neuron and time step


@dataclass(frozen=True, kw_only=True)
class Fidelity(_AtStep, sends_journal=True, measures_weights=True):
    """The rule's gradient was compared with that of BPTT."""

    epoch: int | None  # the last epoch that has ended, from 0; None: at the start of the run
    temporal_share: Annotated[
        Numbers, Metric("fidelity/temporal_share")
    ]  # by layer: the share of BPTT's gradient that passes through time, 0 or more
    cosines: Annotated[dict[str, Numbers], Metric("fidelity/cosines")]  # by rule and layer, -1..1


@dataclass(frozen=True, kw_only=True)
class System(Event):
    """A sample of the load of the driver's machine. These events have a file of their own."""

    step: int  # number of the sample, from 0
    metrics: Annotated[Numbers, Metric("system")]  # MLflow's system metrics


# -------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Event, durable=True, settles_weights=True):
    """A checkpoint is complete."""

    time: Annotated[
        float,
        Gauge(
            "spiketrain_checkpoint_timestamp_seconds",
            "Unix time at which the newest checkpoint was complete.",
        ),
    ] = 0.0  # Unix seconds
    step: Annotated[
        int,
        Gauge("spiketrain_checkpoint_step", "Global batches done at the newest checkpoint."),
    ]  # global batches done
    path: str  # the folder, or the address
    stall_s: Annotated[float, Metric("checkpoint/stall_s")]  # seconds that training waited
    write_s: Annotated[
        float,
        Metric("checkpoint/write_s"),
        Gauge("spiketrain_checkpoint_seconds", "Seconds to write the newest checkpoint."),
    ]  # seconds from the copy of the state until the checkpoint was complete
    bytes: Annotated[int, Metric("checkpoint/bytes")]  # size of all files


@dataclass(frozen=True, kw_only=True)
class Quarantine(Event, durable=True, count_tag="spiketrain.quarantined_checkpoints"):
    """A checkpoint is moved to quarantine, because it is damaged or its weights are bad."""

    path: str  # the new folder, or the new address
    reason: str  # the check that failed


@dataclass(frozen=True, kw_only=True)
class Unwritten(_AtStep, durable=True, count_tag="spiketrain.unwritten_checkpoints"):
    """A checkpoint could not be written."""

    error: str  # one line


@dataclass(frozen=True, kw_only=True)
class Undeleted(_AtStep, count_tag="spiketrain.undeleted_checkpoints"):
    """An old checkpoint could not be deleted. The checkpoint of `step` is complete."""

    error: str  # one line


# ------------------------------------------------------------------------------ faults and recovery


@dataclass(frozen=True, kw_only=True)
class _BadBatch(Event):
    step: int  # number of the batch, from 0
    epoch: int  # from 0
    reason: str  # one line
    advice: str = ""  # what the user can change


@dataclass(frozen=True, kw_only=True)
class Skipped(_BadBatch, count_tag="spiketrain.skipped_samples", counted_field="samples"):
    """The run did not train on a batch."""

    samples: int  # of the global batch


@dataclass(frozen=True, kw_only=True)
class Rollback(_BadBatch, durable=True, count_tag="spiketrain.rollbacks"):
    """The run returns to its newest checkpoint."""

    to: int  # step of the checkpoint


@dataclass(frozen=True, kw_only=True)
class Smaller(_AtStep):
    """Memory ran out. The run continues with a smaller micro-batch."""

    micro_batch: int  # samples of a micro-batch from now on
    reason: str  # one line


@dataclass(frozen=True, kw_only=True)
class Waiting(Event, durable=True):
    """The run waits for storage or for workers."""

    what: str  # the storage or the workers that the run waits for
    most_s: float  # seconds after which the run gives up
    error: str = ""  # one line


@dataclass(frozen=True, kw_only=True)
class Preempted(_AtStep, durable=True, count_tag="spiketrain.preemptions"):
    """The cluster will preempt machines of the run."""

    machines: list[str]  # their names
    seconds_left: float | None  # until the preemption; None: not known


@dataclass(frozen=True, kw_only=True)
class Straggler(_AtStep):
    """Workers are slower than the others."""

    workers: dict[str, dict[str, Any]]  # by rank: `times` (its time over the median) and `host`


@dataclass(frozen=True, kw_only=True)
class DataWait(_AtStep):
    """Rank 0 spends much of its time waiting for data."""

    share: float  # of the time of a batch, in 0..1
    loader_threads: int  # of each worker


@dataclass(frozen=True, kw_only=True)
class Hung(Event, durable=True):
    """The watchdog ended a worker that hung."""

    worker: int  # rank
    stacks: str  # file with the stacks of its threads, relative to the run's folder


@dataclass(frozen=True, kw_only=True)
class Died(Event, durable=True):
    """A worker ended with an error that the worker could not write to the journal itself."""

    worker: int  # rank
    error: str  # one line


# -------------------------------------------------------------------------------- end of an attempt


@dataclass(frozen=True, kw_only=True)
class Finish(
    Event,
    durable=True,
    sends_journal=True,
    settles_weights=True,
    state="finished",
    status="FINISHED",
):
    """The run is complete."""

    step: Annotated[int, Metric("summary/step")]  # global batches done
    summary: Annotated[
        dict[str, Any], Metric("summary", without=("seed", "steps", "epochs"))
    ]  # the content of summary.json without `hardware` (train/metadata.py)


@dataclass(frozen=True, kw_only=True)
class Stopped(_AtStep, durable=True, sends_journal=True, state="stopped", status="KILLED"):
    """The attempt ended because a user or a scheduler asked for it."""

    reason: Annotated[str, Tag("spiketrain.stopped")]  # who asked for the stop
    resume_command: str  # shell command


@dataclass(frozen=True, kw_only=True)
class _Error(Event, durable=True, sends_journal=True, status="FAILED"):
    error: Annotated[str, Tag("spiketrain.error")]  # one line
    traceback: str  # of the error


@dataclass(frozen=True, kw_only=True)
class Failed(_Error, state="failed", diverged="false"):
    """The attempt ended with an error."""


@dataclass(frozen=True, kw_only=True)
class Diverged(_Error, settles_weights=True, state="diverged", diverged="true"):
    """The attempt ended because training diverged. Another attempt would diverge again."""


def kind_of(record: Mapping[str, Any]) -> type[Event]:
    """The class of an event in its JSON form; `Event` if this version does not know the kind."""
    return KINDS.get(record[KIND], Event)


def from_dict(record: Mapping[str, Any]) -> Event:
    """The event in a JSON form.

    Raises:
        ValueError: the kind or a field is unknown, or a field is missing. The message is one line.
    """
    kind, values = kind_of(record), {name: record[name] for name in record if name != KIND}
    require(
        kind is not Event,
        f"journal: an event must be of a kind that this version knows; got {record[KIND]!r}",
    )
    try:
        return kind(**values)
    except TypeError as error:  # names the missing or unknown field
        raise ValueError(
            f"journal: an event {kind.kind!r} must have the fields"
            f" {', '.join(field.name for field in fields(kind))}; got {', '.join(values)}: {error}"
        ) from None


def uses(record: Mapping[str, Any], use: type[_Use]) -> Iterator[tuple[_Use, Any]]:
    """The metrics, tags or gauges of an event, each with the value of its field; None for a missing
    field.
    """
    for name, declaration in declared(kind_of(record), use):
        yield declaration, record.get(name)


@cache
def declared(kind: type[Event], use: type[_Use]) -> tuple[tuple[str, _Use], ...]:
    """The metrics, tags or gauges of a class, each with the name of its field."""
    return tuple(
        (name, declaration)
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for declaration in getattr(hint, "__metadata__", ())
        if isinstance(declaration, use)
    )
