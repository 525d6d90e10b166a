"""What ends a run that cannot go on as asked: one line for the user, and no use in trying again."""

from __future__ import annotations


class Refused(ValueError):
    """Something that the user has to change. Every rank raises it."""


class Diverged(Refused):
    """Training has left all bounds: a loss, a gradient or weights that are not finite.

    A failure where somebody wants the network; an answer where a trial asks how a learning rate does.
    """


def refusal_of(error: ValueError) -> Refused:
    """What the run ends with once every rank knows of the error."""
    return error if isinstance(error, Refused) else Refused(str(error))
