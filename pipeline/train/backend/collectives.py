"""Communication between the workers of one run, except that of gradients."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pipeline.core.errors import as_user_error
from pipeline.train.backend.base import replaced

T_ = TypeVar("T_")

PATIENCE = timedelta(days=2)
ALONE_PATIENCE = timedelta(minutes=30)


# the backends of a process group, by the device that computes. gloo would copy the tensors of a GPU
# to the host and back
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def world() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """Inside, this process is the only worker of a process group, which DeepSpeed needs. An
    existing group is used, and is not destroyed.
    """
    # DeepSpeed reads all of them.
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": device}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    owned = not distributed.is_initialized()
    try:
        if owned:
            distributed.init_process_group(
                BACKENDS[device],
                store=distributed.HashStore(),
                rank=0,
                world_size=1,
                timeout=ALONE_PATIENCE,
            )
        yield
    finally:
        if owned and distributed.is_initialized():
            # DeepSpeed (0.19.8) keeps copies of a group that it has used, so it has to destroy the
            # group. DeepSpeed is not imported for this.
            owner: Any = sys.modules.get("deepspeed.comm")
            if owner is None or not owner.is_initialized():
                owner = distributed
            owner.destroy_process_group()
        for name, value in before.items():  # later child processes have their own
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Ranks:
    """This process among the workers of a run. If there are several, the process group exists."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size = rank, size
        self.device = torch.device(device)
        # A group on the CPU, so that decisions do not wait for GPU kernels. Its timeout is long:
        # the other ranks wait while one rank reads all pages or fits a teacher's head. The watchdog
        # detects hangs.
        self.control: Any = (
            distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        )

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        return self._reduce(value, distributed.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduce(value, distributed.ReduceOp.MAX)

    def decide(self, *flags: bool) -> list[bool]:
        """Rank 0's flags, on every rank."""
        decision = torch.tensor(flags, dtype=torch.uint8)
        if self.size > 1:  # each step: a tensor, which is faster than a pickled object
            distributed.broadcast(decision, src=0, group=self.control)
        return decision.bool().tolist()

    def broadcast_object(self, act: Callable[[], T_]) -> T_:
        """The result of `act` on rank 0, on every rank; a ValueError is raised on every rank."""
        if self.size == 1:
            return act()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = act()
            except ValueError as error:
                outcome[1] = as_user_error(error)
        distributed.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all_gather_object(self, value: T_) -> list[T_]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def all_or_raise(self, act: Callable[[], T_]) -> T_:
        """This rank's result of `act`. If ranks raise ValueError, every rank raises the first one.
        Otherwise the other ranks would wait for that rank in their next collective.
        """
        result, own_error = None, None
        try:
            result = act()
        except ValueError as error:
            own_error = as_user_error(error)
        for rank, refusal in enumerate(self.all_gather_object(own_error)):
            if refusal is not None:
                raise refusal if self.size == 1 else type(refusal)(f"{refusal} (worker {rank})")
        return result  # type: ignore[return-value]  # no rank raised, so `act` has returned

    @contextmanager
    def averaged(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inside, running statistics are their mean over ranks. Afterwards each rank has its own
        again. Yields this rank's own statistics.
        """
        floating = {
            name: buffer
            for name, buffer in network.named_buffers()
            if buffer.is_floating_point() and self.size > 1
        }
        means = {name: self.mean(buffer) for name, buffer in floating.items()}
        with replaced(floating, means) as own:
            yield own

    def _reduce(self, value: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            value = value.to(self.device, copy=True)  # NCCL takes no tensor of the host
            distributed.all_reduce(value, op=how)
        return value
