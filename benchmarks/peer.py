"""The same network, weights, batch and loss in SpikingJelly and here: speed, memory, and images per
second in the same memory.

Command:  python -m benchmarks.peer [--depth 18] [--images 8 32] [--rounds 9] [--memory-mb 400]
          (needs SpikingJelly: pip install '.[dev]')

SEW-ResNet with IF neurons, images of 64 pixels, T = 4, loss of the mean logits under BPTT and the
mean loss of the steps under SLTT. SpikingJelly trains by BPTT, with all steps in one call, which is
its fastest way on a CPU. Gradients are compared first, in float64: BPTT's with SpikingJelly's, and
SLTT's with a loop over single steps of its network whose membranes are detached. Timed are forward,
loss and backward, in rounds in turn, on one thread; ratios are medians over rounds. Bytes are those
that autograd saves for the backward, and membranes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet as peer_models
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.code_version import commit
from pipeline.core.printing import new_console, number, print_table
from pipeline.measure.memory import device_here, hardware
from pipeline.measure.saved_bytes import SavedBytes
from pipeline.models.sew_resnet import sew_resnet
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.state import state_bytes

T, PIXELS, CLASSES = 4, 64, 1000
EQUAL = 1e-5


class Trained(NamedTuple):
    """One way to compute a gradient, and the bytes that it holds."""

    name: str
    network: nn.Module
    train: Callable[[Tensor, Tensor], None]
    states: Callable[[], int]


def spikingjelly_network(depth: Any) -> nn.Module:
    build = getattr(peer_models, f"sew_resnet{depth}")
    network = build(
        pretrained=False,
        cnf="ADD",
        spiking_neuron=neuron.IFNode,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
    )
    functional.set_step_mode(network, "m")
    return network


def same_weights(network: nn.Module, peer: nn.Module) -> nn.Module:
    """`network` with the weights of `peer`: their parameters have one order."""
    with torch.no_grad():
        for own, other in zip(network.parameters(), peer.parameters(), strict=True):
            own.copy_(other)
    return network


def membranes_of(peer: nn.Module) -> list[Tensor]:
    nodes = [each for each in peer.modules() if isinstance(each, neuron.BaseNode)]
    return [node.v for node in nodes if isinstance(node.v, Tensor)]


def of_peer(peer: nn.Module) -> Trained:
    held: list[int] = [0]

    def train(x_B: Tensor, target_B: Tensor) -> None:
        logits_TBK = peer(x_B.unsqueeze(0).repeat(T, 1, 1, 1, 1))
        held[0] = sum(v.nbytes for v in membranes_of(peer))
        F.cross_entropy(logits_TBK.mean(0), target_B).backward()
        functional.reset_net(peer)

    return Trained("SpikingJelly BPTT", peer, train, lambda: held[0])


def of_rule(rule: Rule, network: nn.Module, over_time: Any) -> Trained:
    held: list[int] = [0]
    rule.attach(network, over_time=over_time)

    def train(x_B: Tensor, target_B: Tensor) -> None:
        held[0] = 0
        loss = lambda logits_BK: F.cross_entropy(logits_BK, target_B)
        for term in rule.loss_terms(network, repeat(x_B, T), loss):
            held[0] = max(held[0], state_bytes(network))
            if term.backward is not None:
                term.backward.backward()
        rule.end_of_batch()

    return Trained(rule.label, network, train, lambda: held[0])


def by_steps_of_peer(peer: nn.Module, x_B: Tensor, target_B: Tensor) -> None:
    """SLTT in SpikingJelly: a backward per step, with the membranes detached after it."""
    functional.set_step_mode(peer, "s")
    for _ in range(T):
        (F.cross_entropy(peer(x_B), target_B) / T).backward()
        functional.detach_net(peer)
    functional.reset_net(peer)
    functional.set_step_mode(peer, "m")


def batch(images: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(images, 3, PIXELS, PIXELS, dtype=dtype), torch.randint(CLASSES, (images,))


def gradient_difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a parameter's gradients, as a share of its largest gradient."""
    pairs: Any = zip(one.parameters(), other.parameters(), strict=True)
    return max(
        float((own.grad - its.grad).abs().max() / its.grad.abs().max()) for own, its in pairs
    )


