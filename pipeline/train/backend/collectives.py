"""What the workers of one run say to one another about anything but gradients. One worker talks to
nobody.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pipeline.core.errors import as_user_error

T_ = TypeVar("T_")

PATIENCE = timedelta(days=2)
ALONE_PATIENCE = timedelta(minutes=30)


BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""of a process group, by the device that computes: gloo would copy a GPU's tensors to the host and
back
"""


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """Inside, this process is the only worker of a process group, without which DeepSpeed makes no
    engine.

    One that is there already is taken, and stays.
    """
    told = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "DS_ACCELERATOR": device,
    }  # DeepSpeed reads all of them
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    owned = not distributed.is_initialized()
    try:
        if owned:
            about = {
                "store": distributed.HashStore(),
                "rank": 0,
                "world_size": 1,
                "timeout": ALONE_PATIENCE,
            }
            distributed.init_process_group(BACKENDS[device], **about)
        yield
    finally:
        if owned and distributed.is_initialized():
            _end_group()
        for (
            name,
            value,
        ) in before.items():  # whatever is started from here next is told by others who it is
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _end_group() -> None:
    """As DeepSpeed (0.19.8) does where it has met the group, copies of which it keeps: its next
    engine would ask an ended one.
    """
    met_by = sys.modules.get("deepspeed.comm")  # not imported for this
    (
        met_by if met_by is not None and met_by.is_initialized() else distributed
    ).destroy_process_group()


class Ranks:
    """This process's voice among the workers; the process group exists when there are several."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size = rank, size
        self.device = torch.device(device)
        # Decisions travel beside the GPUs' own stream: asking each other must not wait for kernels.
        # Nor may it end by itself: one rank reads all pages, or fits a teacher's head, while the
        # others wait; that somebody hangs is the watchdog's business.
        self.control: Any = (
            distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        )

    def raise_if_gone(self, error: ValueError) -> None:
        """`error` is nobody's mistake where the process group is gone: Ray (2.60) takes it from
        workers that it is about to end.

        Raises:
            RuntimeError: it is gone.
        """
        if self.size > 1 and not distributed.is_initialized():
            raise RuntimeError(
                "worker: its process group was taken away while it trained"
            ) from error

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.size

    def sum(self, value: Tensor) -> Tensor:
        return self._reduce(value, distributed.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduce(value.to(self.device), distributed.ReduceOp.MAX)

    def decide(self, *flags: bool) -> list[bool]:
        """Rank 0's flags, on every rank."""
        if self.size == 1:
            return list(flags)
        decision = torch.tensor(flags, dtype=torch.uint8)
        distributed.broadcast(decision, src=0, group=self.control)
        return [bool(flag) for flag in decision]

    def broadcast_object(self, act: Callable[[], T_]) -> T_:
        """Rank 0 acts; every rank has its result, or raises what it raised."""
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

    def gather(self, value: T_) -> list[T_]:
        """On rank 0 every rank's value, in the order of ranks; nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def all_gather_object(self, value: T_) -> list[T_]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def all_or_raise(self, act: Callable[[], T_]) -> T_:
        """Every rank acts; where one of them is refused, all are, with what the first of those
        said.

        A rank that gave up alone would leave the others waiting for it in their next collective.
        """
        result, said = None, None
        try:
            result = act()
        except ValueError as error:
            said = as_user_error(error)
        for rank, refusal in enumerate(self.all_gather_object(said)):
            if refusal is not None:
                raise refusal if self.size == 1 else type(refusal)(f"{refusal} (worker {rank})")
        return result  # type: ignore[return-value]  # nobody was refused, so act returned

    @contextmanager
    def averaged(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inside, running statistics are their mean over ranks, to be evaluated and saved; after
        it, each rank has its own again.

        Gives this rank's own.
        """
        floating = {
            name: buffer
            for name, buffer in network.named_buffers()
            if buffer.is_floating_point() and self.size > 1
        }
        own = {name: buffer.clone() for name, buffer in floating.items()}
        for buffer in floating.values():
            distributed.all_reduce(buffer)
            buffer /= self.size
        try:
            yield own
        finally:
            for name, buffer in floating.items():
                buffer.copy_(own[name])

    def _reduce(self, value: Tensor, how: Any) -> Tensor:
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value, op=how)
        return value
