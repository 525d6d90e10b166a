"""A clock that charges the time of training to parts, such as waiting for data or backward.

At each moment of a batch, the innermost open part is charged.

    with clock.batch():
        with clock.part("data_wait"):  ...
        with clock.part("backward"):   ...       # a collective inside may charge "communication"

Time outside all parts is charged to REST, so the parts of a batch add up exactly to its time.

On a CPU the clock reads the host's time. On a GPU the host runs ahead of the kernels, so a part
starts with an event on the stream, and its time is the time between two events. A wait for data is
therefore charged only while kernels wait for the data. Only `take` waits for the events.

In a batch about thirty parts begin. At each of these moments the caches are full of a layer's data,
so every call costs microseconds. The clock therefore records only a name and the time.
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
    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._now: Callable[[], Any] = self._event if self._is_cuda else time.perf_counter
        self._parts = {name: _Part(self, name) for name in PARTS}
        # The innermost part is the last. A thread of autograd may also open a part (for a
        # collective in a gradient hook), while the loop's thread waits for that thread.
        self.open_parts: list[str] = [REST]
        # The current batch's names of parts and their starts (seconds or events), alternating.
        # The last pair ends the batch.
        self._starts: list[Any] | None = None
        self._completed: list[list[Any]] = []  # starts of each batch since the last `take`

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Surround a batch. A batch that ends in an exception is not recorded."""
        self._starts = starts = []
        self.begin(REST)
        try:
            yield
            self.begin(REST)
            self._completed.append(starts)
        finally:
            self._starts = None

    def part(self, name: Part) -> "_Part":
        """Charge the time of the block to `name`. Outside a batch it has no effect."""
        return self._parts[name]

    def begin(self, name: str) -> None:
        """Charge the time from now on to `name`."""
        if self._starts is not None:
            self._starts += name, self._now()

    def take(self) -> list[dict[str, float]]:
        """The seconds of each part and of REST, for each batch completed since the last `take`.

        It waits for the device.
        """
        batches, self._completed = self._completed, []
        if self._is_cuda and batches:
            batches[-1][-1].synchronize()
        return [self._seconds(starts) for starts in batches]

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, starts: list[Any]) -> dict[str, float]:
        seconds: dict[str, float] = dict.fromkeys((*PARTS, REST), 0.0)
        names, times = starts[::2], starts[1::2]
        for name, start, end in zip(names, times, times[1:], strict=False):
            seconds[name] += start.elapsed_time(end) / 1e3 if self._is_cuda else end - start
        return seconds


class _Part(ContextDecorator):
    """A context manager and function decorator. It may be entered within itself."""

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.open_parts.append(self._name)
        self._clock.begin(self._name)

    def __exit__(self, *exc: object) -> None:
        self._clock.open_parts.pop()
        self._clock.begin(self._clock.open_parts[-1])


@contextmanager
def charge_collectives(clock: Clock) -> Iterator[None]:
    """Charge the time of each of `COLLECTIVES` inside a batch to "communication".

    This covers the collectives of backends, synchronised norms and rules, because all of them call
    `torch.distributed.<collective>`. Enter the context before an engine is created: DeepSpeed
    0.19.8 looks up most collectives at each call, but all_gather_into_tensor only at its
    initialisation.

    Only the start of an asynchronous collective is charged to "communication". The wait is charged
    to the part in which it happens.
    """
    originals = {name: getattr(distributed, name) for name in COLLECTIVES}
    for name, collective in originals.items():
        setattr(distributed, name, clock.part("communication")(collective))
    try:
        yield
    finally:
        for name, collective in originals.items():
            setattr(distributed, name, collective)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the host's clock, including the device's work."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. On a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
