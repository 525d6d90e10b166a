"""Saved bytes, resident memory, room in control groups, and errors of memory that ran out.

Saved bytes are computed by hand: float32 is 4 bytes, and what each node saves is read from
derivatives.yaml of torch 2.13. The files of control groups are planted, as Linux shows those of
containers, pods and jobs.
"""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.measure import memory
from pipeline.measure.memory import (
    free_bytes,
    hardware,
    hardware_differences,
    is_out_of_memory,
    memory_now_bytes,
    peak_rss_bytes,
    peaks,
    room_bytes,
)
from pipeline.measure.saved_bytes import SavedBytes


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What counts must be freed by reference counts, as autograd frees it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_chain_of_linear_layers():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(2, 5)
    # x for the first weight; the ReLU's result, saved by itself and by the second layer; and, where
    # it is no parameter, the second weight for its input's gradient
    for parameters, held in ((model, 2 * 5 + 2 * 7), ((), 2 * 5 + 2 * 7 + 7 * 3)):
        with SavedBytes(parameters) as saved:
            y = model(x)
            assert saved.now == held * 4
            y.sum().backward()
        assert (saved.now, saved.peak) == (0, held * 4)


def test_one_storage_saved_by_many_nodes_and_views_counts_once_and_whole():
    weight, large = torch.randn(6, requires_grad=True), torch.randn(100, 6)
    with SavedBytes([weight]) as saved:
        first = (large[3] * weight).sum()  # a view of 6 elements holds the whole storage
        assert saved.now == 600 * 4
        views = large[4], large[3:5], large.T.reshape(100, 6)[0]  # the last one is of a copy
        second = torch.stack([(view * weight).sum() for view in views]).sum()
        del views
        for loss, held in ((first, 600 + 600), (second, 0)):
            assert saved.now == (600 + 600) * 4
            loss.backward()
            assert saved.now == held * 4


def test_parameters_and_their_views_do_not_count_but_their_copies_do():
    model = nn.Linear(4, 4)
    saved = SavedBytes(model)
    flat = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    # as ZeRO moves them before the batch
    model.weight.data, model.bias.data = flat[:16].view(4, 4), flat[16:]
    x = torch.randn(2, 4, requires_grad=True)
    with saved:
        y = model(x) + x @ model.weight.detach()[:, :4].view(4, 4)
        assert saved.now == 2 * 4 * 4  # x
        z = x @ (model.weight * 2)
        assert saved.now == (2 * 4 + 4 * 4) * 4  # x and the doubled weight
    del y, z
    assert saved.now == 0 and saved._excluded == {}


def test_freed_step_by_step_while_backward_runs():
    """Three products of 1000 elements: each node gives up its two factors when it is done."""
    seen: list[int] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, *grad_outputs: Tensor) -> Tensor:
            seen.append(saved.now)
            return grad_outputs[0]

    leaf = torch.randn(1000, requires_grad=True)
    factors = [torch.randn(1000) for _ in range(3)]
    with SavedBytes([leaf]) as saved:
        y = leaf
        for factor in factors:
            y = Look.apply(y) * factor
        assert saved.now == 3 * 4000
        y.sum().backward()
    assert seen == [2 * 4000, 4000, 0]


def test_a_retained_graph_keeps_counting_until_it_is_freed():
    leaf = torch.randn(10, requires_grad=True)
    with SavedBytes([leaf]) as saved:
        y = (leaf * torch.randn(10)).exp().sum()
        for retain, held in ((True, 10 + 10), (False, 0)):
            assert saved.now == (10 + 10) * 4  # the factor, and exp's result
            y.backward(retain_graph=retain)
            assert saved.now == held * 4


def test_a_graph_that_outlives_the_context_is_still_subtracted():
    """An output that its own node saves is no cycle."""
    leaf = torch.randn(10, requires_grad=True)
    with SavedBytes([leaf]) as saved:
        y = leaf.exp()
    z = y * leaf.exp()  # outside: not counted
    alive = weakref.ref(y.untyped_storage())
    del y
    assert saved.now == 40  # z still needs it
    del z
    assert saved.now == 0 and alive() is None


def test_a_storage_at_an_address_that_was_freed_is_another_one():
    leaf = torch.randn(1000, requires_grad=True)
    with SavedBytes([leaf]) as saved:
        for _ in range(50):  # the allocator gives the same address again
            (leaf * torch.randn(1000)).sum().backward()
            assert saved.now == 0
        kept = [leaf * torch.randn(1000) for _ in range(3)]
        del kept[1]
        assert saved.now == 2 * 4000
        kept.append(leaf * torch.randn(1000))
        assert (saved.now, saved.peak) == (3 * 4000, 3 * 4000)


