"""Where does online learning fail? Two flashes, `gap` of T slices apart, whose order is the class:
BPTT, truncated BPTT, OTTT and SLTT, with fixed and with learnt leaks.

Command:  for pair in 8-1 8-2 16-1 16-2 16-4 32-1 32-2 32-4 32-8; do
              spiketrain write events flashes --slices ${pair%-*} --gap ${pair#*-} --size 24
                  --samples 8000 --val-samples 4000 --out data/flashes-$pair
          done
          spiketrain launch recipes/compare/credit_flashes.py --workers 1 --side-by-side auto
          python -m benchmarks.credit_flashes RUNS
          python -m recipes.compare.credit_flashes RUNS; python -m benchmarks.credit_flashes
Source:   set, network and comparison are ours; the rules are of Meng et al. 2023 (SLTT),
          arXiv:2302.14311, and Xiao et al. 2022 (OTTT), arXiv:2210.04195.
Result:   without the gradient through the membrane 10 of 27 cells of flashes are unsafe, 17 are not
          decided, and all of Fashion-MNIST are safe; 135 runs, commits 216e051488a8 and
          0072f7b4883d, AMD EPYC; tables: docs/results.md, "Credit over time"
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from pipeline.core.printing import number, print_table, prose, say
from pipeline.data.datasets.events import Events
from pipeline.recipe import Recipe, Spec, Suite, spec
from pipeline.recipe.json import read_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF, PLIF
from recipes.compare.blocks_base import Answers, Blocks, cell_name
from recipes.events.base import moving
from recipes.fashion.base import fashion

# S seeds, P pairs of recordings, C sets

PAIRS = ((8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (32, 8))
FIXED, LEARNT = spec(LIF, decay=0.9), spec(PLIF, decay=0.5)
# by label: rule, neuron and learning rate, which credit_flashes_rates.py chose
RULES: dict[str, tuple[Spec, Spec, float]] = {
    "BPTT": (spec(BPTT), FIXED, 0.03),
    "truncated BPTT": (spec(BPTT, truncate=4), FIXED, 0.03),
    "OTTT": (spec(OTTT), FIXED, 0.01),
    "SLTT": (spec(SLTT), FIXED, 0.01),
    "BPTT, learnt leak": (spec(BPTT), LEARNT, 0.01),
    "SLTT, learnt leak": (spec(SLTT), LEARNT, 0.003),
}
SETS = tuple(f"flashes-{T}-{gap}" for T, gap in PAIRS)
CELLS = (*product(SETS, RULES), *(("fashion", rule) for rule in RULES if "trunc" not in rule))
SHORT = tuple(cell for cell in CELLS if cell[0].startswith(("flashes-8", "fashion")))
MEMORYLESS = ("OTTT", "SLTT", "SLTT, learnt leak")  # rules of no gradient through the membrane
SAFE = 1.0  # points: a rule is safe where the upper bound of what it loses to BPTT is at most this
SHARE = "temporal share"
# by cell of BPTT, by state of the weights, by "temporal share" or the rule of a cosine, by layer
Probes = dict[str, dict[str, dict[str, dict[str, float]]]]
PROBES = Path(__file__).with_name("credit_flashes_answers") / "probes.json"


def recipe() -> Suite:
    return Suite(recipes=tuple(STUDY.recipes()), report=report)


def trained(cell: tuple[str, ...]) -> Recipe:
    """The recipe of a set and a rule."""
    name, label = cell
    rule, neuron, rate = RULES[label]
    if name == "fashion":
        shared = replace(fashion(), rule=rule, backend="plain")
        if neuron is FIXED:
            return shared
        network, optimizer = shared.model.with_(neuron=neuron), shared.optimizer.with_(lr=0.3)
        return replace(shared, model=network, optimizer=optimizer)  # the rate for a decay of 0.5
    shared = moving(lr=rate)
    network: Any = shared.model.kwargs["network"]
    steps = int(name.split("-")[1])
    data = spec(Events, folder=f"data/{name}", classes=8, steps=steps, size=24, std=(0.2, 0.2))
    return replace(
        shared,
        model=network.with_(classes=8, neuron=neuron),
        rule=rule,
        data=data,
        time_steps=steps,
        epochs=10,
        backend="plain",
    )


STUDY = Blocks(
    name="credit",
    folder=PROBES.parent,
    cells_of={0: CELLS, 1: CELLS, 2: SHORT},  # four hours do not hold more
    recipe_of=trained,
    samples={**dict.fromkeys(SETS, 4_000), "fashion": 10_000},
)


# ----------------------------------------------------------------------------- what the runs tell


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Write the answers of each complete seed, and print the tables once all seeds have some."""
    STUDY.write(runs, console)
    right = STUDY.read(console)
    if not right:
        return {}
    if not PROBES.exists():
        say(console, "credit: benchmarks.credit_flashes must measure seed 0's runs first.")
        return {}
    losses = losses_of(right, read_json(PROBES))
    advice = advice_of([each for each in losses if not each.is_judged])
    render(right, losses, advice, console)
    return {"losses": [asdict(each) for each in losses], "advice": advice and asdict(advice)}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a rule loses on a set to BPTT with its neurons: `points`, with the 95 % interval `low`
    to `high`, and the standard `deviation` of its seeds.

    `signs`: of BPTT's gradient, before and after its training: the largest temporal share of a
    layer, and 1 less the lowest cosine of the rule's gradient in a layer.
    """

    name: str
    rule: str
    points: float
    low: float
    high: float
    deviation: float
    signs: Mapping[str, float]

    @property
    def kind(self) -> str:
        if self.high <= SAFE:
            return "safe"
        return "unsafe" if self.low > SAFE else "undecided"

    @property
    def is_judged(self) -> bool:
        return self.name.startswith(("flashes-32", "fashion"))


@dataclass(frozen=True)
class Advice:
    """A rule is called safe where this sign is at most `threshold`."""

    sign: str
    threshold: float

    def is_right(self, loss: Loss) -> bool:
        return (loss.signs[self.sign] <= self.threshold) == (loss.kind == "safe")


def losses_of(right: Mapping[int, Answers], probes: Probes) -> list[Loss]:
    """Of each set and rule but BPTT, over the seeds in which both finished.

    With the difference d of seed s and pair p of recordings, and the variance a of the seeds'
    means, pooled over the rules of a set, the half-width is

        sqrt(t^2 a / S + 1.96^2 var_p(mean_s d) / P),     Student's t of 2 (S - 1) degrees

    The degrees are those of two rules, because all rules share BPTT's runs. A set does not learn
    its variance from others: runs vary more where a task is hard. The interval of a rule that
    varies more than the others of its set is too narrow, and theirs are too wide; each rule's own
    deviation shows it.
    """
    losses = []
    for name in (*SETS, "fashion"):
        lost: dict[str, NDArray[np.float64]] = {}
        rules = [rule for each, rule in CELLS if each == name and rule != neurons_of(rule)]
        for rule in rules:
            baseline, cell = (cell_name((name, each)) for each in (neurons_of(rule), rule))
            both = [each for each in right.values() if {baseline, cell} <= each.keys()]
            if len(both) > 1:
                lost[rule] = np.array([_pairs(x[baseline]) - _pairs(x[cell]) for x in both])
        if not lost:
            continue
        variances = {rule: lost_SP.mean(1).var(ddof=1) for rule, lost_SP in lost.items()}
        pooled = np.mean([*variances.values()])
        for rule, lost_SP in lost.items():
            S = len(lost_SP)
            of_seeds = stats.t.ppf(0.975, 2 * (S - 1)) * np.sqrt(pooled / S)
            of_pairs = stats.norm.ppf(0.975) * stats.sem(lost_SP.mean(0))
            half, points = float(np.hypot(of_seeds, of_pairs)), float(lost_SP.mean())
            signs = _signs(probes[cell_name((name, neurons_of(rule)))], rule)
            values = {"points": points, "low": points - half, "high": points + half}
            values["deviation"] = float(np.sqrt(variances[rule]))
            losses.append(Loss(name=name, rule=rule, signs=signs, **values))
    return losses


def neurons_of(label: str) -> str:
    """The label of BPTT with the neurons of a rule."""
    return "BPTT" if RULES[label][1] is FIXED else "BPTT, learnt leak"


def _pairs(right_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mean of recordings 2 m and 2 m + 1, which depend on one another, in points."""
    return 100 * right_N.reshape(-1, 2).mean(1)


