"""Charges a clock with what ranks say to one another, whoever says it: a backend, synchronised
norms, a rule.

All of them call `torch.distributed.<collective>`, DeepSpeed 0.19.8 too, which looks most of them up
at each call and keeps one (all_gather_into_tensor) from when it is initialised: so this is entered
before an engine is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from pipeline.measure.clock import Clock

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
