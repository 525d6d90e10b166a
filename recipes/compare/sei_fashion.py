"""Do multiple shortcuts and a teacher rescue 1-bit weights? {real, 1-bit} x {a shortcut around each
block, around each synapse} x {labels, a teacher} on Fashion-MNIST, over ten seeds.

Command:  spiketrain write fashion --out data/fashion
          spiketrain launch recipes/compare/sei_fashion.py --workers 1 --side-by-side auto
          python -m recipes.compare.sei_fashion RUNS
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, only its abstract is public: the cells,
          the network and the teacher are ours.
Result:   not trained yet; the design is in docs/LOG.md, "The design of the study of 1-bit weights".

A block is all cells of one seed; its answers, one bit for each test image, stand in ANSWERS. A
launch trains the seeds that have none. Its report, and the second command at any time, write the
answers of each complete seed and print the tables. The rates were chosen on a held-out tenth of the
training set (sei_fashion_rates.py); temperature and smoothing are not chosen yet.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.printing import new_console, number, print_table, prose, say
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.network import network_teacher
from pipeline.models.transforms import binarized
from pipeline.recipe import Recipe, Spec, Suite, spec
from pipeline.recipe.json import read_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.distillation import Distillation
from pipeline.train.evaluation import read_predictions
from pipeline.train.objective import CrossEntropy
from recipes.compare.factorial_base import (
    Levels,
    Weights,
    cell_name,
    effect,
    student_widening,
)
from recipes.fashion.base import fashion

# N images, S seeds, R resamples

FACTORS: dict[str, Levels] = {
    "weights": ("real", "1-bit"),
    "shortcuts": ("block", "multiple"),
    "taught by": ("labels", "teacher"),
}
NEITHER, BOTH = ("block", "labels"), ("multiple", "teacher")
MAIN = tuple((weights, *rest) for weights in FACTORS["weights"] for rest in (NEITHER, BOTH))
BY_BPTT = tuple(("1-bit", *rest, "BPTT") for rest in (NEITHER, BOTH))
SMOOTHED = ("1-bit", "multiple", "smoothed labels")
ALL = (*product(*FACTORS.values()), SMOOTHED, *BY_BPTT)
CELLS_OF = {seed: ALL if seed < 5 else MAIN for seed in range(10)}
SEEDS = (*CELLS_OF,)
ANSWERS = Path(__file__).with_name("sei_fashion_answers")

EPOCHS = 14
RATE = {"real": 0.6, "1-bit": 0.6}
TEMPERATURE = 1.0
SMOOTHING = 0.1  # targets as uncertain, in nats, as the teacher's answers in training
STUDY = "sei-fashion"
TEACHER = f"{STUDY}-teacher"


def recipe() -> Suite:
    blocks = [seed for seed in SEEDS if not _file(seed).exists()] or SEEDS
    cells = [
        replace(trained(cell), name=_name(cell, seed), seed=seed)
        for seed in blocks
        for cell in CELLS_OF[seed]
    ]
    return Suite(recipes=(teacher(), *cells), report=report)


def trained(cell: tuple[str, ...], *, epochs: int = EPOCHS) -> Recipe:
    """The recipe of a cell: weights, shortcuts, what it learns from, and the rule unless SLTT."""
    weights, shortcuts, taught_by, *rule = cell
    shortcut = {"block": "membrane", "multiple": "multiple"}[shortcuts]
    network = _network(width=16, stem_stride=2, shortcut=shortcut)
    if weights == "1-bit":
        network = spec(binarized, network=network, part="all_but_ends", weights="scaled")
    made = replace(
        fashion(),
        model=network,
        rule=spec(BPTT) if rule else spec(SLTT),
        optimizer=_momentum(RATE[weights]),
        time_steps=2,
        epochs=epochs,
        backend="plain",
    )
    if taught_by == "smoothed labels":
        return replace(made, objective=spec(CrossEntropy, label_smoothing=SMOOTHING))
    if taught_by == "labels":
        return made
    alone = teacher()
    return replace(
        made,
        objective=spec(Distillation, label_weight=0.0, form="soft", temperature=TEMPERATURE),
        teacher=spec(
            network_teacher,
            model=alone.model,
            weights=f"@{TEACHER}",
            time_steps=1,
            cache=spec(Cache, folder="data/sei-fashion-answers", limit_gb=2.0),
        ),
    )


def teacher() -> Recipe:
    """A network of ReLU, twice as wide and at full resolution, trained without the held-out
    tenth.
    """
    shared = fashion()
    return replace(
        shared,
        name=TEACHER,
        model=_network(width=32, stem_stride=1, neuron=spec(nn.ReLU)),
        data=shared.data.with_(held_out=0.1),
        optimizer=_momentum(0.1).with_(weight_decay=5e-4),
        time_steps=1,
        epochs=EPOCHS,
        backend="plain",
    )


def _network(**changes: Any) -> Spec:
    shared = {"blocks": (1, 1, 1), "classes": 10, "in_channels": 1, "pooled": True, "over": "step"}
    return spec(MSResNet, **shared, **changes)


def _momentum(lr: float) -> Spec:
    """Latent weights of 1-bit synapses have no decay."""
    return spec(create_optimizer_v2, opt="momentum", lr=lr, momentum=0.9, weight_decay=1e-4)


def _name(cell: tuple[str, ...], seed: int) -> str:
    return "-".join((STUDY, str(seed), *cell)).lower().replace(" ", "-")


def _file(seed: int) -> Path:
    return ANSWERS / f"seed-{seed}.json"


# -------------------------------------------------------------------------------- the answers


def report(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Write the answers of each complete seed, and print the tables of all that are written."""
    for seed, cells in CELLS_OF.items():
        folders = {cell: runs.get(_name(cell, seed)) for cell in cells}
        found = {cell: folder for cell, folder in folders.items() if folder is not None}
        is_complete = len(found) == len(cells) and all(map(_is_finished, found.values()))
        if is_complete and not _file(seed).exists():
            write_answers(_file(seed), found)
    right = {seed: read_answers(_file(seed)) for seed in SEEDS if _file(seed).exists()}
    if not right:
        say(console, "No seed is complete.")
        return {}
    table = contrasts_of(right)
    render(table, right, console)
    return {"contrasts": table.reset_index().to_dict("records")}


