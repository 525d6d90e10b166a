"""Finds GPUs that torch cannot use, and the reason.

Ray counts cards through NVML, which works with every driver. torch uses CUDA, which refuses a
driver older than the CUDA that torch was built for. Without this check, workers would get cards and
fail.
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
# By CUDA's major version. A newer minor version runs on an older driver of the same major version.
OLDEST_DRIVERS = {12: 525, 13: 580}
# The builds of PyTorch that run on the oldest drivers, by CUDA's major version.
INDEX_OF = {12: "cu126", 13: "cu130"}
ON_A_CPU = "train on the CPU (--device cpu)"
CHECK = "see nvidia-smi; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"


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
    # CUDA uses the cards before the first unknown name, so "", -1 and Slurm's NoDevFiles hide all.
    if re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own message of several lines
        if torch.cuda.is_available():
            return None
    try:
        pynvml.nvmlInit()
        newest = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        version, cards = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        if not list(DEVICES.glob("nvidia[0-9]*")):
            return None
        return UnusableGPUs(
            f"NVIDIA's driver does not answer for the GPUs in {DEVICES}: {error}",
            f"{CHECK}; after an update of the driver restart the machine; or {ON_A_CPU}",
        )
    if not cards:
        return None
    built, runs = torch.version.cuda, newest // 1000
    wanted = min(OLDEST_DRIVERS) if built is None else int(built.split(".")[0])
    ways = []
    if runs < wanted:
        oldest = OLDEST_DRIVERS.get(wanted)
        ways.append(
            f"install a driver that runs CUDA {wanted}"
            if oldest is None
            else f"install driver {oldest} or newer"
        )
    if (built is None or runs < wanted) and runs >= min(INDEX_OF):
        ways.append(
            f"install a torch for this driver: {sys.executable} -m pip install --force-reinstall"
            " torch torchvision --index-url"
            f" https://download.pytorch.org/whl/{INDEX_OF[min(runs, max(INDEX_OF))]}"
        )
    return UnusableGPUs(
        f"torch {torch.__version__} is built {f'for CUDA {built}' if built else 'without CUDA'} and"
        f" cannot use the {counted(cards, 'GPU')} here; NVIDIA's driver {version} runs CUDA"
        f" {runs}.{newest % 1000 // 10} and older",
        ", or ".join([*(ways or [CHECK]), ON_A_CPU]),
    )
