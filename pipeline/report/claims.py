"""The papers' claims about each rule, compared with our own measurements.

A verdict judges the mean over the seeds that a rule and its baseline both ran (`Group.ratios`,
`Group.differences`). If the 95 % interval contains the bound, the verdict says so. Accuracy and
time of a single seed have no interval and get no verdict. A claim about accuracy fails if the rule
diverged in a seed in which the baseline finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from rich.console import Console

from pipeline.core.printing import print_table, prose
from pipeline.core.units import counted
from pipeline.report.metrics import COMPUTE, KEPT
from pipeline.report.results import ReportError
from pipeline.report.study import Group, spread_of
from pipeline.report.sweeps import sweep_of

_TITLES = {
    "peak_saved_bytes": "saved bytes",
    KEPT: "saved bytes and states",
    COMPUTE: "forward and backward",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    about: str  # the rule, and where it was measured
    claim: str  # for example "saved bytes, of BPTT's"
    published: str
    bound: str  # the bound that our value must meet; empty without one
    ours: str
    holds: bool | None  # None: not measured, undecided, no bound, or no interval (accuracy, time)
    within_noise: bool = False  # the 95 % interval of our value contains the bound

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "undecided" if self.within_noise else ""
        if self.within_noise:
            return f"{'holds' if self.holds else 'fails'}, within the noise"
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """What a suite's own report returned and printed. Without a title, it is of the whole page."""

    claims: tuple[Claim, ...] = ()
    sweeps: tuple[Mapping[str, Any], ...] = ()
    printed: str = ""
    key: str = ""  # begins the names of its files
    title: str = ""  # the suite, with the commits and machines of its shown runs
    version: str = ""
    note: str = ""  # why the report is omitted

    def to_json(self) -> dict[str, Any]:
        return {
            "claims": list(map(asdict, self.claims)),
            "sweeps": list(map(dict, self.sweeps)),
            "printed": self.printed,
        }


def parse_result(value: Any, where: str, *, printed: str = "") -> SuiteReport:
    """Read the "claims" and the "sweeps" of a report's value, each a list or a mapping.

    Entries that are no mapping are ignored.

    Args:
        where: the source of the value, for messages.
        printed: the text that the report printed.

    Raises:
        ReportError: a claim lacks a field, or a sweep has another form.
    """
    value = value if isinstance(value, Mapping) else {}
    return SuiteReport(
        claims=tuple(map(_claim_of, _objects(value.get("claims")))),
        sweeps=tuple(sweep_of(each, where) for each in _objects(value.get("sweeps"))),
        printed=printed,
    )


# The largest share that meets the claim, or a function of r that returns a share. r is the
# baseline's ratio of backward to forward time. Our value may exceed the returned share by a tenth.
# None: the claim has no bound.
Bound = float | Callable[[float], float] | None


def share(
    about: str, group: Group, rule: str, name: str, *, bound: Bound = None, published: str = ""
) -> Claim:
    """The ratio of a rule's quantity to its baseline's, averaged over the seeds of both.

    Bytes are divided by those of the baseline, compute time by that of the faster BPTT.
    """
    claim = f"{_TITLES[name]}, of {group.against}'s"
    base, paired = group.base_of(name), group.paired(rule, name)
    spread = spread_of(list(paired.values()))
    if spread is None:
        seeds = [{run.seed for run in group.of(each) if run.is_finished} for each in (rule, base)]
        ours = "not measured"
        if not set.intersection(*seeds):
            ours = group.describe_lost(rule) or (
                f"no run with a seed of {group.against} on the same machine"
            )
        return not_judged(about, claim, published, ours=ours)
    low, high = spread.interval or (spread.mean, spread.mean)
    interval = f" ({low:.3f} to {high:.3f})" if f"{low:.3f}" != f"{high:.3f}" else ""
    text = f"{spread.mean:.3f}{interval} of {base}'s, {seeds_in_words(list(paired))}"
    ours = "; ".join(filter(None, (text, group.describe_lost(rule))))
    if bound is None:
        return not_judged(about, claim, published, ours=ours)
    forward, backward = (
        group.by_seed(base, f"steady_{part}_s") for part in ("forward", "backward")
    )
    r = 0.0
    if callable(bound):
        r = sum(backward[seed] for seed in paired) / sum(forward[seed] for seed in paired)
    max_ratio, bound_text = held_to(bound, r)
    # Bytes repeat exactly, but the speed of a machine varies between runs.
    needs_interval = name == COMPUTE and spread.interval is None
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=bound_text,
        ours=f"{ours}; one seed, no interval" if needs_interval else ours,
        holds=None if needs_interval else spread.mean <= max_ratio,
        within_noise=low <= max_ratio < high,
    )


