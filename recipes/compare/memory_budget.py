"""Given so much memory, which rule reaches the highest accuracy in the same time? Fashion-MNIST and
flashes, six rules, what BPTT keeps of 2, 8 and 32 samples, five seeds.

Command:  spiketrain write fashion --out data/fashion
          spiketrain write events flashes --slices 16 --gap 4 --size 24 --samples 8000
              --val-samples 4000 --out data/flashes-16-4
          python -m benchmarks.memory_budget measure
          spiketrain launch recipes/compare/memory_budget.py --workers 1 --side-by-side 2
          python -m recipes.compare.memory_budget RUNS; python -m benchmarks.memory_budget
Source:   ours
Result:   not trained yet; the design is in docs/LOG.md, "The design of the study of memory budgets"

A block is all cells of one seed (blocks_base.py). Networks have no batch norm, so micro-batches
leave the gradient of a global batch as it is.
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

from pipeline.core.checks import require
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
SECONDS = {FASHION: 150.0, FLASHES: 45.0}  # of a run's training
TRAINED_ON = {FASHION: 60_000, FLASHES: 8_000}
EVALUATED_ON = {FASHION: 10_000, FLASHES: 4_000}
STEPS = {FASHION: 6, FLASHES: 16}
# Of a half and a quarter of the steps in a slice, what keeps fewer bytes.
RECOMPUTED = {FASHION: 3, FLASHES: 4}


def recipe() -> Suite:
    return Suite(recipes=tuple(study().recipes()), report=report)


def study() -> Blocks:
    """Budgets in which a rule has the same micro-batch share a run."""
    cells = {cell_of(each): None for each in measured()["cells"] if each["micro_batch"]}
    return Blocks(
        name=NAME,
        folder=ANSWERS,
        cells_of={seed: tuple(cells) for seed in SEEDS},
        recipe_of=trained,
        samples=EVALUATED_ON,
    )


def trained(cell: Cell) -> Recipe:
    """The recipe of a set, a rule and a micro-batch: as many global batches as SECONDS hold."""
    of, rule, micro_batch = cell
    [seconds] = {each["seconds"] for each in measured()["cells"] if cell_of(each) == cell}
    steps = steps_in(SECONDS[of], seconds)
    return replace(
        shared(of, rule),
        micro_batch=int(micro_batch),
        stop_after=steps,
        epochs=-(-steps // (TRAINED_ON[of] // BATCH)),
    )


def steps_in(seconds: float, seconds_of_batch: float) -> int:
    return max(1, round(seconds / seconds_of_batch))


def shared(of: str, rule: str) -> Recipe:
    """BPTT-recompute has BPTT's learning rate, as it has its gradient, and SLTT-1 has SLTT's."""
    if of == FASHION:
        # docs/LOG.md, "No rule is shown to gain by a rate of its own over the shared 0.3"
        made, rate = fashion(), 0.3
    else:
        rates = {label: lr for label, (_, _, lr) in OF_FLASHES.items()}
        alike = {"BPTT-recompute": "BPTT", "BPTT-truncate": "truncated BPTT", "SLTT-1": "SLTT"}
        made, rate = trained_on_flashes((of, "BPTT")), rates[alike.get(rule, rule)]
    return replace(
        made,
        rule=rules(of)[rule],
        optimizer=made.optimizer.with_(lr=rate),
        time_steps=STEPS[of],
        batch_size=BATCH,
        backend="plain",
    )


def rules(of: str) -> dict[str, Spec]:
    return {
        "BPTT": spec(BPTT),
        "BPTT-recompute": spec(BPTT, recompute=True, chunk=RECOMPUTED[of]),
        "BPTT-truncate": spec(BPTT, truncate=STEPS[of] // 2),
        "SLTT": spec(SLTT),
        "SLTT-1": spec(SLTT, k=1, rescale=True),
        "OTTT": spec(OTTT),
    }


def cell_of(measured: Mapping[str, Any]) -> Cell:
    return measured["set"], measured["rule"], str(measured["micro_batch"])


@cache
def measured() -> Any:
    """Commit, machine, and for each set, budget and rule the micro-batch with its bytes, and the
    seconds of a global batch.
    """
    return read_json(SPEEDS)


# -------------------------------------------------------------------------------------- the report


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule in a budget of a set. A micro-batch of 0: not even one sample fits.

    limit: bytes of the budget
    train_s: seconds of training, the mean of the runs
    top1: of each seed, in percent
    less: points above the `best` form of BPTT in the budget, with the 95 % interval; None for that
        form, and without a common seed

    The best form is that with the highest mean, chosen on the same answers, so others are rather
    underrated.
    """

    of: str
    rule: str
    budget: int
    limit: int
    micro_batch: int
    steps: int = 0
    train_s: float = 0.0
    top1: tuple[float, ...] = ()
    less: tuple[float, float, float] | None = None


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Write the answers of each complete seed, and print the tables once all seeds have some."""
    study().write(runs, console)
    rows = table(console)
    for of in SETS if rows else ():
        render([each for each in rows if each.of == of], console)
    return {"rows": [asdict(each) for each in rows]}


def table(console: Console) -> list[Row]:
    """A row for each set, budget and rule; none before all seeds have answers.

    Raises: ValueError for answers of another machine than that of the speeds.
    """
    blocks, right, draw = study().written(), study().read(console), np.random.default_rng(0)
    machine = "{cpu}, torch {torch}".format(**measured()["machine"])
    for block in blocks.values():
        require(
            block["machine"] == machine,
            f"{NAME}: runs must be on the machine of the measured speeds, {machine}; got"
            f" {block['machine']}",
        )
    top1 = {
        name: [100 * float(each[name].mean()) for each in right.values() if name in each]
        for name in {name for each in right.values() for name in each}
    }
    rows = []
    for of, budget in product(SETS, BUDGETS) if right else ():
        cells = [x for x in measured()["cells"] if (x["set"], x["budget"]) == (of, budget)]
        names = {each["rule"]: cell_name(cell_of(each)) for each in cells if each["micro_batch"]}
        forms = [name for rule, name in names.items() if "BPTT" in rule and name in top1]
        best = max(forms, key=lambda name: statistics.fmean(top1[name]), default="")
        for each in cells:
            row = Row(
                of=of, **{key: each[key] for key in ("rule", "budget", "limit", "micro_batch")}
            )
            name = names.get(each["rule"], "")
            if name in top1:
                seconds = [x["train_s"][name] for x in blocks.values() if name in x["train_s"]]
                pairs = [(x[name], x[best]) for x in right.values() if {name, best} <= x.keys()]
                value_SN = 100.0 * np.array([one.astype(int) - other for one, other in pairs])
                if of == FLASHES:  # recordings 2 m and 2 m + 1 depend on one another
                    value_SN = value_SN.reshape(len(pairs), -1, 2).mean(2)
                is_compared = name != best and len(pairs) > 0
                row = replace(
                    row,
                    steps=steps_in(SECONDS[of], each["seconds"]),
                    train_s=statistics.fmean(seconds),
                    top1=tuple(top1[name]),
                    less=(float(value_SN.mean()), *interval(value_SN, draw, 10_000))
                    if is_compared
                    else None,
                )
            rows.append(row)
    return rows


def render(rows: Sequence[Row], console: Console) -> None:
    cells = []
    for row in rows:
        first = (f"{row.budget} ({row.limit / 1e6:.2f} MB)", row.rule)
        if not row.top1:
            why = "diverged" if row.micro_batch else "holds no sample"
            cells.append((*first, *("",) * 4, why, "", ""))
            continue
        deviation = statistics.stdev(row.top1) if len(row.top1) > 1 else 0.0
        less = ("best form of BPTT", "") if row.less is None else (
            f"{row.less[0]:+.2f}", f"{row.less[1]:+.2f} to {row.less[2]:+.2f}"
        )  # fmt: skip
        cells.append((
            *first,
            f"{row.micro_batch}",
            f"{row.steps:,}",
            f"{row.steps * BATCH / TRAINED_ON[row.of]:.2f}",
            f"{row.train_s:.0f}",
            f"{statistics.fmean(row.top1):.2f} ± {deviation:.2f}",
            *less,
        ))  # fmt: skip
    titles = ("micro-batch", "batches", "epochs", "s", "top-1, %", "points above BPTT", "95 %")
    seeds = max(len(row.top1) for row in rows)
    of = rows[0].of
    say(console, f"{of}: {SECONDS[of]:.0f} s of training, batches of {BATCH}, {seeds} seeds")
    print_table(console, (prose("memory of BPTT's"), prose("rule"), *map(number, titles)), cells)


if __name__ == "__main__":
    study().main(report)
