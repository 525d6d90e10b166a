"""Given so much memory, which rule reaches the highest accuracy in the same time? Fashion-MNIST and
flashes, six rules, what BPTT holds for 2, 8 and 32 samples, five seeds.

Command:  spiketrain write fashion --out data/fashion
          spiketrain write events flashes --slices 16 --gap 4 --size 24 --samples 8000
              --val-samples 4000 --out data/flashes-16-4
          python -m benchmarks.memory_budget measure
          spiketrain launch recipes/compare/memory_budget.py --workers 1 --side-by-side 2
          python -m recipes.compare.memory_budget RUNS; python -m benchmarks.memory_budget
Source:   ours
Result:   docs/results.md, "Accuracy in a memory budget": SLTT-1 is 0.97 points (0.59 to 1.31) above
          BPTT on Fashion-MNIST in the smallest budget, and 16 to 37 below on flashes; five seeds,
          commits 4449e51984c4 and 10afd0f2ec8f, 2 cores of an AMD EPYC

Networks have no batch norm, so neither micro-batches nor slices of time change a batch's gradient.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pipeline.core.printing import number, print_table, prose, say
from pipeline.recipe import Recipe, Spec, Suite, spec
from pipeline.recipe.json import read_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from recipes.compare.blocks_base import Blocks, Cell, cell_name, interval
from recipes.compare.credit_flashes import RULES as OF_FLASHES
from recipes.compare.credit_flashes import trained as trained_on_flashes
from recipes.fashion.base import fashion

NAME = "budget"
SPEEDS = Path(__file__).with_name("memory_budget_speeds.json")
ANSWERS = Path(__file__).with_name("memory_budget_answers")

SEEDS, BUDGETS = range(5), (2, 8, 32)
BATCH = 96  # a multiple of each budget
FASHION, FLASHES = SETS = ("fashion", "flashes-16-4")
SECONDS = {FASHION: 120.0, FLASHES: 45.0}  # of a run's training, without loading
TRAINED_ON = {FASHION: 60_000, FLASHES: 8_000}
EVALUATED_ON = {FASHION: 10_000, FLASHES: 4_000}
STEPS = {FASHION: 6, FLASHES: 16}


def recipe() -> Suite:
    return Suite(recipes=tuple(study().recipes()), report=report)


def study() -> Blocks:
    """Budgets in which a rule has the same micro-batch and slice share a run."""
    cells = {cell_of(each): None for each in measured()["cells"] if each["micro_batch"]}
    return Blocks(
        name=NAME,
        folder=ANSWERS,
        cells_of={seed: tuple(cells) for seed in SEEDS},
        recipe_of=trained,
        samples=EVALUATED_ON,
        machine="{cpu}, torch {torch}".format(**measured()["machine"]),
    )


def trained(cell: Cell) -> Recipe:
    """The recipe of a set, a rule, a micro-batch and a slice: as many global batches as SECONDS
    hold.
    """
    of, rule, micro_batch, size = cell
    [seconds] = {each["seconds"] for each in measured()["cells"] if cell_of(each) == cell}
    steps = steps_in(SECONDS[of], seconds)
    return replace(
        shared(of, rule, int(size)),
        micro_batch=int(micro_batch),
        stop_after=steps,
        epochs=-(-steps // (TRAINED_ON[of] // BATCH)),
    )


def steps_in(seconds: float, seconds_of_batch: float) -> int:
    return max(1, round(seconds / seconds_of_batch))


def shared(of: str, rule: str, size: int) -> Recipe:
    """BPTT-recompute has BPTT's learning rate, as it has its gradient, and SLTT-1 has SLTT's.

    Args:
        size: the time steps of a slice, one of `sizes_of`.
    """
    if of == FASHION:
        # docs/LOG.md, "No rule is shown to gain by a rate of its own over the shared 0.3"
        made, rate = fashion(), 0.3
    else:
        rates = {label: lr for label, (_, _, lr) in OF_FLASHES.items()}
        alike = {"BPTT-recompute": "BPTT", "BPTT-truncate": "truncated BPTT", "SLTT-1": "SLTT"}
        made, rate = trained_on_flashes((of, "BPTT")), rates[alike.get(rule, rule)]
    return replace(
        made,
        rule=_rule(rule, size),
        optimizer=made.optimizer.with_(lr=rate),
        time_steps=STEPS[of],
        batch_size=BATCH,
        backend="plain",
    )


def sizes_of(steps: int) -> dict[str, tuple[int, ...]]:
    """By rule, the slices of time in which it may run, which have one gradient."""
    divisors = tuple(size for size in range(1, steps + 1) if steps % size == 0)
    return {
        "BPTT": (steps,),
        "BPTT-recompute": divisors[:-1],
        "BPTT-truncate": (steps // 2,),
        "SLTT": divisors,
        "SLTT-1": (1,),
        "OTTT": divisors,
    }


def _rule(rule: str, size: int) -> Spec:
    return {
        "BPTT": spec(BPTT),
        "BPTT-recompute": spec(BPTT, recompute=True, chunk=size),
        "BPTT-truncate": spec(BPTT, truncate=size),
        "SLTT": spec(SLTT, chunk=size),
        "SLTT-1": spec(SLTT, k=1, rescale=True),
        "OTTT": spec(OTTT, chunk=size),
    }[rule]


def cell_of(measured: Mapping[str, Any]) -> Cell:
    micro_batch, size = (str(measured[key]) for key in ("micro_batch", "slice"))
    return measured["set"], measured["rule"], micro_batch, size


@cache
def measured() -> Any:
    """Commit, machine, and for each set, budget and rule the micro-batch and the slice with their
    bytes, and the seconds of a global batch.
    """
    return read_json(SPEEDS)


# -------------------------------------------------------------------------------------- the report


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule in a budget of a set. A micro-batch of 0: not even one sample fits.

    limit, bytes: of the budget, and what the rule holds of it
    slice: time steps of a slice
    train_s: seconds of training, the mean of the runs
    top1: of each seed, in percent
    is_best: whether it is the form of BPTT with the highest mean of those with the most seeds
    less: points above the best form of BPTT, with the 95 % interval; None for forms of BPTT, and
        without a common seed

    The best form is chosen on the same answers, so other rules are rather underrated.
    """

    of: str
    rule: str
    budget: int
    limit: int
    bytes: int
    micro_batch: int
    slice: int
    steps: int = 0
    train_s: float = 0.0
    top1: tuple[float, ...] = ()
    is_best: bool = False
    less: tuple[float, float, float] | None = None


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Write the answers of each complete seed, and print the tables once all seeds have some."""
    study().write(runs, console)
    rows = table(console)
    for of in SETS if rows else ():
        render([each for each in rows if each.of == of], console)
    return {"rows": [asdict(each) for each in rows]}


def table(console: Console) -> list[Row]:
    """A row for each set, budget and rule; none before all seeds have answers."""
    blocks, right, draw = study().written(), study().read(console), np.random.default_rng(0)
    top1 = {
        name: [100 * float(each[name].mean()) for each in right.values() if name in each]
        for name in {name for each in right.values() for name in each}
    }
    rows = []
    for of, budget in product(SETS, BUDGETS) if right else ():
        cells = [x for x in measured()["cells"] if (x["set"], x["budget"]) == (of, budget)]
        names = {each["rule"]: cell_name(cell_of(each)) for each in cells if each["micro_batch"]}
        forms = [name for rule, name in names.items() if "BPTT" in rule and name in top1]
        best = max(
            forms, key=lambda name: (len(top1[name]), statistics.fmean(top1[name])), default=""
        )
        for each in cells:
            keys = ("rule", "budget", "limit", "bytes", "micro_batch", "slice")
            row = Row(of=of, **{key: each[key] for key in keys})
            name = names.get(each["rule"], "")
            if name in top1:
                seconds = [x["train_s"][name] for x in blocks.values() if name in x["train_s"]]
                pairs = [(x[name], x[best]) for x in right.values() if {name, best} <= x.keys()]
                row = replace(
                    row,
                    steps=steps_in(SECONDS[of], each["seconds"]),
                    train_s=statistics.fmean(seconds),
                    top1=tuple(top1[name]),
                    is_best=name == best,
                )
                if pairs and name not in forms:
                    value_SN = 100.0 * np.array([one.astype(int) - other for one, other in pairs])
                    if of == FLASHES:  # recordings 2 m and 2 m + 1 depend on one another
                        value_SN = value_SN.reshape(len(pairs), -1, 2).mean(2)
                    less = float(value_SN.mean()), *interval(value_SN, draw, 10_000)
                    row = replace(row, less=less)
            rows.append(row)
    return rows


def render(rows: Sequence[Row], console: Console) -> None:
    of, cells, seeds = rows[0].of, [], max(len(row.top1) for row in rows)
    for row in rows:
        name = f"{row.rule} in {row.limit / 1e6:.2f} MB"
        if not row.top1:
            why = "diverged" if row.micro_batch else "holds no sample"
            cells.append((name, *("",) * 5, why, ""))
            continue
        deviation = statistics.stdev(row.top1) if len(row.top1) > 1 else 0.0
        some = f" ({len(row.top1)} of {seeds})" if len(row.top1) < seeds else ""
        less = "best of BPTT" if row.is_best else ""
        if row.less is not None:
            less = "{:+.2f} ({:+.2f} to {:+.2f})".format(*row.less)
        cells.append((
            name,
            f"{row.bytes / 1e6:.2f}",
            f"{row.micro_batch}",
            f"{row.slice}",
            f"{row.steps:,}",
            f"{row.train_s:.0f}",
            f"{statistics.fmean(row.top1):.2f} ± {deviation:.2f}{some}",
            less,
        ))  # fmt: skip
    titles = ("MB held", "micro-batch", "slice", "batches", "s", "top-1, %", "points above")
    say(
        console,
        f"{of}: {SECONDS[of]:.0f} s of computation, batches of {BATCH}, {seeds} seeds, in what BPTT"
        f" holds for {', '.join(map(str, BUDGETS))} samples",
    )
    print_table(console, (prose("rule and budget"), *map(number, titles)), cells)
    say(
        console,
        "Points are above BPTT's best form in the budget, with 95 %. Batches fill the planned"
        " seconds by speeds that were measured in turn, with an error of some 10 %. The column s is"
        " of the runs themselves, with loading and with what else the machine did.",
    )


if __name__ == "__main__":
    study().main(report)
