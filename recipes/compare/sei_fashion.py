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
answers of each complete seed and print the tables. Settings were chosen on a held-out tenth of the
training set (sei_fashion_rates.py, sei_fashion_temperature.py).
"""

import hashlib
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
from pipeline.track.run_state import is_over, state_of, top1_of
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

# N images, S seeds, R resamples, V different values

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
GATE = 0.4  # points: the largest half-width with which the study decides, and what matters
LEAST_TEACHER = 0.935  # top-1 on the held-out tenth

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
        found = {cell: runs[name] for cell in cells if (name := _name(cell, seed)) in runs}
        ends = {cell: state_of(run) for cell, run in found.items()}
        is_complete = len(found) == len(cells) and {*ends.values()} <= {"finished", "diverged"}
        if is_complete and not _file(seed).exists():
            finished = {cell: run for cell, run in found.items() if ends[cell] == "finished"}
            write_answers(seed, finished)
            for cell in found.keys() - finished.keys():
                say(
                    console,
                    f"Seed {seed}: {cell_name(cell)} diverged; its contrasts lack the seed.",
                )
    right = {seed: read_answers(_file(seed)) for seed in SEEDS if _file(seed).exists()}
    if not right:
        say(console, "No seed is complete.")
        return {}
    table = contrasts_of(right)
    render(table, right, console)
    return {"contrasts": table.reset_index().to_dict("records")}


def write_answers(seed: int, cells: Mapping[tuple[str, ...], Path]) -> None:
    """Write which test images the runs of a seed answered right, in the order of the set.

    Raises: ValueError for a run of another recipe than its cell's, for runs of several commits,
        contents or teachers, and for a teacher below LEAST_TEACHER.
    """
    blocks, teachers, answers = [], [], {}
    for cell, run in cells.items():
        found = Recipe.read(run / "recipe.json")
        planned = replace(trained(cell), name=_name(cell, seed), seed=seed)
        predictions, summary = (
            read_predictions(run / "answers.npz"),
            read_json(run / "summary.json"),
        )
        require(
            _without_paths(found) == _without_paths(planned),
            f"sei-fashion: {run.name} must have the recipe of its cell and seed",
        )
        require(
            np.array_equal(predictions.index, np.arange(10_000)),
            f"sei-fashion: {run.name} must have answered the 10,000 test images",
        )
        blocks.append(
            {
                "commits": summary["commits"],
                "data": summary["data_fingerprint"],
                "machine": summary["hardware"]["cpu"],
            }
        )
        if found.teacher is not None:
            weights = Path(found.teacher.kwargs["weights"])
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
            teachers.append({"weights": digest, "top1": top1_of(weights.parent)})
        answers[cell_name(cell)] = np.packbits(predictions.is_correct).tobytes().hex()
    for what, each in (("commit, data and machine", blocks), ("teacher", teachers)):
        require(
            all(one == each[0] for one in each),
            f"sei-fashion: the runs of a seed must have one {what}; got {each}",
        )
    for one in teachers:
        require(
            one["top1"] >= LEAST_TEACHER,
            f"sei-fashion: the teacher must reach {LEAST_TEACHER:.1%}; got {one['top1']:.2%}",
        )
    block = {**blocks[0], "teacher": teachers[:1], "cells": answers}
    ANSWERS.mkdir(exist_ok=True)
    write_whole(_file(seed), (json.dumps(block, indent=1) + "\n").encode())


def _without_paths(recipe: Recipe) -> Recipe:
    taught_by = recipe.teacher and recipe.teacher.with_(weights="", cache=None)
    return replace(recipe, data=recipe.data.with_(folder=""), teacher=taught_by)


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
    """A row per contrast: `points`, the 95 % interval `low` to `high`, `seeds` with all its cells.

    The value of a seed and an image is 100 sum_c w[c] right[c] points.
    """
    draw = np.random.default_rng(seed)
    rows = {}
    for name, weights in contrasts().items():
        cells = {cell_name(cell): weight for cell, weight in weights.items()}
        seeds = [each for each, frame in right.items() if cells.keys() <= {*frame}]
        if seeds:
            value_SN = 100 * np.array(
                [
                    sum(w * right[each][cell].to_numpy() for cell, w in cells.items())
                    for each in seeds
                ]
            )
            low, high = interval(value_SN, draw, resamples)
            points = float(value_SN.mean())
            rows[name] = {"points": points, "low": low, "high": high, "seeds": len(seeds)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("contrast")


def interval(
    value_SN: NDArray[np.float64], draw: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds and images, both of which are samples.

    A resample draws seeds, by their means, and images, by theirs, with replacement, and adds the
    deviations of both. What is of one seed and one image alone is in both, so that with the
    variances a of seeds, b of images and e of the rest the expected variance is

        a / S + b / N + 2 e / (S N)

    instead of one e. Where seeds and images are weighed in one product, it is three (Owen 2007,
    arXiv:0712.1111). Deviations of seeds are widened, because resamples of S seeds vary less than
    seeds do.
    """
    S, N = value_SN.shape
    if S == 1:
        return -np.inf, np.inf
    mean = value_SN.mean()
    seeds_R = draw.multinomial(S, np.full(S, 1 / S), size=resamples) @ value_SN.mean(1) / S - mean
    # Images of one value are drawn together.
    value_V, images_V = np.unique(value_SN.sum(0), return_counts=True)
    images_R = draw.multinomial(N, images_V / N, size=resamples) @ value_V / (S * N) - mean
    low, high = np.percentile(mean + student_widening(S) * seeds_R + images_R, (2.5, 97.5))
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """In words, of an effect in points with its 95 % interval."""
    if low > 0 or high < 0:
        return "helps" if low > 0 else "harms"
    return f"smaller than {GATE}" if max(-low, high) < GATE else "undecided"


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
    gain, more, cost = (
        table.loc[name]
        for name in (
            "1-bit: both - neither",
            "gain in 1-bit - gain in real",
            "neither: 1-bit - real",
        )
    )
    half = (gain.high - gain.low) / 2
    meets = "within" if half <= GATE else "above"
    say(
        console,
        f"Multiple shortcuts and a teacher, in 1-bit weights: {verdict(gain.low, gain.high)}. The"
        f" interval's half-width of {half:.2f} points is {meets} the gate of {GATE}.",
    )
    than = {"helps": "more than", "harms": "less than", "undecided": "not shown otherwise than"}
    words = than.get(verdict(more.low, more.high), f"as much, within {GATE} points, as")
    say(console, f"1-bit weights gain by them {words} real weights.")
    if cost.high < -0.5:
        say(console, f"They bring back {-gain.points / cost.points:.0%} of what 1 bit costs.")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    jobs = sorted(folder.glob(f"{STUDY}-[0-9]*/recipe.json"))
    over = [each for each in jobs if is_over(each.parent, is_needed=False)]
    report({read_json(each)["recipe"]["name"]: each.parent for each in over}, new_console())


if __name__ == "__main__":
    main()
