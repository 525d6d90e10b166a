"""Where the time of training goes: at each moment of a batch exactly one part is charged, the innermost that is entered.

    with clock.batch():
        with clock.part("data_wait"):  ...
        with clock.part("backward"):   ...       # in which a collective may charge "communication"

What no part is entered for is charged to REST. So the parts of a batch, with REST, are its seconds, to the last digit.

On a CPU the clock is the host's. On a GPU the host runs ahead of the kernels and its seconds mean nothing, so each boundary is an
event on the stream, and a part's seconds are the stream's: a wait for data is charged for as long as kernels had to wait for it.
Nobody waits for an event before `take` asks for the seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from pipeline.measure.time_parts import BETWEEN, PARTS, REST

__all__ = ["BETWEEN", "PARTS", "REST", "Between", "Clock", "Part"]

Part = Literal["data_wait", "transfer", "teacher", "forward", "backward", "communication", "optimizer", "metrics"]
Between = Literal["evaluation", "checkpoint", "tracking", "fidelity", "coordination"]
T_ = TypeVar("T_")


@dataclass
class _Batch:
    """The boundaries of one batch; the last one ends it."""

    names: list[str] = field(default_factory=list)
    """what begins at each"""
    at: list[Any] = field(default_factory=list)
    """when: seconds, or an event"""


class Clock:
    """The clock of one rank."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._now: Callable[[], Any] = self._event if self._is_cuda else time.perf_counter
        self._open: _Batch | None = None
        self._ended: list[_Batch] = []
        self._charged: str = REST
        # An autograd thread enters a part (a collective in a hook of a gradient) while the one of the loop waits for it.
        self._lock = threading.RLock()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Surrounds a batch. One that an exception ends is forgotten."""
        self._open = _Batch()
        self.enter(REST)
        try:
            yield
            self.enter(REST)
            self._ended.append(self._open)
        finally:
            self._open = None

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Inside, time is charged to `name`; outside of a batch to nothing."""
        return _Entered(self, name)

    def each(self, name: Part, source: Iterable[T_]) -> Iterator[T_]:
        """`source`, with what it takes to make each next one charged to `name`."""
        iterator = iter(source)
        while True:
            with self.part(name):
                value = next(iterator, _END)
            if value is _END:
                return
            yield value  # type: ignore[misc]  # not the end

    def enter(self, name: str) -> str:
        """Charge `name` from now on; what was charged before."""
        with self._lock:
            outer, self._charged = self._charged, name
            if self._open is not None:
                self._open.names.append(name)
                self._open.at.append(self._now())
        return outer

    def take(self) -> list[dict[str, float]]:
        """The seconds of each part, and of REST, in every batch that ended since the last `take`; waits for the device."""
        ended, self._ended = self._ended, []
        if self._is_cuda and ended:
            ended[-1].at[-1].synchronize()
        return [self._seconds(batch) for batch in ended]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, batch: _Batch) -> dict[str, float]:
        seconds: dict[str, float] = dict.fromkeys((*PARTS, REST), 0.0)
        for name, begun, ended in zip(batch.names, batch.at, batch.at[1:], strict=False):
            seconds[name] += begun.elapsed_time(ended) / 1e3 if self._is_cuda else ended - begun
        return seconds


class _Entered:
    """A part from its beginning to its end. No generator: it is entered several times for each time step of a batch."""

    __slots__ = ("_clock", "_name", "_outer")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name, self._outer = clock, name, REST

    def __enter__(self) -> None:
        self._outer = self._clock.enter(self._name)

    def __exit__(self, *exc: object) -> None:
        self._clock.enter(self._outer)


_END = object()
