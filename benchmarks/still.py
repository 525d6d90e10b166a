"""What a still image saves: step time with what stands before the first neuron computed once,
against computed at every step.

Command:  python -m benchmarks.still [--rule bptt|sltt|ottt] [--batches 6] [--side 160] [--size 2]
          [--threads 1]
Result:   once / at every step, T = 2 and T = 4:  SLTT 0.956, 0.916;  BPTT 0.938, 0.903;  OTTT-A
          0.957, 0.939;  medians of 6 batches of 2; commit 9206f888d723, one thread of 2 cores of an
          AMD EPYC, torch 2.13

Two copies of a QKFormer (10-384 as published, but one block in its last stage) with the same
weights see the same random images, one as `encode.repeat` gives them and one as a recording of
equal frames, which is computed frame by frame; whoever comes first takes turns, so that drift of
the machine falls on both alike. Timed are forward, loss and backward of all T steps."""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.trainee import Trainee
from pipeline.core.code_version import commit
from pipeline.measure.memory import device_here, hardware
from pipeline.models.qkformer import QKFormer
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat

CLASSES, WARM_UP = 13, 1
NETWORK = partial(QKFormer, channels=384, depth=4, heads=6, classes=CLASSES)
RULES: dict[str, Callable[[], Rule]] = {"bptt": BPTT, "sltt": SLTT, "ottt": OTTT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rule", choices=sorted(RULES), default="sltt")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for steps in (2, 4):
        compare(
            arguments.rule,
            steps,
            batches=arguments.batches,
            side=arguments.side,
            size=arguments.size,
        )


def compare(rule: str, steps: int, *, batches: int, side: int, size: int) -> float:
    """The median time of a batch of still images over that of the same frames as a recording."""
    still, recording = trainee_of(rule), trainee_of(rule)
    for index in range(WARM_UP + batches):
        x_TB, target_B = (
            repeat(torch.randn(size, 3, side, side), steps),
            torch.randint(CLASSES, (size,)),
        )
        pairs = [(still, x_TB), (recording, x_TB.contiguous())]
        for trainee, frames_TB in pairs if index % 2 else reversed(pairs):
            trainee.learn(frames_TB, target_B)
    once, at_every_step = still.median(warm_up=WARM_UP), recording.median(warm_up=WARM_UP)
    machine = hardware(device_here())
    print(
        f"{rule}, {side} px, T = {steps}, batch {size}, {batches} interleaved batches,"
        f" {torch.get_num_threads()} threads: once {once:.3f} s, at every step {at_every_step:.3f}"
        f" s, ratio {once / at_every_step:.3f} (commit {commit()}, {machine['cpu']},"
        f" {machine['cores']} cores, torch {machine['torch']})"
    )
    return once / at_every_step


def trainee_of(rule: str) -> Trainee:
    """One with the same weights at each call."""
    torch.manual_seed(0)
    # OTTT has no trace for batch norm.
    network = NETWORK(shortcut="multiple", norm="sws") if rule == "ottt" else NETWORK()
    return Trainee(network, RULES[rule]())


if __name__ == "__main__":
    main()
