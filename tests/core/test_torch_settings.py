"""The precision of fp32 products and convolutions on a card, and page faults of a thread that frees
memory and allocates it again, measured in processes of their own.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.core.torch_settings import compute_in, computing, environment, products_in
from pipeline.models.teachers.base import Teacher
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import Untrained
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def products() -> list[Any]:
    """Of matrix products, convolutions and recurrent networks."""
    cudnn: Any = torch.backends.cudnn
    return [each.fp32_precision for each in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with products_in("fp32"):
        yield


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
        backends = torch.backends
        return (
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    assert older() == (False, False, "highest")
    with products_in("tf32"):
        assert older() == (True, True, "high")
        with products_in("bf16"):
            assert older() == (False, False, "highest")
        assert older() == (True, True, "high")
    assert older() == (False, False, "highest")


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
        match=(
            r"recipe: precision='tf32' must have an NVIDIA card of .* 8\.0 or newer; got cpu: take"
        ),
    ):
        compute_in("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="got Tesla V100"):
        compute_in("tf32", CARD)
    assert products() == ["ieee"] * 3


def test_the_precision_is_part_of_the_study() -> None:
    keys = {
        small_recipe(precision=each).study_key({"data": "x"}) for each in ("fp32", "tf32", "bf16")
    }
    assert len(keys) == 3


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


TURNS = """
import ctypes, resource, sys, threading
from pipeline.core.torch_settings import keep_freed_memory
if sys.argv[1] == "told":
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


def faults(how: str, **more: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ran = subprocess.run(
        [sys.executable, "-c", TURNS, how],
        env={**plain, **more},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_freed_memory_causes_no_page_faults_when_it_is_used_again() -> None:
    assert faults("not told") > 100  # else this test would see nothing
    assert faults("told") < 20
    assert faults("not told", **environment()) < 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
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
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = (int(word) for word in ran.stdout.split())
    assert kept > 190 << 20 and left < 10 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_malloc_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    told = environment()
    assert told["MALLOC_ARENA_MAX"] == "4" and int(told["MALLOC_TRIM_THRESHOLD_"]) > 2**30
