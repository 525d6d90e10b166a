"""Settings of a worker on a GPU for the same bits after a restart, and the conditions of a run."""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.core import torch_settings as settled
from pipeline.core.torch_settings import EXACT, configure_torch, exactness

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in EXACT:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(settled, "_inexact", set())
    cudnn: Any = torch.backends.cudnn
    threads = torch.get_num_threads()
    was = cudnn.deterministic, cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        yield
    cudnn.deterministic, cudnn.benchmark = was
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_a_gpu_sums_in_one_order() -> None:
    configure_torch(1, CARD)
    assert {name: os.environ.get(name) for name in EXACT} == {
        "NCCL_ALGO": "Ring",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert (
        torch.are_deterministic_algorithms_enabled()
        and torch.is_deterministic_algorithms_warn_only_enabled()
    )
    assert exactness(CARD) == "yes"


def test_a_cpu_stays_as_it_is() -> None:
    torch.backends.cudnn.deterministic = False
    configure_torch(1, CPU)
    assert (
        not any(name in os.environ for name in EXACT)
        and not torch.are_deterministic_algorithms_enabled()
    )
    assert exactness(CPU) == "yes"


def test_settings_of_the_user_stay_and_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    configure_torch(1, CARD)
    assert os.environ["NCCL_ALGO"] == "Tree" and exactness(CARD) == "no: NCCL_ALGO=Tree"


def test_an_operation_without_a_deterministic_form_is_named(
    recwarn: pytest.WarningsRecorder,
) -> None:
    """torch's own words (2.13); other warnings are shown as before."""
    configure_torch(1, CARD)
    configure_torch(1, CARD)  # as the next run in this process
    told = (
        "does not have a deterministic implementation, but you set"
        " 'torch.use_deterministic_algorithms(True, warn_only=True)'"
    )
    for name in ("reflection_pad2d_backward_cuda", "kthvalue CUDA"):
        warnings.warn(f"{name} {told}", UserWarning, stacklevel=1)
    warnings.warn("something else", UserWarning, stacklevel=1)
    assert exactness(CARD) == "no: kthvalue CUDA, reflection_pad2d_backward_cuda"
    assert [str(each.message) for each in recwarn] == ["something else"]