def share_of_k(T: int, k: int) -> Callable[[float], float]:
    """A function of r: the share of BPTT's time for T forwards and k backwards.

    The share is (T + k r) / (T (1 + r)).
    """
    return lambda r: (T + k * r) / (T * (1 + r))


def share_of_two_forwards(r: float) -> float:
    """The share of BPTT's time for a rule that runs every forward twice: (2 + r) / (1 + r)."""
    return (2 + r) / (1 + r)


def accuracy(about: str, group: Group, rule: str, *, within: float | None, published: str) -> Claim:
    """The claim that a rule is at most `within` points below the baseline over paired seeds.

    The claim is not judged if `within` is None. It fails if the rule diverged in a seed in which
    the baseline finished. Otherwise, it is undecided if the interval contains the bound, and
    not judged if there are fewer than two common seeds.
    """
    claim = f"top-1 below {group.against}'s, points"
    bound = "" if within is None else f"<= {within:g}"
    measured = next((each for each in group.differences if each.rule == rule), None)
    if measured is None:
        lost = group.describe_lost(rule)
        return Claim(
            about=about,
            claim=claim,
            published=published,
            bound=bound if lost else "",
            ours=lost or f"fewer than two seeds of {group.against} on the same machine",
            holds=False if lost and within is not None else None,
        )
    verdict = None if within is None else measured.verdict(within)
    ours = (
        f"{measured.mean:+.2f} ({measured.low:+.2f} to {measured.high:+.2f}),"
        f" {counted(measured.seeds, 'seed')}"
    )
    if measured.diverged:
        ours += f", and {measured.diverged} that diverged"
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=bound,
        ours=ours,
        holds={"holds": True, "fails": False}.get(verdict or ""),
        within_noise=verdict == "is undecided",
    )


def not_judged(about: str, claim: str, published: str, *, ours: str) -> Claim:
    return Claim(about=about, claim=claim, published=published, bound="", ours=ours, holds=None)


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    columns = ("rule", *map(prose, ("claim", "published", "bound", "ours")), "")
    rows = [
        (each.about, each.claim, each.published, each.bound, each.ours, each.verdict)
        for each in claims
    ]
    print_table(console, columns, rows, title="claims", keys=2)


def held_to(bound: float | Callable[[float], float], r: float) -> tuple[float, str]:
    """The largest value that meets the bound, and the bound as text."""
    if not callable(bound):
        return bound, f"<= {bound:.3g}"
    limit = 1.1 * bound(r)
    return limit, f"<= {limit:.3f} (r = {r:.2f})"


def seeds_in_words(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _objects(value: Any) -> list[Mapping[str, Any]]:
    values = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, list, tuple)):
        return []
    return [each for each in values if isinstance(each, Mapping)]


def _claim_of(value: Mapping[str, Any]) -> Claim:
    needed = [each.name for each in fields(Claim) if each.default is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ReportError(
            f"report: a claim must have {', '.join(needed)}; it lacks {', '.join(missing)}"
        )
    return Claim(**{each.name: value[each.name] for each in fields(Claim) if each.name in value})
