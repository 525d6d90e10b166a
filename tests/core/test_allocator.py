"""Page faults of a thread that frees memory and allocates it again, measured in processes of their
own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pipeline.core.torch_settings import environment

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