def _is_finished(run: Path) -> bool:
    return (run / "summary.json").exists() and (run / "answers.npz").exists()


def write_answers(file: Path, cells: Mapping[tuple[str, ...], Path]) -> None:
    """Write which test images the runs of one seed answered right, in the order of the set."""
    block: dict[str, Any] = {"cells": {}}
    for cell, run in cells.items():
        predictions = read_predictions(run / "answers.npz")
        summary = read_json(run / "summary.json")
        require(
            np.array_equal(predictions.index, np.arange(10_000)),
            f"sei-fashion: {run.name} must have answered the 10,000 test images",
        )
        require(
            summary["epochs"] == EPOCHS,
            f"sei-fashion: {run.name} must have trained {EPOCHS} epochs; got {summary['epochs']}",
        )
        block |= {"commit": summary["commit"], "machine": summary["hardware"]["cpu"]}
        block["cells"][cell_name(cell)] = np.packbits(predictions.is_correct).tobytes().hex()
    file.parent.mkdir(exist_ok=True)
    write_whole(file, (json.dumps(block, indent=1) + "\n").encode())


def read_answers(file: Path) -> pd.DataFrame:
    """A row for each image, a column of True and False for each cell."""
    cells = read_json(file)["cells"]
    bits = {cell: np.frombuffer(bytes.fromhex(text), np.uint8) for cell, text in cells.items()}
    return pd.DataFrame({cell: np.unpackbits(each).astype(bool) for cell, each in bits.items()})


# ------------------------------------------------------------------------------ the comparison


