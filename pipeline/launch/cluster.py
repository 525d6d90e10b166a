"""Where and on how much a run or a suite trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from pipeline.core.checks import is_count, refuse_unless_counts
from pipeline.launch.base import Device, Launcher
from pipeline.launch.in_process import Inline
from pipeline.launch.ray import Ray
from pipeline.launch.ray_cluster import NodeLoss
from pipeline.recipe.spec import arguments_of
from pipeline.train.checkpoint import refuse_credentials
from pipeline.train.elastic import told

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
"""fields that whoever goes on with a run may change for good: the machines may be others than those
that it was launched on
"""
_OF_RAY = ("workers", "address", "cpus_per_worker", "max_restarts", "node_loss")
"""fields without an effect on one worker in this process"""
MOST_WORKERS = 65_536
"""far above any that a global batch divides by; each number of a range is checked"""
MOST_HANG_MINUTES = 7 * 24 * 60.0
"""a week; the timers that watch overflow at some hundred years"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nothing of it belongs to the recipe."""

    workers: int | tuple[int, ...] = 1
    """processes that train together; several numbers, ascending: as many of these as there is room
    for, from time to time
    """
    inline: bool = False
    address: str | None = None
    """of a Ray cluster that is there; None, or "local": one of our own, on this machine"""
    device: Device = "auto"
    cpus_per_worker: int | Literal["auto"] = "auto"
    """cores of a worker; auto: its node's cores over its GPUs where it has a GPU, else one
    (`launch/base.py`)
    """
    loader_threads: int | Literal["auto"] = "auto"
    """that read data in a worker; auto: as many as its cores where it has a GPU, else one"""
    max_restarts: int = 3
    hang_minutes: float = 30.0
    """between two signs of life of a worker, after which it writes down its stacks and ends; 0:
    nobody watches
    """
    verify: Literal["sampled", "full"] = "sampled"
    """which pages of the data are compared with their checksums while they are read: some, or each
    for every sample
    """
    checkpoints: str | None = None
    """a folder or an address, beneath which each run keeps its checkpoints in a folder of its name;
    None: in the run's folder
    """
    node_loss: NodeLoss = "fast"
    """how long a node that says nothing is waited for"""
    side_by_side: int | Literal["auto"] = 1
    """runs of a suite that train at the same time, each on cores and cards of its own; auto: as
    many as there is room for
    """

    def __post_init__(self) -> None:
        if isinstance(self.workers, list):  # of JSON
            object.__setattr__(self, "workers", tuple(self.workers))
        if self.address == "local":
            object.__setattr__(self, "address", None)
        counts: dict[str, object] = {"workers": self.workers}
        counts |= {
            name: each
            for name in ("cpus_per_worker", "loader_threads")
            if (each := getattr(self, name)) != "auto"
        }
        refuse_unless_counts("cluster", counts)
        refuse_unless_counts("cluster", {"max_restarts": self.max_restarts}, least=0)
        if self.checkpoints is not None:
            refuse_credentials(self.checkpoints)
        refuse_unless_watchable("cluster", self.hang_minutes)
        if self.side_by_side != "auto":
            refuse_unless_counts("cluster", {"side_by_side": self.side_by_side})
        if list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"cluster: numbers of workers must ascend; got {self.workers!r}")
        if len(self.sizes) > 1 and self.side_by_side != 1:
            raise ValueError(
                f"cluster: runs side by side need one number of workers; got {told(self.sizes)}"
            )

    @property
    def worker_settings(self) -> dict[str, Any]:
        """What each worker is told of it: fields of pipeline.train.job.Job.

        The launcher puts what it finds in the place of `auto`, once it knows the nodes.
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

    def launcher(self) -> Launcher:
        if self.inline:
            for name in _OF_RAY:
                if getattr(self, name) != getattr(Cluster, name):
                    got = told(self.sizes) if name == "workers" else getattr(self, name)
                    raise ValueError(
                        "cluster: --inline is one worker in this process, without Ray; got"
                        f" {option(name)} {got}"
                    )
            return Inline(device=self.device, loader_threads=self.loader_threads)
        return Ray(
            workers=self.workers,
            address=self.address,
            cpus_per_worker=self.cpus_per_worker,
            loader_threads=self.loader_threads,
            device=self.device,
            max_restarts=self.max_restarts,
            node_loss=self.node_loss,
        )

    def resumed(
        self,
        *,
        workers: int | tuple[int, ...] | None = None,
        inline: bool = False,
        address: str | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> Cluster:
        """As it was launched, but for what the user now says of it: `options` are of OPERATIONAL.

        What it was launched with on Ray waits while one worker trains in this process; what is said
        of it then is refused.

        Raises:
            ValueError: it was launched on a cluster, and nobody says which one it is to go on with.
                The folder's word is not enough: it may be from elsewhere, and whoever it leads to
                is shown the token and runs what they like here.
        """
        if address is None and self.address is not None and not inline:
            raise ValueError(
                "resume: a run that was launched on a Ray cluster must be told --address anew; got"
                f" none, it was {self.address}; --address local starts a cluster here"
            )
        if inline or (self.inline and workers is None and address is None):
            of_ray = {name: getattr(Cluster, name) for name in _OF_RAY}
            said = {
                **self._in_turn(is_asked=inline and not self.inline),
                **options,
                "workers": workers or 1,
                "address": address,
            }
            return replace(self, **{**of_ray, **said, "inline": True})
        in_turn = self._in_turn(is_asked=isinstance(workers, tuple))
        return replace(
            self,
            **{
                **in_turn,
                **options,
                "workers": workers or self.workers,
                "address": address,
                "inline": False,
            },
        )

    def _in_turn(self, *, is_asked: bool) -> dict[str, Any]:
        """Of runs that were to be as many as there is room for: one at a time, where what
        `is_asked` now admits no more.
        """
        return {"side_by_side": 1} if is_asked and self.side_by_side == "auto" else {}

    def resume_address(self, launched: Cluster) -> str | None:
        """`--address` of the command that goes on, where this does now, with what was `launched`
        so.
        """
        return None if launched.address is None else self.address or "local"

    @classmethod
    def from_json(cls, value: Any) -> Cluster:
        """What `dataclasses.asdict` made of one.

        Raises:
            ValueError: a field that there is not, a value of another type, or a count that is none.
        """
        return cls(**arguments_of(cls, value, who="cluster"))


def refuse_unless_watchable(who: str, hang_minutes: float) -> None:
    if not 0 <= hang_minutes <= MOST_HANG_MINUTES:
        raise ValueError(
            f"{who}: hang_minutes must be in 0..{MOST_HANG_MINUTES:.0f}, a week, where 0 is never;"
            f" got {hang_minutes:g}"
        )


def option(field: str) -> str:
    """As it is typed."""
    return f"--{field.replace('_', '-')}"


def differences(was: Cluster, now: Cluster) -> dict[str, str]:
    """What is told of each field that differs, by its name: `--verify was sampled, is full`."""
    values = {name: (getattr(was, name), getattr(now, name)) for name in asdict(was)}
    return {name: f"{option(name)} was {a}, is {b}" for name, (a, b) in values.items() if a != b}


def parse_workers(text: str) -> int | tuple[int, ...]:
    """`4`, a range `2:4`, or the numbers themselves, `2,4,8`.

    Raises:
        ValueError: anything else.
    """
    least, colon, most = text.partition(":")
    numbers = [
        int(each) if each.isdecimal() else 0
        for each in ((least, most) if colon else text.split(","))
    ]
    if (
        not all(is_count(each) for each in numbers)
        or numbers != sorted(set(numbers))
        or numbers[-1] > MOST_WORKERS
    ):
        raise ValueError(
            "launch: --workers must be a number, a range such as 2:4 or ascending numbers such as"
            f" 2,4,8, none above {MOST_WORKERS}; got {text}"
        )
    if colon:
        return tuple(range(numbers[0], numbers[1] + 1))
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
