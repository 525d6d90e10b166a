"""Whether torch can use the GPUs of this machine, and what to do where it cannot.

Ray counts cards through NVML, which every driver answers; torch asks CUDA, which refuses a driver
that is older than the CUDA that torch was built for. Without a word ahead, workers would be given
cards and die.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pynvml
import torch

DEVICES = Path("/dev")
OLDEST_DRIVERS = {12: 525, 13: 580}
"""by CUDA's major version; within one, a newer minor version runs on an older driver"""
INDEX = "https://download.pytorch.org/whl"
INDEX_OF = {12: "cu126", 13: "cu130"}
"""PyTorch's builds for each of them, with the fewest demands on the driver"""
ON_A_CPU = "train on the CPU (--device cpu)"


class UnusableGPUs(NamedTuple):
    """GPUs of a machine that torch cannot use."""

    told: str
    advice: str

    def __str__(self) -> str:
        return f"{self.told}; {self.advice}"


class _Driver(NamedTuple):
    version: str
    cuda: tuple[int, int]
    """the newest that it runs"""
    cards: int


def unusable_gpus() -> UnusableGPUs | None:
    """What keeps torch from the GPUs of this machine.

    None where torch can use them, none is there, or CUDA_VISIBLE_DEVICES hides them all.
    """
    if _hides_all(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own words, several lines of them
        if torch.cuda.is_available():
            return None
    try:
        driver = _driver()
    except pynvml.NVMLError as error:
        return _without_answer(error) if list(DEVICES.glob("nvidia[0-9]*")) else None
    if not driver.cards:
        return None
    here = f"the {driver.cards} GPUs here" if driver.cards > 1 else "the GPU here"
    of_driver = (
        f"NVIDIA's driver {driver.version}, which runs CUDA {driver.cuda[0]}.{driver.cuda[1]} and"
        " older"
    )
    built = torch.version.cuda
    if built is None:
        told = (
            f"torch {torch.__version__} is built without CUDA and cannot use {here} ({of_driver})"
        )
        return UnusableGPUs(
            told, f"{_another_torch(driver) or _another_driver(min(OLDEST_DRIVERS))}, or {ON_A_CPU}"
        )
    told = f"torch {torch.__version__} is built for CUDA {built} and cannot use {here}"
    major = int(built.split(".")[0])
    if driver.cuda[0] < major:
        ways = [_another_driver(major), _another_torch(driver), ON_A_CPU]
        return UnusableGPUs(
            f"{told}: this is {of_driver}", ", or ".join(way for way in ways if way)
        )
    advice = (
        "see nvidia-smi; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility; or"
        f" {ON_A_CPU}"
    )
    return UnusableGPUs(f"{told}: {_reason()}; the driver is new enough ({of_driver})", advice)


def _hides_all(visible: str | None) -> bool:
    """CUDA takes the cards before the first name that it does not know: `""`, `-1` and Slurm's
    `NoDevFiles` are none.
    """
    return visible is not None and re.match(r"\d|GPU-|MIG-", visible) is None


def _driver() -> _Driver:
    """Raises: pynvml.NVMLError where no driver answers."""
    pynvml.nvmlInit()
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        version: str = pynvml.nvmlSystemGetDriverVersion()
        return _Driver(version, (cuda // 1000, cuda % 1000 // 10), pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _without_answer(error: pynvml.NVMLError) -> UnusableGPUs:
    told = f"NVIDIA's driver does not answer for the GPUs in {DEVICES}: {error}"
    rest = "a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    return UnusableGPUs(
        told,
        f"see nvidia-smi; after an update of the driver restart the machine; {rest}; or {ON_A_CPU}",
    )


def _another_driver(cuda: int) -> str:
    oldest = OLDEST_DRIVERS.get(cuda)
    return (
        f"install a driver that runs CUDA {cuda}"
        if oldest is None
        else f"install driver {oldest} or newer"
    )


def _another_torch(driver: _Driver) -> str:
    """For CUDA of the driver's major version; nothing where PyTorch has none so old."""
    index = INDEX_OF.get(min(driver.cuda[0], max(INDEX_OF)))
    if index is None:
        return ""
    install = f"{sys.executable} -m pip install --force-reinstall torch torchvision"
    return f"install a torch for this driver: {install} --index-url {INDEX}/{index}"


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return "CUDA finds no device"
