"""A card that is there and that torch cannot use is told of in one line: the driver, what torch was
built for, what to do.
"""

import sys
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch

from pipeline.measure import unusable_gpus as gpu_driver
from pipeline.measure.unusable_gpus import unusable_gpus

INSTALL = (
    f"install a torch for this driver: {sys.executable} -m pip install --force-reinstall torch"
    " torchvision --index-url https://download.pytorch.org/whl/"
)
CPU = "or train on the CPU (--device cpu)"
TORCH = f"torch {torch.__version__} is built"


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def machine(
    patch: pytest.MonkeyPatch,
    *,
    version: str,
    cuda: int,
    cards: int,
    built: str | None,
    usable: bool = False,
) -> None:
    """NVML and torch as they answer on such a machine; `cuda` as NVML says it, 12020 for 12.2."""
    for name, answer in (
        ("nvmlInit", None),
        ("nvmlShutdown", None),
        ("nvmlSystemGetDriverVersion", version),
        ("nvmlSystemGetCudaDriverVersion_v2", cuda),
        ("nvmlDeviceGetCount", cards),
    ):
        patch.setattr(pynvml, name, lambda answer=answer: answer)
    patch.setattr(torch.version, "cuda", built)
    patch.setattr(torch.cuda, "is_available", lambda: usable)


@pytest.mark.parametrize(
    ("about", "line"),
    [
        (
            {"version": "535.104.05", "cuda": 12020, "cards": 8, "built": "13.0"},
            f"{TORCH} for CUDA 13.0 and cannot use the 8 GPUs here; NVIDIA's driver 535.104.05 runs"
            f" CUDA 12.2 and older; install driver 580 or newer, or {INSTALL}cu126, {CPU}",
        ),
        (  # too old for any torch
            {"version": "470.1", "cuda": 11040, "cards": 1, "built": "12.6"},
            f"{TORCH} for CUDA 12.6 and cannot use the 1 GPU here; NVIDIA's driver 470.1 runs CUDA"
            f" 11.4 and older; install driver 525 or newer, {CPU}",
        ),
        (  # too old for a torch that is newer than the table of drivers
            {"version": "580.65", "cuda": 13000, "cards": 1, "built": "14.1"},
            f"{TORCH} for CUDA 14.1 and cannot use the 1 GPU here; NVIDIA's driver 580.65 runs CUDA"
            f" 13.0 and older; install a driver that runs CUDA 14, or {INSTALL}cu130, {CPU}",
        ),
        *(
            (
                {"version": "580.65", "cuda": cuda, "cards": 1, "built": None},
                f"{TORCH} without CUDA and cannot use the 1 GPU here; NVIDIA's driver 580.65 runs"
                f" CUDA {runs} and older; {INSTALL}{index}, {CPU}",
            )
            for cuda, runs, index in (
                (13000, "13.0", "cu130"),
                (12080, "12.8", "cu126"),
                (14010, "14.1", "cu130"),
            )
        ),
        (  # a driver that is new enough and does not serve torch
            {"version": "580.65", "cuda": 13000, "cards": 4, "built": "13.0"},
            f"{TORCH} for CUDA 13.0 and cannot use the 4 GPUs here; NVIDIA's driver 580.65 runs"
            " CUDA 13.0 and older; see nvidia-smi; a container needs"
            f" NVIDIA_DRIVER_CAPABILITIES=compute,utility, {CPU}",
        ),
        ({"version": "580.65", "cuda": 13000, "cards": 8, "built": "13.0", "usable": True}, None),
        ({"version": "535.1", "cuda": 12020, "cards": 0, "built": "13.0"}, None),
    ],
)
def test_the_driver_what_torch_was_built_for_and_what_to_do_are_in_one_line(
    about: dict[str, Any], line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, **about)
    found = unusable_gpus()
    assert (None if found is None else str(found)) == line


@pytest.mark.parametrize(
    ("visible", "hidden"),
    [("", True), ("-1", True), ("NoDevFiles", True), ("0", False), ("GPU-8932f937", False)],
)
def test_cards_that_the_user_hides_are_not_missed(
    visible: str, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, version="535.1", cuda=12020, cards=8, built="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (unusable_gpus() is None) == hidden


@pytest.mark.parametrize("is_there", [True, False])
def test_a_driver_that_does_not_answer(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    machine(monkeypatch, version="", cuda=0, cards=0, built="13.0")
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    monkeypatch.setattr(gpu_driver, "DEVICES", tmp_path)
    for name in ("nvidia-uvm", "nvidiactl", *(["nvidia0"] if is_there else [])):
        (tmp_path / name).touch()
    found = unusable_gpus()
    assert (found is not None) == is_there
    assert found is None or found.problem.startswith(
        f"NVIDIA's driver does not answer for the GPUs in {tmp_path}: "
    )