@pytest.mark.parametrize("is_measured", [False, True])
@pytest.mark.parametrize("what", ["input", "result", "parameter"])
def test_changes_in_place_are_noticed_as_without_it(what: str, is_measured: bool):
    def batch() -> Tensor:
        weight = nn.Parameter(torch.ones(4))
        with SavedBytes([weight]) if is_measured else nullcontext():
            x = torch.ones(4, requires_grad=what == "parameter")
            y = (weight * x).exp()
        with torch.no_grad():
            {"input": x, "result": y, "parameter": weight}[what].add_(1)
        return y.sum()

    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation.*is at version 1; expected version 0"
    ):
        batch().backward()


def test_gradients_are_the_same_even_the_second_ones():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def gradients() -> list[Tensor]:
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        of = first.square().sum(), [x, *model.parameters()]
        return [first, *torch.autograd.grad(*of, materialize_grads=True)]

    plain = gradients()
    with SavedBytes(model) as saved:
        torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
    assert saved.peak > 0


# ---------------------------------------------------------------------------------- process, device


def test_peak_rss_is_this_processs_own_and_can_start_anew():
    code = (
        "from pipeline.measure.memory import peak_rss_bytes, reset_peak_rss\nbefore ="
        " peak_rss_bytes(); block = bytearray(b'x') * (200 << 20); peak = peak_rss_bytes(); del"
        " block\nagain = reset_peak_rss() and peak_rss_bytes()\nprint(before, peak, again)"
    )
    ballast = bytearray(b"x") * (400 << 20)  # getrusage would show it in the child
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    before, peak = int(output[0]), int(output[1])
    assert before < len(ballast) < peak_rss_bytes()
    assert 150 << 20 < peak - before < 250 << 20
    assert output[2] == "False" or int(output[2]) < peak - (150 << 20)


def test_the_device_of_the_run_is_asked_and_not_what_else_is_there(monkeypatch):
    """A machine with two cards: a worker on the second is told of that one, and one on cores of
    none.
    """
    answers = {
        "memory_allocated": 1,
        "mem_get_info": (5, 9),
        "get_device_name": "H100",
        "max_memory_allocated": 2,
        "max_memory_reserved": 3,
    }
    asked = []
    for name, value in answers.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda device, value=value: asked.append(device) or value
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card, cores = torch.device("cuda", 1), torch.device("cpu")
    assert (memory_now_bytes(card), free_bytes(card), hardware(card)["gpu"]) == (1, 5, "H100")
    of_card = {"peak_device_bytes": 2, "peak_reserved_bytes": 3}
    assert peaks(card).items() >= of_card.items() and asked == [card] * 5
    assert min(memory_now_bytes(cores), free_bytes(cores)) > 10**6
    assert peaks(cores).items() >= dict.fromkeys(of_card, 0).items()
    assert hardware(cores)["gpu"] == "none" and len(asked) == 5


