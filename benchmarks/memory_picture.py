"""Draws docs/memory.svg, the picture of README: bytes kept for backward against T, for each rule.

Command:  python -m benchmarks.memory_picture, of docs/memory.json, which is the output of
          spiketrain sweep recipes/fashion/sltt.py --steps 1,2,4,8,16 --batch 64 --format json
Result:   docs/memory.svg, of the commit and machine in docs/memory.json; bytes of storages are
          counted, so the machine does not change them
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
RULES = ("BPTT", "BPTT-recompute", "OPZO", "SLTT", "OTTT-A", "SLTT-1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", type=Path, default=DOCS / "memory.json")
    parser.add_argument("--out", type=Path, default=DOCS / "memory.svg")
    chosen = parser.parse_args()
    draw(json.loads(chosen.sweep.read_text()), chosen.out)


def draw(sweep: Mapping[str, Any], out: Path) -> None:
    """Write the SVG; the same sweep gives the same file."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    alike: dict[tuple[tuple[float, float, float], ...], list[str]] = {}
    for rule in RULES:
        costs = [p for p in sweep["points"] if p["cost"]["rule"] == rule]
        if not costs:
            raise ValueError(f"memory_picture: the sweep must have each of {RULES}; no {rule}")
        alike.setdefault(tuple(map(_point, costs)), []).append(rule)
    for points, rules in alike.items():
        steps, saved_mb, kept_mb = zip(*points, strict=True)
        [line] = axes.plot(steps, saved_mb, marker="o", label=", ".join(rules))
        axes.plot(steps, kept_mb, linestyle=":", color=line.get_color())
    axes.set(
        title=(
            f"Saved for backward (dotted: and states), {sweep['recipe']}, {sweep['samples']} images"
        ),
        xlabel="time steps T",
        ylabel="MB",
        ylim=(0, None),
    )
    axes.set_xticks(sorted({each["time_steps"] for each in sweep["points"]}))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write an SVG without a date and with fixed ids."""
    with mpl.rc_context({"svg.hashsalt": "spiketrain", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})


def _point(point: Mapping[str, Any]) -> tuple[float, float, float]:
    """T, MB saved for backward, MB saved and states."""
    saved = point["cost"]["peak_saved_bytes"]
    return point["time_steps"], saved / 1e6, (saved + point["cost"]["state_bytes"]) / 1e6


if __name__ == "__main__":
    main()
