"""Cores of a worker: one holder each, for all threads, waited for, free when the holder dies."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from pipeline.core import cpu_affinity as cores_module
from pipeline.core.cpu_affinity import (
    near_cores,
    physical_cores,
    reserve_cores,
)
from pipeline.core.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.core.cpu_affinity import reserve_cores
with reserve_cores(1, folder=Path(sys.argv[1])) as cores:
    print(*cores, flush=True)
    time.sleep(60)
"""


def test_all_threads_stay_on_the_cores_until_the_end(tmp_path: Path) -> None:
    before, go_on = os.sched_getaffinity(0), threading.Event()
    waiting = threading.Thread(target=go_on.wait, daemon=True)
    waiting.start()
    seen: list[set[int]] = []
    with reserve_cores(1, folder=tmp_path) as cores:
        assert cores in physical_cores(before).values()
        assert os.sched_getaffinity(waiting.native_id or 0) == set(cores) == os.sched_getaffinity(0)
        later = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        later.start()
        later.join()
        assert seen == [set(cores)]
    assert os.sched_getaffinity(0) == before == os.sched_getaffinity(waiting.native_id or 0)
    go_on.set()


def test_no_core_has_two_holders_and_a_killed_holder_frees_its_cores(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline().split()[0])
        everything = len(physical_cores(os.sched_getaffinity(0)))
        try:
            if everything > 1:
                with reserve_cores(1, folder=tmp_path) as mine:
                    assert theirs not in mine
            said = f"needs {everything} unreserved cores; this process may use {everything} cores,"
            with (
                pytest.raises(UserError, match=said),
                reserve_cores(everything, folder=tmp_path, timeout_s=0.1),
            ):
                pass
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
    with reserve_cores(everything, folder=tmp_path) as mine:
        assert theirs in mine


@pytest.mark.parametrize(
    ("siblings", "logical", "expected"),
    [
        ({}, (0, 1, 3), {"0": (0,), "1": (1,), "3": (3,)}),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, (0, 1, 2, 3), {"0": (0, 2), "1": (1, 3)}),
        (
            {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"},
            (1, 2, 3),
            {"0": (1,), "2": (2, 3)},
        ),  # one is not for this process
    ],
)
def test_siblings_are_one_core(
    siblings: dict[int, str], logical: tuple[int, ...], expected: dict, tmp_path: Path
) -> None:
    for core, text in siblings.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    assert physical_cores(logical, topology=tmp_path) == expected


# -------------------------------------------------------------------------------------- near a card

CARD = torch.device("cuda", 0)
EVERY = sorted(os.sched_getaffinity(0))


def kept_on(
    patch: pytest.MonkeyPatch, device: torch.device, near: set[int] | None, *, at_least: int = 1
) -> list[int]:
    """The affinity beside a card whose node has the cores `near`; None: NVML does not know it."""

    def masks(handle: str, count: int, scope: int) -> list[int]:
        if near is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [sum(1 << core % 64 for core in near if core // 64 == at) for at in range(count)]

    nvml = SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        NVML_AFFINITY_SCOPE_NODE=pynvml.NVML_AFFINITY_SCOPE_NODE,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-abc": "it"}.__getitem__,
        nvmlDeviceGetCpuAffinityWithinScope=masks,
    )
    patch.setattr(cores_module, "pynvml", nvml)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    with near_cores(device, at_least=at_least):
        return sorted(os.sched_getaffinity(0))


@pytest.mark.skipif(len(EVERY) < 2, reason="one core is as near as another")
def test_a_worker_keeps_to_the_cores_of_its_cards_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_on(monkeypatch, CARD, {EVERY[-1], 5000}) == EVERY[-1:]
    assert sorted(os.sched_getaffinity(0)) == EVERY  # the affinity is restored at the end


@pytest.mark.parametrize(
    ("device", "near", "at_least"),
    [
        pytest.param(torch.device("cpu"), {EVERY[-1]}, 1, id="a CPU"),
        pytest.param(CARD, {EVERY[-1]}, 2, id="too few"),
        pytest.param(CARD, {5000, 5031}, 1, id="none of this process"),
        pytest.param(CARD, set(range(8192)), 1, id="all"),
        pytest.param(CARD, None, 1, id="NVML does not know"),
    ],
)
def test_the_affinity_stays_where_no_node_is_near(
    device: torch.device, near: set[int] | None, at_least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_on(monkeypatch, device, near, at_least=at_least) == EVERY
