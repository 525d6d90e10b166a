"""What SLTT and OTTT claim against BPTT, measured on Fashion-MNIST: memory, time, accuracy, and the
part of the gradient that they drop.

Command:  spiketrain write fashion --out data/fashion
          spiketrain launch recipes/compare/claims_fashion.py
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311; Xiao et al. 2022 (OTTT), arXiv:2210.04195; the
          network is one of ours.
Result:   SLTT keeps 0.30 of the bytes that BPTT keeps for backward, and takes 1.17 and 1.15 of its
          time in turn, SLTT-1 0.60 and 0.59; no rule loses 0.5 points on average, within 0.7 is
          undecided; 36 runs, commit 19f97825ba12, AMD EPYC: docs/results.md, "Published claims".

Two studies, at the decays of the two papers (1/11 and 0.5), T = 6, five rules, BPTT as the papers
have it and three seeds in each; all share the learning rate 0.3. SLTT-K is rescaled by T/K, so that
its expected gradient is SLTT's. Times are of rules in turn, because runs share their machine.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.printing import say
from pipeline.recipe import Evaluation, Recipe, Suite, spec
from pipeline.recipe.json import read_json
from pipeline.recipe.suite import Measurement
from pipeline.report.claims import (
    Claim,
    accuracy,
    not_judged,
    print_claims,
    seeds_in_words,
    share,
    share_of_k,
    share_of_two_forwards,
)
from pipeline.report.compare import Comparison, comparisons
from pipeline.report.metrics import KEPT
from pipeline.report.results import Run, read_run
from pipeline.report.study import WITHIN, Group, spread_of
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.track.run_state import state_of, top1_of
from recipes.compare.claims_base import (
    at_their_largest,
    flat_in_t,
    temporal_shares,
    time_in_turn,
)
from recipes.fashion.base import fashion
from recipes.imagenet.nf_resnet34_sltt import recipe as nf_resnet34_sltt

T, EPOCHS, SEEDS = 6, 3, (0, 1, 2)
SWEPT = (2, 4, 8, 16)
DRAWN = ("bptt", "bptt-recompute", "sltt", "ottt-a")
"""whose memory and time are measured at each of SWEPT"""
LARGEST_IN = 100_000_000
"""bytes that each rule's own largest batch is looked for in, with what lies beside it"""
BATCH = 256  # on one worker; the papers have 128 a device
STUDIES = {"decay-1-11": (1 / 11, 0.3), "decay-1-2": (0.5, 0.3)}
"""decay, and a learning rate that SLTT-1's rescaled gradient bears"""
RULES = {
    "bptt": spec(BPTT),
    "bptt-stepped": spec(BPTT, chunk=1),
    "bptt-recompute": spec(BPTT, recompute=True),
    "sltt": spec(SLTT),
    "sltt-1": spec(SLTT, k=1, rescale=True),
    "sltt-2": spec(SLTT, k=2, rescale=True),
    "ottt-a": spec(OTTT),
}
TRAINED = ("bptt", "sltt", "sltt-1", "sltt-2", "ottt-a")
KEPT_RESET = "bptt-kept-reset"
"""BPTT as the papers have it: the gradient passes through the reset, which is detached here"""
CLAIMED = {RULES[rule].build().label for rule in ("bptt", "sltt", "sltt-1")}
PLANNED_FOR = {"device": "v100", "samples": 1_281_167, "workers": 1}
"""one card, and the training images of ImageNet"""


def recipe() -> Suite:
    return Suite(
        recipes=tuple(each for study in STUDIES for each in _of_study(study)),
        report=report,
        measurements=(
            *(each for study in STUDIES for each in _beside(study)),
            Measurement("imagenet", "plan", _imagenet_recipes(), PLANNED_FOR),
        ),
    )


def _beside(study: str) -> Iterator[Measurement]:
    """Bytes and time by T, each rule's largest batch, and times of rules that took turns."""

    def of(rules: Iterable[str]) -> tuple[str | Recipe, ...]:
        shared = _shared(study)
        return tuple(
            _name(study, rule, SEEDS[0]) if rule in TRAINED else replace(shared, rule=RULES[rule])
            for rule in rules
        )

    yield Measurement(f"{study}-by-t", "sweep", of(DRAWN), {"steps": SWEPT})
    largest = {"memory_bytes": LARGEST_IN, "at_largest": True}
    yield Measurement(f"{study}-largest", "sweep", of(RULES), largest)
    yield Measurement(f"{study}-in-turn", "interleaved", of(RULES))


def _imagenet_recipes() -> tuple[Recipe, ...]:
    """NF-ResNet-34 at T = 6 in fp32, as the sheet of the card has it."""
    shared = replace(nf_resnet34_sltt(), precision="fp32")
    rules = (RULES["bptt"], RULES["sltt"], spec(SLTT, k=1))
    return tuple(replace(shared, rule=rule) for rule in rules)


