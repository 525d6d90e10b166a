"""Devices that a plan can be made for: cards by their data sheets, and the device here.

The figures of data sheets are dense, without structured sparsity. Those of the device here are
measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection

import torch
from torch.nn import functional as F

from pipeline.core.torch_settings import Precision, computing, configure_torch
from pipeline.measure.clock import seconds_of
from pipeline.measure.memory import device_here, format_hardware, free_bytes, hardware
from pipeline.measure.traffic import Device

DEVICES = {
    "h100": Device(
        name="H100 SXM, 80 GB",
        flops={"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        watts=700,
        driver="NVIDIA H100 80GB HBM3",
        source="NVIDIA H100 Tensor Core GPU data sheet",
    ),
    "h200": Device(
        name="H200 SXM, 141 GB",
        flops={"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bandwidth=4.8e12,
        memory=141e9,
        link=450e9,
        watts=700,
        driver="NVIDIA H200",
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "a100": Device(
        name="A100 SXM, 80 GB",
        flops={"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        bandwidth=2.039e12,
        memory=80e9,
        link=300e9,
        watts=400,
        driver="NVIDIA A100-SXM4-80GB",
        source="NVIDIA A100 Tensor Core GPU data sheet",
    ),
    "v100": Device(
        name="V100 SXM2, 32 GB",
        flops={"fp32": 15.7e12},
        bandwidth=0.9e12,
        memory=32e9,
        link=150e9,
        watts=300,
        driver="Tesla V100-SXM2-32GB",
        source="NVIDIA V100 Tensor Core GPU data sheet",
    ),
    "rtx4090": Device(
        name="GeForce RTX 4090, 24 GB",
        flops={"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
        bandwidth=1.008e12,
        memory=24e9,
        link=32e9,
        watts=450,
        driver="NVIDIA GeForce RTX 4090",
        source="NVIDIA Ada GPU architecture white paper; the link is PCIe 4.0 x16",
    ),
}

TIMED = 7
TOGETHER = 50  # small operations in one measurement


def measured_here(precisions: Collection[Precision], *, threads: int) -> Device:
    """Measure the device here by three operations of a training step, in about a second.

    They are a 3x3 convolution, a sum of two tensors larger than a cache, and a small operation.
    The rates are achieved ones, so the efficiency is 1; other shapes are slower.
    """
    device = device_here()
    configure_torch(threads, device)
    x, weight = torch.rand(32, 64, 28, 28, device=device), torch.rand(64, 64, 3, 3, device=device)
    large, small = torch.rand(2**24, device=device), torch.rand(1, device=device)

    def launches() -> None:
        for _ in range(TOGETHER):
            torch.add(small, small)

    def median_s(act: Callable[[], object]) -> float:
        act()
        return statistics.median(seconds_of(act, device) for _ in range(TIMED))

    flops: dict[str, float] = {}
    for precision in precisions:
        with torch.no_grad(), computing(device, precision):
            convolution_s = median_s(lambda: F.conv2d(x, weight, padding=1))
        flops[precision] = 2 * x.numel() * weight[0].numel() / convolution_s
    with torch.no_grad():
        sum_s = median_s(lambda: torch.add(large, large, out=large))
        launch_s = median_s(launches) / TOGETHER
    return Device(
        name=format_hardware(hardware(device)),
        flops=flops,
        bandwidth=3 * large.nbytes / sum_s,
        memory=free_bytes(device),
        link=0.0,
        watts=0.0,
        efficiency=1.0,
        launch=launch_s,
        driver=str(hardware(device)["gpu"]),
        source="measured",
    )
