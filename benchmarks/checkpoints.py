"""How long training stands still for a checkpoint, written beside it and waited for, in turn in one process; and its size.

Command:  python -m benchmarks.checkpoints [--saves 11] [--folder DIR]
Result:   commit abe7edc24319, 2 cores of an Intel Xeon, torch 2.13, nothing else running, a local disk, medians of 11 saves each

    network                    checkpoint        training stands still, ms (most)   written, s    a batch then takes, ms
    VGG-sWS, half as wide         27.8 MB   waited for               74    (91)         0.07                        67
                                            beside                    7    (11)         0.07                        76
    VGG-sWS                      110.8 MB   waited for              292   (495)         0.26                       262
                                            beside                   27    (29)         0.26                       278

Two networks learn by SLTT with momentum, on one thread: a VGG of a quarter of VGG-sWS's width squared, and VGG-sWS. A checkpoint
holds the weights, the momentum, and the weights once more for whoever evaluates. Waited for: the batch after it begins when it is
whole, on disk and summed. Beside: training waits for the copy alone, and its next batches share the machine with the thread that
writes, so that what those take longer is told, too. `--folder`: the storage that is asked about; without it the temporary one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.backend.plain import Plain
from pipeline.checkpoint import Checkpoints, Folder, Saved
from pipeline.code import commit
from pipeline.guards.batches import Unguarded
from pipeline.loop import MicroBatch, train
from pipeline.measure.memory import hardware
from pipeline.models.vgg import vgg_sws
from pipeline.objective import CrossEntropy
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from tests.silent import NoMeters

T, BATCH, PIXELS, CLASSES = 2, 8, 16, 10
HALF = ((32, 64), (128, 128), (256, 256), (256, 256))
NETWORKS: dict[str, Callable[[], nn.Module]] = {"VGG-sWS, half as wide": partial(vgg_sws, stages=HALF), "VGG-sWS": vgg_sws}
TRAINER = {"world_size": 1, "zero": 0, "score": None}


class Trained:
    """A network that learns from one batch again and again; `step()` gives the seconds it took."""

    def __init__(self, network: nn.Module) -> None:
        self.rule = SLTT()
        self.rule.attach(network)
        self.backend = Plain(network, lambda network: torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9))
        x_TB = repeat(torch.randn(BATCH, 3, PIXELS, PIXELS), T)
        self.batch = MicroBatch(x_TB, torch.randint(CLASSES, (BATCH,)), range(BATCH), 1.0)
        self.steps = 0

    def step(self) -> float:
        began = time.perf_counter()
        batches = [(self.steps, [self.batch])]
        train(self.rule, self.backend, lambda step: None, batches, CrossEntropy(), NoMeters(), Unguarded())
        self.steps += 1
        return time.perf_counter() - began


@dataclass
class Found:
    """Seconds, of each save or batch."""

    stall_s: list[float] = field(default_factory=list)
    write_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """of batches while a checkpoint is written beside them; where it is waited for, of those between"""
    bytes: int = 0

    def note(self, saved: Saved, stall_s: float) -> None:
        self.stall_s.append(stall_s)
        self.write_s.append(saved.write_s)
        self.bytes = saved.bytes


def waited_for(trained: Trained, checkpoints: Checkpoints, found: Found) -> None:
    began = time.perf_counter()
    checkpoints.save(trained.steps, trained.backend, trained.rule, TRAINER)
    saved = checkpoints.wait()
    stall_s = time.perf_counter() - began
    assert saved is not None
    found.note(saved, stall_s)
    found.step_s.append(trained.step())


def beside(trained: Trained, checkpoints: Checkpoints, found: Found) -> None:
    began = time.perf_counter()
    checkpoints.save(trained.steps, trained.backend, trained.rule, TRAINER)
    stall_s = time.perf_counter() - began
    while (saved := checkpoints.done()) is None:
        found.step_s.append(trained.step())
    checkpoints.wait()
    found.note(saved, stall_s)


def measure(network: nn.Module, folder: Path, saves: int) -> dict[str, Found]:
    trained, ways = Trained(network), {"waited for": waited_for, "beside": beside}
    checkpoints, found = Checkpoints(Folder(folder), attempt="b"), {name: Found() for name in ways}
    for index in range(saves + 1):
        for name in sorted(ways, reverse=bool(index % 2)):  # neither always comes after the other
            trained.step()
            ways[name](trained, checkpoints, found[name] if index else Found())  # the first of each warms up
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--saves", type=int, default=11)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, network in NETWORKS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            report(name, measure(network(), Path(folder) / "checkpoints", arguments.saves))
    machine = hardware()
    print(f"medians of {arguments.saves} saves each; commit {commit()}, {machine['cpu']}, torch {machine['torch']}")


def report(name: str, found: dict[str, Found]) -> None:
    for way, each in found.items():
        stall_s, write_s, step_s = (statistics.median(values) for values in (each.stall_s, each.write_s, each.step_s))
        print(
            f"{name}, checkpoint of {each.bytes / 1e6:.1f} MB, {way}: training stands still for {stall_s * 1e3:.1f} ms "
            f"(most {max(each.stall_s) * 1e3:.1f}), written in {write_s:.3f} s, a batch then takes {step_s * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main()
