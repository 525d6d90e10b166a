"""What `spiketrain probe` measures in recipes/compare/credit_flashes.py, and the study's picture:
top-1 against the gap between flashes, and what a rule loses against the temporal share.

Command:  python -m benchmarks.credit_flashes RUNS, of the runs of seed 0: the probes
          python -m benchmarks.credit_flashes, of the answers of the study: the picture
Result:   probes.json beside the study's answers, and docs/credit.svg
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.memory_picture import DOCS, save
from pipeline.core.checks import require
from pipeline.core.printing import new_console
from pipeline.forecast.bench import Bench
from pipeline.measure.gradient_similarity import fidelity
from pipeline.recipe import Recipe, spec
from pipeline.recipe.json import read_json, write_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.track.run_state import state_of
from recipes.compare.blocks_base import cell_name
from recipes.compare.credit_flashes import (
    CELLS,
    PAIRS,
    PROBES,
    RULES,
    SHARE,
    STUDY,
    Loss,
    Probes,
    baselines,
    losses_of,
    neurons_of,
    top1_of,
)


def main() -> None:
    if len(sys.argv) > 1:
        PROBES.parent.mkdir(exist_ok=True)
        STUDY.main(lambda runs, console: write_json(PROBES, probe(runs)))
        return
    right = STUDY.read(new_console())
    require(right, f"{STUDY.name}: the picture needs the answers of all seeds")
    draw(top1_of(right), losses_of(right, read_json(PROBES)), DOCS / "credit.svg")


def probe(runs: Mapping[str, Path]) -> Probes:
    """What `spiketrain probe` measures on one batch, for each set and neurons: `before` training,
    and `after` BPTT's run of seed 0.
    """
    probes: Probes = {}
    for name, baseline in baselines():
        wanted = STUDY.run_name((name, baseline), 0)
        is_finished = wanted in runs and state_of(runs[wanted]) == "finished"
        require(is_finished, f"{STUDY.name}: the run {wanted} must have finished")
        run = runs[wanted]
        made = Recipe.read(run / "recipe.json")
        rules = [rule for each, rule in CELLS if each == name and neurons_of(rule) == baseline]
        probes[cell_name((name, baseline))] = {
            "before": _probe(made, rules),
            "after": _probe(replace(made, init=str(run)), rules),
        }
    return probes


def _probe(recipe: Recipe, rules: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the layers in which BPTT's gradient can be compared: a layer of silent neurons has 0."""
    bench = Bench(recipe, batch_size=64)
    gradients = {rule: bench.gradients_of(RULES[rule][0]) for rule in rules}
    bptt, sltt = (
        next(each[0] for rule, each in gradients.items() if RULES[rule][0] == spec(wanted))
        for wanted in (BPTT, SLTT)
    )
    found = fidelity(bptt, sltt, gradients)
    require(found.comparable, f"{STUDY.name}: no layer of {recipe.name} has a gradient to compare")
    measured = {SHARE: found.temporal_share, **found.cosines}
    return {
        name: {layer: values[layer] for layer in found.comparable}
        for name, values in measured.items()
    }


def draw(top1: Mapping[tuple[str, str], float], losses: Sequence[Loss], out: Path) -> None:
    """Write the SVG of the flashes. The same values give the same file.

    Args:
        top1: in percent, by set and rule.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    lengths = sorted({T for T, _ in PAIRS})
    *panels, last = figure.subplots(1, len(lengths) + 1)
    colors = {rule: f"C{index}" for index, rule in enumerate(RULES)}
    for axes, T in zip(panels, lengths, strict=True):
        gaps = [gap for of, gap in PAIRS if of == T]
        for rule, color in colors.items():
            values = [top1.get((f"flashes-{T}-{gap}", rule), float("nan")) for gap in gaps]
            axes.plot(gaps, values, marker="o", color=color, label=rule)
        axes.set(title=f"T = {T}", xlabel="slices between the flashes", xscale="log", ylim=(0, 102))
        axes.minorticks_off()
        axes.set_xticks(gaps, map(str, gaps))
    panels[0].set_ylabel("top-1, %")
    for rule, color in colors.items():
        of_rule = [each for each in losses if each.rule == rule]
        if of_rule:
            shares = [each.signs["share before"] for each in of_rule]
            points = [each.points for each in of_rule]
            halves = [each.high - each.points for each in of_rule]
            last.errorbar(shares, points, halves, fmt="o", color=color)
    last.set(title="lost to BPTT", xlabel=f"{SHARE}, untrained", ylabel="points")
    for axes in (*panels, last):
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, out)


if __name__ == "__main__":
    main()
