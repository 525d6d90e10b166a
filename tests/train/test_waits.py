"""A batch of training waits for nothing on the device: on `meta`, which has no values, it runs
through, and nothing asks for a value or copies a constant of the host.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.data.mixing import Mixing
from pipeline.measure.meters import Meters
from pipeline.models.parts import copy_neuron
from pipeline.models.vgg import vgg_sws
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.rate import RateLIF
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.train.backend.collectives import Ranks
from pipeline.train.backend.ema import EMABackend
from pipeline.train.backend.plain import Plain
from pipeline.train.guards.anomaly import AnomalyGuard
from pipeline.train.loop import Guard, MicroBatch, train_batch
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import Network, learn

META, T, B, CLASSES = torch.device("meta"), 4, 8, 10
ROWS = ((2, 3, 4), (1, 1, 1))
RULES: dict[str, Callable[[], Rule]] = {
    "BPTT": BPTT,
    "BPTT-recompute": lambda: BPTT(recompute=True),
    "SLTT": SLTT,
    "SLTT-2": lambda: SLTT(k=2, rescale=True),
    "OTTT": OTTT,
    "OPZO": OPZO,
    "DFA": lambda: OPZO("random"),
    "DSR": DSR,
    "HLOP(BPTT)": lambda: HLOP(BPTT(), rows=ROWS),
    "HLOP(SLTT)": lambda: HLOP(SLTT(), rows=ROWS),
    "HLOP(SLTT-2)": lambda: HLOP(SLTT(k=2), rows=ROWS),
    "HLOP(OTTT)": lambda: HLOP(OTTT(), rows=ROWS, learn_from="traces"),
    "HLOP(OPZO)": lambda: HLOP(OPZO(), rows=ROWS),
    "HLOP(DSR)": lambda: HLOP(DSR(), rows=ROWS, learn_from="rates"),
}


class Waits(TorchDispatchMode):
    """Counts what waits for a GPU, by operation and line of the pipeline."""

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")
    SOLVERS = ("linalg_qr", "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_cholesky")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        of_host = name in ("_to_copy", "copy_") and args[name == "copy_"].device != META
        moves = of_host and not (kwargs or {}).get("non_blocking")
        if name in (*self.READS, *self.SOLVERS) or (moves and result.device == META):
            self.add(name)
        return result

    def add(self, name: str) -> None:
        frames = [each for each in traceback.extract_stack() if "/pipeline/" in each.filename]
        self.found[name, f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"] += 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """What makes a tensor of the host's numbers on a device copies them there."""
    found = Waits()
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        made = getattr(owner, name)

        def watched(*args: Any, made: Any = made, name: str = name, **kwargs: Any) -> Tensor:
            tensor = made(*args, **kwargs)
            if tensor.is_meta:
                found.add(name)
            return tensor

        monkeypatch.setattr(owner, name, watched)
    return found


@pytest.fixture
def fused_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, one kernel moves all weights. Of this kernel torch has none for `meta`."""
    sgd = sys.modules["torch.optim.sgd"]  # torch.optim deletes the name
    monkeypatch.setattr(sgd, "_device_dtype_check_for_fused", lambda parameter: None)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_sgd_", lambda *args, **kwargs: None, "Meta")
    yield
    library._destroy()


def vgg(neuron: nn.Module) -> nn.Module:
    return vgg_sws(CLASSES, in_channels=1, stages=((4,), (4,)), neuron=neuron)


def plain_network(neuron: nn.Module) -> nn.Module:
    """HLOP needs plain weights."""
    return Network(
        lambda net, x_TB: net.last(net.two(net.hidden(net.one(net.first(x_TB)).flatten(2)))),
        first=Conv2d(1, 4, 3, padding=1),
        one=neuron,
        hidden=Linear(4 * 64, 6),
        two=copy_neuron(neuron),
        last=Linear(6, CLASSES),
    )


def trained(rule: Rule, network: nn.Module) -> tuple[EMABackend, AnomalyGuard]:
    rule.attach(
        network,
        world=World(seed=3),
        over_time="mean" if "mean" in rule.over_time_choices else "steps",
    )
    rule.start_task(network, 0)
    plain = Plain(
        network,
        lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True),
        clip_norm=1.0,
    )
    backend = EMABackend(plain, decay=0.9)
    guard = AnomalyGuard(backend, rule, Ranks(), spike=3.0)
    return backend, guard


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_asks_for_no_value(rule: str, waits: Waits, fused_on_meta: None) -> None:
    """Mixing, the guard, clipping, the optimizer and an average included; the second batch, as the
    first one loads and makes what it needs.
    """
    made = RULES[rule]()
    neuron = RateLIF() if "DSR" in rule else LIF()
    make = plain_network if "HLOP" in rule else vgg
    network = make(neuron).to(META)
    backend, guard = trained(made, network)
    meters = Meters(network, batch_size=B, device=META, memory_every=None, operations_every=None)
    mixing = Mixing(mixup=0.2, cutmix=1.0, probability=0.9)

    def batch(step: int, guard: Guard = guard) -> None:
        x_B, target_B = (
            torch.zeros(B, 1, 8, 8, device=META),
            torch.zeros(B, dtype=torch.long, device=META),
        )
        x_B, target_BK = mixing(x_B, target_B, classes=CLASSES, seed=3, step=step, rows=range(B))
        micro_batches = [MicroBatch(repeat(x_B, T), target_BK, range(B), 1.0)]
        train_batch(
            made, backend, lambda step: None, step, micro_batches, CrossEntropy(), meters, guard
        )

    batch(0, Guard())
    guard._has_moved = True  # as after a good batch, which the host has read
    waits.found.clear()
    with waits:
        batch(1)
    assert not waits.found
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("file", "steps", "rule"),
    [
        *(("nf_resnet34_sltt", 6, rule) for rule in ("BPTT", "SLTT", "OTTT")),
        *(("qkformer_10_384_bptt", 4, rule) for rule in ("BPTT", "SLTT")),
    ],
)
def test_networks_for_imagenet_ask_for_no_value(
    file: str, steps: int, rule: str, waits: Waits
) -> None:
    """Those whose kernels have a budget (tests/forecast/test_kernel_budget.py)."""
    made = OTTT(readout="plain") if rule == "OTTT" else RULES[rule]()
    network = import_module(f"recipes.imagenet.{file}").recipe().model.build().to(META)
    made.attach(network)
    x_B, target_B = torch.zeros(2, 3, 64, 64, device=META), torch.zeros(2, device=META).long()
    terms = made.loss_terms(network, repeat(x_B, steps), CrossEntropy()(target_B), step=0)
    with waits:
        learn(terms)
        made.end_of_batch()
    assert not waits.found


def test_what_waits_is_found(waits: Waits) -> None:
    one = torch.ones(2)
    with waits:
        one.sum().item()
        torch.linalg.qr(torch.eye(2))
        torch.zeros(2, device=META).copy_(one)
        one.to(META)
        torch.tensor([1.0], device=META)
    assert [name for name, _ in waits.found] == [
        *("_local_scalar_dense", "linalg_qr", "copy_", "_to_copy", "tensor")
    ]
