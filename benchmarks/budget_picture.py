"""Draws top-1 against the memory of a micro-batch in equal seconds, for each rule, into docs.

Command:  python -m benchmarks.budget_picture, of the answers of recipes/compare/memory_budget.py
Result:   budget.svg; not drawn yet, the study has no answers
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.memory_picture import DOCS, save
from pipeline.core.printing import new_console
from recipes.compare.memory_budget import EVALUATED_ON, FASHION, SECONDS, SETS, Row, rules, table


def main() -> None:
    draw(table(new_console()), DOCS / "budget.svg")


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write the SVG of the rows of `table`. The same rows give the same file."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SETS))
    for axes, of in zip(panels, SETS, strict=True):
        of_set = [row for row in rows if row.of == of]
        for rule in rules(FASHION):
            trained = [row for row in of_set if row.rule == rule and row.top1]
            memory_mb = [row.limit / 1e6 for row in trained]
            means = [statistics.fmean(row.top1) for row in trained]
            spread = [statistics.stdev(row.top1) if len(row.top1) > 1 else 0.0 for row in trained]
            axes.errorbar(memory_mb, means, spread, marker="o", label=rule)
        ticks = {row.limit / 1e6: f"{row.limit / 1e6:.1f}\n{row.budget}" for row in of_set}
        axes.set(
            title=f"{of}, {SECONDS[of]:.0f} s of training",
            xlabel="MB of a micro-batch: what BPTT keeps of so many samples",
            ylabel=f"top-1 of {EVALUATED_ON[of]:,} samples, %",
            xscale="log",
        )
        axes.minorticks_off()
        axes.set_xticks([*ticks], [*ticks.values()])
        axes.grid(alpha=0.3)
    panels[-1].legend(frameon=False)
    save(figure, out)


if __name__ == "__main__":
    main()
