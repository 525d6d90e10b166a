"""Fused kernels of neurons: numba on CPUs, Triton on NVIDIA GPUs."""
