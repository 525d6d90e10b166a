"""What the papers claim of a rule, beside what was measured here: {claim, published, ours, holds?}.

What is judged is what the rest of a report shows: the mean over the seeds that a rule and its
baseline both ran (`Group.ratios`, `Group.differences`); and times as well in the mean of starts in
which rules took turns on one batch, before any training. Where its 95 % interval lies on both sides
of the bound, the verdict says so. A claim that does not hold is shown as not holding, and one that
was not run as that. Accuracy and time of one seed have no interval, and get no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.core.printing import print_table, prose
from pipeline.core.units import counted
from pipeline.recipe import BASELINE, is_baseline
from pipeline.report.largest import largest
from pipeline.report.spread import spread_of
from pipeline.report.study import COMPUTE, KEPT, Group
from pipeline.report.study_run import StudyRun

if TYPE_CHECKING:  # which imports torch, and whoever reads results waits for that
    from pipeline.forecast.interleaved import InterleavedTimes

_CALLED = {
    "peak_saved_bytes": "saved bytes",
    KEPT: "saved bytes and states",
    COMPUTE: "forward and backward",
}


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
    """None: not run here, undecided, of one seed, or reported without a bound"""
    within_noise: bool = False
    """the 95 % interval of ours lies on both sides of the bound"""

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return "undecided" if self.within_noise else ""
        if self.within_noise:
            return f"{'holds' if self.holds else 'fails'}, within the noise"
        return "holds" if self.holds else "does not hold"


def bytes_at_most(
    about: str, group: Group, rule: str, *, bound: float | None, published: str
) -> Claim:
    """Of the baseline's peak; `bound` None: nothing is claimed that ours could be held to."""
    held_to = "" if bound is None else f"<= {bound:.3f}"
    return _share(
        about, group, rule, "peak_saved_bytes", bound=bound, held_to=held_to, published=published
    )


def kept(about: str, group: Group, rule: str) -> Claim:
    """Membranes, traces and what slices share counted in, no storage twice: what no paper tells,
    and a reader must know.
    """
    return _share(about, group, rule, KEPT, bound=None, held_to="", published="")


def flat_in_t(
    about: str, bytes_of_T: Mapping[int, float], *, over: Sequence[int], published: str
) -> Claim:
    """Within 3 % over all of these T: where one was too large for the machine, nothing is
    judged.
    """
    claim = f"saved bytes from T = {min(over)} to {max(over)}"
    if absent := [T for T in over if T not in bytes_of_T]:
        return not_judged(
            about, claim, published, ours=f"not measured at T = {', '.join(map(str, absent))}"
        )
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
    """Its own largest batch at each T and the speed there, beside the faster BPTT's at its own:
    what a rule's memory buys.

    Of batches that were trained; no paper has these, so nothing is judged.
    """
    found = [] if sweep is None else [each for each in largest(sweep) if each.rule == rule]
    limit = None if sweep is None else sweep.get("memory_bytes")
    where = "" if limit is None else f" in {limit / 1e6:.4g} MB"
    tried = [each for each in found if each.beside is not None]
    batches = [f"T = {each.time_steps}: {each.batch:,} of {each.base_batch:,}" for each in tried]
    speeds = [f"T = {each.time_steps}: {each.beside:.2f}" for each in tried]
    for claim, told in (("images of its largest batch", batches), ("images/s of it", speeds)):
        ours = ", ".join(told) or "not measured"
        yield not_judged(
            about, f"{claim}{where}, of the faster {BASELINE}'s at its own", "", ours=ours
        )


def time_at_most(about: str, group: Group, rule: str, *, bound: float, published: str) -> Claim:
    """Of the faster BPTT's compute time."""
    return _share(
        about, group, rule, COMPUTE, bound=bound, held_to=f"<= {bound:g}", published=published
    )


def share_of_k(T: int, k: int) -> Callable[[float], float]:
    """All of T forwards and k of T backwards: (T + k r) / (T (1 + r)) of BPTT's time, as a function
    of r.
    """
    return lambda r: (T + k * r) / (T * (1 + r))


def time_of_k(about: str, group: Group, rule: str, *, T: int, k: int, published: str) -> Claim:
    """At most a tenth more than `share_of_k` of the faster BPTT's, with that one's own r."""
    return _time_by_r(about, group, rule, share_of_k(T, k), published=published)


def time_of_two_forwards(about: str, group: Group, rule: str, *, published: str) -> Claim:
    """Every forward is made twice: at most 1.1 (2 + r) / (1 + r) of the faster BPTT's, with that
    one's own r.
    """
    return _time_by_r(about, group, rule, lambda r: (2 + r) / (1 + r), published=published)


def time_in_turn(
    about: str,
    turns: Mapping[str, InterleavedTimes],
    rule: str,
    *,
    bound: float | Callable[[float], float],
    published: str,
) -> Claim:
    """Of the faster BPTT's, start by start of rules that took turns: what a machine that drifts
    from run to run cannot blur.

    `turns` without the rule: it was not measured so. `bound`: what ours is held to, or a function
    of r, the backward over the forward of what is divided by, and then a tenth more.
    """
    claim = f"{_CALLED[COMPUTE]} in turn, of {BASELINE}'s"
    if rule not in turns:
        return not_judged(about, claim, published, ours="not measured in turn")
    kinds = {each: statistics.fmean(turns[each].compute_s) for each in turns if is_baseline(each)}
    base = min(kinds, key=lambda each: kinds[each])
    r = sum(turns[base].backward_s) / sum(turns[base].forward_s)
    most = 1.1 * bound(r) if callable(bound) else bound
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
        bound=f"<= {most:.3f} (r = {r:.2f})" if callable(bound) else f"<= {most:g}",
        ours=(
            f"{found.mean:.3f} ({low:.3f} to {high:.3f}) of {base}'s, {counts}, at"
            f" {turns[base].commit}"
        ),
        holds=found.mean <= most,
        within_noise=low <= most < high,
    )


