"""`Cluster`: the options of a launch that do not belong to the recipe. They choose the machines,
and the GPU, the cores and the loader threads of each worker.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline.core.checks import is_count, refuse_unless_counts, require
from pipeline.core.errors import DataError, UserError
from pipeline.core.units import counted
from pipeline.launch.ray_cluster import NodeLoss
from pipeline.measure.memory import unusable_gpus
from pipeline.recipe.spec import arguments_of
from pipeline.train.checkpoint import refuse_credentials
from pipeline.train.elastic import format_sizes

Device = Literal["auto", "cpu", "gpu"]
CountOrAuto = int | Literal["auto"]
# Fields that `resume` may change and save: a run may continue on other machines.
OPERATIONAL_FIELDS = (
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
RAY_FIELDS = ("workers", "address", "cpus_per_worker", "max_restarts", "node_loss")
# Limits a range such as 2:4, because each of its numbers is checked.
MAX_WORKERS = 65_536
# A week. The watchdog's timers overflow after some hundred years.
MAX_HANG_MINUTES = 7 * 24 * 60.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The options of a launch.

    Args:
        workers: the number of processes that train together. With several ascending numbers, the
            run uses the largest number that the cluster has resources for. This number may change
            while the run trains.
        inline: train one worker in this process, without Ray.
        address: the address of an existing Ray cluster (`auto`, `host:6379`, `ray://...`). None or
            "local": the launch starts a cluster on this machine.
        device: whether workers train on GPUs (`workers_use_gpus`).
        cpus_per_worker: the cores that Ray reserves for a worker, and the number of torch's
            threads. `cores_and_loader_threads` explains `auto`.
        loader_threads: threads that read data in a worker. auto: one per core if the
            worker has a GPU and TBB is installed, else one.
        max_restarts: how many times dead workers are restarted until the run makes progress again
            (`ray_trainer.py`).
        hang_minutes: a worker that makes no progress for this time writes the stacks of its threads
            and ends. 0: never.
        verify: the data pages that are compared with their checksums while training reads them.
            `sampled`: the pages of some samples. `full`: all pages.
        checkpoints: a folder or an address. Each run stores its checkpoints in a folder of its name
            there. None: in the run's folder.
        node_loss: how long the run waits for a node that does not answer (`ray_cluster.py`).
        side_by_side: the number of runs of a suite that train at the same time, each on its own
            cores and GPUs. auto: as many as the cluster has resources for.

    Raises:
        ValueError: a number is out of range, numbers of workers do not ascend, runs side by side
            have several numbers of workers, or the address of checkpoints has credentials.
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
        refuse_unless_counts(
            "cluster",
            {
                name: getattr(self, name)
                for name in ("workers", "cpus_per_worker", "loader_threads", "side_by_side")
                if getattr(self, name) != "auto"
            },
        )
        refuse_unless_counts("cluster", {"max_restarts": self.max_restarts}, minimum=0)
        if self.checkpoints is not None:
            refuse_credentials(self.checkpoints)
        check_hang_minutes("cluster", self.hang_minutes)
        require(
            list(self.sizes) == sorted(set(self.sizes)),
            f"cluster: numbers of workers must ascend; got {self.workers!r}",
        )
        require(
            len(self.sizes) <= 1 or self.side_by_side == 1,
            "cluster: --workers must be one number for runs side by side; got"
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
        """The numbers of workers that a run may have, ascending."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers,)

    def resumed(
        self,
        *,
        workers: int | tuple[int, ...] | None = None,
        inline: bool = False,
        address: str | None = None,
        options: Mapping[str, Any] = {},
    ) -> "Cluster":
        """This cluster with the options of a resume; `options` are values of OPERATIONAL_FIELDS.

        If one worker trains in this process, the launch's options for Ray are ignored.
        `launcher_of` refuses options for Ray that are given at the resume.

        Raises:
            ValueError: the run was launched on a Ray cluster, and no address is given. The address
                in the folder is not used: the folder may be from another person, and a cluster that
                this process joins gets the user's token and can run code here.
        """
        require(
            address is not None or self.address is None or inline,
            "resume: --address must be given again for a run that was launched on a Ray cluster;"
            f" got none (at the launch: {self.address}); --address local starts a cluster here",
        )
        is_inline = inline or (self.inline and workers is None and address is None)
        defaults = {name: getattr(Cluster, name) for name in RAY_FIELDS} if is_inline else {}
        if self.side_by_side == "auto" and (
            isinstance(workers, tuple) or (inline and not self.inline)
        ):
            defaults["side_by_side"] = 1
        placement = {
            "workers": workers or (1 if is_inline else self.workers),
            "address": address,
            "inline": is_inline,
        }
        return replace(self, **{**defaults, **options, **placement})

    def resume_address(self, launched: "Cluster") -> str | None:
        """The `--address` of the command that resumes a run on this cluster. `launched` is the
        cluster of the run's launch. None: the command needs no address.
        """
        return None if launched.address is None else self.address or "local"

    @classmethod
    def from_json(cls, value: Any) -> "Cluster":
        """Read a cluster from the JSON values of its fields.

        Raises:
            ValueError: a field is unknown, or a value is refused.
        """
        return cls(**arguments_of(cls, value, subject="cluster"))


