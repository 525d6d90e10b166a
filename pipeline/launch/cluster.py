"""`Cluster`: the machines that a run or a suite trains on, how it runs there, and what each worker
gets: a GPU, cores, loader threads. The errors of launchers.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline.core.checks import is_count, refuse_unless_counts, require
from pipeline.core.errors import DataError, UserError
from pipeline.core.units import counted
from pipeline.launch.ray_cluster import NodeLoss
from pipeline.measure.unusable_gpus import unusable_gpus
from pipeline.recipe.spec import arguments_of
from pipeline.train.checkpoint import refuse_credentials
from pipeline.train.elastic import format_sizes

Device = Literal["auto", "cpu", "gpu"]
CountOrAuto = int | Literal["auto"]
# Fields that `resume` may change for good: a run may continue on other machines.
OPERATIONAL = (
    "device",
    "cpus_per_worker",
    "loader_threads",
    "max_restarts",
    "hang_minutes",
    "verify",
    "node_loss",
    "side_by_side",
)
# Fields without effect on one worker in this process.
OF_RAY = ("workers", "address", "cpus_per_worker", "max_restarts", "node_loss")
# Far above any number that divides a global batch. Each number of a range is checked.
MOST_WORKERS = 65_536
# A week. The watchdog's timers overflow after some hundred years.
MOST_HANG_MINUTES = 7 * 24 * 60.0


class LaunchError(RuntimeError):
    """A run that failed, in one line."""


class WorkersEnded(LaunchError):
    """The workers died and are not started again.

    `is_for_the_user`: the cause stays until a user changes something.
    """

    def __init__(self, message: str, *, is_for_the_user: bool = False) -> None:
        super().__init__(message)
        self.is_for_the_user = is_for_the_user


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The options of a launch. None of them belongs to the recipe.

    Args:
        workers: processes that train together. With several ascending numbers, the largest number
            that there is room for trains; it may change during the run.
        inline: one worker in this process, without Ray.
        address: of an existing Ray cluster (`auto`, `host:6379`, `ray://...`). None or "local": a
            cluster of our own on this machine.
        device: whether workers train on GPUs (`takes_gpus`).
        cpus_per_worker: cores of a worker, which Ray reserves, and torch's threads; `share_of`
            explains `auto`.
        loader_threads: threads that read data in a worker. auto: one per core with a GPU, else one.
        max_restarts: how often dead workers are restarted without progress between
            (`ray_trainer.py`).
        hang_minutes: the time without a sign of life after which a worker writes its stacks and
            ends. 0: never.
        verify: which data pages are compared with their checksums while training reads them: those
            of some samples, or of all.
        checkpoints: a folder or an address, below which each run keeps its checkpoints in a folder
            of its name. None: in the run's folder.
        node_loss: how long the run waits for a node that does not answer (`ray_cluster.py`).
        side_by_side: runs of a suite that train at the same time, each on cores and GPUs of its
            own. auto: as many as there is room for.

    Raises:
        ValueError: a value that is refused.
    """

    workers: int | tuple[int, ...] = 1
    inline: bool = False
    address: str | None = None
    device: Device = "auto"
    cpus_per_worker: CountOrAuto = "auto"
    loader_threads: CountOrAuto = "auto"
    max_restarts: int = 3
    hang_minutes: float = 30.0
    verify: Literal["sampled", "full"] = "sampled"
    checkpoints: str | None = None
    node_loss: NodeLoss = "fast"
    side_by_side: CountOrAuto = 1

    def __post_init__(self) -> None:
        if isinstance(self.workers, list):  # from JSON
            object.__setattr__(self, "workers", tuple(self.workers))
        if self.address == "local":
            object.__setattr__(self, "address", None)
        counts = ("workers", "cpus_per_worker", "loader_threads", "side_by_side")
        refuse_unless_counts(
            "cluster",
            {name: each for name in counts if (each := getattr(self, name)) != "auto"},
        )
        refuse_unless_counts("cluster", {"max_restarts": self.max_restarts}, minimum=0)
        if self.checkpoints is not None:
            refuse_credentials(self.checkpoints)
        refuse_unless_watchable("cluster", self.hang_minutes)
        require(
            list(self.sizes) == sorted(set(self.sizes)),
            f"cluster: numbers of workers must ascend; got {self.workers!r}",
        )
        require(
            len(self.sizes) <= 1 or self.side_by_side == 1,
            "cluster: runs side by side need one number of workers; got"
            f" {format_sizes(self.sizes)}",
        )

    @property
    def worker_settings(self) -> dict[str, Any]:
        """The fields of pipeline.train.job.Job that depend on the cluster.

        The launcher replaces `auto` once it knows the nodes.
        """
        return {
            "threads": 1 if self.cpus_per_worker == "auto" else self.cpus_per_worker,
            "loader_threads": 1 if self.loader_threads == "auto" else self.loader_threads,
            "hang_minutes": self.hang_minutes,
            "verify": self.verify,
            "own_cores": self.side_by_side != 1,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every number of workers that a run may have."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers,)

    def resumed(
        self,
        *,
        workers: int | tuple[int, ...] | None = None,
        inline: bool = False,
        address: str | None = None,
        options: Mapping[str, Any] = {},
    ) -> "Cluster":
        """This cluster with the options of a resume; `options` are fields of OPERATIONAL.

        If one worker trains in this process, the launch's options for Ray are ignored, and
        `launcher_of` refuses those of the resume.

        Raises:
            ValueError: the run was launched on a Ray cluster, and no address is given. The address
                in the folder is not used: the folder may be from another person, and a cluster that
                this process joins gets the token and can run code here.
        """
        require(
            address is not None or self.address is None or inline,
            "resume: a run that was launched on a Ray cluster needs --address anew; got"
            f" none, it was {self.address}; --address local starts a cluster here",
        )
        is_inline = inline or (self.inline and workers is None and address is None)
        before = {name: getattr(Cluster, name) for name in OF_RAY} if is_inline else {}
        if self.side_by_side == "auto" and (
            isinstance(workers, tuple) or (inline and not self.inline)
        ):
            before["side_by_side"] = 1
        now = {
            "workers": workers or (1 if is_inline else self.workers),
            "address": address,
            "inline": is_inline,
        }
        return replace(self, **{**before, **options, **now})

    def resume_address(self, launched: "Cluster") -> str | None:
        """The `--address` of the command that resumes, on this cluster, a run of `launched`."""
        return None if launched.address is None else self.address or "local"

    @classmethod
    def from_json(cls, value: Any) -> "Cluster":
        """The cluster that `dataclasses.asdict` turned into JSON values.

        Raises:
            ValueError: an unknown field, or a value that is refused.
        """
        return cls(**arguments_of(cls, value, subject="cluster"))


def refuse_unless_watchable(who: str, hang_minutes: float) -> None:
    require(
        0 <= hang_minutes <= MOST_HANG_MINUTES,
        f"{who}: hang_minutes must be in 0..{MOST_HANG_MINUTES:.0f}, a week, where 0 is never;"
        f" got {hang_minutes:g}",
    )


def option_name(field: str) -> str:
    """The command-line option of a field of `Cluster`."""
    return f"--{field.replace('_', '-')}"


def differences(was: Cluster, now: Cluster) -> dict[str, str]:
    """A text for each field that differs, by its name: `--verify was sampled, is full`."""
    after = asdict(now)
    return {
        name: f"{option_name(name)} was {before}, is {after[name]}"
        for name, before in asdict(was).items()
        if before != after[name]
    }


def parse_workers(text: str) -> int | tuple[int, ...]:
    """Parse `4`, a range `2:4`, or a list `2,4,8`.

    Raises:
        ValueError: anything else.
    """
    least, colon, most = text.partition(":")
    numbers = [
        int(each) if each.isdecimal() else 0
        for each in ((least, most) if colon else text.split(","))
    ]
    require(
        all(is_count(each) for each in numbers)
        and numbers == sorted(set(numbers))
        and numbers[-1] <= MOST_WORKERS,
        "launch: --workers must be a number, a range such as 2:4 or ascending numbers such as"
        f" 2,4,8, none above {MOST_WORKERS}; got {text}",
    )
    if colon:
        return tuple(range(numbers[0], numbers[1] + 1))
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


# ------------------------------------------------------------------------- what each worker gets


def takes_gpus(device: Device, workers: int, gpus: int) -> bool:
    """Whether each worker gets a GPU. `auto` takes GPUs if there are any.

    Raises:
        UserError: there are fewer GPUs than workers. Otherwise some workers would silently train
            on CPUs.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus < workers:
        raise UserError(
            f"launch: each worker needs a GPU; got {counted(workers, 'worker')} and"
            f" {counted(gpus, 'GPU')}; take fewer workers or --device cpu"
        )
    return True


def refuse_unusable_cards(device: Device) -> None:
    """Raises: UserError if torch cannot use the GPUs of this machine and `device` is not `cpu`."""
    if device != "cpu" and (problem := unusable_gpus()) is not None:
        raise UserError(f"launch: {problem}")


def share_of(
    nodes: Iterable[Mapping[str, float]],
    *,
    gpus: bool,
    cores: CountOrAuto = "auto",
    loader_threads: CountOrAuto = "auto",
) -> tuple[int, int]:
    """Cores and loader threads of a worker. Numbers from the user are kept.

    One core decodes some hundreds of JPEGs in a second, which leaves a GPU idle most of the time.
    So a worker with a GPU gets the cores of its node divided by the node's GPUs. A worker on a CPU
    gets one core, which keeps runs comparable.

    Args:
        nodes: the resources of each node, as Ray counts them.
    """
    if cores == "auto":
        # The smallest number of cores per GPU over all nodes.
        with_gpu = [node for node in nodes if gpus and node.get("GPU", 0) >= 1]
        cores = max(1, min((int(has.get("CPU", 0) // has["GPU"]) for has in with_gpu), default=1))
    if loader_threads == "auto":
        loader_threads = cores if gpus and _has_tbb() else 1
    return cores, loader_threads


def _has_tbb() -> bool:
    from pipeline.data.ffcv.numba_threads import require_tbb  # imports numba, which takes a second

    with suppress(DataError):
        require_tbb()
        return True
    return False
