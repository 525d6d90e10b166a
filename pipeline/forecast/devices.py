"""Data sheets of cards for plans. The figures are dense, without structured sparsity.

In the roofline model an operation takes the longer of its arithmetic and its memory traffic:

    seconds = sum over operations of max(flops / peak flops, bytes / peak bandwidth)

The model has no caches: each kernel reads the previous kernel's output again from memory. Kernels
that fuse several operations are faster.

Source: Williams, Waterman & Patterson 2009 (doi 10.1145/1498765.1498785) for the roofline.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.core.torch_settings import Precision


@dataclass(frozen=True)
class Operation:
    """One kernel."""

    flops: int
    bytes: int  # bytes read and written


@dataclass(frozen=True, kw_only=True)
class Device:
    """The data sheet of a card."""

    name: str
    flops: Mapping[str, float]  # dense, per second, by precision; a multiply-add counts as two
    bandwidth: float  # of its memory, in bytes per second
    memory: float  # bytes
    link: float  # to the other cards of its node, in bytes per second and direction
    watts: float
    efficiency: float = 0.4  # share of the roofline that training reaches: an assumption
    launch: float = 5e-6  # seconds from one kernel launch to the next, in Python
    driver: str  # the name from the driver, and so in torch; it differs by board and memory
    source: str

    def busy_s(self, operations: Iterable[Operation], precision: Precision) -> float:
        """Seconds by the roofline model at an efficiency of 1."""
        peak = self.flops[precision]
        return sum(max(each.flops / peak, each.bytes / self.bandwidth) for each in operations)


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