def contrasts() -> dict[str, Weights]:
    """The weights of the cells by what they measure. Those of MAIN have ten seeds."""

    def less(one: tuple[str, ...], other: tuple[str, ...]) -> Weights:
        return {one: 1.0, other: -1.0}

    def gain(weights: str) -> Weights:
        return less((weights, *BOTH), (weights, *NEITHER))

    neither, both = (("1-bit", *rest) for rest in (NEITHER, BOTH))
    return {
        "1-bit: both - neither": gain("1-bit"),
        "real: both - neither": gain("real"),
        "gain in 1-bit - gain in real": gain("1-bit") | {k: -w for k, w in gain("real").items()},
        "neither: 1-bit - real": less(neither, ("real", *NEITHER)),
        "both: 1-bit - real": less(both, ("real", *BOTH)),
        "1-bit: multiple - block": effect(FACTORS, "shortcuts", at={"weights": "1-bit"}),
        "1-bit: teacher - labels": effect(FACTORS, "taught by", at={"weights": "1-bit"}),
        "real: multiple - block": effect(FACTORS, "shortcuts", at={"weights": "real"}),
        "real: teacher - labels": effect(FACTORS, "taught by", at={"weights": "real"}),
        "1-bit, multiple: teacher - smoothed labels": less(both, SMOOTHED),
        "1-bit, neither: SLTT - BPTT": less(neither, BY_BPTT[0]),
        "1-bit, both: SLTT - BPTT": less(both, BY_BPTT[1]),
    }


def contrasts_of(
    right: Mapping[int, pd.DataFrame], *, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """A row per contrast, in points: `points`, the 95 % interval `low` to `high`, and `seeds`.

    A resample draws seeds and images with replacement, all cells of a contrast by the same draw:

        value = 100 / (S N) sum_s m[s] sum_n k[n] sum_c w[c] right[s,n,c]

    The percentiles are widened, because resamples of S seeds vary less than seeds do.

    Source: Owen 2007 (the pigeonhole bootstrap, arXiv:0712.1111), which is conservative.
    """
    draw = np.random.default_rng(seed)
    N = len(next(iter(right.values())))
    images_RN = draw.multinomial(N, np.full(N, 1 / N), size=resamples).astype(np.float32)
    rows = {}
    for name, weights in contrasts().items():
        cells = {cell_name(cell): weight for cell, weight in weights.items()}
        seeds = [each for each, frame in right.items() if cells.keys() <= {*frame}]
        if not seeds:
            continue
        value_SN = np.array(
            [sum(w * right[each][cell].to_numpy() for cell, w in cells.items()) for each in seeds],
            np.float32,
        )
        points = 100 * float(value_SN.mean(dtype=np.float64))
        S = len(seeds)
        seeds_RS = draw.multinomial(S, np.full(S, 1 / S), size=resamples)
        drawn_R = 100 * (seeds_RS * (images_RN @ value_SN.T)).sum(1) / (S * N)
        ends: NDArray[np.float64] = np.percentile(drawn_R, (2.5, 97.5))
        low, high = points + (student_widening(S) if S > 1 else np.inf) * (ends - points)
        rows[name] = {"points": points, "low": low, "high": high, "seeds": S}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("contrast")


def verdict(low: float, high: float, *, matters: float = 0.4) -> str:
    """In words, of an effect in points with its 95 % interval."""
    if low > 0 or high < 0:
        return "helps" if low > 0 else "harms"
    return f"smaller than {matters}" if max(-low, high) < matters else "undecided"


def render(table: pd.DataFrame, right: Mapping[int, pd.DataFrame], console: Console) -> None:
    top1 = pd.DataFrame({seed: 100 * frame.mean() for seed, frame in right.items()})
    rows = [
        (str(cell), f"{row.mean():.2f}", f"{row.std():.2f}", str(row.count()))
        for cell, row in top1.iterrows()
    ]
    columns = (prose("cell"), number("top-1, %"), number("deviation"), number("seeds"))
    print_table(console, columns, rows)
    console.print()
    rows = [
        (str(name), f"{row.points:+.2f}", f"{row.low:+.2f} to {row.high:+.2f}", f"{row.seeds:.0f}")
        for name, row in table.iterrows()
    ]
    columns = (prose("contrast"), number("points"), number("95 %"), number("seeds"))
    print_table(console, columns, rows)
    gain, cost = (table.loc[name] for name in ("1-bit: both - neither", "neither: 1-bit - real"))
    words = verdict(gain.low, gain.high)
    say(console, f"Multiple shortcuts and a teacher, in 1-bit weights: {words}.")
    if cost.high < -0.5:
        say(console, f"They bring back {-gain.points / cost.points:.0%} of what 1 bit costs.")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    jobs = sorted(folder.glob(f"{STUDY}-[0-9]*/recipe.json"))
    report({read_json(each)["recipe"]["name"]: each.parent for each in jobs}, new_console())


if __name__ == "__main__":
    main()