def compare_gradients(depth: Any) -> None:
    """Raises: SystemExit if a gradient differs."""
    ways: tuple[tuple[str, Rule, Any], ...] = (("BPTT", BPTT(), "time"), ("SLTT", SLTT(), "step"))
    for name, rule, over in ways:
        torch.manual_seed(1)
        peer = spikingjelly_network(depth).double()
        network = same_weights(sew_resnet(depth, over=over).double(), peer)
        x_B, target_B = batch(2, torch.float64)
        if name == "BPTT":
            of_peer(peer).train(x_B, target_B)
        else:
            by_steps_of_peer(peer, x_B, target_B)
        of_rule(rule, network, "mean" if name == "BPTT" else "steps").train(x_B, target_B)
        difference = gradient_difference(network, peer)
        print(f"{name}: the gradients differ by {difference:.1e} at most")
        if not difference < EQUAL:
            raise SystemExit(f"{name}: the gradients must differ by less than {EQUAL}")


def contestants(depth: Any) -> list[Trained]:
    torch.manual_seed(1)
    peer = spikingjelly_network(depth)
    rules: tuple[tuple[Rule, Any, Any], ...] = (
        (BPTT(), "time", "mean"),
        (SLTT(), "step", "steps"),
        (SLTT(k=1), "step", "steps"),
    )
    ours = [
        of_rule(rule, same_weights(sew_resnet(depth, over=over), peer), over_time)
        for rule, over, over_time in rules
    ]
    return [of_peer(peer), *ours]


def bytes_per_image(each: Trained, images: int) -> tuple[float, float]:
    """Bytes saved for backward, and of membranes."""
    each.network.zero_grad()
    with SavedBytes(each.network) as saved:
        each.train(*batch(images))
    return saved.peak / images, each.states() / images


def seconds(each: Trained, data: tuple[Tensor, Tensor]) -> float:
    each.network.zero_grad()
    began = time.perf_counter()
    each.train(*data)
    return time.perf_counter() - began


def in_turn(
    trained: Sequence[Trained], images: Sequence[int], rounds: int
) -> list[tuple[float, list[float]]]:
    """By contestant: its median seconds, and its images/s over those of the first, by round."""
    data = [batch(count) for count in images]
    for each, own in zip(trained, data, strict=True):
        seconds(each, own)
    taken = [
        [seconds(each, own) for each, own in zip(trained, data, strict=True)] for _ in range(rounds)
    ]
    speeds = [[count / each for count, each in zip(images, row, strict=True)] for row in taken]
    return [
        (
            statistics.median(row[index] for row in taken),
            [row[index] / row[0] for row in speeds],
        )
        for index in range(len(trained))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--depth", type=int, choices=(18, 34), default=18)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-mb", type=float, default=400.0, help="of saved bytes and states")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare_gradients(arguments.depth)
    trained = contestants(arguments.depth)
    console, columns = new_console(), (number("s"), number("images/s"), number("of the first's"))
    for images in arguments.images:
        found = in_turn(trained, [images] * len(trained), arguments.rounds)
        rows = [row_of(each, images, *about) for each, about in zip(trained, found, strict=True)]
        print(f"\n{images} images of {PIXELS} pixels, T = {T}")
        print_table(console, ("rule", *columns), rows)
    sizes = [sum(bytes_per_image(each, 4)) for each in trained]
    fits = [max(1, int(arguments.memory_mb * 1e6 / size)) for size in sizes]
    found = in_turn(trained, fits, max(3, arguments.rounds // 3))
    rows = [
        (
            *row_of(each, count, *about)[:1],
            f"{size / 1e6:.2f}",
            str(count),
            *row_of(each, count, *about)[1:],
        )
        for each, size, count, about in zip(trained, sizes, fits, found, strict=True)
    ]
    print(f"\nIn {arguments.memory_mb:g} MB of saved bytes and states, each at its largest batch")
    print_table(console, ("rule", number("MB an image"), number("images"), *columns), rows)
    machine = hardware(device_here())
    print(f"SEW-ResNet-{arguments.depth}, one thread; commit {commit()}, {machine['cpu']}")


def row_of(each: Trained, images: int, median_s: float, ratios: list[float]) -> tuple[str, ...]:
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return (
        each.name,
        f"{median_s:.3f}",
        f"{images / median_s:.1f}",
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
    )


if __name__ == "__main__":
    main()
