"""What an earlier training is worth on other pictures: a network that was trained on 8 classes of
stamps is fine-tuned on the other 5, beside the same network from scratch in as many epochs.

Command:  python -m benchmarks.finetuned --split 0 --seeds 5 [--size 64] [--epochs 10]
          [--scratch-epochs N] [--rates 0.004 0.004 0.004] [--trains all|head] [--layer-decay 0.5]
          [--least-area 0.08] [--processes 2] [--folder data/finetuned]
Result:   --trains head --least-area 0.5 --rates 0.004 0.003 0.003, split 0, five seeds: fine-tuned
          .2350 to .2875, from scratch .2425 to .3275, difference -3.35 points, 95 % interval -6.46
          to -0.24; commit 84ebd9ba2b54, 2 cores of an AMD EPYC, two trainings at a time

Objects and backgrounds of the evaluation pictures are in neither training set. The pictures lie in
folders of JPEGs, as users have them, and `spiketrain finetune` makes the recipe. From scratch is
that recipe without `init`. Both runs of a seed have the same batches and epochs unless
--scratch-epochs says otherwise, and their times are printed. The three learning rates are those of
the training on 8 classes, of the fine-tuning, and from scratch; they were chosen on split 3. The
interval is that of the paired differences.
"""

import argparse
import io
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.code_version import commit
from pipeline.core.run_folder import RunFolder
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import read_tables
from pipeline.data.write.images import write_folder
from pipeline.data.write.stamps import write_stamps
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import launch_run
from pipeline.launch.finetune import finetuning, read_start
from pipeline.measure.memory import device_here, hardware
from pipeline.models.ms_resnet import MSResNet
from pipeline.recipe.recipe import Recipe, read_json, spec
from pipeline.report.study import spread_of
from pipeline.rules.sltt import SLTT
from recipes.stamps.base import qkformer

EARLIER = 8  # classes, the first ones in the order of their names


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("split", 3), ("seeds", 5), ("size", 64), ("epochs", 10), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--first-epochs", type=int, default=20)
    parser.add_argument("--scratch-epochs", type=int)
    parser.add_argument("--trains", choices=("all", "head"), default="all")
    parser.add_argument("--layer-decay", type=float)
    parser.add_argument("--least-area", type=float, default=0.08)
    parser.add_argument("--rates", type=float, nargs=3, default=[4e-3, 4e-3, 4e-3])
    parser.add_argument("--folder", type=Path, default=Path("data/finetuned"))
    chosen = parser.parse_args()
    folder = chosen.folder.resolve() / f"split-{chosen.split}-{chosen.size}"
    if not (folder / "later-ffcv").exists():
        write(folder, chosen.split, chosen.size)
    print(
        f"split {chosen.split}, {chosen.size} pixels, {commit()}; {hardware(device_here())['cpu']}"
    )
    train = partial(pair, folder=folder, chosen=chosen)
    with ProcessPoolExecutor(chosen.processes, mp_context=get_context("spawn")) as pool:
        differences = []
        for seed, (tuned, scratch) in enumerate(pool.map(train, range(chosen.seeds))):
            differences.append(100 * (tuned["top1"] - scratch["top1"]))
            print(
                f"seed {seed}: fine-tuned {tuned['top1']:.4f} in {tuned['wall_s']:.0f} s, from"
                f" scratch {scratch['top1']:.4f} in {scratch['wall_s']:.0f} s",
                flush=True,
            )
    spread = spread_of(differences)
    assert spread is not None
    print(f"difference {spread.mean:+.2f} points, 95 % interval {spread.interval}")


def write(folder: Path, split: int, size: int) -> None:
    """`earlier` and `later`: folders of JPEGs, and their FFCV files."""
    write_stamps(folder / "all", size=size, split=split, workers=2)
    for part in ("train", "val"):
        path = folder / "all" / f"{part}.beton"
        tables, stored = read_tables(path), np.memmap(path, np.uint8, "r")
        names = manifests.read(path).classes
        for number, label in enumerate(tables.labels):
            name = "earlier" if label < EARLIER else "later"
            place = folder / name / part / names[label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:05}.jpg").write_bytes(tables.payload(stored, number))
    for name in ("earlier", "later"):
        write_folder(folder / name, folder / f"{name}-ffcv", workers=2)


def pair(seed: int, *, folder: Path, chosen: Any) -> list[dict[str, Any]]:
    """The summaries of the fine-tuned network and of the one from scratch."""
    earlier_rate, later_rate, scratch_rate = chosen.rates
    base = qkformer()
    area = (chosen.least_area, 1.0)
    data = spec(
        Beton,
        folder=str(folder / "earlier-ffcv"),
        classes=EARLIER,
        size=chosen.size,
        area=area,
    )
    first = replace(
        base,
        name="earlier",
        model=spec(MSResNet, blocks=(1, 1, 1, 1), width=16, classes=EARLIER, over="step"),
        rule=spec(SLTT),
        data=data,
        optimizer=base.optimizer.with_(lr=earlier_rate),
        epochs=chosen.first_epochs,
        seed=seed,
    )
    settings = f"{chosen.least_area:g}-{chosen.first_epochs}"
    start = read_start(train(first, folder, f"earlier-{settings}-{earlier_rate:g}-{seed}"))
    tuned, _ = finetuning(
        start,
        folder / "later-ffcv",
        lr=later_rate,
        trains=chosen.trains,
        layer_decay=chosen.layer_decay,
        epochs=chosen.epochs,
        batch_size=64,
    )
    tuned = replace(tuned, seed=seed, data=tuned.data.with_(area=area))
    epochs = chosen.scratch_epochs or chosen.epochs
    whole, _ = finetuning(
        start, folder / "later-ffcv", lr=scratch_rate, epochs=epochs, batch_size=64
    )
    scratch = replace(whole, init=None, seed=seed, data=tuned.data)
    way = f"{chosen.trains}-{chosen.layer_decay}-{earlier_rate:g}-{later_rate:g}"
    runs = [
        train(tuned, folder, f"tuned-{settings}-{chosen.epochs}-{way}-{seed}"),
        train(scratch, folder, f"scratch-{settings}-{epochs}-{scratch_rate:g}-{seed}"),
    ]
    return [read_json(RunFolder(run).summary) for run in runs]


def train(recipe: Recipe, folder: Path, name: str) -> Path:
    """The run of this name, which is trained unless it has finished."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/{os.getpid()}.db"
    run = folder / "runs" / name
    if not RunFolder(run).summary.exists():
        with redirect_stdout(io.StringIO()):
            launch_run(recipe, Cluster(inline=True, device="cpu"), run.parent, name=name)
    return run


if __name__ == "__main__":
    main()