def test_a_machine_is_known_again_however_many_cards_a_worker_saw(monkeypatch):
    """By the card that a command here would compute on; a run on cores of that machine was on
    another device.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    of_worker = {**hardware(torch.device("cuda", 3)), "threads": 9}
    assert hardware_differences(of_worker, own_cores=False) == []
    on_cores = hardware(torch.device("cpu"))
    differing = [("gpu", "H100", "none"), ("kernels", "triton", "numba")]
    assert hardware_differences(on_cores, own_cores=False) == differing


def plant(folder: Path, *, limit: str, used: int, cache: int, version: int = 2) -> None:
    limits, uses, caches = {
        1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        2: ("max", "current", "inactive_file"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    stat = f"anon {used}\n{caches} {cache}\nactive_file 50"
    for name, text in ((limits, limit), (uses, used), ("stat", stat)):
        (folder / f"memory.{name}").write_text(f"{text}\n")


def room(mount: Path, groups: str) -> int | None:
    (mount / "groups").write_text(groups)
    return room_bytes(mount=mount, groups=mount / "groups")


@pytest.mark.parametrize("group", ["/", "/kubepods/of/the/host"])
@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 700 + 200), ("max", None)])
def test_a_container_that_sees_its_own_group_as_the_root(
    tmp_path: Path, group: str, limit: str, left: int | None
) -> None:
    """The cache that is not in use can be given back."""
    plant(tmp_path, limit=limit, used=700, cache=200)
    assert room(tmp_path, f"0::{group}\n") == left
    assert room_bytes(mount=tmp_path, groups=tmp_path / "absent") is None


def test_the_least_of_a_group_and_those_above_it(tmp_path: Path) -> None:
    """Slurm limits the job, systemd the slice that it is in; a group beside it does not count."""
    for name, limit, used, cache in (
        ("slice", "2000", 1000, 0),
        ("slice/job", "900", 600, 100),
        ("slice/job/step", "max", 600, 100),
        ("slice/other", "100", 100, 0),
        ("tight", "1200", 1000, 0),
        ("tight/job", "900", 600, 100),
    ):
        plant(tmp_path / name, limit=limit, used=used, cache=cache)
    assert room(tmp_path, "0::/slice/job/step\n") == 400
    assert room(tmp_path, "0::/tight/job\n") == 200


def test_the_first_version_has_files_of_its_own(tmp_path: Path) -> None:
    none = str(2**63 - 4096)  # stands for no limit
    plant(tmp_path / "memory", limit=none, used=10**9, cache=0, version=1)
    plant(tmp_path / "memory" / "docker" / "one", limit="1000", used=900, cache=300, version=1)
    groups = "9:name=systemd:/\n4:memory:/docker/one\n1:cpu:/\n0::/\n"
    assert room(tmp_path, groups) == 400
    plant(tmp_path / "full" / "memory", limit="1000", used=1001, cache=0, version=1)
    assert room(tmp_path / "full", groups) == 0


def test_what_is_free_is_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for left in (None, 4096, 0, 2**63):
        monkeypatch.setattr("pipeline.measure.memory.room_bytes", lambda left=left: left)
        free = free_bytes(torch.device("cpu"))
        assert free == left if left in (4096, 0) else 10**6 < free < 2**60


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


OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
    RuntimeError("[rank1]: Connection closed by peer"),
    ValueError("training: out of memory"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHERS], ids=lambda error: str(error)[:40])
def test_memory_that_ran_out_is_known_whoever_says_so(error: Exception) -> None:
    assert is_out_of_memory(error) == (error in OUT_OF_MEMORY)


def test_torchs_own_allocator_on_a_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)
    assert is_out_of_memory(refused.value)


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


GROWTH = """
import json
import torch
from pipeline.measure.memory import peak_rss_bytes
from pipeline.measure.saved_bytes import SavedBytes
from pipeline.models.mlp import mlp
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.helpers.rule_networks import cross_entropy, learn

FEW, MANY = 2, 10  # time steps; each tensor of the hidden layer, 512 samples by 4096, takes 8 MB
model, target_B = mlp(in_features=16, hidden=(4096,)), torch.arange(512) % 10

def peaks(rule, steps):
    rule.attach(model)
    with SavedBytes(model) as saved:
        learn(rule.loss_terms(model, torch.rand(steps, 512, 16), cross_entropy(target_B), step=0))
    rule.release()
    return saved.peak, peak_rss_bytes()

peaks(SLTT(), FEW)  # what is loaded and allocated once
# The rule with the smaller peak comes first, as the peak of a process never falls. BPTT goes step
# by step: a forward over all steps at once needs more beside what it saves.
rules = SLTT(), BPTT(chunk=1)
found = {rule.label: [peaks(rule, steps) for steps in (FEW, MANY)] for rule in rules}
print(json.dumps({rule: [many - few for few, many in zip(*each)] for rule, each in found.items()}))
"""


@pytest.mark.full
def test_resident_memory_grows_with_time_steps_as_saved_bytes_do() -> None:
    # glibc gives back what was freed, rather than keep it for the next
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    output = subprocess.run(
        [sys.executable, "-c", GROWTH],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env=environment,
    ).stdout
    grown = json.loads(output)
    (of_sltt, resident_of_sltt), (of_bptt, resident_of_bptt) = grown["SLTT"], grown["BPTT-chunk-1"]
    assert of_sltt == 0 and of_bptt > 1e8
    assert resident_of_bptt == pytest.approx(of_bptt, rel=0.1)
    assert resident_of_sltt < 0.1 * of_bptt


@pytest.mark.parametrize(
    ("visible", "cards", "usable", "refused"),
    [
        (None, 8, False, True),
        (None, 8, True, False),
        (None, 0, False, False),
        *((hidden, 8, False, False) for hidden in ("", "-1", "NoDevFiles")),
        *((shown, 8, False, True) for shown in ("0", "GPU-8932f937")),
    ],
)
def test_gpus_that_torch_cannot_use(
    visible: str | None,
    cards: int,
    usable: bool,
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{index}" for index in range(cards))):
        (tmp_path / name).touch()
    monkeypatch.setattr(memory, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = memory.unusable_gpus()
    assert (found is not None) == refused
    assert found is None or f"cannot use the {cards} GPUs here" in found
