"""The papers' claims about a rule beside what was measured here: {claim, published, ours, holds?}.

Judged is the mean over the seeds that a rule and its baseline both ran (`Group.ratios`,
`Group.differences`), and for times also the mean of starts in which rules took turns on one batch,
before any training. Where the 95 % interval lies on both sides of the bound, the verdict says so.
A claim that was not run is shown as that. Accuracy and time of one seed have no interval, and get
no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.baseline import BASELINE, is_baseline
from pipeline.printing import print_table, prose
from pipeline.report.results import COMPUTE, KEPT, Run
from pipeline.report.runs import ReportError
from pipeline.report.study import Group, spread_of
from pipeline.report.sweeps import largest, sweep_of
from pipeline.units import counted

if TYPE_CHECKING:  # which imports torch
    from pipeline.forecast.turns import Turns

_CALLED = {"peak_saved_bytes": "saved bytes", KEPT: "saved bytes and states", COMPUTE: "forward and backward"}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of the table of claims."""

    about: str  # the rule, and where
    claim: str  # such as: saved bytes, of BPTT's
    published: str
    bound: str  # that ours is held to; empty without one
    ours: str
    holds: bool | None  # None: not run here, undecided, of one seed, or without a bound
    within_noise: bool = False  # the 95 % interval of ours lies on both sides of the bound

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "undecided" if self.within_noise else ""
        if self.within_noise:
            return f"{'holds' if self.holds else 'fails'}, within the noise"
        return "holds" if self.holds else "does not hold"


@dataclass(frozen=True, kw_only=True)
class Returned:
    """The claims and sweeps that a suite's own report returns, or that MLflow keeps of it."""

    claims: tuple[Claim, ...] = ()
    sweeps: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"claims": list(map(asdict, self.claims)), "sweeps": list(map(dict, self.sweeps))}


def returned(value: Any, where: str) -> Returned:
    """The "claims" and the "sweeps" of a report's value, each a list or a mapping of them.

    Raises:
        ReportError: one of them is no claim or no sweep; the value came from `where`.
    """
    value = value if isinstance(value, Mapping) else {}
    return Returned(
        claims=tuple(map(_claim_of, _objects(value.get("claims")))),
        sweeps=tuple(sweep_of(each, where) for each in _objects(value.get("sweeps"))),
    )


Bound = float | Callable[[float], float] | None
"""A share, or a function of r, the backward over the forward of what is divided by: ours may be a
tenth more than its value. None: nothing is claimed that ours could be held to."""


def share(about: str, group: Group, rule: str, name: str, *, bound: Bound = None, published: str = "") -> Claim:
    """A rule's quantity over its baseline's, the mean over the seeds of both.

    Bytes are of the baseline's, and compute time is of the faster BPTT's.
    """
    claim = f"{_CALLED[name]}, of {group.against}'s"
    base, paired = group.base_of(name), group.paired(rule, name)
    found = spread_of(list(paired.values()))
    if found is None:
        seeds = [{run.seed for run in group.of(each) if run.is_finished} for each in (rule, base)]
        absent = group.describe_lost(rule) or f"no run beside {group.against}'s, trained on the same"
        ours = "not measured" if set.intersection(*seeds) else absent
        return not_judged(about, claim, published, ours=ours)
    low, high = found.interval or (found.mean, found.mean)
    reach = f" ({low:.3f} to {high:.3f})" if f"{low:.3f}" != f"{high:.3f}" else ""
    text = f"{found.mean:.3f}{reach} of {base}'s, {_seeds(list(paired))}"
    ours = "; ".join(filter(None, (text, group.describe_lost(rule))))
    if bound is None:
        return not_judged(about, claim, published, ours=ours)
    forward, backward = (group.by_seed(base, f"steady_{part}_s") for part in ("forward", "backward"))
    r = sum(backward[seed] for seed in paired) / sum(forward[seed] for seed in paired) if callable(bound) else 0.0
    most, held_to = _held_to(bound, r)
    # Bytes repeat exactly; the speed of a machine moves from run to run.
    is_lone = name == COMPUTE and found.interval is None
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=held_to,
        ours=f"{ours}; one seed, no interval" if is_lone else ours,
        holds=None if is_lone else found.mean <= most,
        within_noise=low <= most < high,
    )


def share_of_k(T: int, k: int) -> Callable[[float], float]:
    """Of all of T forwards and k of T backwards: (T + k r) / (T (1 + r)) of BPTT's time."""
    return lambda r: (T + k * r) / (T * (1 + r))


def share_of_two_forwards(r: float) -> float:
    """Of a rule that makes every forward twice: (2 + r) / (1 + r) of BPTT's time."""
    return (2 + r) / (1 + r)


def flat_in_t(about: str, bytes_of_T: Mapping[int, float], *, over: Sequence[int], published: str) -> Claim:
    """Within 3 % over all of these T: where one was too large for the machine, nothing is judged."""
    claim = f"saved bytes from T = {min(over)} to {max(over)}"
    if absent := [T for T in over if T not in bytes_of_T]:
        return not_judged(about, claim, published, ours=f"not measured at T = {', '.join(map(str, absent))}")
    measured = [bytes_of_T[T] for T in over]
    spread = max(measured) / min(measured) - 1
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound="<= +3 %",
        ours=f"{spread:+.1%}",
        holds=spread <= 0.03,
    )


