"""Which errors say that memory ran out."""

from __future__ import annotations

import pytest
import torch

from pipeline.measure.memory import is_out_of_memory

OUT_OF_MEMORY = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    ),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    torch.distributed.DistBackendError(
        "NCCL error, ncclUnhandledCudaError\nLast error:\nCuda failure 2 'out of memory'"
    ),
    RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes."
    ),
    RuntimeError("unable to mmap 800 bytes from file </f>: Cannot allocate memory (12)"),
    MemoryError("Unable to allocate 8.00 EiB for an array"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_memory_that_ran_out_is_known_whoever_says_so(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_torchs_own_allocator_on_a_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        RuntimeError("[rank1]: Connection closed by peer"),
        ValueError("training: out of memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "said",
    [
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_what_has_other_causes_too_is_of_memory_on_a_full_card_alone(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_out_of_memory(RuntimeError(said))  # no card
    for free, is_memory in ((2, True), (40, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free << 30, 80 << 30))
        assert is_out_of_memory(RuntimeError(said)) == is_memory

    def dead() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", dead)
    assert not is_out_of_memory(RuntimeError(said))
