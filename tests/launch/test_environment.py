"""What workers are told through their environment."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.torch_settings import EXACT
from pipeline.launch.environment import of_worker, passed_on


def told(**about: Any) -> dict[str, str]:
    return of_worker(**{"threads": 1, "loader_threads": 1, "gpus": False, "alone": False, **about})


@pytest.mark.parametrize(
    "name",
    [
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_ALLOC_CONF",
        "CUBLAS_WORKSPACE_CONFIG",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
    ],
)
def test_settings_of_compilers_and_allocators_are_passed_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "a value")
    assert passed_on()[name] == told()[name] == "a value"


def test_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_STORE_TOKEN", "secret")
    monkeypatch.setenv("TORCHINDUCTOR_REMOTE_PASSWORD", "secret")
    assert "secret" not in told().values()


def test_workers_on_cards_are_exact_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXACT:
        monkeypatch.delenv(name, raising=False)
    assert EXACT.items() <= told(gpus=True).items() and not EXACT.keys() & told().keys()
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert told(gpus=True)["NCCL_ALGO"] == "Tree"  # the user's own word
