"""The papers' claims about a rule beside our own measurements: {claim, published, ours, holds?}.

A verdict judges the mean over the seeds that a rule and its baseline both ran (`Group.ratios`,
`Group.differences`). For times it also judges the mean over starts: before any training, the rules
take turns on one batch. If the 95 % interval contains the bound, the verdict says so. A claim that
was not run is listed as not run. Accuracy and time of a single seed have no interval and get no
verdict.
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

_CALLED = {
    "peak_saved_bytes": "saved bytes",
    KEPT: "saved bytes and states",
    COMPUTE: "forward and backward",
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table of claims."""

    about: str  # the rule, and where it was measured
    claim: str  # for example "saved bytes, of BPTT's"
    published: str
    bound: str  # the bound that our value is held to; empty without one
    ours: str
    holds: bool | None  # None: not run here, undecided, a single seed, or no bound
    within_noise: bool = False  # the 95 % interval of our value contains the bound

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "undecided" if self.within_noise else ""
        if self.within_noise:
            return f"{'holds' if self.holds else 'fails'}, within the noise"
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The claims and sweeps that a suite's own report returns, or that MLflow stores for it."""

    claims: tuple[Claim, ...] = ()
    sweeps: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"claims": list(map(asdict, self.claims)), "sweeps": list(map(dict, self.sweeps))}


def parse_result(value: Any, where: str) -> SuiteResult:
    """Read the "claims" and the "sweeps" of a report's value, each a list or a mapping.

    Raises:
        ReportError: an entry is not a claim or not a sweep. `where` names the source of the value.
    """
    value = value if isinstance(value, Mapping) else {}
    return SuiteResult(
        claims=tuple(map(_claim_of, _objects(value.get("claims")))),
        sweeps=tuple(sweep_of(each, where) for each in _objects(value.get("sweeps"))),
    )


# A share, or a function of r, which is the divisor's ratio of backward to forward time. Our value
# may exceed the bound by a tenth. None: the claim has no bound that our value could be held to.
Bound = float | Callable[[float], float] | None


def share(
    about: str, group: Group, rule: str, name: str, *, bound: Bound = None, published: str = ""
) -> Claim:
    """The ratio of a rule's quantity to its baseline's, averaged over the seeds of both.

    Bytes are divided by those of the baseline, compute time by that of the faster BPTT.
    """
    claim = f"{_CALLED[name]}, of {group.against}'s"
    base, paired = group.base_of(name), group.paired(rule, name)
    spread = spread_of(list(paired.values()))
    if spread is None:
        seeds = [{run.seed for run in group.of(each) if run.is_finished} for each in (rule, base)]
        absent = (
            group.describe_lost(rule) or f"no run beside {group.against}'s, trained on the same"
        )
        ours = "not measured" if set.intersection(*seeds) else absent
        return not_judged(about, claim, published, ours=ours)
    low, high = spread.interval or (spread.mean, spread.mean)
    reach = f" ({low:.3f} to {high:.3f})" if f"{low:.3f}" != f"{high:.3f}" else ""
    text = f"{spread.mean:.3f}{reach} of {base}'s, {seeds_in_words(list(paired))}"
    ours = "; ".join(filter(None, (text, group.describe_lost(rule))))
    if bound is None:
        return not_judged(about, claim, published, ours=ours)
    forward, backward = (
        group.by_seed(base, f"steady_{part}_s") for part in ("forward", "backward")
    )
    r = (
        sum(backward[seed] for seed in paired) / sum(forward[seed] for seed in paired)
        if callable(bound)
        else 0.0
    )
    most, limit = held_to(bound, r)
    # Bytes repeat exactly; the speed of a machine moves from run to run.
    is_lone = name == COMPUTE and spread.interval is None
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=limit,
        ours=f"{ours}; one seed, no interval" if is_lone else ours,
        holds=None if is_lone else spread.mean <= most,
        within_noise=low <= most < high,
    )


def share_of_k(T: int, k: int) -> Callable[[float], float]:
    """The share of BPTT's time for T forwards and k backwards: (T + k r) / (T (1 + r))."""
    return lambda r: (T + k * r) / (T * (1 + r))


def share_of_two_forwards(r: float) -> float:
    """The share of BPTT's time for a rule that runs every forward twice: (2 + r) / (1 + r)."""
    return (2 + r) / (1 + r)


def accuracy(about: str, group: Group, rule: str, *, within: float | None, published: str) -> Claim:
    """The claim that a rule is at most `within` points below the baseline over paired seeds.

    The claim holds, fails, or is undecided if the interval contains the bound.
    """
    claim, bound = (
        f"top-1 below {group.against}'s, points",
        "" if within is None else f"<= {within:g}",
    )
    measured = next((each for each in group.differences if each.rule == rule), None)
    if measured is None:
        lost = group.describe_lost(rule)
        return Claim(
            about=about,
            claim=claim,
            published=published,
            bound=bound if lost else "",
            ours=lost or f"no two seeds in common with {group.against}'s, trained on the same",
            holds=False if lost and within is not None else None,
        )
    verdict = None if within is None else measured.verdict(within)
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=bound,
        ours=(
            f"{measured.mean:+.2f} ({measured.low:+.2f} to {measured.high:+.2f}),"
            f" {counted(measured.seeds, 'seed')}"
        )
        + (f", and {measured.diverged} that diverged" if measured.diverged else ""),
        holds={"holds": True, "fails": False}.get(verdict or ""),
        within_noise=verdict == "is undecided",
    )


def not_judged(about: str, claim: str, published: str, *, ours: str) -> Claim:
    return Claim(about=about, claim=claim, published=published, bound="", ours=ours, holds=None)


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """Print the claims. A terminal shows the rule of consecutive lines once."""
    columns = ("rule", *map(prose, ("claim", "published", "held to", "ours")), "")
    rows = [
        (each.about, each.claim, each.published, each.bound, each.ours, each.verdict)
        for each in claims
    ]
    print_table(console, columns, rows, title="claims", keys=2)


def held_to(bound: float | Callable[[float], float], r: float) -> tuple[float, str]:
    most = 1.1 * bound(r) if callable(bound) else bound
    return most, f"<= {most:.3f} (r = {r:.2f})" if callable(bound) else f"<= {bound:.3g}"


def seeds_in_words(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _objects(value: Any) -> list[Mapping[str, Any]]:
    values = value.values() if isinstance(value, Mapping) else value
    return (
        [each for each in values if isinstance(each, Mapping)]
        if isinstance(value, (Mapping, list, tuple))
        else []
    )


def _claim_of(value: Mapping[str, Any]) -> Claim:
    needed = [each.name for each in fields(Claim) if each.default is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ReportError(
            f"report: a claim must have {', '.join(needed)}; there is no {missing[0]}"
        )
    return Claim(**{each.name: value[each.name] for each in fields(Claim) if each.name in value})
