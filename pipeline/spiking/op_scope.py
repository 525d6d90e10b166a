"""The purpose of matrix products outside the network's own forward and backward.

    with op_scope("solver"):
        ...                      # products in here are counted for the solver

Rules open a scope where their own work begins. The operation counter (`measure/operations.py`)
reads `current_scope()`. The innermost scope counts. A scope costs two updates of a context
variable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

# recomputation: a forward repeated for its backward; solver: the adjoint of an equilibrium;
# feedback: signals to hidden layers and the update of their matrices; lateral: the subspaces of old
# tasks and the projection; rates: means over time; limit: the norm of a limited weight
OpScope = Literal["recomputation", "solver", "feedback", "lateral", "rates", "limit"]

_served: ContextVar[OpScope | None] = ContextVar("op_scope", default=None)


@contextmanager
def op_scope(what: OpScope) -> Iterator[None]:
    """Count products inside the block for `what`."""
    token = _served.set(what)
    try:
        yield
    finally:
        _served.reset(token)


def current_scope() -> OpScope | None:
    """The innermost scope; None for the network's own forward or backward."""
    return _served.get()
