"""What `spiketrain probe` measures in recipes/compare/credit_flashes.py.

Command:  python -m benchmarks.credit_probes RUNS, of the runs of seed 0
Result:   probes.json beside the study's answers; not measured yet
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.forecast.bench import Bench
from pipeline.measure.gradient_similarity import fidelity
from pipeline.recipe import Recipe, spec
from pipeline.recipe.json import write_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from recipes.compare.credit_flashes import (
    CELLS,
    PROBES,
    RULES,
    SHARE,
    STUDY,
    Probes,
    baselines,
    neurons_of,
)
from recipes.compare.factorial_base import cell_name


def main() -> None:
    STUDY.main(lambda runs, console: write_json(PROBES, probe(runs)))


def probe(runs: Mapping[str, Path]) -> Probes:
    """What `spiketrain probe` measures on one batch, for each set and neurons: `before` training,
    and `after` BPTT's run of seed 0.
    """
    probes: Probes = {}
    for name, baseline in baselines():
        run = runs[STUDY.run_name((name, baseline), 0)]
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
    measured = {SHARE: found.temporal_share, **found.cosines}
    return {
        name: {layer: values[layer] for layer in found.comparable}
        for name, values in measured.items()
    }


if __name__ == "__main__":
    main()