def at_their_largest(about: str, sweep: Mapping[str, Any] | None, rule: str) -> Iterator[Claim]:
    """Its own largest batch at each T and the speed there, beside the faster BPTT's at its own: what a rule's memory buys.

    Of batches that were trained; no paper has these, so nothing is judged.
    """
    found = [] if sweep is None else [each for each in largest(sweep) if each.rule == rule]
    limit = None if sweep is None else sweep.get("memory_bytes")
    where = "" if limit is None else f" in {limit / 1e6:.4g} MB"
    tried = [each for each in found if each.ratio is not None]
    batches = [f"T = {each.time_steps}: {each.batch:,} of {each.base_batch:,}" for each in tried]
    speeds = [f"T = {each.time_steps}: {each.ratio:.2f}" for each in tried]
    for claim, told in (("images of its largest batch", batches), ("images/s of it", speeds)):
        ours = ", ".join(told) or "not measured"
        yield not_judged(about, f"{claim}{where}, of the faster {BASELINE}'s at its own", "", ours=ours)


def time_in_turn(
    about: str, turns: Mapping[str, Turns], rule: str, *, bound: float | Callable[[float], float], published: str
) -> Claim:
    """Of the faster BPTT's, start by start of rules that took turns: what a machine that drifts from run to run cannot blur.

    `turns` without the rule: it was not measured so. `bound`: what ours is held to, or a function of r, the backward over the
    forward of what is divided by, and then a tenth more.
    """
    claim = f"{_CALLED[COMPUTE]} in turn, of {BASELINE}'s"
    if rule not in turns:
        return not_judged(about, claim, published, ours="not measured in turn")
    kinds = {each: statistics.fmean(turns[each].compute_s) for each in turns if is_baseline(each)}
    base = min(kinds, key=lambda each: kinds[each])
    r = sum(turns[base].backward_s) / sum(turns[base].forward_s)
    most, held_to = _held_to(bound, r)
    seconds = zip(turns[rule].compute_s, turns[base].compute_s, strict=True)
    found = spread_of([mine / its for mine, its in seconds])
    assert found is not None and found.interval is not None, "of several starts"
    low, high = found.interval
    starts, samples = counted(found.runs, "start"), counted(turns[base].samples, "sample")
    counts = f"{starts} of {turns[base].processes} at once, {samples} each, {turns[base].backend}"
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=held_to,
        ours=f"{found.mean:.3f} ({low:.3f} to {high:.3f}) of {base}'s, {counts}, at {turns[base].commit}",
        holds=found.mean <= most,
        within_noise=low <= most < high,
    )


def accuracy(about: str, group: Group, rule: str, *, within: float | None, published: str) -> Claim:
    """At most `within` points below the baseline over paired seeds: the whole interval, none of it, or undecided."""
    claim, bound = f"top-1 below {group.against}'s, points", "" if within is None else f"<= {within:g}"
    found = next((difference for difference in group.differences if difference.rule == rule), None)
    if found is None and (lost := group.describe_lost(rule)):
        holds = None if within is None else False
        return Claim(about=about, claim=claim, published=published, bound=bound, ours=lost, holds=holds)
    if found is None:
        return not_judged(about, claim, published, ours=f"no two seeds in common with {group.against}'s, trained on the same")
    verdict = None if within is None else found.verdict(within)
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=bound,
        ours=f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}), {counted(found.seeds, 'seed')}"
        + (f", and {found.diverged} that diverged" if found.diverged else ""),
        holds={"holds": True, "fails": False}.get(verdict or ""),
        within_noise=verdict == "is undecided",
    )


def temporal_shares(about: str, runs: Sequence[Run]) -> Iterator[Claim]:
    """|g_BPTT - g_SLTT| / |g_BPTT| of each layer at the start and after each epoch, the mean over the runs that looked."""
    found: dict[str, dict[int, list[float | None]]] = {}
    for run in runs:
        for look in run.history.fidelity:
            moment = 0 if look.epoch is None else look.epoch + 1
            for layer, share in look.temporal_share.items():
                found.setdefault(layer, {}).setdefault(moment, []).append(share)
    seeds = _seeds([run.seed for run in runs if run.history.fidelity])
    for layer, by_moment in found.items():
        shares = (
            f"{f'epoch {moment}' if moment else 'start'} {_mean_of_known(each)}" for moment, each in sorted(by_moment.items())
        )
        claim = f"share of BPTT's gradient through time, {layer}"
        yield not_judged(about, claim, "", ours=f"{', '.join(shares)}; {seeds}")


def _mean_of_known(shares: Sequence[float | None]) -> str:
    """`0.22 (2 of 3)` where some are not."""
    known = [share for share in shares if share is not None]
    if not known:
        return "not known"
    return f"{statistics.fmean(known):.2f}" + (f" ({len(known)} of {len(shares)})" if len(known) < len(shares) else "")


def not_judged(about: str, claim: str, published: str, *, ours: str) -> Claim:
    return Claim(about=about, claim=claim, published=published, bound="", ours=ours, holds=None)


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """A table, in which a terminal shows once what several lines are about."""
    columns = ("rule", *map(prose, ("claim", "published", "held to", "ours")), "")
    rows = [(each.about, each.claim, each.published, each.bound, each.ours, each.verdict) for each in claims]
    print_table(console, columns, rows, title="claims", keys=2)


def _held_to(bound: float | Callable[[float], float], r: float) -> tuple[float, str]:
    most = 1.1 * bound(r) if callable(bound) else bound
    return most, f"<= {most:.3f} (r = {r:.2f})" if callable(bound) else f"<= {bound:.3g}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _objects(value: Any) -> list[Mapping[str, Any]]:
    values = value.values() if isinstance(value, Mapping) else value
    return [each for each in values if isinstance(each, Mapping)] if isinstance(value, (Mapping, list, tuple)) else []


def _claim_of(value: Mapping[str, Any]) -> Claim:
    needed = [each.name for each in fields(Claim) if each.default is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ReportError(f"report: a claim must have {', '.join(needed)}; there is no {missing[0]}")
    return Claim(**{each.name: value[each.name] for each in fields(Claim) if each.name in value})
