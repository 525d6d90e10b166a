"""The causal test of what membranes carry over, as a table."""

from __future__ import annotations

from rich.console import Console

from pipeline.ensemble import CausalTest, Ensemble, Mean
from pipeline.printing import new_console, number, print_table, say
from pipeline.units import counted

_TITLES = ("T", "carry-over", "one step", "ensemble", "gap", "disagree", "below real", "loss of one", "loss of ensemble")


def print_carryover(found: CausalTest, name: str, *, by: str | None = None, console: Console | None = None) -> None:
    """One line for each T and carry-over: accuracies in per cent and their differences in points, ± standard errors.

    `by`: what the groups are that the errors are over; None: each sample was taken to be drawn by itself.
    """
    console = console or new_console()
    columns = [title if title == "carry-over" else number(title) for title in _TITLES]
    print_table(console, columns, map(_cells, found.ensembles), title=name, keys=2)
    over = "as if each were drawn by itself" if by is None else f"over their {counted(found.groups, 'group')} by {by}"
    say(
        console,
        f"{counted(found.samples, 'sample')}, ± one standard error {over}; gaussian: their moments; "
        f"shuffled: {found.same_class:.1%} of donors are of the same class; one batch carried over {found.bytes / 1e6:.4g} MB",
    )


def _cells(one: Ensemble) -> tuple[str, ...]:
    return (
        str(one.steps),
        one.carry_over,
        _share(one.single),
        _share(one.ensemble),
        _points(one.gap),
        _share(one.disagreement),
        _points(one.below_real) if one.carry_over != "real" else "",
        f"{one.single_loss.value:.4f}",
        f"{one.ensemble_loss.value:.4f}",
    )


def _share(mean: Mean) -> str:
    return f"{mean.value:.2%}"


def _points(mean: Mean) -> str:
    return f"{100 * mean.value:+.2f} ± {100 * mean.error:.2f}"
