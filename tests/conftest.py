"""What every test process must have about it before numba, DeepSpeed, Ray or MLflow is imported."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.lab import Driven, Lab
    from tests.helpers.small import Command, Done, Refused

gc.set_threshold(700, 10, 1000)  # as pipeline/__main__.py sets it, before the imports

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault(
    "NUMBA_NUM_THREADS", "4"
)  # FFCV refuses more loader threads than this, also on a machine with fewer cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault(
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2"
)  # Ray 2.60 polls its workers every 2 s by default
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

# Tests run on the CPU, on a machine with GPUs too: their processes have a rank each, and there may
# be fewer cards than ranks. CUDA reads the variable once, when something first asks for it; `pytest
# -m gpu` gets its cards back before that.
_CARDS = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
signal.signal(
    signal.SIGHUP, signal.SIG_DFL
)  # whoever tests under nohup hands on, to all that tests start, that it is ignored


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        return
    for name, value in _CARDS.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_are_cheap() -> None:
    """Spare the garbage collector what stays until the end: a million objects of modules.

    Without it, collections took a fifth of the time of tests/launch and tests/measure: each test
    file imports more, and a full collection took 0.3 s in the end.
    """
    gc.collect()
    gc.freeze()
    # The kernel walks all pages of the process for its PSS: 16 ms in one of 1 GB, and a run of
    # 0.8 s asks eleven times. tests/train/test_worker.py asks for it.
    if meters := sys.modules.get("pipeline.measure.meters"):
        vars(meters).update(pss_bytes=meters.rss_bytes)


@pytest.fixture
def spiketrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process, see `tests.helpers.small.command`."""
    from tests.helpers.small import command

    return command(monkeypatch, capsys)


@pytest.fixture
def done(spiketrain: Command) -> Done:
    """What a command prints that ends with exit code 0."""

    def done(*words: object) -> str:
        code, said, error = spiketrain(*map(str, words))
        assert code == 0, error
        return said

    return done


@pytest.fixture
def refused(spiketrain: Command) -> Refused:
    """The one line on stderr of a command that a user's mistake ends with exit code 2."""

    def refused(*words: object) -> str:
        code, _, error = spiketrain(*map(str, words))
        assert code == 2, error
        assert len(error.strip().splitlines()) == 1, error
        return error.strip()

    return refused


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's SQLite store without a run. To make its tables takes seconds, to copy it none."""
    from pipeline.track.mlflow_store import connect

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> str:
    """The URI of an MLflow store in the test's folder; commands use it."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def driven() -> Iterator[Callable[..., Driven]]:
    """Starts a driver of a lab's run, inline unless words say where; none outlives the test."""
    from tests.helpers.lab import Driven

    started: list[Driven] = []

    def start(lab: Lab, *words: str, terminal: int | None = None) -> Driven:
        started.append(Driven(lab, *(words or ("--inline",)), terminal=terminal))
        return started[-1]

    yield start
    for each in started:
        each.kill()
