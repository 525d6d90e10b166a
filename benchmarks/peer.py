"""The same network, weights, batch and loss in SpikingJelly and here: speed, memory, and images per
second in the same memory.

Command:  python -m benchmarks.peer [--network sew18|sew34|qkformer] [--device cpu|cuda]
          [--images 8 32] [--rounds 9] [--memory-mb 400]
          (needs SpikingJelly: pip install '.[dev]')

The networks are SEW-ResNet-18 and -34 with IF neurons, and QKFormer-10-384 with LIF neurons. T = 4;
images have 64 pixels on a CPU and 224 on a GPU. The loss is that of the mean logits under BPTT, and
the mean of the steps' losses under SLTT. Batch norm takes its statistics over time under BPTT.

Gradients are compared first, in float64: BPTT's with SpikingJelly's, and SLTT's with a loop over
single steps of its network whose membranes are detached. (On a GPU this is without our kernels,
which have none for float64.) Timed are forward, loss and backward, in rounds in turn, on one
thread. Ratios are medians over rounds, with the lowest and the highest.

SpikingJelly trains by BPTT, with all steps in one call, which is its fastest way. On a GPU it has a
row for each implementation of its neurons, with channels first in memory and last (NHWC), where
ours are. The first row is its own choice. Release 2.0 has no CuPy backend; "cuda" are the kernels
that its installation compiles with SJ_BUILD_NATIVE_CUDA=1. Products on a GPU are in TF32.

Saved are the bytes that autograd keeps for the backward, states are membranes and cached values.
Their sum is the memory of a CPU; on a GPU it is the peak of the allocator, less what it holds
between batches. "bits" are synapses that keep spikes as bits (`pack_spikes`). Products are the
share of convolutions and matrix products in the time, by torch's profiler: both sides have the same
products under BPTT.
"""

import argparse
import copy
import os
import re
import statistics
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from spikingjelly._ops import if_, lif
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import profile

from benchmarks.peer_networks import NETWORKS, Network, T, gradient_difference, ours_of, theirs_of
from pipeline.core.code_version import commit
from pipeline.core.printing import new_console, number, print_table
from pipeline.core.torch_settings import compute_in
from pipeline.measure.memory import device_here, format_hardware, hardware
from pipeline.measure.saved_bytes import SavedBytes
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.state import state_bytes
from pipeline.spiking.synapse import pack_spikes
from pipeline.train.transfer import move_network

CLASSES = 1000
EQUAL = 1e-5
PRODUCT = re.compile(r"aten::(\w*conv\w*|mm|addmm|bmm)$")

Data = tuple[Tensor, Tensor]  # images and targets


def nothing() -> None:
    pass


class Trained(NamedTuple):
    """One way to compute a gradient."""

    name: str
    network: nn.Module
    train: Callable[[Tensor, Tensor, Callable[[], object]], None]  # calls back while states exist
    states: Callable[[Container[int]], int]  # bytes now, without these storages


def of_peer(name: str, peer: nn.Module, implementation: str = "auto") -> Trained:
    nodes: list[Any] = [each for each in peer.modules() if isinstance(each, neuron.BaseNode)]

    def train(x_B: Tensor, target_B: Tensor, watch: Callable[[], object]) -> None:
        use(implementation)
        logits = peer(x_B.unsqueeze(0).repeat(T, 1, 1, 1, 1))
        loss = F.cross_entropy(logits.mean(0) if logits.dim() == 3 else logits, target_B)
        watch()
        loss.backward()
        functional.reset_net(peer)

    def states(excluded: Container[int]) -> int:
        storages = (node.v.untyped_storage() for node in nodes)
        return sum(each.nbytes() for each in storages if each._cdata not in excluded)

    return Trained(name, peer, train, states)


def use(implementation: str) -> None:
    """Choose SpikingJelly's neurons on a GPU. Its release 2.0 reads environment variables when it
    is imported, so that only one implementation could be timed in a process.
    """
    for selection in (if_._selection, lif._selection):
        if selection._requested != implementation:
            selection._requested = implementation
            selection._selections.clear()


def implementations(on: torch.device) -> list[str]:
    """Those of SpikingJelly's neurons that this machine has, in its own order of preference."""
    found: list[str] = []
    for name in ("cuda", "triton", "torch"):
        use(name)
        try:
            functional.neuron_implementation("if", on)
        except RuntimeError as error:
            print(f"not installed: {error}")
        else:
            found.append(name)
    use("auto")
    return found


