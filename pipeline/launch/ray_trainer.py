"""Ray's TorchTrainer with our policies (`restarts.py`), and with torch's store on loopback.

A cluster that a launch starts itself must not be reachable from other machines. A setting makes Ray
listen on loopback, the name of the interface does so for gloo and NCCL. torch's store takes no host
(2.13) and no token, so it gets a socket that we open.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from torch.distributed import TCPStore

from pipeline.launch.restarts import Resizing, Restarts

HOST = "127.0.0.1"

_store: list[TCPStore] = []
"""The store of worker 0. Its server ends with its last client."""


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller uses our policies for failures and for the number of workers.

    Args:
        sizes: the numbers of workers that the run may have, ascending.
        folder: the folder of the run.
        awaits_nodes: whether workers wait for lost nodes to come back or to be replaced.
    """

    def __init__(
        self, *args: Any, sizes: Sequence[int], folder: Path, awaits_nodes: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        failures = self.run_config.failure_config
        assert failures is not None  # by default Ray sets one
        several = len(sizes) > 1  # then Resizing waits for nodes
        restarts = Restarts(failures, folder=folder, awaits_nodes=awaits_nodes and not several)
        self._policies: dict[str, Any] = {"failure_policy": restarts}
        if several:
            self._policies["scaling_policy"] = Resizing(
                self.scaling_config, sizes=sizes, folder=folder
            )

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**{**parts, **self._policies})


class OnLoopback(TorchConfig):
    """A TorchConfig for workers that all run on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        port = worker_group.execute_single(0, _open_store)
        worker_group.execute(_set_address, port)
        worker_group.execute(_set_torch_distributed_env_vars)
        given = {
            "backend": backend_config.backend,
            "init_method": "env://",
            "timeout_s": backend_config.timeout_s,
            "world_size": len(worker_group),
        }
        setup, start = _setup_torch_process_group, worker_group.execute_single_async
        ray.get([start(rank, setup, world_rank=rank, **given) for rank in range(len(worker_group))])


def _open_store() -> int:
    """Serve the store in worker 0. Returns its port.

    With `multi_tenant` the worker itself joins this store when it asks for one at that port.
    """
    listening = socket.create_server((HOST, 0))
    port = listening.getsockname()[1]
    _store[:] = [
        TCPStore(
            HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening.detach(),
        )
    ]
    return port


def _set_address(port: int) -> None:
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
