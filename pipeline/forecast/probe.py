"""The cost of each rule on one batch (`bench.py`), and its gradient's similarity to BPTT's."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.checks import require
from pipeline.core.stages import say_stage
from pipeline.core.units import counted, first_few
from pipeline.forecast.bench import (
    RULES,
    BatchBench,
    Bench,
    Cost,
    TeacherCost,
    fastest_baseline,
    in_turns,
    measure_teacher,
    median_cost,
    rules_by_label,
)
from pipeline.measure.gradient_similarity import Fidelity, Gradients, fidelity
from pipeline.measure.memory import hardware
from pipeline.recipe import BASELINE, is_baseline
from pipeline.recipe.recipe import Recipe, Spec
from pipeline.train.build import check_recipe

# A rule is called safe if its gradient has at least this cosine with BPTT's in every layer. In
# docs/results.md, "Credit over time", this was right for SLTT and OTTT in 10 of 10 decided cells,
# none in 0.75..0.99, so that the data do not fix the limit.
SAFE = 0.9
_UNKNOWN = "BPTT's gradient is 0 or not finite"
_JUDGED = 'Such advice was judged for SLTT and OTTT (docs/rules/index.md, "Which rule to take").'


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The costs and gradients of rules on one batch."""

    samples: int
    time_steps: int
    # BPTT first, if it can train the network; seconds are medians over the rounds
    costs: tuple[Cost, ...]
    # By rule: seconds of forward and backward in each round. Rules alternate within a round.
    rounds: Mapping[str, tuple[float, ...]]
    fidelity: Fidelity | None  # None without BPTT's gradient for comparison
    refused: Mapping[str, str]  # for each rule that cannot train the network: the reason
    uncompared: Mapping[str, str]  # by rule: why its gradient could not be measured
    hardware: Mapping[str, object]

    def cost(self, rule: str) -> Cost | None:
        return next((cost for cost in self.costs if cost.rule == rule), None)

    @property
    def time_baseline(self) -> Cost | None:
        """The reference of times: the fastest of BPTT folded over time and BPTT in slices of time.

        The reference of bytes and operations is always BPTT folded over time.
        """
        return fastest_baseline(self.costs)


@dataclass(frozen=True, kw_only=True)
class Probe(Measured):
    """The costs and gradients of rules on one batch of a recipe."""

    recipe: str
    teacher: TeacherCost | None  # not part of any rule's cost


def probe(
    recipe: Recipe,
    *,
    batch_size: int | None = None,
    threads: int = 1,
    rules: Sequence[Spec] = RULES,
) -> Probe:
    """Probe `rules` and the recipe's own rule.

    `batch_size`: samples in the batch; None: the micro-batch of a single worker.

    Raises:
        ValueError: the recipe contradicts itself, or no rule can train the network.
        DataError: the data cannot be read.
    """
    check_recipe(recipe.with_untrained_teacher(), 1)
    say_stage("reading a batch; a machine's first start compiles the data loader")
    bench = Bench(recipe, batch_size=batch_size, threads=threads)
    with bench.running(f"{recipe.name}'s teacher"):
        teacher = measure_teacher(recipe, bench.x_B)
    labelled = rules_by_label(rules, recipe.rule)
    measured = measure("probe", bench, labelled)
    return Probe(recipe=recipe.name, teacher=teacher, **vars(measured))


def measure(
    subject: str, bench: BatchBench, rules: Mapping[str, Spec], rounds: int | None = None
) -> Measured:
    """Measure rules, which are given by label.

    `rounds`: as in `in_turns`.

    Raises: ValueError, which starts with `subject`, if no rule can train the network.
    """
    say_stage(f"measuring {', '.join(rules)}")
    costs, refused = in_turns(rules, bench.cost, rounds)
    require(costs, f"{subject}: no rule can train this network; " + "; ".join(refused.values()))
    say_stage("comparing their gradients")
    gradients: dict[str, Sequence[Gradients]] = {}
    uncompared: dict[str, str] = {}
    for label in costs:
        try:
            gradients[label] = bench.gradients_of(rules[label])
        except ValueError as error:
            uncompared[label] = str(error)
    compared = None
    if BASELINE in gradients:
        sltt = gradients["SLTT"][0] if "SLTT" in gradients else None
        compared = fidelity(gradients[BASELINE][0], sltt, gradients)
    return Measured(
        samples=bench.samples,
        time_steps=bench.time_steps,
        costs=tuple(median_cost(each) for each in costs.values()),
        rounds={label: tuple(cost.compute_s for cost in each) for label, each in costs.items()},
        fidelity=compared,
        refused=refused,
        uncompared=uncompared,
        hardware=hardware(bench.x_TB.device),
    )


