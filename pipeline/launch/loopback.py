"""A cluster of our own is reached from its own machine alone: where Ray, torch's process group and NCCL listen.

What binds every interface by itself is told otherwise: Ray by a setting that is read when Ray is imported, gloo and NCCL by the
name of the interface, and torch's store, which takes no host (2.13) and asks nobody for a token, by a socket of ours.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from torch.distributed import TCPStore

HOST = "127.0.0.1"

_held: list[TCPStore] = []
"""in worker 0: the store's server lives for as long as one of its clients does"""


class OnLoopback(TorchConfig):
    """As TorchConfig, for workers that are all on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        port = worker_group.execute_single(0, _open_store)
        worker_group.execute(_tell, port)
        worker_group.execute(_set_torch_distributed_env_vars)
        how = {"backend": backend_config.backend, "init_method": "env://", "timeout_s": backend_config.timeout_s}
        size = len(worker_group)
        joined = [
            worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, world_size=size, **how)
            for rank in range(size)
        ]
        ray.get(joined)


def _open_store() -> int:
    """The port at which worker 0 serves the store; `multi_tenant`, it is the one that it then asks for at that port."""
    listening = socket.create_server((HOST, 0))
    port = listening.getsockname()[1]
    _held[:] = [
        TCPStore(HOST, port, is_master=True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listening.detach())
    ]
    return port


def _tell(port: int) -> None:
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