def baselines() -> list[tuple[str, str]]:
    return [(name, rule) for name, rule in CELLS if rule == neurons_of(rule)]


def _signs(states: Mapping[str, Mapping[str, Mapping[str, float]]], rule: str) -> dict[str, float]:
    return {
        **{f"share {state}": max(found[SHARE].values()) for state, found in states.items()},
        **{f"1 - cosine {state}": 1 - min(found[rule].values()) for state, found in states.items()},
    }


def decided(losses: Sequence[Loss]) -> list[Loss]:
    """The safe and unsafe ones of rules that leave out the gradient through time."""
    return [each for each in losses if each.rule in MEMORYLESS and each.kind != "undecided"]


def correlations(losses: Sequence[Loss]) -> dict[str, float]:
    """Spearman's, of each sign with what rules without the gradient through time lose."""
    rows = [{**each.signs, "points": each.points} for each in losses if each.rule in MEMORYLESS]
    return pd.DataFrame(rows).corr("spearman")["points"].to_dict()


def advice_of(losses: Sequence[Loss]) -> Advice | None:
    """The advice that is most often right. Of equally good ones the first sign, and the threshold
    in the widest gap between its values. None: not both kinds are decided, so nothing tells a
    threshold.
    """
    rows, found = decided(losses), []
    if {each.kind for each in rows} != {"safe", "unsafe"}:
        return None
    for sign in losses[0].signs:
        values = sorted({each.signs[sign] for each in rows})
        for low, high in pairwise(values):
            advice = Advice(sign, (low + high) / 2)
            found.append((sum(map(advice.is_right, rows)), high - low, advice))
    most = max(right for right, _, _ in found)
    best = [each for each in found if each[0] == most]
    sign = best[0][2].sign
    return max((each for each in best if each[2].sign == sign), key=lambda each: each[1])[2]