def accuracy(about: str, group: Group, rule: str, *, within: float | None, published: str) -> Claim:
    """At most `within` points below the baseline over paired seeds: the whole interval, none of it,
    or undecided.
    """
    claim, bound = (
        f"top-1 below {group.against}'s, points",
        "" if within is None else f"<= {within:g}",
    )
    found = next((difference for difference in group.differences if difference.rule == rule), None)
    if found is None and (lost := group.lost_told(rule)):
        holds = None if within is None else False
        return Claim(
            about=about, claim=claim, published=published, bound=bound, ours=lost, holds=holds
        )
    if found is None:
        return not_judged(
            about,
            claim,
            published,
            ours=f"no two seeds in common with {group.against}'s, trained on the same",
        )
    verdict = None if within is None else found.verdict(within)
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=bound,
        ours=(
            f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}),"
            f" {counted(found.seeds, 'seed')}"
        )
        + (f", and {found.diverged} that diverged" if found.diverged else ""),
        holds={"holds": True, "fails": False}.get(verdict or ""),
        within_noise=verdict == "is undecided",
    )


def temporal_shares(about: str, runs: Sequence[StudyRun]) -> Iterator[Claim]:
    """|g_BPTT - g_SLTT| / |g_BPTT| of each layer at the start and after each epoch, the mean over
    the runs that looked.
    """
    found: dict[str, dict[int, list[float | None]]] = {}
    for run in runs:
        for look in run.fidelity:
            moment = 0 if look.epoch is None else look.epoch + 1
            for layer, share in look.temporal_share.items():
                found.setdefault(layer, {}).setdefault(moment, []).append(share)
    seeds = _seeds([run.seed for run in runs if run.fidelity])
    for layer, by_moment in found.items():
        shares = (
            f"{f'epoch {moment}' if moment else 'start'} {_mean_of_known(each)}"
            for moment, each in sorted(by_moment.items())
        )
        claim = f"share of BPTT's gradient through time, {layer}"
        yield not_judged(about, claim, "", ours=f"{', '.join(shares)}; {seeds}")


def _mean_of_known(shares: Sequence[float | None]) -> str:
    """`0.22 (2 of 3)` where some are not."""
    known = [share for share in shares if share is not None]
    if not known:
        return "not known"
    return f"{statistics.fmean(known):.2f}" + (
        f" ({len(known)} of {len(shares)})" if len(known) < len(shares) else ""
    )


def not_judged(about: str, claim: str, published: str, *, ours: str) -> Claim:
    return Claim(about=about, claim=claim, published=published, bound="", ours=ours, holds=None)


def print_claims(claims: Sequence[Claim], console: Console) -> None:
    """A table, in which a terminal shows once what several lines are about."""
    columns = ("rule", *map(prose, ("claim", "published", "held to", "ours")), "")
    rows = [
        (each.about, each.claim, each.published, each.bound, each.ours, each.verdict)
        for each in claims
    ]
    print_table(console, columns, rows, title="claims", keys=2)


def told(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [asdict(claim) for claim in claims]


def _share(
    about: str,
    group: Group,
    rule: str,
    name: str,
    *,
    bound: float | None,
    held_to: str,
    published: str,
) -> Claim:
    """A rule's `name` over its baseline's, in the mean over the seeds of both; `held_to` is the
    bound in words.
    """
    claim = f"{_CALLED[name]}, of {group.against}'s"
    paired = group.paired(rule, name)
    found = spread_of(list(paired.values()))
    if found is None:
        seeds = [
            {run.seed for run in group.of(each) if run.is_finished}
            for each in (rule, group.base_of(name))
        ]
        absent = group.lost_told(rule) or f"no run beside {group.against}'s, trained on the same"
        return not_judged(
            about, claim, published, ours="not measured" if set.intersection(*seeds) else absent
        )
    low, high = found.interval or (found.mean, found.mean)
    reach = f" ({low:.3f} to {high:.3f})" if f"{low:.3f}" != f"{high:.3f}" else ""
    told = f"{found.mean:.3f}{reach} of {group.base_of(name)}'s, {_seeds(list(paired))}"
    ours = "; ".join(filter(None, (told, group.lost_told(rule))))
    if bound is None:
        return not_judged(about, claim, published, ours=ours)
    is_lone = (
        name == COMPUTE and found.interval is None
    )  # bytes repeat exactly, and a machine's speed moves from run to run
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=held_to,
        ours=f"{ours}; one seed, no interval" if is_lone else ours,
        holds=None if is_lone else found.mean <= bound,
        within_noise=low <= bound < high,
    )


def _time_by_r(
    about: str, group: Group, rule: str, share_of: Callable[[float], float], *, published: str
) -> Claim:
    """A tenth more than `share_of(r)`, r the backward over the forward of what is divided by, over
    the seeds of both.
    """
    base, seeds = group.base_of(COMPUTE), group.paired(rule, COMPUTE)
    bound, held_to = None, ""
    if seeds:
        forward, backward = (
            group.by_seed(base, f"steady_{part}_s") for part in ("forward", "backward")
        )
        r = sum(backward[seed] for seed in seeds) / sum(forward[seed] for seed in seeds)
        bound = 1.1 * share_of(r)
        held_to = f"<= {bound:.3f} (r = {r:.2f})"
    return _share(about, group, rule, COMPUTE, bound=bound, held_to=held_to, published=published)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
