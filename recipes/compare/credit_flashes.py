"""Where does online learning fail? Two flashes, `gap` of T slices apart, whose order is the class:
BPTT, truncated BPTT, OTTT and SLTT, with fixed and with learnt leaks.

Command:  for pair in 8-1 8-2 16-1 16-2 16-4 32-1 32-2 32-4 32-8; do
              spiketrain write events flashes --slices ${pair%-*} --gap ${pair#*-} --size 24
                  --samples 8000 --val-samples 4000 --out data/flashes-$pair
          done
          spiketrain launch recipes/compare/credit_flashes.py --workers 1 --side-by-side auto
          python -m recipes.compare.credit_flashes RUNS
Source:   set, network and comparison are ours; the rules are of Meng et al. 2023 (SLTT),
          arXiv:2302.14311, and Xiao et al. 2022 (OTTT), arXiv:2210.04195.
Result:   not trained yet; the design is in docs/LOG.md, "The design of the study of credit over
          time".

A block is all cells of one seed (blocks.py). The rates were chosen on a held-out tenth of the
training sets (credit_flashes_rates.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from pipeline.core.printing import number, print_table, prose, say
from pipeline.data.datasets.events import Events
from pipeline.forecast.bench import Bench
from pipeline.forecast.probe import SAFE as LEAST_COSINE
from pipeline.measure.gradient_similarity import fidelity
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Recipe, Spec, Suite, spec
from pipeline.recipe.json import read_json, write_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF, PLIF
from recipes.compare.blocks import Answers, Blocks
from recipes.compare.factorial_base import cell_name
from recipes.events.base import moving
from recipes.fashion.base import fashion

# S seeds, P pairs of recordings, C sets

PAIRS = ((8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (32, 8))
FIXED, LEARNT = spec(LIF, decay=0.9), spec(PLIF, decay=0.5)
# by label: rule, neuron and learning rate
RULES: dict[str, tuple[Spec, Spec, float]] = {
    "BPTT": (spec(BPTT), FIXED, 0.01),
    "truncated BPTT": (spec(BPTT, truncate=4), FIXED, 0.01),
    "OTTT": (spec(OTTT), FIXED, 0.01),
    "SLTT": (spec(SLTT), FIXED, 0.01),
    "BPTT, learnt leak": (spec(BPTT), LEARNT, 0.01),
    "SLTT, learnt leak": (spec(SLTT), LEARNT, 0.01),
}
SETS = tuple(f"flashes-{T}-{gap}" for T, gap in PAIRS)
CELLS = (*product(SETS, RULES), *(("fashion", rule) for rule in RULES if "trunc" not in rule))
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
    network = spec(
        vgg_sws,
        classes=8,
        in_channels=2,
        stages=((16,), (32,), (64,)),
        stem=(5, 2),
        neuron=neuron,
    )
    steps = int(name.split("-")[1])
    data = spec(Events, folder=f"data/{name}", classes=8, steps=steps, size=24, std=(0.2, 0.2))
    return replace(
        moving(lr=rate), model=network, rule=rule, data=data, time_steps=steps, epochs=10,
        backend="plain",
    )  # fmt: skip


STUDY = Blocks(
    name="credit",
    folder=PROBES.parent,
    cells_of=dict.fromkeys(range(2), CELLS),
    recipe_of=trained,
    samples={**dict.fromkeys(SETS, 4_000), "fashion": 10_000},
)


# ----------------------------------------------------------------------------- what the runs tell


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Write the answers of each complete seed, and print the tables once all seeds have some."""
    STUDY.write(runs, console)
    right = STUDY.read()
    if len(right) < len(STUDY.cells_of):
        say(console, f"{len(right)} of {len(STUDY.cells_of)} seeds are complete.")
        return {}
    if not PROBES.exists():
        write_json(PROBES, probe(runs))
    losses = losses_of(right, read_json(PROBES))
    advice = advice_of([each for each in losses if not each.is_judged])
    render(right, losses, advice, console)
    return {"losses": [asdict(each) for each in losses], "advice": asdict(advice)}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a rule loses on a set to BPTT with its neurons: `points`, with the 95 % interval `low`
    to `high`.

    `signs`: of BPTT's gradient, before and after its training: the largest temporal share of a
    layer, and 1 less the lowest cosine of the rule's gradient in a layer.
    """

    name: str
    rule: str
    points: float
    low: float
    high: float
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
    """Of each set and rule but BPTT.

    With the difference d of seed s and pair p of recordings, and the variance a of the seeds'
    means, pooled over the C sets of a rule, the half-width is

        sqrt(t^2 a / S + 1.96^2 var_p(mean_s d) / P),     Student's t of C (S - 1) degrees

    Student's quantile of two seeds alone is 12.7.
    """
    losses, S = [], len(right)
    for label in RULES.keys() - {"BPTT", "BPTT, learnt leak"}:
        neurons, sets = neurons_of(label), [name for name, rule in CELLS if rule == label]
        lost_CSP = [
            np.array([_pairs(x, name, neurons) - _pairs(x, name, label) for x in right.values()])
            for name in sets
        ]
        student = stats.t.ppf(0.975, len(sets) * (S - 1))
        pooled = np.mean([lost_SP.mean(1).var(ddof=1) for lost_SP in lost_CSP])
        for name, lost_SP in zip(sets, lost_CSP, strict=True):
            of_pairs = stats.norm.ppf(0.975) * stats.sem(lost_SP.mean(0))
            half = float(np.sqrt(student**2 * pooled / S + of_pairs**2))
            points = float(lost_SP.mean())
            ends = {"points": points, "low": points - half, "high": points + half}
            signs = _signs(probes[cell_name((name, neurons))], label)
            losses.append(Loss(name=name, rule=label, signs=signs, **ends))
    return sorted(losses, key=lambda each: (each.rule, CELLS.index((each.name, each.rule))))


def neurons_of(label: str) -> str:
    """The label of BPTT with the neurons of a rule."""
    return "BPTT" if RULES[label][1] is FIXED else "BPTT, learnt leak"


def _pairs(right: Answers, name: str, label: str) -> NDArray[np.float64]:
    """The mean of recordings 2 m and 2 m + 1, which depend on one another, in points."""
    return 100 * right[cell_name((name, label))].reshape(-1, 2).mean(1)


def _signs(states: Mapping[str, Mapping[str, Mapping[str, float]]], rule: str) -> dict[str, float]:
    return {
        **{f"share {state}": max(found[SHARE].values()) for state, found in states.items()},
        **{f"1 - cosine {state}": 1 - min(found[rule].values()) for state, found in states.items()},
    }


def probe(runs: Mapping[str, Path]) -> Probes:
    """What `spiketrain probe` measures on one batch, for each set and neurons: `before` training,
    and `after` BPTT's run of seed 0.
    """
    probes: Probes = {}
    for name, baseline in CELLS:
        if baseline == neurons_of(baseline):
            run = runs[STUDY.run_name((name, baseline), 0)]
            made = Recipe.read(run / "recipe.json")
            rules = [rule for each, rule in CELLS if each == name and neurons_of(rule) == baseline]
            probes[cell_name((name, baseline))] = {
                "before": _probe(made, rules),
                "after": _probe(replace(made, init=str(run)), rules),
            }
    return probes


def _probe(recipe: Recipe, rules: Sequence[str]) -> dict[str, dict[str, float]]:
    bench = Bench(recipe, batch_size=64)
    gradients = {rule: bench.gradients_of(RULES[rule][0]) for rule in rules}
    bptt, sltt = (bench.gradients_of(spec(rule))[0] for rule in (BPTT, SLTT))
    found = fidelity(bptt, sltt, gradients)
    return {SHARE: found.temporal_share, **found.cosines}


def decided(losses: Sequence[Loss]) -> list[Loss]:
    """The safe and unsafe ones of rules that leave out the gradient through time."""
    return [each for each in losses if each.rule in MEMORYLESS and each.kind != "undecided"]


def advice_of(losses: Sequence[Loss]) -> Advice:
    """The advice that is most often right. Of equally good ones, that with the threshold in the
    widest gap between values of its sign.
    """
    rows, found = decided(losses), []
    for sign in losses[0].signs:
        values = sorted({0.0, *(each.signs[sign] for each in rows)})
        for low, high in pairwise([*values, values[-1] + 1.0]):
            advice = Advice(sign, (low + high) / 2)
            found.append((sum(map(advice.is_right, rows)), high - low, advice))
    return max(found, key=lambda each: each[:2])[2]


def render(
    right: Mapping[int, Answers], losses: Sequence[Loss], advice: Advice, console: Console
) -> None:
    top1 = {cell: 100 * np.mean([x[cell].mean() for x in right.values()]) for cell in right[0]}
    rows = []
    for name in (*SETS, "fashion"):
        cells = [cell_name((name, rule)) for rule in RULES]
        rows.append((name, *(f"{top1[cell]:.2f}" if cell in top1 else "" for cell in cells)))
    print_table(console, (prose("top-1, %"), *map(number, RULES)), rows)
    console.print()
    rows = [
        (
            f"{each.name}, {each.rule}",
            f"{each.points:+.2f}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            each.kind,
            *(f"{value:.2f}" for value in each.signs.values()),
        )
        for each in losses
    ]
    titles = ("lost to BPTT", "95 %", "", *losses[0].signs)
    print_table(console, (prose("set and rule"), *map(number, titles)), rows)
    say(
        console,
        "A rule without the gradient through time is called safe where"
        f" {advice.sign} training is at most {advice.threshold:.2f}.",
    )
    today = Advice("1 - cosine before", 1 - LEAST_COSINE)
    for part, is_judged in (("threshold was set on", False), ("judgement is on", True)):
        of_part = decided([each for each in losses if each.is_judged == is_judged])
        for words, rule in (("right", advice), ("`probe`'s sentence of today", today)):
            counts = []
            for kind in ("safe", "unsafe"):
                cells = [each for each in of_part if each.kind == kind]
                counts.append(f"{sum(map(rule.is_right, cells))} of {len(cells)} {kind}")
            say(console, f"The part that the {part}: {words} in {' and '.join(counts)} cells.")


if __name__ == "__main__":
    STUDY.main(report)