def _of_study(study: str) -> Iterator[Recipe]:
    shared = _shared(study)
    neuron = shared.model.kwargs["neuron"]
    kept = shared.model.with_(neuron=neuron.with_(reset_gradient="kept"))
    for seed in SEEDS:
        for rule in TRAINED:
            yield replace(shared, name=_name(study, rule, seed), rule=RULES[rule], seed=seed)
        yield replace(shared, name=_name(study, KEPT_RESET, seed), model=kept, seed=seed)


def _shared(study: str) -> Recipe:
    decay, rate = STUDIES[study]
    base = fashion()
    return replace(
        base,
        name=f"claims-{study}",
        rule=RULES["bptt"],
        model=base.model.with_(neuron=base.model.kwargs["neuron"].with_(decay=decay)),
        optimizer=base.optimizer.with_(lr=rate),
        time_steps=T,
        batch_size=BATCH,
        epochs=EPOCHS,
        evaluation=Evaluation(every=0, fidelity_every=1),
    )


def _name(study: str, rule: str, seed: int) -> str:
    return f"claims-{study}-{rule}-{seed}"


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    studies, claims, sweeps = {}, [], {}
    for study in STUDIES:
        folders = {rule: [runs[_name(study, rule, seed)] for seed in SEEDS] for rule in TRAINED}
        every = [folder for each in folders.values() for folder in each]
        if all(state_of(folder) == "diverged" for folder in every):
            claims.append(_lost(study, len(every)))
            continue
        found = comparisons(every[0].parent, every)
        for comparison in found:
            comparison.render(console)
        studies[study] = [comparison.to_json() for comparison in found]
        beside = {
            of: _measured(runs, f"{study}-{of}", console) for of in ("by-t", "largest", "in-turn")
        }
        named = {"by T": beside["by-t"], "largest batches": beside["largest"]}
        sweeps |= {f"{study}, {of}": sweep for of, sweep in named.items() if sweep is not None}
        trained = Recipe.read(folders["bptt"][0] / "recipe.json")
        group = _most_complete(study, found, console).group
        claims += _claims(trained, group, beside, [read_run(folder) for folder in folders["sltt"]])
        kept = [runs[_name(study, KEPT_RESET, seed)] for seed in SEEDS]
        claims += [_below_kept(study, rule, kept, of_rule) for rule, of_rule in folders.items()]
        about = f"BPTT, the reset's gradient kept, {study}"
        claims += temporal_shares(about, [read_run(folder) for folder in kept])
    claims += _imagenet(_measured(runs, "imagenet", console))
    print_claims(claims, console)
    return {"claims": [asdict(claim) for claim in claims], "studies": studies, "sweeps": sweeps}


def _measured(runs: Mapping[str, Path], name: str, console: Console) -> dict[str, Any] | None:
    """The result of a measurement of the suite; None, and a line that says why, without one."""
    found = read_json(runs[name])
    # Sweeps and plans have a mapping "refused", of the rules or steps that were not measured.
    if not isinstance(found.get("refused"), str):
        return found
    say(console, f"{name}: not measured: {found['refused']}")
    return None


def _below_kept(study: str, rule: str, kept: Sequence[Path], others: Sequence[Path]) -> Claim:
    """A rule, by which the reset is detached, below BPTT with the reset's gradient kept, as the
    papers have it, over the seeds that finished both.
    """
    points = {
        seed: 100 * (one - other)
        for seed, one, other in zip(SEEDS, map(top1_of, kept), map(top1_of, others), strict=True)
        if one is not None and other is not None
    }
    spread = spread_of([*points.values()])
    ours = "no seed finished both"
    if spread is not None:
        low, high = spread.interval or (-math.inf, math.inf)
        seeds = seeds_in_words([*points])
        ours = f"{spread.mean:+.2f} ({low:+.2f} to {high:+.2f}), {seeds}"
    label, claim = RULES[rule].build().label, "top-1 below BPTT's with the reset's gradient kept"
    return not_judged(f"{label}, {study}", f"{claim}, points", "the papers keep it", ours=ours)


def _lost(study: str, runs: int) -> Claim:
    ours = f"all {runs} runs diverged"
    return Claim(
        about=study, claim="every claim of it", published="", bound="", ours=ours, holds=False
    )


def _most_complete(study: str, found: list[Comparison], console: Console) -> Comparison:
    """The one with most of the rules that claims are of, then runs, by which they are judged; a
    line tells of runs elsewhere.
    """
    judged = max(
        found,
        key=lambda comparison: (
            len(CLAIMED & set(comparison.group.finished_rules)),
            len(comparison.group.finished),
        ),
    )
    if elsewhere := [
        run.name
        for comparison in found
        if comparison is not judged
        for run in comparison.group.finished
    ]:
        say(
            console,
            f"{study}: claims are judged on {judged.where} alone; elsewhere:"
            f" {', '.join(elsewhere)}",
        )
    return judged


