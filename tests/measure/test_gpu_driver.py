"""A card that is there and that torch cannot use is told of in one line: the driver, what torch was
built for, what to do.
"""

import re
import sys
from pathlib import Path

import pynvml
import pytest
import torch

from pipeline.measure import gpu_driver
from pipeline.measure.gpu_driver import unusable_gpus

INSTALL = (
    re.escape(f"{sys.executable} -m pip install --force-reinstall torch torchvision --index-url ")
    + "https://[^ ]+/"
)


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


def test_a_driver_that_is_older_than_torchs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, version="535.104.05", cuda=12020, cards=8, built="13.0")
    line = str(unusable_gpus())
    assert "\n" not in line and re.fullmatch(
        rf"torch {re.escape(torch.__version__)} is built for CUDA 13.0 and cannot use the 8 GPUs"
        r" here: this is NVIDIA's driver "
        r"535.104.05, which runs CUDA 12.2 and older; install driver 580 or newer, or install a"
        r" torch for this driver: "
        rf"{INSTALL}cu126, or train on the CPU \(--device cpu\)",
        line,
    ), line


def test_a_driver_that_is_too_old_for_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, version="470.1", cuda=11040, cards=1, built="12.6")
    found = unusable_gpus()
    assert found is not None and found.problem.endswith(
        "cannot use the GPU here: this is NVIDIA's driver 470.1, which runs CUDA 11.4 and older"
    )
    assert found.advice == "install driver 525 or newer, or train on the CPU (--device cpu)"


@pytest.mark.parametrize(("cuda", "index"), [(13000, "cu130"), (12080, "cu126"), (14010, "cu130")])
def test_a_torch_without_cuda(cuda: int, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, version="580.65", cuda=cuda, cards=1, built=None)
    found = unusable_gpus()
    assert (
        found is not None
        and "is built without CUDA and cannot use the GPU here (NVIDIA's driver 580.65, which"
        in found.problem
    )
    assert re.match(
        rf"install a torch for this driver: {INSTALL}{index}, or train on the CPU", found.advice
    )


def test_a_driver_that_is_new_enough_and_does_not_serve_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet"
            " initialized\nmore"
        )

    machine(monkeypatch, version="580.65", cuda=13000, cards=4, built="13.0")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    found = unusable_gpus()
    assert (
        found is not None
        and "the 4 GPUs here: Unexpected error from cudaGetDeviceCount(). Error 802"
        in found.problem
    )
    assert "\n" not in str(found) and "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in found.advice


def test_where_torch_can_use_them_or_none_is_there_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, version="580.65", cuda=13000, cards=8, built="13.0", usable=True)
    assert unusable_gpus() is None
    machine(monkeypatch, version="535.1", cuda=12020, cards=0, built="13.0")
    assert unusable_gpus() is None


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
