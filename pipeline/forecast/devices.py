"""Cards that a plan can be made for, as their data sheets have them: dense figures, without
structured sparsity.
"""

from __future__ import annotations

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
