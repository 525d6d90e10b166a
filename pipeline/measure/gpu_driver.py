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


class _Driver(NamedTuple):
    version: str
    cuda: tuple[int, int]  # the newest CUDA version that it supports
    cards: int


def unusable_gpus() -> UnusableGPUs | None:
    """The reason why torch cannot use the GPUs of this machine.

    None if torch can use them, if there are none, or if CUDA_VISIBLE_DEVICES hides them.
    """
    if _hides_all(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own message of several lines
        if torch.cuda.is_available():
            return None
    try:
        driver = _driver()
    except pynvml.NVMLError as error:
        return _no_answer(error) if list(DEVICES.glob("nvidia[0-9]*")) else None
    if not driver.cards:
        return None
    here = f"the {driver.cards} GPUs here" if driver.cards > 1 else "the GPU here"
    of_driver = (
        f"NVIDIA's driver {driver.version}, which runs CUDA {driver.cuda[0]}.{driver.cuda[1]} and"
        " older"
    )
    built = torch.version.cuda
    if built is None:
        advice = _another_torch(driver) or _another_driver(min(OLDEST_DRIVERS))
        return UnusableGPUs(
            f"torch {torch.__version__} is built without CUDA and cannot use {here} ({of_driver})",
            f"{advice}, or {ON_A_CPU}",
        )
    problem = f"torch {torch.__version__} is built for CUDA {built} and cannot use {here}"
    major = int(built.split(".")[0])
    if driver.cuda[0] < major:
        ways = [_another_driver(major), _another_torch(driver), ON_A_CPU]
        return UnusableGPUs(
            f"{problem}: this is {of_driver}", ", or ".join(way for way in ways if way)
        )
    advice = (
        "see nvidia-smi; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility; or"
        f" {ON_A_CPU}"
    )
    return UnusableGPUs(f"{problem}: {_reason()}; the driver is new enough ({of_driver})", advice)


def _hides_all(visible: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all cards.

    CUDA uses the cards before the first unknown name, so `""`, `-1` and Slurm's `NoDevFiles` hide
    all.
    """
    return visible is not None and re.match(r"\d|GPU-|MIG-", visible) is None


def _driver() -> _Driver:
    """Raises: pynvml.NVMLError if no driver answers."""
    pynvml.nvmlInit()
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        version: str = pynvml.nvmlSystemGetDriverVersion()
        return _Driver(version, (cuda // 1000, cuda % 1000 // 10), pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _no_answer(error: pynvml.NVMLError) -> UnusableGPUs:
    return UnusableGPUs(
        f"NVIDIA's driver does not answer for the GPUs in {DEVICES}: {error}",
        "see nvidia-smi; after an update of the driver restart the machine; a container needs"
        f" NVIDIA_DRIVER_CAPABILITIES=compute,utility; or {ON_A_CPU}",
    )


def _another_driver(cuda: int) -> str:
    if cuda not in OLDEST_DRIVERS:
        return f"install a driver that runs CUDA {cuda}"
    return f"install driver {OLDEST_DRIVERS[cuda]} or newer"


def _another_torch(driver: _Driver) -> str:
    """Advice to install a build for the driver's major version; "" if PyTorch has no such build."""
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
