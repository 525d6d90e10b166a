"""How long training stands still for a checkpoint, written beside it and waited for, in turn in one
process; and its size.

Command:  python -m benchmarks.checkpoints [--saves 11] [--folder DIR]
Result:   commit 45dee44e4d14, 2 cores of an Intel Xeon, torch 2.13, nothing else running, a local
          disk, medians of 11 saves each

    network                    checkpoint        training stands still, ms (most)   written, s    a
    batch then takes, ms VGG-sWS, half as wide         27.8 MB   waited for               92   (117)
    0.07                        86
                                            beside                   20    (21)         0.08
                                            93
    VGG-sWS                      110.8 MB   waited for              290   (503)         0.25
                                            279 beside                   43    (44)         0.26
                                            295

Two networks learn by SLTT with momentum, on one thread: a VGG of a quarter of VGG-sWS's width
squared, and VGG-sWS. A checkpoint holds the weights, the momentum, and the weights once more for
whoever evaluates. The run is the product's own, of one worker on the plain backend, and so are the
figures: the events "checkpoint" tell them. Waited for, as where somebody asks for one: the batch
after it begins when it is whole, on disk and summed. Beside: training waits for all that comes
before the writing (is every weight finite, what memory is used, the copies), and its next batches
share the machine with the thread that writes, so that what those take longer is told, too. With
several workers comparing them comes on top. `--folder`: the storage that is asked about; without it
the temporary one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from timm.optim import create_optimizer_v2

from pipeline.core.code_version import commit
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.cluster import Cluster
from pipeline.launch.prepare import prepare
from pipeline.measure.memory import device_here, hardware
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Checkpointing, Recipe, Spec, spec
from pipeline.rules.sltt import SLTT
from pipeline.track.events import Checkpoint, Event
from pipeline.track.journal import Tracker
from pipeline.train.assemble import TrainContext
from pipeline.train.job import RankInfo
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from pipeline.train.trainer import Trainer
from pipeline.train.transfer import arriving
from pipeline.train.worker import run

T, BATCH, PIXELS, CLASSES = 2, 8, 16, 10
HALF = ((32, 64), (128, 128), (256, 256), (256, 256))
NETWORKS = {
    "VGG-sWS, half as wide": spec(vgg_sws, classes=CLASSES, stages=HALF),
    "VGG-sWS": spec(vgg_sws, classes=CLASSES),
}


def recipe(model: Spec) -> Recipe:
    """Of one epoch, longer than what is trained of it."""
    return Recipe(
        name="checkpoints",
        model=model,
        rule=spec(SLTT),
        data=spec(
            Synthetic,
            samples=10_000 * BATCH,
            classes=CLASSES,
            shape=(3, PIXELS, PIXELS),
            augment="none",
        ),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.01, momentum=0.9),
        schedule=spec(cosine, warmup=0.0),
        time_steps=T,
        batch_size=BATCH,
        epochs=1,
        checkpoints=Checkpointing(minutes=0.0),
        backend="plain",
    )


@dataclass
class Found:
    """Seconds, of each save or batch."""

    stall_s: list[float] = field(default_factory=list)
    write_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """of batches while a checkpoint is written beside them; where it is waited for, of those
    between
    """
    bytes: int = 0

    def note(self, event: Checkpoint) -> None:
        self.stall_s.append(event.stall_s)
        self.write_s.append(event.write_s)
        self.bytes = event.bytes


class Told:
    """The run's tracker, and what was told last of a checkpoint."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.checkpoint: Checkpoint | None = None

    def write(self, event: Event, /) -> None:
        self.tracker.write(event)
        if isinstance(event, Checkpoint):
            self.checkpoint = event


class InTurn(Trainer):
    """The product's attempt at a run, which saves in the one way and the other in turn."""

    def __init__(self, context: TrainContext, *, saves: int, found: dict[str, Found]) -> None:
        self.told = Told(context.tracker)
        super().__init__(replace(context, tracker=self.told))
        self.saves, self.found = saves, found

    def run(self) -> None:
        ways: dict[str, Callable[[Found], None]] = {
            "waited for": self._waited_for,
            "beside": self._beside,
        }
        with closing(self.context.loaders.train(0)) as train_set, train_set.epoch(0) as loader:
            self.source = arriving(iter(loader), self.ranks.device)
            for index in range(self.saves + 1):
                for name in sorted(
                    ways, reverse=bool(index % 2)
                ):  # neither always comes after the other
                    self._batch()
                    ways[name](self.found[name] if index else Found())  # the first of each warms up

    def _waited_for(self, found: Found) -> None:
        self.saving.save(self.step, score=None)
        self.saving.wait(self.step)
        found.note(self._told())
        found.step_s.append(self._batch())

    def _beside(self, found: Found) -> None:
        self.saving.save(self.step, score=None)
        while self.told.checkpoint is None:
            found.step_s.append(self._batch())
        found.note(self._told())

    def _told(self) -> Checkpoint:
        told, self.told.checkpoint = self.told.checkpoint, None
        assert told is not None
        return told

    def _batch(self) -> float:
        """The seconds it took, with what is done between it and the next: there training hears that
        a checkpoint is whole.
        """
        began = time.perf_counter()
        self._train_batch(self.source)
        self.step += 1
        with self.meters.between("coordination"):
            self._between_batches(0, last=False)
        return time.perf_counter() - began


def measure(model: Spec, folder: Path, saves: int) -> dict[str, Found]:
    found = {name: Found() for name in ("waited for", "beside")}
    run(
        prepare(recipe(model), Cluster(), folder),
        RankInfo(),
        trainer_of=partial(InTurn, saves=saves, found=found),
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--saves", type=int, default=11)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    for name, model in NETWORKS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            report(name, measure(model, Path(folder), arguments.saves))
    machine = hardware(device_here())
    print(
        f"medians of {arguments.saves} saves each; commit {commit()}, {machine['cpu']}, torch"
        f" {machine['torch']}"
    )


def report(name: str, found: dict[str, Found]) -> None:
    for way, each in found.items():
        stall_s, write_s, step_s = (
            statistics.median(values) for values in (each.stall_s, each.write_s, each.step_s)
        )
        print(
            f"{name}, checkpoint of {each.bytes / 1e6:.1f} MB, {way}: training stands still for"
            f" {stall_s * 1e3:.1f} ms (most {max(each.stall_s) * 1e3:.1f}), written in"
            f" {write_s:.3f} s, a batch then takes {step_s * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main()
