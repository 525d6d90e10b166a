"""torch's settings: precision on a card, the same bits after a restart, and page faults of a thread
that frees memory and allocates it again, measured in processes of their own.
"""

import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.core import torch_settings
from pipeline.core.torch_settings import (
    EXACT,
    compute_in,
    computing,
    configure_torch,
    exactness,
    malloc_environment,
    products_in,
)
from pipeline.models.teachers.base import Teacher
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import Untrained
from pipeline.recipe.recipe import spec

about_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about its malloc")
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def products() -> list[Any]:
    """Of matrix products, convolutions and recurrent networks."""
    cudnn: Any = torch.backends.cudnn
    return [each.fp32_precision for each in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in EXACT:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch_settings, "_nondeterministic", set())
    for place, name in (
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "benchmark"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),  # type: ignore[attr-defined]
    ):
        monkeypatch.setattr(place, name, getattr(place, name))
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), products_in("fp32"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.usefixtures("ampere")
def test_products_and_convolutions_are_computed_alike() -> None:
    """By themselves torch computes the one in TF32 and the other not."""
    for precision, wanted in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        compute_in(precision, CARD)  # type: ignore[arg-type]
        assert products() == [wanted] * 3


def test_the_older_settings_agree_with_the_newer() -> None:
    """torch.compile (2.13) reads them, and a read fails where they disagree with the newer ones."""

    def older() -> tuple[object, ...]:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    seen = [older()]
    with products_in("tf32"):
        seen.append(older())
        with products_in("bf16"):
            seen.append(older())
        seen.append(older())
    seen.append(older())
    ieee, tf32 = (False, False, "highest"), (True, True, "high")
    assert seen == [ieee, tf32, ieee, tf32, ieee]


@pytest.mark.usefixtures("ampere")
def test_the_precision_holds_inside_the_context_only() -> None:
    compute_in("tf32", CARD)
    with products_in("fp32"):
        assert products() == ["ieee"] * 3
    assert products() == ["tf32"] * 3
    x = torch.ones(2, 2)
    with computing(CPU, "bf16"):
        assert (x @ x).dtype == torch.bfloat16 and products() == ["ieee"] * 3
    assert (x @ x).dtype == torch.float32 and products() == ["tf32"] * 3


def test_tf32_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=(r"recipe: precision='tf32' needs an NVIDIA card of .* 8\.0 or newer; got cpu: use"),
    ):
        compute_in("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="got Tesla V100"):
        compute_in("tf32", CARD)
    assert products() == ["ieee"] * 3


@pytest.mark.usefixtures("ampere")
def test_a_teacher_computes_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pictures:
        classes, shape, mean, std = 1000, (3, 32, 32), (0.5,) * 3, (0.2,) * 3

    made: Teacher = spec(timm_teacher, name="test_vit", weights=spec(Untrained), size=160).build(
        Pictures()
    )
    seen: list[list[str]] = []
    body: Any = made.body
    body.register_forward_pre_hook(lambda *_: seen.append(products()))
    compute_in("tf32", CARD)
    made(torch.rand(1, 3, 32, 32))
    assert seen == [["ieee"] * 3] and products() == ["tf32"] * 3


def test_a_gpu_sums_in_one_order() -> None:
    configure_torch(1, CARD)
    assert {name: os.environ.get(name) for name in EXACT} == {
        "NCCL_ALGO": "Ring",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert torch.is_deterministic_algorithms_warn_only_enabled() and exactness(CARD) == "yes"


def test_a_cpu_stays_as_it_is() -> None:
    torch.backends.cudnn.deterministic = False
    configure_torch(1, CPU)
    assert not EXACT.keys() & os.environ.keys() and exactness(CPU) == "yes"
    assert not torch.are_deterministic_algorithms_enabled()


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
    said = (
        "does not have a deterministic implementation, but you set"
        " 'torch.use_deterministic_algorithms(True, warn_only=True)'"
    )
    for name in ("reflection_pad2d_backward_cuda", "kthvalue CUDA"):
        warnings.warn(f"{name} {said}", UserWarning, stacklevel=1)
    warnings.warn("something else", UserWarning, stacklevel=1)
    assert exactness(CARD) == "no: kthvalue CUDA, reflection_pad2d_backward_cuda"
    assert [str(each.message) for each in recwarn] == ["something else"]


TURNS = """
import ctypes, resource, sys, threading
from pipeline.core.torch_settings import keep_freed_memory
if sys.argv[1] == "set":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def turn():
    held = [libc.malloc(size << 20) for size in (3, 50, 3)]
    for address, size in zip(held, (3, 50, 3)):
        ctypes.memset(address, 1, size << 20)
    for address in held:
        libc.free(address)

def turns():
    turn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        turn()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=turns)
thread.start()
thread.join()
"""


def printed(program: str, *words: str, **options: Any) -> str:
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def faults(how: str, **more: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return int(printed(TURNS, how, env={**plain, **more}))


@about_glibc
@pytest.mark.full
def test_freed_memory_causes_no_page_faults_when_it_is_used_again() -> None:
    assert faults("unset") > 100  # else this test would see nothing
    assert faults("set") < 20
    assert faults("unset", **malloc_environment()) < 20


@about_glibc
def test_freed_memory_can_be_released_to_the_kernel() -> None:
    code = """
import ctypes
from pipeline.core.torch_settings import keep_freed_memory, release_freed_memory
from pipeline.measure.memory import rss_bytes
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = rss_bytes()
address = libc.malloc(200 << 20)
ctypes.memset(address, 1, 200 << 20)
libc.free(address)
kept = rss_bytes()
release_freed_memory()
print(kept - before, rss_bytes() - before)
"""
    kept, left = map(int, printed(code).split())
    assert kept > 190 << 20 and left < 10 << 20


@about_glibc
def test_malloc_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    found = malloc_environment()
    assert found["MALLOC_ARENA_MAX"] == "4" and int(found["MALLOC_TRIM_THRESHOLD_"]) > 2**30
