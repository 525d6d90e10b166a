"""The benchmark beside SpikingJelly in a small form: a small QKFormer, one round, 80 columns."""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from spikingjelly.activation_based.model.qkformer import QKFormer as TheirQKFormer

from benchmarks import peer
from benchmarks.peer_networks import NETWORKS, Network
from pipeline.core.torch_settings import products_in
from pipeline.models.qkformer import QKFormer


def small_qkformer() -> Network:
    theirs: Any = NETWORKS["qkformer"].theirs
    size = {"embed_dims": 96, "num_heads": (2, 2, 2), "depths": (1, 2, 2)}
    return Network(
        "small",
        partial(TheirQKFormer, **size, **theirs.keywords),
        partial(QKFormer, channels=96, depth=5, heads=2, classes=peer.CLASSES),
        (2,),
    )


def run(monkeypatch: pytest.MonkeyPatch, *, device: str, memory_mb: int) -> None:
    monkeypatch.setitem(NETWORKS, "small", small_qkformer())
    command = "peer --network small --images 2 --rounds 1"
    arguments = f"{command} --device {device} --memory-mb {memory_mb}"
    monkeypatch.setattr("sys.argv", arguments.split())
    monkeypatch.setattr(peer, "new_console", lambda: Console(file=sys.stdout, width=80))
    threads = torch.get_num_threads()
    try:
        with products_in("fp32"):  # afterwards the precisions are those of before
            peer.main()
    finally:
        torch.set_num_threads(threads)
