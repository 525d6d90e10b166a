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

DEVICES = Path("/dev")
# By CUDA's major version. A newer minor version runs on an older driver of the same major version.
OLDEST_DRIVERS = {12: 525, 13: 580}
INDEX = "https://download.pytorch.org/whl"
# The builds of PyTorch that run on the oldest drivers, by CUDA's major version.
INDEX_OF = {12: "cu126", 13: "cu130"}
ON_A_CPU = "train on the CPU (--device cpu)"


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
            "see nvidia-smi; after an update of the driver restart the machine; a container needs"
            f" NVIDIA_DRIVER_CAPABILITIES=compute,utility; or {ON_A_CPU}",
        )
    if not cards:
        return None
    built, major = torch.version.cuda, newest // 1000
    wanted = min(OLDEST_DRIVERS) if built is None else int(built.split(".")[0])
    another_driver = (
        f"install driver {OLDEST_DRIVERS[wanted]} or newer"
        if wanted in OLDEST_DRIVERS
        else f"install a driver that runs CUDA {wanted}"
    )
    build = INDEX_OF.get(min(major, max(INDEX_OF)))
    install = f"{sys.executable} -m pip install --force-reinstall torch torchvision"
    another_torch = (
        [f"install a torch for this driver: {install} --index-url {INDEX}/{build}"] if build else []
    )
    here = f"cannot use the {cards} GPUs here" if cards > 1 else "cannot use the GPU here"
    driver = f"NVIDIA's driver {version}, which runs CUDA {major}.{newest % 1000 // 10} and older"
    if built is None:
        problem = f"is built without CUDA and {here} ({driver})"
        ways = another_torch or [another_driver]
    elif major < wanted:
        problem = f"is built for CUDA {built} and {here}: this is {driver}"
        ways = [another_driver, *another_torch]
    else:
        problem = (
            f"is built for CUDA {built} and {here}: {_reason()}; the driver is new enough"
            f" ({driver})"
        )
        ways = ["see nvidia-smi; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"]
    return UnusableGPUs(f"torch {torch.__version__} {problem}", ", or ".join([*ways, ON_A_CPU]))


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return "CUDA finds no device"
