"""How the study of SLTT's and OTTT's claims judges what it measures beside its runs."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.core.units import counted
from pipeline.recipe import BASELINE, is_baseline
from pipeline.report.claims import Bound, Claim, held_to, not_judged, seeds_in_words
from pipeline.report.results import Run
from pipeline.report.study import spread_of
from pipeline.report.sweeps import fastest_baselines, points_of


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
    points = [] if sweep is None else points_of(sweep)
    fastest, batches, speeds = fastest_baselines(points), [], []
    for each in points:
        base = fastest.get(each.time_steps)
        if each.rule == rule and each.images_per_s is not None and base is not None:
            batches.append(f"T = {each.time_steps}: {each.batch:,} of {base.batch:,}")
            ratio = each.images_per_s / (base.images_per_s or 1)
            speeds.append(f"T = {each.time_steps}: {ratio:.2f}")
    limit = None if sweep is None else sweep.get("memory_bytes")
    where = "" if limit is None else f" in {limit / 1e6:.4g} MB"
    for claim, values in (("images of its largest batch", batches), ("images/s of it", speeds)):
        ours = ", ".join(values) or "not measured"
        yield not_judged(
            about, f"{claim}{where}, of the faster {BASELINE}'s at its own", "", ours=ours
        )


def time_in_turn(
    about: str,
    turns: Mapping[str, Mapping[str, Any]],
    rule: str,
    *,
    bound: Bound = None,
    published: str = "",
) -> Claim:
    """A rule's time over the faster BPTT's, start by start of rules that took turns, so that the
    drift of a machine drops out.

    Args:
        turns: fields of InterleavedTimes by rule; without the rule, nothing is judged.
        bound: what ours is held to, or a function of r, the backward over the forward of what is
            divided by; ours may be a tenth more than its value. None: nothing is judged.
    """
    claim = f"forward and backward in turn, of {BASELINE}'s"
    if rule not in turns:
        return not_judged(about, claim, published, ours="not measured in turn")
    compute = {
        each: [sum(both) for both in zip(of["forward_s"], of["backward_s"], strict=True)]
        for each, of in turns.items()
    }
    base = min(filter(is_baseline, turns), key=lambda each: statistics.fmean(compute[each]))
    of = turns[base]
    found = spread_of([mine / its for mine, its in zip(compute[rule], compute[base], strict=True)])
    assert found is not None and found.interval is not None, "of several starts"
    low, high = found.interval
    starts, samples = counted(found.runs, "start"), counted(of["samples"], "sample")
    counts = f"{starts} of {of['processes']} at once, {samples} each, {of['backend']}"
    ours = f"{found.mean:.3f} ({low:.3f} to {high:.3f}) of {base}'s, {counts}, at {of['commit']}"
    if bound is None:
        return not_judged(about, claim, published, ours=ours)
    most, limit = held_to(bound, sum(of["backward_s"]) / sum(of["forward_s"]))
    return Claim(
        about=about,
        claim=claim,
        published=published,
        bound=limit,
        ours=ours,
        holds=found.mean <= most,
        within_noise=low <= most < high,
    )


def temporal_shares(about: str, runs: Sequence[Run]) -> Iterator[Claim]:
    """|g_BPTT - g_SLTT| / |g_BPTT| of each layer at the start and after each epoch, the mean over
    the runs that looked.
    """
    found: dict[str, dict[int, list[float | None]]] = {}
    for run in runs:
        for look in run.history.fidelity:
            moment = 0 if look.epoch is None else look.epoch + 1
            for layer, value in look.temporal_share.items():
                found.setdefault(layer, {}).setdefault(moment, []).append(value)
    seeds = seeds_in_words([run.seed for run in runs if run.history.fidelity])
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
