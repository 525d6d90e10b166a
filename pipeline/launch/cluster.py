"""Where and on how much a run or a suite trains."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline.launch.base import Device, Launcher
from pipeline.launch.inline import Inline
from pipeline.launch.ray import Ray
from pipeline.spec import admits, type_name


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

    def launcher(self) -> Launcher:
        if self.inline:
            for name in ("workers", "address", "cpus_per_worker", "max_restarts"):
                if getattr(self, name) != getattr(Cluster, name):
                    option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise ValueError(f"launch: --inline is one worker in this process, without Ray; got {option}")
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
        if inline:
            return Cluster(inline=True, device=self.device, loader_threads=self.loader_threads)
        if workers is not None or address is not None:
            return replace(self, inline=False, workers=workers or self.workers, address=address or self.address)
        return self

    @classmethod
    def from_json(cls, value: Any) -> Cluster:
        """What `dataclasses.asdict` made of one.

        Raises:
            ValueError: a field that there is not, or a value of another type.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"cluster: must be an object; got {value!r}")
        hints = typing.get_type_hints(cls)
        for name, given in value.items():
            if name not in hints:
                raise ValueError(f"cluster: unknown field {name!r}; it has {', '.join(each.name for each in fields(cls))}")
            if not admits(hints[name], given):
                raise ValueError(f"cluster: {name} must be {type_name(hints[name])}; got {given!r}")
        return cls(**value)