def advice(result: Measured) -> str:
    """Advise the cheapest safe rule, and compare its cost with BPTT's.

    The cheapest rule has the smallest product of seconds and bytes (saved, states and the rule's
    own). A rule is safe if its gradient has a cosine of at least `SAFE` with BPTT's in every layer.
    A layer cannot be judged if BPTT's gradient there is not finite or is 0, for example with silent
    neurons. The rule then "may be" safe.
    """
    bptt, fastest, compared = result.cost(BASELINE), result.time_baseline, result.fidelity
    reasons = {**result.refused, **result.uncompared}
    if bptt is None or fastest is None or compared is None:
        why = reasons.get(BASELINE, "BPTT was not tried")
        return f"There is nothing to compare gradients with; {why}."
    others = [
        cost
        for cost in result.costs
        if cost.rule in compared.cosines and not is_baseline(cost.rule)
    ]
    if not others:
        why = first_few([*reasons.values()], max_names=1) or "no other rule was tried"
        return f"There is no gradient to compare with BPTT's; {why}."
    if not compared.comparable:
        return f"{_UNKNOWN} in every layer, so there is nothing to compare gradients with."
    lowest = {cost.rule: compared.lowest(cost.rule) for cost in others}
    layers, known = len(compared.layers), len(compared.comparable)
    unknown_note = f" {_UNKNOWN} in {layers - known} of {layers} layers." if known < layers else ""
    if safe := [cost for cost in others if lowest[cost.rule][1] >= SAFE]:
        best = min(safe, key=lambda cost: cost.all_bytes * cost.compute_s)
        verdict, where = "is", "every layer"
        if unknown_note:
            verdict, where = "may be", f"{known} of {layers} layers"
        layer, cosine = lowest[best.rule]
        return (
            f"{best.rule} {verdict} safe here before training: in {where} its gradient has a cosine"
            f" of {cosine:.2f} or more with BPTT's (lowest at {layer}).{unknown_note}"
            f" {_cost_of(result, best, bptt, fastest)} {_JUDGED}"
        )
    rule, (layer, cosine) = max(lowest.items(), key=lambda each: each[1][1])
    subject = "No rule whose gradient was compared is" if result.uncompared else "No rule is"
    return (
        f"{subject} safe here before training. The most similar gradient is that of {rule}, whose"
        f" lowest cosine is {cosine:.2f}, at {layer}.{unknown_note} Take BPTT with a smaller"
        " micro_batch, truncated BPTT, or a rule after a run beside BPTT at a smaller size."
        f" {_JUDGED}"
    )


def _cost_of(result: Measured, best: Cost, bptt: Cost, fastest: Cost) -> str:
    """Two sentences about the bytes and the time of the advised rule."""
    rounds = zip(result.rounds[best.rule], result.rounds[fastest.rule], strict=True)
    shares = [seconds / baseline_s for seconds, baseline_s in rounds]
    own_bytes = " and its own bytes" if best.rule_bytes else ""
    baseline_time = (
        "BPTT's time"
        if fastest is bptt
        else f"the time of {fastest.rule}, the fastest form of BPTT"
    )
    return (
        f"It keeps {best.peak_saved_bytes / bptt.peak_saved_bytes:.0%} of BPTT's bytes for"
        f" backward, and {best.all_bytes / bptt.all_bytes:.0%} with states{own_bytes}. It takes"
        f" {statistics.median(shares):.0%} of {baseline_time} ({min(shares):.0%} to"
        f" {max(shares):.0%} in {counted(len(shares), 'round')})."
    )
