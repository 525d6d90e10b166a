"""A clock that charges the time of training to parts, such as waiting for data or backward.

At each moment of a batch, the innermost open part is charged.

    with clock.batch():
        with clock.part("data_wait"):  ...
        with clock.part("backward"):   ...       # a collective inside may charge "communication"

Time outside all parts is charged to REST, so the parts of a batch add up exactly to its time.

On a CPU the clock is the host's. On a GPU the host runs ahead of the kernels. Each boundary is then
an event on the stream, and a part's time is the stream's. A wait for data is charged for as long as
kernels had to wait for it. Only `take` waits for the events.

A batch has about thirty boundaries. Each follows a layer that has just filled the caches, where
every call costs microseconds. A boundary therefore only records a name and the time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any

import torch
from torch import distributed

from pipeline.measure.constants import PARTS, REST, Part

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "barrier",
)


class Clock:
    """The clock of one rank."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._now: Callable[[], Any] = self._event if self._is_cuda else time.perf_counter
        self._parts = {name: _Part(self, name) for name in PARTS}
        # The open parts, the innermost last. A thread of autograd may open one too (for a
        # collective in a gradient hook), while the loop's thread waits for it.
        self.entered: list[str] = [REST]
        # The boundaries of the current batch: alternately the name of a part that begins, and its
        # time (seconds or an event). The last pair ends the batch.
        self._boundaries: list[Any] | None = None
        self._ended: list[list[Any]] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Surround a batch. A batch that ends in an exception is not recorded."""
        self._boundaries = batch = []
        self.begin(REST)
        try:
            yield
            self.begin(REST)
            self._ended.append(batch)
        finally:
            self._boundaries = None

    def part(self, name: Part) -> "_Part":
        """Charge the time inside to `name`. It has no effect outside a batch."""
        return self._parts[name]

    def begin(self, name: str) -> None:
        """Charge `name` from now on."""
        if self._boundaries is not None:
            self._boundaries += name, self._now()

    def take(self) -> list[dict[str, float]]:
        """The seconds of each part, REST included, of every batch since the last `take`.

        It waits for the device.
        """
        ended, self._ended = self._ended, []
        if self._is_cuda and ended:
            ended[-1][-1].synchronize()
        return [self._seconds(batch) for batch in ended]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, boundaries: list[Any]) -> dict[str, float]:
        seconds: dict[str, float] = dict.fromkeys((*PARTS, REST), 0.0)
        names, at = boundaries[::2], boundaries[1::2]
        for name, begun, ended in zip(names, at, at[1:], strict=False):
            seconds[name] += begun.elapsed_time(ended) / 1e3 if self._is_cuda else ended - begun
        return seconds


class _Part(ContextDecorator):
    """A context manager, also for each call of a function. It may be entered within itself."""

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.entered.append(self._name)
        self._clock.begin(self._name)

    def __exit__(self, *exc: object) -> None:
        self._clock.entered.pop()
        self._clock.begin(self._clock.entered[-1])


@contextmanager
def charge_collectives(clock: Clock) -> Iterator[None]:
    """Charge the time of every collective inside a batch to "communication".

    This covers the collectives of backends, synchronised norms and rules, because all of them call
    `torch.distributed.<collective>`. Enter it before an engine is made: DeepSpeed 0.19.8 looks up
    most collectives at each call, but keeps all_gather_into_tensor from its initialisation.

    For an asynchronous collective only the start is charged here. The wait is charged to the part
    in which it happens.
    """
    own = {name: getattr(distributed, name) for name in COLLECTIVES}
    for name, collective in own.items():
        setattr(distributed, name, clock.part("communication")(collective))
    try:
        yield
    finally:
        for name, collective in own.items():
            setattr(distributed, name, collective)


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the host's clock, including the device's work."""
    synchronize(device)
    begun = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - begun


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. On a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