def check_hang_minutes(subject: str, hang_minutes: float) -> None:
    require(
        0 <= hang_minutes <= MAX_HANG_MINUTES,
        f"{subject}: hang_minutes must be in 0..{MAX_HANG_MINUTES:.0f} (a week; 0 means never);"
        f" got {hang_minutes:g}",
    )


def option_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def differences(old: Cluster, new: Cluster) -> dict[str, str]:
    """The fields that differ, each with a text such as `--verify was sampled, is full`."""
    new_values = asdict(new)
    return {
        name: f"{option_name(name)} was {value}, is {new_values[name]}"
        for name, value in asdict(old).items()
        if value != new_values[name]
    }


def parse_workers(text: str) -> int | tuple[int, ...]:
    """Parse `4`, a range `2:4`, or a list `2,4,8`.

    Raises:
        ValueError: the text has another form, or a number is 0 or above MAX_WORKERS, or the numbers
            do not ascend.
    """
    is_range = ":" in text
    parts = text.split(":", 1) if is_range else text.split(",")
    numbers = [int(part) if part.isdecimal() else 0 for part in parts]
    require(
        all(is_count(number) for number in numbers)
        and numbers == sorted(set(numbers))
        and numbers[-1] <= MAX_WORKERS,
        "launch: --workers must be a number, a range such as 2:4 or ascending numbers such as"
        f" 2,4,8, none above {MAX_WORKERS}; got {text}",
    )
    if is_range:
        return tuple(range(numbers[0], numbers[1] + 1))
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


# ------------------------------------------------------------------------- what each worker gets


def workers_use_gpus(device: Device, workers: int, gpus: int) -> bool:
    """Whether each worker gets a GPU. With `auto`, workers use GPUs if there are any.

    Raises:
        UserError: workers use GPUs, and there are fewer GPUs than workers. Without this error, some
            workers would silently train on CPUs.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus < workers:
        raise UserError(
            f"launch: each worker must get a GPU; got {counted(workers, 'worker')} and"
            f" {counted(gpus, 'GPU')}; launch fewer workers, or use --device cpu"
        )
    return True


def refuse_unusable_gpus(device: Device) -> None:
    """Raises: UserError if torch cannot use the GPUs of this machine and `device` is not `cpu`."""
    if device != "cpu" and (problem := unusable_gpus()) is not None:
        raise UserError(f"launch: {problem}")


def cores_and_loader_threads(
    nodes: Iterable[Mapping[str, float]],
    *,
    uses_gpus: bool,
    cores: CountOrAuto = "auto",
    loader_threads: CountOrAuto = "auto",
) -> tuple[int, int]:
    """The numbers of cores and loader threads of a worker. Only `auto` is replaced.

    One core decodes some hundreds of JPEGs in a second, which leaves a GPU idle most of the time.
    So each worker with a GPU gets the smallest number of cores per GPU over all nodes with GPUs. A
    worker on a CPU gets one core, which keeps runs comparable. Without TBB, `auto` is one loader
    thread.

    Args:
        nodes: the resources of each node, as Ray counts them.
    """
    if cores == "auto":
        # The smallest number of cores per GPU over all nodes.
        gpu_nodes = [node for node in nodes if uses_gpus and node.get("GPU", 0) >= 1]
        cores = max(
            1, min((int(node.get("CPU", 0) // node["GPU"]) for node in gpu_nodes), default=1)
        )
    if loader_threads == "auto":
        loader_threads = cores if uses_gpus and _has_tbb() else 1
    return cores, loader_threads


def _has_tbb() -> bool:
    from pipeline.data.ffcv.numba_threads import require_tbb  # imports numba, which takes a second

    with suppress(DataError):
        require_tbb()
        return True
    return False
