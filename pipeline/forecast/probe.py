"""What each rule would cost on a recipe's network, and what of BPTT's gradient it would drop: on
one batch (`bench.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.stages import say_stage
from pipeline.forecast.bench import (
    RULES,
    Bench,
    Cost,
    fastest_baseline,
    measure_costs,
    median_cost,
    rules_by_label,
)
from pipeline.forecast.teacher_cost import TeacherCost, measure_teacher
from pipeline.measure.fidelity import Fidelity, Gradients, fidelity
from pipeline.measure.memory import device_here, hardware
from pipeline.recipe import BASELINE, is_baseline
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe

SAFE = 0.9


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found on one batch of a recipe."""

    recipe: str
    samples: int
    time_steps: int
    # BPTT first, where it can train the network; seconds are medians over the rounds
    costs: tuple[Cost, ...]
    # seconds of forward and backward of each rule, in rounds in which they took turns
    rounds: Mapping[str, tuple[float, ...]]
    teacher: TeacherCost | None  # in no rule's cost
    fidelity: Fidelity | None  # None without BPTT's gradient: nothing to compare with
    refused: Mapping[str, str]  # rules that cannot train the network, and why
    # rules that can, but have no gradient to compare, and why; without that of BPTT none is
    # compared
    uncompared: Mapping[str, str]
    hardware: Mapping[str, object]

    def cost(self, rule: str) -> Cost | None:
        return next((cost for cost in self.costs if cost.rule == rule), None)

    def share_of_time(self, rule: str) -> tuple[float, ...]:
        """Of the time baseline's, in each round."""
        base = self.time_baseline
        assert base is not None, "asked where there is one"
        return tuple(
            mine / its for mine, its in zip(self.rounds[rule], self.rounds[base.rule], strict=True)
        )

    @property
    def time_baseline(self) -> Cost | None:
        """What seconds are divided by: the faster BPTT; bytes and operations are divided by those
        of BPTT folded over time.
        """
        return fastest_baseline(self.costs)


def probe(
    recipe: Recipe,
    *,
    batch_size: int | None = None,
    threads: int = 1,
    rules: Sequence[Spec] = RULES,
) -> Probe:
    """Probe `rules`, and the recipe's own, on `batch_size` samples (None: what one worker would
    hold at a time).

    Raises: ValueError for a recipe that does not fit together, or where no rule can train the
    network; what the data refuse."""
    check_recipe(recipe.with_untrained_teacher(), 1)
    say_stage("reading a batch; the first one compiles what reads the data")
    bench = Bench(recipe, batch_size=batch_size, threads=threads)
    with bench.in_memory(f"{recipe.name}'s teacher"):
        teacher = measure_teacher(recipe, bench.x_B)
    say_stage(f"measuring {', '.join(rules_by_label(rules, recipe.rule))}")
    rounds, refused = measure_costs(bench, rules_by_label(rules, recipe.rule))
    if not rounds:
        raise ValueError("probe: no rule can train this network; " + "; ".join(refused.values()))
    say_stage("comparing their gradients")
    found: dict[str, Sequence[Gradients]] = {}
    uncompared: dict[str, str] = {}
    for label, rule in rules_by_label(rules, recipe.rule).items():
        if label in rounds and (
            label == BASELINE or not is_baseline(label)
        ):  # BPTT in slices of time has BPTT's gradient
            try:
                found[label] = bench.gradients(rule)
            except ValueError as error:
                uncompared[label] = str(error)
    return Probe(
        recipe=recipe.name,
        samples=bench.samples,
        time_steps=recipe.time_steps,
        costs=tuple(median_cost(each) for each in rounds.values()),
        rounds={label: tuple(cost.compute_s for cost in each) for label, each in rounds.items()},
        teacher=teacher,
        fidelity=_compared(found),
        refused=refused,
        uncompared=uncompared,
        hardware=hardware(device_here()),
    )


def _compared(found: Mapping[str, Sequence[Gradients]]) -> Fidelity | None:
    if BASELINE not in found:
        return None
    (bptt,), sltt = found[BASELINE], found.get("SLTT")
    others = {label: draws for label, draws in found.items() if label != BASELINE}
    return fidelity(bptt, None if sltt is None else sltt[0], others)


def advice(found: Probe) -> str:
    """One sentence or two: the cheapest rule whose gradient is near BPTT's in every layer, and what
    it saves.

    Cheapest: the least product of seconds and bytes: saved, states and the rule's own. Near: a
    cosine of `SAFE` or more. Where BPTT's gradient of a layer is 0, as where neurons are silent,
    nothing is known of it, and no rule is called safe."""
    bptt, fastest = found.cost(BASELINE), found.time_baseline
    if bptt is None or fastest is None:
        return (
            "There is nothing to compare gradients with;"
            f" {found.refused.get(BASELINE, 'BPTT was not tried')}."
        )
    if found.fidelity is None:
        return f"There is nothing to compare gradients with; {found.uncompared[BASELINE]}."
    others = [cost for cost in found.costs if not is_baseline(cost.rule)]
    if not others:
        return (
            "There is no rule to compare with BPTT;"
            f" {'; '.join(found.refused.values()) or 'none was tried'}."
        )
    others = [cost for cost in others if cost.rule in found.fidelity.cosines]
    if not others:
        return (
            f"There is no gradient to compare with BPTT's; {'; '.join(found.uncompared.values())}."
        )
    layers, known = found.fidelity.layers, found.fidelity.comparable
    unknown = "BPTT's gradient is 0 or not finite"
    if not known:
        return f"{unknown} in every layer, so there is nothing to compare gradients with."
    lowest = {cost.rule: found.fidelity.lowest(cost.rule) for cost in others}
    near = [cost for cost in others if lowest[cost.rule][1] >= SAFE]
    if not near:
        rule, (layer, cosine) = max(lowest.items(), key=lambda item: item[1][1])
        whose = "No gradient that was compared is" if found.uncompared else "No rule's gradient is"
        blind = (
            ""
            if len(known) == len(layers)
            else f"{unknown} in {len(layers) - len(known)} of {len(layers)} layers. "
        )
        return (
            f"{whose} near BPTT's in every layer: the nearest is {rule}, with a cosine of"
            f" {cosine:.2f} at {layer}. {blind}Whether it learns all the same, a run says."
        )
    best = min(near, key=lambda cost: _all_bytes(cost) * cost.compute_s)
    layer, cosine = lowest[best.rule]
    if len(known) == len(layers):
        called, where = f"{best.rule} is safe here before training", "every layer"
    else:
        called = f"{best.rule} is near BPTT here before training, but not known to be safe"
        where = f"{len(known)} of {len(layers)} layers; {unknown} in the others"
    kept, shares = _all_bytes(best) / _all_bytes(bptt), found.share_of_time(best.rule)
    own = " and the rule's own" if best.rule_bytes else ""
    saves = f"saves {1 - kept:.0%}" if kept < 1 else "saves nothing"
    faster = "its time" if fastest is bptt else f"the time of {fastest.rule}, the faster BPTT"
    return (
        f"{called}: its gradient has a cosine of {cosine:.2f} or more (least at {layer}) with"
        f" BPTT's in {where}; it keeps {best.peak_saved_bytes / bptt.peak_saved_bytes:.0%} of"
        f" BPTT's bytes for backward, {kept:.0%} with states{own}, so it {saves}, and takes"
        f" {statistics.median(shares):.0%} of {faster}, {min(shares):.0%} to {max(shares):.0%} in"
        f" {len(shares)} rounds."
    )


def _all_bytes(cost: Cost) -> int:
    return cost.kept_bytes + cost.rule_bytes
