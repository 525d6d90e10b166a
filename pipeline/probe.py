"""What each rule would cost on a recipe's network, and what of BPTT's gradient it would drop: on one batch (`bench.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.bench import BASELINE, RULES, Bench, Cost, by_label
from pipeline.build import check_recipe
from pipeline.measure.fidelity import Fidelity, Gradients, fidelity
from pipeline.measure.memory import hardware
from pipeline.recipe import Recipe, Spec

SAFE = 0.9


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found on one batch of a recipe."""

    recipe: str
    samples: int
    time_steps: int
    costs: tuple[Cost, ...]
    """BPTT first, where it can train the network"""
    fidelity: Fidelity | None
    """None where BPTT cannot train the network: nothing to compare with"""
    refused: Mapping[str, str]
    """rules that cannot train the network, and why"""
    hardware: Mapping[str, object]

    def cost(self, rule: str) -> Cost | None:
        return next((cost for cost in self.costs if cost.rule == rule), None)


def probe(recipe: Recipe, *, batch_size: int | None = None, threads: int = 1, rules: Sequence[Spec] = RULES) -> Probe:
    """Probe `rules`, and the recipe's own, on `batch_size` samples (None: what one worker would hold at a time).

    Raises: ValueError for a recipe that does not fit together, or where no rule can train the network; what the data refuse.
    """
    check_recipe(recipe.with_untrained_teacher(), 1)
    bench = Bench(recipe, batch_size=batch_size, threads=threads)
    costs: list[Cost] = []
    found: dict[str, Sequence[Gradients]] = {}
    refused: dict[str, str] = {}
    for label, rule in by_label(rules, recipe.rule).items():
        try:
            cost, found[label] = bench.cost(rule), bench.gradients(rule)
            costs.append(cost)
        except ValueError as error:
            refused[label] = str(error)
    if not costs:
        raise ValueError("probe: no rule can train this network; " + "; ".join(refused.values()))
    return Probe(
        recipe=recipe.name,
        samples=bench.samples,
        time_steps=recipe.time_steps,
        costs=tuple(costs),
        fidelity=_compared(found),
        refused=refused,
        hardware=hardware(),
    )


def _compared(found: Mapping[str, Sequence[Gradients]]) -> Fidelity | None:
    if BASELINE not in found:
        return None
    (bptt,), sltt = found[BASELINE], found.get("SLTT")
    others = {label: draws for label, draws in found.items() if label != BASELINE}
    return fidelity(bptt, None if sltt is None else sltt[0], others)


def advice(found: Probe) -> str:
    """One sentence: the cheapest rule whose gradient is near BPTT's in every layer, and what it saves.

    Cheapest: the least product of saved bytes and seconds. Near: a cosine of `SAFE` or more in every layer.
    """
    bptt = found.cost(BASELINE)
    if bptt is None or found.fidelity is None:
        return f"{found.recipe}: BPTT cannot train this network, so there is nothing to compare gradients with."
    lowest = {cost.rule: found.fidelity.lowest(cost.rule) for cost in found.costs if cost.rule != BASELINE}
    safe = [cost for cost in found.costs if cost.rule in lowest and lowest[cost.rule][1] >= SAFE]
    if not safe:
        rule, (layer, cosine) = max(lowest.items(), key=lambda item: -2 if math.isnan(item[1][1]) else item[1][1])
        return (
            f"No rule's gradient is near BPTT's in every layer: the nearest is {rule}, with a cosine of {cosine:.2f} at {layer}. "
            "Whether it learns all the same, a run says."
        )
    best = min(safe, key=lambda cost: cost.peak_saved_bytes * cost.compute_s)
    layer, cosine = lowest[best.rule]
    return (
        f"{best.rule} is safe here before training: its gradient has a cosine of {cosine:.2f} or more with BPTT's in every layer "
        f"(least at {layer}); it keeps {best.peak_saved_bytes / bptt.peak_saved_bytes:.0%} of BPTT's bytes "
        f"and takes {best.compute_s / bptt.compute_s:.0%} of its time."
    )
