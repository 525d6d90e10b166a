"""mine.py of docs/tutorials/own_pictures.md on small picture sets: are BPTT and SLTT near?

Command:  python -m benchmarks.pictures [--sets shapes fashion stamps] [--seeds 3] [--folder DIR]
Result:   docs/LOG.md, "The template of README"

Each set is written to a folder of its own, mine.py beside it with the number of its classes, and
launched as that page says, with several seeds. Nothing else of the recipe changes, except that the
test pictures are read once, after the last epoch.

    shapes    3 classes, 174 pictures to train on, generated: discs, squares and triangles
    fashion   10 classes, 1,000 pictures to train on: Debian's Fashion-MNIST
    (`dataset-fashion-mnist`)
    stamps    13 classes, 1,300 scenes to train on, of Debian's photographs (infra/setup.sh
    --pictures), test objects unseen

Exits with 1 where a run diverged, or where the means of the two rules lie more than `NEAR` points
apart.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image, ImageDraw

from pipeline.core.code_version import commit
from pipeline.data.write.images import fashion_sets
from pipeline.measure.memory import device_here, hardware

PAGE = Path(__file__).parents[1] / "docs/tutorials/own_pictures.md"
NEAR = 6.0
"""points between the means of BPTT and SLTT"""
CORNERS = {"disc": 40, "square": 4, "triangle": 3}
CLASSES = {"shapes": len(CORNERS), "fashion": 10, "stamps": 13}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", nargs="+", choices=CLASSES, default=list(CLASSES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    chosen = parser.parse_args()
    folder = (chosen.folder or Path(tempfile.mkdtemp(prefix="pictures-"))).absolute()
    print(f"commit {commit()}; {hardware(device_here())['cpu']}; {folder}", flush=True)
    are_near = [_is_near(name, folder / name, seeds=chosen.seeds) for name in chosen.sets]
    sys.exit(0 if all(are_near) else 1)


def template(classes: int) -> str:
    """mine.py as docs/tutorials/own_pictures.md has it, for `classes` classes."""
    [text] = [
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
        if 'name="mine"' in block
    ]
    return text.replace("classes=2", f"classes={classes}")


def write_shapes(folder: Path, *, train: int, val: int, seed: int = 0) -> None:
    """So many pictures of each class in `folder/train` and `folder/val`, of sizes, places, turns
    and colours drawn from `seed`.

    The colour of a shape leans towards one that its class has; the ground has any, so some shapes
    are hard to see."""
    draw = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for label in CORNERS:
            (into := folder / part / label).mkdir(parents=True)
            for number in range(count):
                _shape(label, draw).save(into / f"{number}.jpg")


def _shape(label: str, draw: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in draw.integers(60, 120, 2))
    ground = tuple(int(value) for value in draw.integers(0, 256, 3))
    colour = draw.integers(0, 100, 3) + 155 * (np.arange(3) == list(CORNERS).index(label))
    picture = Image.new("RGB", (width, height), ground)
    radius = draw.uniform(0.2, 0.45) * min(width, height)
    centre = draw.uniform((radius, radius), (width - radius, height - radius))
    angles = draw.uniform(0, 2 * np.pi) + np.arange(CORNERS[label]) * 2 * np.pi / CORNERS[label]
    corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ImageDraw.Draw(picture).polygon(
        [(float(x), float(y)) for x, y in corners], fill=tuple(int(value) for value in colour)
    )
    noisy = np.asarray(picture) + draw.normal(0, 25, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _write_fashion(folder: Path, *, train: int, val: int) -> None:
    """The first so many pictures of each class of either part of Fashion-MNIST."""
    for source, count in zip(fashion_sets(), (train, val), strict=True):
        found = dict.fromkeys(range(CLASSES["fashion"]), 0)
        for item in source.items:
            if found[item.label] < count:
                (into := folder / source.name / str(item.label)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(item.image)).save(into / f"{found[item.label]}.png")
                found[item.label] += 1


def _is_near(name: str, folder: Path, *, seeds: int) -> bool:
    folder.mkdir(parents=True)
    if name == "stamps":
        _spiketrain(
            folder,
            "write",
            "stamps",
            "--out",
            "data/pictures",
            "--size",
            "64",
            "--samples",
            "1300",
            "--val-samples",
            "520",
        )
    else:
        if name == "shapes":
            write_shapes(folder / "pictures", train=58, val=100)
        else:
            _write_fashion(folder / "pictures", train=100, val=100)
        words = ("--mode", "jpg", "--max-resolution", "256")
        _spiketrain(
            folder, "write", "folder", "--source", "pictures", "--out", "data/pictures", *words
        )
    (folder / "mine.py").write_text(template(CLASSES[name]))
    once = ("--set", "evaluation.every=0")
    _spiketrain(
        folder,
        "launch",
        "mine.py",
        "--inline",
        "--device",
        "cpu",
        "--seeds",
        str(seeds),
        *once,
        may_fail=True,
    )
    top1 = {rule: sorted(_top1_of(folder / "runs", rule)) for rule in ("BPTT", "SLTT")}
    is_whole = all(len(values) == seeds for values in top1.values())
    apart = 100 * (fmean(top1["BPTT"]) - fmean(top1["SLTT"])) if is_whole else float("nan")
    told = "; ".join(
        f"{rule} {' '.join(f'{100 * value:.1f}' for value in values)}"
        for rule, values in top1.items()
    )
    print(
        f"{name}, {CLASSES[name]} classes: top-1 by seed {told}; BPTT less SLTT {apart:+.1f} points"
        " in the mean",
        flush=True,
    )
    return is_whole and abs(apart) <= NEAR


def _top1_of(runs: Path, rule: str) -> Iterator[float]:
    """Of the runs of a rule that finished and never went back."""
    for file in runs.glob("*/summary.json"):
        summary = json.loads(file.read_text())
        if summary["rule"] == rule and not summary["rollbacks"]:
            yield summary["top1"]


def _spiketrain(folder: Path, *words: str, may_fail: bool = False) -> None:
    subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=folder,
        check=not may_fail,
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
