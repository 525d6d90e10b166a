"""Collectives of the workers of one run, except the reduction of gradients, and comparisons of
ranks: slow ranks, and ranks whose values differ after a fault.
"""

import hashlib
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from pipeline.core.errors import as_user_error
from pipeline.train.backend.base import temporary_values

T_ = TypeVar("T_")

# The timeout of a collective is long, because all ranks wait while one rank reads all pages or fits
# a teacher's head. The watchdog detects hangs.
COLLECTIVE_TIMEOUT = timedelta(days=2)
SINGLE_WORKER_TIMEOUT = timedelta(minutes=30)

# The backends of a process group, by the device that computes. With gloo alone, the tensors of a
# GPU would be copied to the host and back.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process, and the number of ranks; (0, 1) without a process group."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """Inside the context, this process is the only worker of a process group, which DeepSpeed
    needs. If there is a process group already, that group is used and stays.
    """
    # DeepSpeed reads these environment variables.
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": device}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    is_new = not distributed.is_initialized()
    try:
        if is_new:
            distributed.init_process_group(
                BACKENDS[device],
                store=distributed.HashStore(),
                rank=0,
                world_size=1,
                timeout=SINGLE_WORKER_TIMEOUT,
            )
        yield
    finally:
        if is_new and distributed.is_initialized():
            # DeepSpeed (0.19.8) keeps copies of a group that it has used, so it has to destroy the
            # group. If DeepSpeed is not imported yet, torch destroys the group.
            comm: Any = sys.modules.get("deepspeed.comm")
            if comm is None or not comm.is_initialized():
                comm = distributed
            comm.destroy_process_group()
        for name in variables:  # child processes that start later must not inherit them
            os.environ.pop(name)
        os.environ.update(before)


class Ranks:
    """The collectives of a run, called by one of its ranks.

    The process group must exist if there are several ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size = rank, size
        self.device = torch.device(device)
        # A group on the CPU, so that decisions do not wait for GPU kernels.
        self.control: Any = (
            distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            if self.size > 1
            else None
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
        if self.size > 1:  # called at every step; a tensor is faster than a pickled object
            distributed.broadcast(decision, src=0, group=self.control)
        return decision.bool().tolist()

    def broadcast_object(self, function: Callable[[], T_]) -> T_:
        """The result of `function` on rank 0, on every rank. The other ranks do not call it.

        Raises:
            UserError: `function` raised a ValueError. Every rank raises the error. (If there is one
                rank, it raises the ValueError itself.)
            Exception: any other error of `function`. Only rank 0 raises it, and the other ranks
                wait for rank 0.
        """
        if self.size == 1:
            return function()
        result_and_error: list[Any] = [None, None]
        if self.rank == 0:
            try:
                result_and_error[0] = function()
            except ValueError as error:
                result_and_error[1] = as_user_error(error)
        distributed.broadcast_object_list(result_and_error, src=0, group=self.control)
        result, error = result_and_error
        if error is not None:
            raise error
        return result

    def all_gather_object(self, value: T_) -> list[T_]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def all_or_raise(self, function: Callable[[], T_]) -> T_:
        """This rank's result of `function`, which every rank calls.

        Raises:
            UserError: a rank raised a ValueError. Every rank raises the error of the lowest such
                rank. Otherwise the other ranks would wait for that rank in their next collective.
        """
        result, own_error = None, None
        try:
            result = function()
        except ValueError as error:
            own_error = as_user_error(error)
        for rank, error in enumerate(self.all_gather_object(own_error)):
            if error is not None:
                raise error if self.size == 1 else type(error)(f"{error} (worker {rank})")
        return result  # type: ignore[return-value]  # no rank raised, so `function` has returned

    @contextmanager
    def averaged_buffers(self, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inside the context, each floating-point buffer, such as a running statistic, is its mean
        over ranks. Afterwards each rank has its own buffers again.

        Yields copies of this rank's own buffers, by name; none if there is one rank.
        """
        buffers = {
            name: buffer
            for name, buffer in network.named_buffers()
            if buffer.is_floating_point() and self.size > 1
        }
        means = {name: self.mean(buffer) for name, buffer in buffers.items()}
        with temporary_values(buffers, means) as own_buffers:
            yield own_buffers

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            value = value.to(self.device, copy=True)  # NCCL accepts only tensors on a GPU
            distributed.all_reduce(value, op=operation)
        return value


# ------------------------------------------------------------------------------ comparison of ranks


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW = 4096  # number of values in a row


def fingerprint(values: Iterable[Tensor]) -> str:
    """A hash of all values. The CPU waits once for each device.

    The values of a tensor are read as integers and arranged in rows. The sums of rows and of
    columns are hashed, not the values. Sums of integers do not depend on the order of summation. A
    flipped bit changes the sum of its column. Two swapped values change the sums of their columns;
    in the same column, they change the sums of their rows. The last values, which do not fill a
    row, are hashed directly.
    """
    parts_by_device: dict[torch.device, list[Tensor]] = {}
    for value in values:
        bits = value.detach().contiguous().view(_INTEGERS[value.element_size()]).flatten()
        end = len(bits) // _ROW * _ROW
        rows_RC = bits[:end].view(-1, _ROW)
        # A sum in the integer type of the values needs no converted copy of them.
        parts = (rows_RC.sum(0, dtype=bits.dtype), rows_RC.sum(1, dtype=bits.dtype), bits[end:])
        parts_by_device.setdefault(bits.device, []).extend(part.view(torch.uint8) for part in parts)
    digest = hashlib.blake2b(digest_size=16)
    for parts in parts_by_device.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def drifted(values: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """The ranks whose values differ from those of most ranks. Collective.

    If two groups are equally large, the group with the lowest rank counts as the majority.
    """
    if ranks.size == 1:
        return []
    fingerprints = ranks.all_gather_object(fingerprint(values))
    majority, _ = Counter(fingerprints).most_common(1)[0]
    return [rank for rank, value in enumerate(fingerprints) if value != majority]


def stragglers(busy_s: float, ranks: Ranks, *, max_ratio: float = 1.5) -> dict[int, float]:
    """The slow ranks: the ratio of a rank's busy time to the median of all ranks, if it is above
    `max_ratio`. Collective.

    For an even number of ranks, the median is the shorter of the two middle times.
    """
    busy_s_by_rank = ranks.all_gather_object(busy_s)
    median_s = statistics.median_low(busy_s_by_rank)
    return {
        rank: rank_s / median_s
        for rank, rank_s in enumerate(busy_s_by_rank)
        if median_s > 0 and rank_s > max_ratio * median_s
    }
