"""Finds GPUs that torch cannot use, and the reason.

Ray counts GPUs through NVML, which works with every driver. torch uses CUDA, which refuses a driver
older than the CUDA that torch was built for. Without this check, workers would get GPUs and fail.
"""

import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pynvml
import torch

from pipeline.core.units import counted

DEVICES = Path("/dev")
# The oldest driver for each major version of CUDA. It runs all minor versions.
OLDEST_DRIVERS = {12: 525, 13: 580}
# The PyTorch package index for each major version of CUDA. Its builds run on the oldest drivers.
TORCH_INDEXES = {12: "cu126", 13: "cu130"}
CPU_ADVICE = "train on the CPU (--device cpu)"
DRIVER_ADVICE = "see nvidia-smi; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"


class UnusableGPUs(NamedTuple):
    """The reason why torch cannot use a machine's GPUs, and the remedy."""

    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.advice}"


def unusable_gpus() -> UnusableGPUs | None:
    """The reason why torch cannot use the GPUs of this machine.

    None if torch can use them, if there are none, or if CUDA_VISIBLE_DEVICES hides them.
    """
    # CUDA uses the GPUs before the first unknown name, so "", -1 and Slurm's NoDevFiles hide all.
    if re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own message of several lines
        if torch.cuda.is_available():
            return None
    try:
        pynvml.nvmlInit()
        driver_cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 12020 for CUDA 12.2
        driver, gpus = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        if not list(DEVICES.glob("nvidia[0-9]*")):
            return None
        return UnusableGPUs(
            f"NVIDIA's driver does not answer for the GPUs in {DEVICES}: {error}",
            f"{DRIVER_ADVICE}; after an update of the driver, restart the machine; or {CPU_ADVICE}",
        )
    if not gpus:
        return None
    driver_major, torch_cuda = driver_cuda // 1000, torch.version.cuda
    build = "without CUDA" if torch_cuda is None else f"for CUDA {torch_cuda}"
    torch_major = min(OLDEST_DRIVERS) if torch_cuda is None else int(torch_cuda.split(".")[0])
    advice = []
    if driver_major < torch_major and torch_major in OLDEST_DRIVERS:
        advice.append(f"install driver {OLDEST_DRIVERS[torch_major]} or newer")
    elif driver_major < torch_major:
        advice.append(f"install a driver that runs CUDA {torch_major}")
    if (torch_cuda is None or driver_major < torch_major) and driver_major >= min(TORCH_INDEXES):
        index = TORCH_INDEXES[min(driver_major, max(TORCH_INDEXES))]
        advice.append(
            f"install a torch for this driver: {sys.executable} -m pip install --force-reinstall"
            f" torch torchvision --index-url https://download.pytorch.org/whl/{index}"
        )
    return UnusableGPUs(
        f"torch {torch.__version__} is built {build} and cannot use the {counted(gpus, 'GPU')}"
        f" here; NVIDIA's driver {driver} runs CUDA {driver_major}.{driver_cuda % 1000 // 10} and"
        " older",
        ", or ".join([*(advice or [DRIVER_ADVICE]), CPU_ADVICE]),
    )