def holds(advice: Advice, losses: Sequence[Loss]) -> bool | None:
    """Whether the advice is right in at least 8 of 10 decided cells of the judged part, and in half
    of those of each kind. None: there are fewer than 10, or than 3 of a kind.
    """
    rows = decided([each for each in losses if each.is_judged])
    by_kind = [[advice.is_right(x) for x in rows if x.kind == kind] for kind in ("safe", "unsafe")]
    if len(rows) < 10 or min(map(len, by_kind)) < 3:
        return None
    is_right_of_each = all(sum(of_kind) >= 0.5 * len(of_kind) for of_kind in by_kind)
    return is_right_of_each and sum(map(sum, by_kind)) >= 0.8 * len(rows)


def render(
    right: Mapping[int, Answers],
    losses: Sequence[Loss],
    advice: Advice | None,
    console: Console,
) -> None:
    top1 = top1_of(right)
    rows = []
    for name in (*SETS, "fashion"):
        cells = [top1.get((name, rule)) for rule in RULES]
        rows.append((name, *("" if x is None else f"{x:.2f}" for x in cells)))
    print_table(console, (prose("top-1, %"), *map(number, RULES)), rows)
    console.print()
    rows = [
        (
            f"{each.name}, {each.rule}",
            f"{each.points:+.2f}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            each.kind,
            f"{each.deviation:.2f}",
            *(f"{value:.2f}" for value in each.signs.values()),
        )
        for each in losses
    ]
    titles = ("lost to BPTT", "95 %", "", "deviation", *losses[0].signs)
    print_table(console, (prose("set and rule"), *map(number, titles)), rows)
    console.print()
    parts = {"T = 8 and 16": False, "the judged part": True}
    of_parts = {
        part: [each for each in losses if each.is_judged == is_judged]
        for part, is_judged in parts.items()
    }
    found = [correlations(of_part) for of_part in of_parts.values()]
    rows = [(sign, *(f"{each[sign]:+.2f}" for each in found)) for sign in losses[0].signs]
    print_table(console, (prose("rank correlation with loss"), *map(number, parts)), rows)
    # pipeline/forecast/probe.py
    today = Advice("1 - cosine before", 0.1)
    for words, each in (("the threshold of T = 8 and 16", advice), ("a cosine of 0.9", today)):
        if each is None:
            say(console, "T = 8 and 16 have not both safe and unsafe cells, so no threshold.")
            continue
        counts = []
        for part, of_part in of_parts.items():
            for kind in ("safe", "unsafe"):
                cells = [loss for loss in decided(of_part) if loss.kind == kind]
                counts.append(f"{sum(map(each.is_right, cells))} of {len(cells)} {kind} on {part}")
        verdict = {True: "holds", False: "does not hold", None: "cannot be judged"}
        say(
            console,
            f"By {words} a rule is safe where {each.sign} training is at most"
            f" {each.threshold:.2f}: right in {', '.join(counts)} cells."
            f" It {verdict[holds(each, losses)]}.",
        )


def top1_of(right: Mapping[int, Answers]) -> dict[tuple[str, str], float]:
    """The mean top-1 of each cell in percent."""
    found = {}
    for cell in CELLS:
        each = [100 * x[name].mean() for x in right.values() if (name := cell_name(cell)) in x]
        if each:
            found[cell] = float(np.mean(each))
    return found


if __name__ == "__main__":
    STUDY.main(report)
