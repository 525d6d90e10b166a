"""What OTTT's traces cost: time of OTTT-A against SLTT on the same network, side by side in one
process.

Command:  python -m benchmarks.ottt [--network vgg|nf_resnet|mlp] [--batches 40]
Result:   OTTT-A / SLTT 1.008 (vgg), 1.060 (nf_resnet), 1.020 (mlp): medians of 40 batches, bound
          1.35; commit 9206f888d723, one thread of 2 cores of an AMD EPYC, torch 2.13. Under a load
          of 8 to 19, at f06c77e: 0.99 to 1.18

Two copies of a network with the same weights see the same random images at T = 6, batch after
batch, one copy by SLTT and one by OTTT-A, whoever comes first taking turns, so that drift of the
machine falls on both alike. Timed are forward, loss and backward of all T steps; the optimizer's
step, which knows no rule, comes after the clock. Exits with 1 when the ratio of the medians is
above the bound.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.trainee import Trainee
from pipeline.core.code_version import commit
from pipeline.measure.memory import device_here, hardware
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.vgg import vgg_sws
from pipeline.rules.base import Rule
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid

BOUND = 1.35  # OTTT / SLTT
TIME_STEPS, WARM_UP = 6, 4
NEURON = LIF(surrogate=Sigmoid())
# (network, shape of a sample, batch size): OTTT's own, narrower; the one of the Fashion-MNIST
# recipes; a fully connected one.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "vgg": (
        lambda: vgg_sws(stages=((32, 64), (128, 128), (128, 128)), neuron=NEURON),
        (3, 32, 32),
        16,
    ),
    "nf_resnet": (
        lambda: nf_resnet18_small(
            in_channels=1, width=32, blocks=(1, 1, 1), stem_stride=2, neuron=NEURON
        ),
        (1, 28, 28),
        64,
    ),
    "mlp": (lambda: mlp(neuron=NEURON), (1, 28, 28), 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="vgg")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ratio = compare(arguments.network, arguments.batches)
    sys.exit(ratio > BOUND)


def compare(name: str, batches: int) -> float:
    """OTTT-A's median time over SLTT's."""
    build, shape, size = NETWORKS[name]
    torch.manual_seed(0)
    sltt, ottt = trainee_of(build(), SLTT()), trainee_of(build(), OTTT())
    for index in range(WARM_UP + batches):
        ottt.network.load_state_dict(sltt.network.state_dict())  # equal weights, so equal spikes
        x_TB, target_B = repeat(torch.randn(size, *shape), TIME_STEPS), torch.randint(10, (size,))
        for trainee in (sltt, ottt) if index % 2 else (ottt, sltt):
            trainee.learn(x_TB, target_B)
    by_ottt, by_sltt = ottt.median(warm_up=WARM_UP), sltt.median(warm_up=WARM_UP)
    machine = hardware(device_here())
    print(
        f"{name}, T = {TIME_STEPS}, batch {size}, {batches} interleaved batches,"
        f" {torch.get_num_threads()} threads: OTTT-A {by_ottt * 1e3:.1f} ms, SLTT"
        f" {by_sltt * 1e3:.1f} ms, ratio {by_ottt / by_sltt:.3f} (bound {BOUND}) (commit"
        f" {commit()}, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']})"
    )
    return by_ottt / by_sltt


def trainee_of(network: nn.Module, rule: Rule) -> Trainee:
    return Trainee(network, rule, optimizer=torch.optim.SGD(network.parameters(), lr=0.01))


if __name__ == "__main__":
    main()
