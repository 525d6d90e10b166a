"""What a product is worked out for, where it is neither the forward of a network nor the backward
of one.

    with op_scope("solver"):
        ...                      # every product in here belongs to the solver

A rule says so where its own work begins, and whoever counts operations (`measure/operations.py`)
asks `current_scope()`. Inner beats outer. It costs two moves of a context variable, and nothing happens
where nobody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

OpScope = Literal["recomputation", "solver", "feedback", "lateral", "rates", "limit"]
"""recomputation: a forward made again for its backward; solver: the adjoint of an equilibrium;
feedback: signals to hidden layers, and learning what makes them; lateral: the subspaces of old
tasks, and the projection; rates: means over time; limit: the norm of a weight that is limited"""

_served: ContextVar[OpScope | None] = ContextVar("op_scope", default=None)


@contextmanager
def op_scope(what: OpScope) -> Iterator[None]:
    """Inside, products are worked out for `what`."""
    token = _served.set(what)
    try:
        yield
    finally:
        _served.reset(token)


def current_scope() -> OpScope | None:
    """What products are worked out for at the moment; None: forward or backward of the network."""
    return _served.get()
