"""Where and on how much a run or a suite trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.counts import refuse_unless_counts
from pipeline.launch.base import Device, Launcher
from pipeline.launch.inline import Inline
from pipeline.launch.ray import Ray
from pipeline.spec import arguments_of


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nothing of it belongs to the recipe."""

    workers: int = 1
    inline: bool = False
    address: str | None = None
    device: Device = "auto"
    cpus_per_worker: int = 1
    loader_threads: int = 1
    max_restarts: int = 3
    hang_minutes: float = 30.0
    """between two signs of life of a worker, after which it writes down its stacks and ends; 0: nobody watches"""
    verify: Literal["sampled", "full"] = "sampled"
    """which pages of the data are compared with their checksums while they are read: some, or each for every sample"""
    checkpoints: str | None = None
    """a folder or an address, beneath which each run keeps its checkpoints in a folder of its name; None: in the run's folder"""
    side_by_side: int | Literal["auto"] = 1
    """runs of a suite that train at the same time, each on cores and cards of its own; auto: as many as there is room for"""

    def __post_init__(self) -> None:
        counts = {"workers": self.workers, "cpus_per_worker": self.cpus_per_worker, "loader_threads": self.loader_threads}
        refuse_unless_counts("cluster", counts)
        refuse_unless_counts("cluster", {"max_restarts": self.max_restarts}, least=0)
        if self.hang_minutes < 0:
            raise ValueError(f"cluster: hang_minutes must not be negative; got {self.hang_minutes:g}")
        if self.side_by_side != "auto":
            refuse_unless_counts("cluster", {"side_by_side": self.side_by_side})

    def launcher(self) -> Launcher:
        if self.inline:
            for name in ("workers", "address", "cpus_per_worker", "max_restarts"):
                if getattr(self, name) != getattr(Cluster, name):
                    option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise ValueError(f"cluster: --inline is one worker in this process, without Ray; got {option}")
            return Inline(device=self.device)
        return Ray(
            workers=self.workers,
            address=self.address,
            cpus_per_worker=self.cpus_per_worker,
            device=self.device,
            max_restarts=self.max_restarts,
        )

    def resumed(self, *, workers: int | None, inline: bool, address: str | None) -> Cluster:
        """As it was launched, but for what the user now says of it."""
        if inline:  # with what does not go with it, which `launcher` refuses
            mine = Cluster(inline=True, device=self.device, loader_threads=self.loader_threads, side_by_side=self.side_by_side)
            mine = replace(mine, checkpoints=self.checkpoints)
            return replace(mine, workers=workers or 1, address=address)
        if workers is not None or address is not None:
            return replace(self, inline=False, workers=workers or self.workers, address=address or self.address)
        return self

    @classmethod
    def from_json(cls, value: Any) -> Cluster:
        """What `dataclasses.asdict` made of one.

        Raises:
            ValueError: a field that there is not, a value of another type, or a count that is none.
        """
        return cls(**arguments_of(cls, value, who="cluster"))