def of_rule(rule: Rule, network: Network, peer: nn.Module, *, bits: bool = False) -> Trained:
    """Our network under a rule, with the weights of `peer`."""
    own = ours_of(network, "time" if isinstance(rule, BPTT) else "step", peer)
    rule.attach(own, over_time="mean" if isinstance(rule, BPTT) else "steps")
    if bits:
        pack_spikes(own)

    def train(x_B: Tensor, target_B: Tensor, watch: Callable[[], object]) -> None:
        loss = lambda logits_BK: F.cross_entropy(logits_BK, target_B)
        for term in rule.loss_terms(own, repeat(x_B, T), loss):
            watch()
            if term.backward is not None:
                term.backward.backward()
        rule.end_of_batch()

    name = f"{rule.label}, bits" if bits else rule.label
    return Trained(name, own, train, lambda excluded: state_bytes(own, excluded=excluded))


def contestants(network: Network, on: torch.device) -> list[Trained]:
    torch.manual_seed(1)
    peer = theirs_of(network).to(on)
    theirs = [of_peer("SpikingJelly", peer)]
    if on.type == "cuda":
        layouts = {"": peer, ", NHWC": move_network(copy.deepcopy(peer), on)}
        theirs = [
            of_peer(f"SpikingJelly {name}{order}", each, name)
            for name in implementations(on)
            for order, each in layouts.items()
        ]
    rules = ((BPTT(), False), *((SLTT(k), bits) for k in (None, 1) for bits in (False, True)))
    return [*theirs, *(of_rule(rule, network, peer, bits=bits) for rule, bits in rules)]


def by_steps_of_peer(peer: nn.Module, x_B: Tensor, target_B: Tensor) -> None:
    """SLTT in SpikingJelly: a backward per step, with the membranes detached after it."""
    for _ in range(T):
        logits_BK = peer(x_B.unsqueeze(0)).view(len(x_B), -1)
        (F.cross_entropy(logits_BK, target_B) / T).backward()
        functional.detach_net(peer)
    functional.reset_net(peer)


def compare_gradients(network: Network, data: Data) -> None:
    """Raises: SystemExit if a gradient differs."""
    x_B, target_B = data[0].double(), data[1]
    for rule in (BPTT(), SLTT()):
        torch.manual_seed(1)
        peer = theirs_of(network).to(x_B)
        own = of_rule(rule, network, peer)
        if isinstance(rule, BPTT):
            of_peer("", peer).train(x_B, target_B, nothing)
        else:
            by_steps_of_peer(peer, x_B, target_B)
        own.train(x_B, target_B, nothing)
        difference = gradient_difference(own.network, peer)
        print(f"{rule.label}: the gradients differ by {difference:.1e} at most")
        if not difference < EQUAL:
            raise SystemExit(f"{rule.label}: the gradients must differ by less than {EQUAL}")


def batch(images: int, pixels: int, on: torch.device) -> Data:
    """On a GPU channels come last in memory."""
    torch.manual_seed(0)
    x_B, target_B = torch.randn(images, 3, pixels, pixels), torch.randint(CLASSES, (images,))
    order = torch.channels_last if on.type == "cuda" else torch.contiguous_format
    return x_B.to(on, memory_format=order), target_B.to(on)


class Held(NamedTuple):
    """The most bytes in a batch."""

    saved: int
    states: int
    peak: int | None  # None: on a CPU

    @property
    def total(self) -> int:
        return self.saved + self.states if self.peak is None else self.peak


def held(each: Trained, data: Data) -> Held:
    found: list[tuple[int, int]] = []
    each.network.zero_grad()
    with SavedBytes(each.network) as saved:
        each.train(*data, lambda: found.append((saved.now, each.states(saved.storages))))
    if not data[0].is_cuda:
        return Held(*max(found, key=sum), None)
    each.network.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    each.train(*data, nothing)
    return Held(*max(found, key=sum), torch.cuda.max_memory_allocated() - before)


