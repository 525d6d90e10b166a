"""The purpose of operations outside the network's own forward and backward.

    with op_scope("solver"):
        ...                      # operations here are counted under "solver"

Rules and limited weights open scopes around their own computations. The operation counter
(`measure/operations.py`) reads `current_scope()`, which is the innermost scope.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

# recomputation: a second forward, for the backward; solver: the adjoint of an equilibrium;
# feedback: signals to hidden layers, and the update of feedback matrices; lateral: lateral
# neurons, and the projection of gradients; rates: means over time; limit: the norm of a limited
# weight
OpScope = Literal["recomputation", "solver", "feedback", "lateral", "rates", "limit"]

_current_scope: ContextVar[OpScope | None] = ContextVar("op_scope", default=None)


@contextmanager
def op_scope(scope: OpScope) -> Iterator[None]:
    """Count operations inside the block under `scope`."""
    token = _current_scope.set(scope)
    try:
        yield
    finally:
        _current_scope.reset(token)


def current_scope() -> OpScope | None:
    """The innermost scope; None for the network's own forward or backward."""
    return _current_scope.get()
