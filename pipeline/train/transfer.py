"""Moves networks and batches to the device of a run.

On a GPU the convolutions of a network get images whose channels come last in memory, and weights in
the same order, because cuDNN's kernels for tensor cores use this order. Checkpoints and hashes do
not depend on it. Under ZeRO-1 and ZeRO-2 weights keep torch's order, and cuDNN copies them.

Batches cross to a GPU on a stream of their own, one micro-batch ahead. Levels are looked up there
(`pipeline.data.base.Batch`). On a CPU batches stay as they are.
"""

# T time, B batch, C channels, H W pixels, V levels

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.data.base import Batch

Item = TypeVar("Item")
Network = TypeVar("Network", bound=nn.Module)


def move_network(network: Network, device: torch.device) -> Network:
    """Move a network in place."""
    network.to(device)
    if device.type == "cuda":
        use_channels_last(network)
    return network


def use_channels_last(network: nn.Module) -> None:
    """Reorder the weights of convolutions in memory, in place."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.clone(memory_format=torch.channels_last)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """A batch for the network on `device`: x is float32. The index stays where it is."""
    return _for_network(_copy(batch, device))


class Arriving(NamedTuple):
    """A batch on its way to the device of the network."""

    batch: Batch
    copied: torch.cuda.Event | None = None  # None: nothing is copied

    def arrive(self) -> Batch:
        """The batch, as from `move_batch`. The current stream of a GPU waits for the copy."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.batch.x.device)
            stream.wait_event(self.copied)
            for tensor in (self.batch.x, self.batch.target, self.batch.table):
                if tensor is not None:
                    # Its memory belongs to the other stream, which may reuse it only after this
                    # stream's work.
                    tensor.record_stream(stream)
        return _for_network(self.batch)


def arriving(batches: Iterator[Batch], device: torch.device) -> Iterator[Arriving]:
    """The batches in their order.

    On a GPU the copy of the next batch starts before a batch is returned. An error of the next
    batch is raised then.
    """
    if device.type != "cuda":
        return (
            Arriving(batch if batch.x.device == device else _copy(batch, device))
            for batch in batches
        )
    return one_ahead(map(partial(_start_copy, stream=torch.cuda.Stream(device)), batches))


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items in their order. Each is yielded after the next one was taken."""
    waiting = list[Item]()
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _start_copy(batch: Batch, *, stream: torch.cuda.Stream) -> Arriving:
    with torch.cuda.stream(stream):
        copy, copied = _copy(batch, stream.device), torch.cuda.Event()
        copied.record(stream)
    return Arriving(copy, copied)


def _copy(batch: Batch, device: torch.device) -> Batch:
    move = partial(Tensor.to, device=device, non_blocking=True)
    table = None if batch.table is None else move(batch.table)
    return replace(batch, x=move(batch.x), target=move(batch.target), table=table)


def _for_network(batch: Batch) -> Batch:
    if batch.table is not None:
        return replace(batch, x=look_up(batch.x, batch.table), table=None)
    return replace(batch, x=channels_last(batch.x)) if batch.x.is_cuda else batch


def look_up(level_BCHW: Tensor, table_CV: Tensor) -> Tensor:
    """The value of each level, uint8, in the table of its channel. Channels are last in memory."""
    level_BHWC = level_BCHW.movedim(1, -1).contiguous()
    first_C = torch.arange(
        0, table_CV.numel(), table_CV.shape[1], dtype=torch.int32, device=table_CV.device
    )
    index_BHWC = level_BHWC.int() + first_C
    value_N = table_CV.flatten().index_select(0, index_BHWC.flatten())
    return value_N.view_as(index_BHWC).movedim(-1, 1)


def channels_last(x_B: Tensor) -> Tensor:
    """Images `[B,C,H,W]` or recordings `[B,T,C,H,W]`, in an order of memory in which
    `to_time_first` gives time steps whose channels are last.
    """
    if x_B.dim() == 4:
        return x_B.clone(memory_format=torch.channels_last)
    x_TBHWC = x_B.permute(1, 0, 3, 4, 2).clone(memory_format=torch.contiguous_format)
    return x_TBHWC.permute(1, 0, 4, 2, 3)