def largest_batch(each: Trained, budget: float, of: Callable[[int], Data]) -> int:
    """Raises: SystemExit if one image needs more."""
    images = 8
    for _ in range(3):  # bytes of an image depend little on the number of images
        images = max(1, int(images * budget / held(each, of(images)).total))
    while (most := held(each, of(images)).total) > budget:
        if images == 1:
            raise SystemExit(f"{each.name}: one image needs {most / 1e6:.1f} MB")
        images -= 1
    return images


def seconds(each: Trained, data: Data) -> float:
    each.network.zero_grad()
    wait = torch.cuda.synchronize if data[0].is_cuda else nothing
    wait()
    began = time.perf_counter()
    each.train(*data, nothing)
    wait()
    return time.perf_counter() - began


def share_of_products(each: Trained, data: Data) -> float:
    """The share of convolutions and matrix products in the device's time."""
    with profile() as profiler:
        seconds(each, data)
    kind = DeviceType.CUDA if data[0].is_cuda else DeviceType.CPU
    own_us = attrgetter(f"self_{'device' if data[0].is_cuda else 'cpu'}_time_total")
    events: Any = profiler.key_averages()
    total_us = sum(own_us(e) for e in events if e.device_type == kind and not e.is_user_annotation)
    # The time of a GPU's kernels is also that of the operation which has launched them.
    operations = [event for event in events if event.device_type == DeviceType.CPU]
    return sum(own_us(event) for event in operations if PRODUCT.search(event.key)) / total_us


def in_turn(trained: Sequence[Trained], data: Sequence[Data], rounds: int) -> list[tuple[str, str]]:
    """By contestant: its images/s, and its speed over that of the first."""
    pairs = list(zip(trained, data, strict=True))
    for each, own in pairs:
        seconds(each, own)
    by_round = [[len(own[1]) / seconds(each, own) for each, own in pairs] for _ in range(rounds)]
    cells: list[tuple[str, str]] = []
    for speeds in zip(*by_round, strict=True):
        ratios = [own / row[0] for own, row in zip(speeds, by_round, strict=True)]
        middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        cells.append((f"{statistics.median(speeds):.1f}", middle))
    return cells


def table(trained: Sequence[Trained], data: Sequence[Data], rounds: int) -> None:
    speeds = in_turn(trained, data, rounds)
    first = None
    rows: list[tuple[str, ...]] = []
    for each, own, speed in zip(trained, data, speeds, strict=True):
        images, most = len(own[1]), held(each, own)
        saved, states = most.saved / images / 1e6, most.states / images / 1e6
        first = first or saved + states
        share = f"{(saved + states) / first:.3f}"
        products = f"{share_of_products(each, own):.0%}"
        peak = [] if most.peak is None else [f"{most.peak / 1e6:.0f}"]
        size = f"{saved:.2f}", f"{states:.2f}", share
        rows.append((each.name, str(images), *speed, *size, products, *peak))
    columns = ["images", "images a second", "of the first's", "MB saved an image", "MB of states"]
    columns += ["of the first's", "products", *(["peak MB"] if data[0][0].is_cuda else [])]
    print_table(new_console(), ("rule", *map(number, columns)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--network", choices=NETWORKS, default="sew18")
    parser.add_argument("--device", type=torch.device, default=device_here())
    parser.add_argument(
        "--images", type=int, nargs="+", help="default: 8 32; on a GPU 32 128, QKFormer 8 32"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-mb", type=float, help="default: 400, on a GPU 16000")
    arguments = parser.parse_args()
    on, network = arguments.device, NETWORKS[arguments.network]
    on_gpu = on.type == "cuda"
    pixels = 224 if on_gpu else 64
    of = partial(batch, pixels=pixels, on=on)
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler tells when it starts
    compare_gradients(network, of(2))
    compute_in("tf32" if on_gpu else "fp32", on)
    trained = contestants(network, on)
    for images in arguments.images or (network.images_on_gpu if on_gpu else (8, 32)):
        print(f"\n{images} images of {pixels} pixels, T = {T}")
        table(trained, [of(images)] * len(trained), arguments.rounds)
    budget_mb = arguments.memory_mb or (16_000.0 if on_gpu else 400.0)
    print(f"\nIn {budget_mb:g} MB, each at its largest batch")
    data = [of(largest_batch(each, budget_mb * 1e6, of)) for each in trained]
    table(trained, data, max(3, arguments.rounds // 3))
    print(f"{network.title}; commit {commit()}, {format_hardware(hardware(on))}")


if __name__ == "__main__":
    main()