def _claims(
    trained: Recipe,
    group: Group,
    beside: Mapping[str, Mapping[str, Any] | None],
    looked: Sequence[Run],
) -> Iterator[Claim]:
    """The claims of a study. A rule without a run beside BPTT's leaves a claim without a verdict.

    Args:
        beside: what was measured of the study, by the ends of the names of `_beside`.
        looked: runs that compared gradients.
    """
    swept, largest, turns = beside["by-t"], beside["largest"], beside["in-turn"] or {}
    T, decay = (
        trained.time_steps,
        Fraction(trained.value_of("model.neuron.decay")).limit_denominator(100),
    )

    def about(rule: str) -> str:
        return f"{rule}, decay {decay}, T = {T}"

    constant = 1 / T + 0.05
    of = (about("SLTT"), group, "SLTT")
    yield share(
        *of,
        "peak_saved_bytes",
        bound=constant,
        published="0.30 of GPU memory (ImageNet), 0.36 of GPU memory (CIFAR-10)",
    )
    yield share(*of, KEPT)
    yield flat_in_t(about("SLTT"), _bytes_of_T(swept, "SLTT"), over=SWEPT, published="constant")
    yield from at_their_largest(about("SLTT"), largest, "SLTT")
    published = "0.91 of training hours (ImageNet), 0.72 of training hours (CIFAR-10)"
    yield time_in_turn(about("SLTT"), turns, "SLTT", bound=1.0, published=published)
    yield accuracy(*of, within=WITHIN, published="+0.28 (ImageNet), +0.01 (CIFAR-10)")
    yield from temporal_shares(about("SLTT"), looked)
    of = (about("SLTT-1"), group, "SLTT-1")
    one, two = (
        "0.43 of training hours (ImageNet)",
        "half of the training time, of SLTT-K (abstract)",
    )
    yield time_in_turn(about("SLTT-1"), turns, "SLTT-1", bound=share_of_k(T, 1), published=one)
    yield from at_their_largest(about("SLTT-1"), largest, "SLTT-1")
    yield accuracy(*of, within=WITHIN, published="+0.30 (ImageNet)")
    of = (about("SLTT-2"), group, "SLTT-2")
    yield share(*of, "peak_saved_bytes", bound=constant, published="as SLTT's")
    yield time_in_turn(about("SLTT-2"), turns, "SLTT-2", bound=share_of_k(T, 2), published=two)
    yield from at_their_largest(about("SLTT-2"), largest, "SLTT-2")
    yield accuracy(*of, within=None, published="")
    of = (about("OTTT-A"), group, "OTTT-A")
    yield share(
        *of, "peak_saved_bytes", bound=0.5, published="0.33 to 0.50 of GPU memory (CIFAR-10)"
    )
    yield share(*of, KEPT)
    yield time_in_turn(about("OTTT-A"), turns, "OTTT-A")
    yield from at_their_largest(about("OTTT-A"), largest, "OTTT-A")
    yield accuracy(*of, within=WITHIN, published="-0.74 (CIFAR-10), -1.99 (CIFAR-100)")
    yield time_in_turn(
        about("BPTT-recompute"),
        turns,
        "BPTT-recompute",
        bound=share_of_two_forwards,
        published="one more forward a batch (Chen et al. 2016)",
    )
    yield from at_their_largest(about("BPTT-recompute"), largest, "BPTT-recompute")


def _bytes_of_T(swept: Mapping[str, Any] | None, rule: str) -> dict[int, float]:
    points = () if swept is None else swept["points"]
    costs = {
        point["time_steps"]: point["cost"] for point in points if point["cost"]["rule"] == rule
    }
    return {steps: cost["peak_saved_bytes"] for steps, cost in costs.items()}


def _imagenet(plan: Mapping[str, Any] | None) -> Iterator[Claim]:
    """NF-ResNet-34 at T = 6: published figures of one card with AMP, and what a plan in fp32
    predicts.
    """
    planned = {} if plan is None else {each["rule"]: _predicted(each) for each in plan["rules"]}
    refused = {} if plan is None else plan["refused"]
    planned |= {rule: f"not planned: {why}" for rule, why in refused.items()}
    published = {
        "BPTT": ("28.41 GB, AMP", "73.8 h, AMP", "66.47 %"),
        "SLTT": ("8.47 GB, AMP", "66.9 h, AMP", "66.19 %"),
        "SLTT-1": ("", "32.03 h, AMP", "66.17 %"),
    }
    for rule, (memory, hours, top1) in published.items():
        about, predicted = f"{rule}, NF-ResNet-34, ImageNet", planned.get(rule, "not planned")
        if memory:
            yield not_judged(about, "memory", memory, ours=f"not run here; {predicted}")
        yield not_judged(about, "time", hours, ours=f"not run here; {predicted}")
        yield not_judged(about, "top-1", top1, ours="not run here")


def _predicted(rule: Mapping[str, Any]) -> str:
    size = f"{rule['micro_batch']} samples at a time x {rule['accumulation']}"
    return (
        f"plan in fp32, estimated, not measured: {rule['memory_bytes'] / 1e9:.3g} GB, {size},"
        f" {rule['hours']:.3g} h"
    )
