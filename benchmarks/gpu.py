"""What one NVIDIA GPU does: images per second of two networks, with the fused kernels and in eager
torch, and the share of the memory's bandwidth that the neuron's kernel reaches.

Command:  python -m benchmarks.gpu [--images 32] [--batches 20]
Result:   not run: no machine of this project has had a GPU

The targets are for an H100 and are nobody's measurement. Batches are random images in bf16, trained
on by the loop of a run, without the optimizer's work (plain SGD with a rate of 0) and without
reading data. Kernels and the GPU's busy time are those of torch's profiler; idle is the share of a
batch, timed without the profiler, in which no kernel runs. The neuron's kernel moves the bytes of
its inputs and outputs, each once; bandwidth is that of a copy on the GPU in the same process.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import NamedTuple, get_args

import pynvml
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipeline.core.code_version import commit
from pipeline.core.printing import new_console, number, print_table
from pipeline.forecast.bench import Bench, DoesNotFit
from pipeline.measure.memory import (
    device_here,
    hardware,
    peak_device_bytes,
    reset_peak_device_bytes,
    unusable_gpus,
)
from pipeline.recipe import Recipe, Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF, Kernel, named_neurons
from pipeline.spiking.state import fresh_state
from recipes.imagenet import nf_resnet34_sltt, qkformer_10_384_bptt

WARM_UP = 5  # batches: kernels are compiled in the first ones
PROFILED = 3  # batches
NEURONS, STEPS = 2**26, 4  # of the neuron's kernel, in bf16
BANDWIDTH_TARGET = 0.7


class Network(NamedTuple):
    name: str
    recipe: Recipe
    rules: Mapping[Spec, float | None]  # with the target in images/s


def networks() -> Iterable[Network]:
    sltt, ottt = spec(SLTT), spec(OTTT, readout="plain")
    yield Network(
        "nf_resnet34, T = 6",
        nf_resnet34_sltt.recipe().override({"time_steps": 6, "precision": "bf16"}),
        {spec(BPTT): None, sltt: 1500.0, spec(SLTT, k=1): None, ottt: None},
    )
    yield Network(
        "QKFormer-10-384, T = 4",
        qkformer_10_384_bptt.recipe().override({"time_steps": 4, "precision": "bf16"}),
        {spec(BPTT): 900.0, sltt: None},
    )


class Speed(NamedTuple):
    images_per_s: float
    kernels: float  # a batch
    idle: float  # share of a batch
    peak_bytes: int

    def cells(self) -> tuple[str, ...]:
        peak = f"{self.peak_bytes / 1e9:.2f}"
        return f"{self.images_per_s:,.0f}", f"{self.kernels:,.0f}", f"{self.idle:.0%}", peak


def speed(bench: Bench, rule: Spec, kernel: Kernel, batches: int) -> Speed:
    on = bench.x_B.device
    for _, neuron in named_neurons(bench.network):
        neuron.kernel = kernel
    with bench.training(rule) as (*_, train_once):
        seconds(train_once, WARM_UP, on)
        reset_peak_device_bytes(on)
        batch_s = seconds(train_once, batches, on)
        peak = peak_device_bytes(on)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            seconds(train_once, PROFILED, on)
    device = getattr(DeviceType, on.type.upper())
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == device and not event.is_user_annotation  # of the optimizer
    ]
    busy_s = sum(event.time_range.elapsed_us() for event in events) / 1e6 / PROFILED
    return Speed(bench.samples / batch_s, len(events) / PROFILED, 1 - busy_s / batch_s, peak)


def seconds(act: Callable[[], object], times: int, on: torch.device) -> float:
    """Of one call."""
    _wait(on)
    began = time.perf_counter()
    for _ in range(times):
        act()
    _wait(on)
    return (time.perf_counter() - began) / times


def _wait(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def bandwidths(neurons: int, on: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, and of the neuron's forward, and forward and backward."""
    lif, like = LIF(), {"dtype": torch.bfloat16, "device": on}
    x_TB, g_TB = (torch.randn(STEPS, neurons, **like) for _ in range(2))
    copied, value = torch.empty_like(x_TB), x_TB.nbytes // STEPS
    membrane = 2 * value  # fp32

    def forward() -> torch.Tensor:
        with fresh_state(lif):
            return lif(x_TB)

    def both() -> object:
        return torch.autograd.grad(forward(), x_TB, g_TB)

    found = {"copy": 2 * x_TB.nbytes / _after_warm_up(lambda: copied.copy_(x_TB), on)}
    moved = 2 * STEPS * value + membrane
    found["forward"] = moved / _after_warm_up(forward, on)
    x_TB.requires_grad_()
    found["forward and backward"] = (moved + 3 * STEPS * value) / _after_warm_up(both, on)
    return found


def _after_warm_up(act: Callable[[], object], on: torch.device) -> float:
    seconds(act, WARM_UP, on)
    return seconds(act, 20, on)


def report(every: Iterable[Network], *, images: int, batches: int, neurons: int) -> None:
    on, console = device_here(), new_console()
    rows = []
    for network in every:
        recipe = network.recipe.override({"batch_size": images})
        bench = Bench(recipe, batch_size=images, needs_data=False)
        for rule, target in network.rules.items():
            for kernel in get_args(Kernel):
                row = network.name, rule.build().label, kernel
                goal = f">= {target:,.0f}" if target and kernel == "auto" else ""
                try:
                    rows.append((*row, goal, *speed(bench, rule, kernel, batches).cells()))
                except DoesNotFit:
                    rows.append((*row, goal, "does not fit", "", "", ""))
    columns = ("target", "images/s", "kernels", "idle", "peak GB")
    print_table(console, ("network", "rule", "neurons", *map(number, columns)), rows, keys=3)
    copy, *kernels_of_neuron = bandwidths(neurons, on).items()
    for name, bandwidth in kernels_of_neuron:
        print(
            f"LIF, {neurons} neurons, T = {STEPS}, bf16, {name}: {bandwidth / 1e9:,.0f} GB/s,"
            f" {bandwidth / copy[1]:.2f} of a copy's {copy[1] / 1e9:,.0f} GB/s (target"
            f" {BANDWIDTH_TARGET})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20)
    arguments = parser.parse_args()
    on = device_here()
    if on.type != "cuda":
        print(f"benchmarks.gpu needs an NVIDIA GPU that torch can use: {unusable_gpus() or 'none'}")
        return
    pynvml.nvmlInit()
    print(
        f"{hardware(on)['gpu']}, driver {pynvml.nvmlSystemGetDriverVersion()}, torch"
        f" {torch.__version__}, Triton {version('triton')}, commit {commit()}; batches of"
        f" {arguments.images} images"
    )
    report(networks(), images=arguments.images, batches=arguments.batches, neurons=NEURONS)


if __name__ == "__main__":
    main()
