"""Where the time of training goes: at each moment of a batch exactly one part is charged, the
innermost that is entered.

    with clock.batch():
        with clock.part("data_wait"):  ...
        with clock.part("backward"):   ...       # in which a collective may charge "communication"

What no part is entered for is charged to REST. So the parts of a batch, with REST, are its seconds,
to the last digit.

On a CPU the clock is the host's. On a GPU the host runs ahead of the kernels and its seconds mean
nothing, so each boundary is an event on the stream, and a part's seconds are the stream's: a wait
for data is charged for as long as kernels had to wait for it. Nobody waits for an event before
`take` asks for the seconds.

A batch has some thirty boundaries, each behind a layer that has just passed through the caches,
where every call is one of microseconds: so at a boundary there are few, and nothing is made but the
time.

Seconds of one act by the host's clock; on a card, until it has done what it was asked for.

Charges a clock with what ranks say to one another, whoever says it: a backend, synchronised
norms, a rule.

All of them call `torch.distributed.<collective>`, DeepSpeed 0.19.8 too, which looks most of them up
at each call and keeps one (all_gather_into_tensor) from when it is initialised: so this is entered
before an engine is made.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import distributed

from pipeline.measure.constants import BETWEEN, PARTS, REST

__all__ = ["BETWEEN", "PARTS", "REST", "Between", "Clock", "Part"]

Part = Literal[
    "data_wait",
    "transfer",
    "teacher",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "metrics",
]
Between = Literal["evaluation", "checkpoint", "tracking", "fidelity", "coordination", "skipped"]
T_ = TypeVar("T_")


class Clock:
    """The clock of one rank."""

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._now: Callable[[], Any] = self._event if self._is_cuda else time.perf_counter
        self._parts = {name: _Part(self, name) for name in PARTS}
        self.entered: list[str] = [REST]
        """the innermost last; also by a thread of autograd (a collective in a hook of a gradient),
        for which the loop's waits
        """
        self._boundaries: list[Any] | None = None
        """of the batch at hand: what begins and when, seconds or an event, in turn; the last one
        ends it
        """
        self._ended: list[list[Any]] = []

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Surrounds a batch. One that an exception ends has no parts."""
        self._boundaries = batch = []
        self.begin(REST)
        try:
            yield
            self.begin(REST)
            self._ended.append(batch)
        finally:
            self._boundaries = None

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Inside, time is charged to `name`; outside of a batch to nothing."""
        return self._parts[name]

    def each(self, name: Part, source: Iterable[T_]) -> Iterator[T_]:
        """`source`, with what it takes to make each next one charged to `name`."""
        iterator = iter(source)
        part = self._parts[name]
        while True:
            with part:
                value = next(iterator, _END)
            if value is _END:
                return
            yield value  # type: ignore[misc]  # not the end

    def begin(self, name: str) -> None:
        """Charge `name` from now on."""
        if self._boundaries is not None:
            self._boundaries += name, self._now()

    def take(self) -> list[dict[str, float]]:
        """The seconds of each part, and of REST, in every batch that ended since the last `take`;
        waits for the device.
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


class _Part:
    """Entered as often as one likes, within itself too."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.entered.append(self._name)
        self._clock.begin(self._name)

    def __exit__(self, *exc: object) -> None:
        entered = self._clock.entered
        entered.pop()
        self._clock.begin(entered[-1])


_END = object()


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    settle(device)
    begun = time.perf_counter()
    act()
    settle(device)
    return time.perf_counter() - begun


def settle(device: torch.device) -> None:
    """Wait for what a card was asked for; on a CPU nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


@contextmanager
def collectives_on(clock: Clock) -> Iterator[None]:
    """Inside, the time of every collective within a batch is charged to "communication".

    Of one that is started and waited for later, the start alone: what is waited for is charged
    where it is waited for."""
    own = {name: getattr(distributed, name) for name in COLLECTIVES}
    for name, collective in own.items():
        setattr(distributed, name, _charged(collective, clock))
    try:
        yield
    finally:
        for name, collective in own.items():
            setattr(distributed, name, collective)


def _charged(collective: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.part("communication"):
            return collective(*args, **kwargs)

    return call
