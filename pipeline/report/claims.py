"""What the papers claim of a rule, beside what was measured here: {claim, published, ours, holds?}.

A claim that does not hold is shown as not holding, and one that was not run as that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table."""

    about: str
    """the rule, and where"""
    claim: str
    """such as saved bytes, of BPTT's"""
    published: str
    bound: str
    """what ours is held to; empty where nothing is"""
    ours: str
    holds: bool | None
    """None: not run here, or reported without a bound"""

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: ""}[self.holds]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one rule in one study: means over its runs."""

    saved_bytes: float
    forward_s: float
    backward_s: float
    """of a steady batch"""

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def ratio(self) -> float:
        """r, backward over forward."""
        return self.backward_s / self.forward_s


def measured(summaries: Sequence[Mapping[str, Any]]) -> Measured:
    """From the summaries of a rule's runs.

    Raises: ValueError for a run that was too short to be timed.
    """

    def mean(name: str) -> float:
        values = [summary[name] for summary in summaries]
        if None in values:
            raise ValueError(f"claims: a run must have a batch that is neither its first nor counted; got none to take {name} of")
        return statistics.fmean(values)

    return Measured(
        saved_bytes=mean("peak_saved_bytes"), forward_s=mean("steady_forward_s"), backward_s=mean("steady_backward_s")
    )


def saved_bytes(about: str, rule: Measured, bptt: Measured, *, T: int, published: str) -> Claim:
    """At most 1/T + 0.05 of BPTT's."""
    share, bound = rule.saved_bytes / bptt.saved_bytes, 1 / T + 0.05
    return Claim(
        about=about,
        claim="saved bytes, of BPTT's",
        published=published,
        bound=f"<= {bound:.3f}",
        ours=f"{share:.3f}",
        holds=share <= bound,
    )


def flat_in_t(about: str, bytes_of_T: Mapping[int, float], *, published: str) -> Claim:
    """Within 3 % over all T."""
    spread = max(bytes_of_T.values()) / min(bytes_of_T.values()) - 1
    return Claim(
        about=about,
        claim=f"saved bytes from T = {min(bytes_of_T)} to {max(bytes_of_T)}",
        published=published,
        bound="<= +3 %",
        ours=f"{spread:+.1%}",
        holds=spread <= 0.03,
    )


def time_of_k(about: str, rule: Measured, bptts: Iterable[Measured], *, T: int, k: int, published: str) -> Claim:
    """At most 1.1 (T + k r) / (T (1 + r)) of the faster BPTT's compute time, with that one's own r."""
    bptt = _faster(bptts)
    r = bptt.ratio
    bound = 1.1 * (T + k * r) / (T * (1 + r))
    return _time(about, rule, bptt, bound=bound, told=f"<= {bound:.3f} (r = {r:.2f})", published=published)


def time_at_most(about: str, rule: Measured, bptts: Iterable[Measured], *, bound: float, published: str) -> Claim:
    """Of the faster BPTT's compute time."""
    return _time(about, rule, _faster(bptts), bound=bound, told=f"<= {bound:g}", published=published)


def _faster(bptts: Iterable[Measured]) -> Measured:
    return min(bptts, key=lambda each: each.compute_s)


def _time(about: str, rule: Measured, bptt: Measured, *, bound: float, told: str, published: str) -> Claim:
    share = rule.compute_s / bptt.compute_s
    return Claim(
        about=about,
        claim="forward and backward, of BPTT's",
        published=published,
        bound=told,
        ours=f"{share:.3f}",
        holds=share <= bound,
    )


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    table = Table(title="claims", box=None, header_style="bold", pad_edge=False, title_justify="left")
    for title in ("rule", "claim", "published", "held to", "ours", ""):
        table.add_column(title, overflow="fold")
    for claim in claims:
        cells = (claim.about, claim.claim, claim.published, claim.bound, claim.ours, claim.verdict)
        table.add_row(*map(Text, cells))
    console.print(table)


def told(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [asdict(claim) for claim in claims]
