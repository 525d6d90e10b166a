"""Bytes of tensors: saved by autograd for backward, and held by the parts of training."""

import threading
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


class SavedBytes:
    """Counts the bytes that autograd saves for backward inside the `with` block.

        with SavedBytes(model) as saved:
            ...
        saved.peak

    `now` and `peak` are the current and the largest size of all storages with saved tensors. Each
    storage counts whole and once, however many nodes or views save it. It counts from the first
    node that saves it until the last such node is freed. Backward frees the nodes, except those of
    a retained graph, which are freed later.

    Storages of `parameters` (a model, or an iterable of tensors) and their views do not count.
    Copies of a weight (autocast, standardised weights) are not parameters, so they count. The
    parameters' storages are looked up where the block begins, because an engine such as DeepSpeed
    moves parameters into flat buffers. A graph may outlive the block; `now` still decreases when
    the graph is freed.

    Tensors that are saved inside other saved-tensor hooks do not count. torch.utils.checkpoint with
    use_reentrant=False therefore hides the tensors that it recomputes (torch 2.13). Recomputed
    tensors count with use_reentrant=True, and in a Function whose backward recomputes them.
    """

    def __init__(self, parameters: nn.Module | Iterable[Tensor] = ()) -> None:
        self._parameters = (
            list(parameters.parameters()) if isinstance(parameters, nn.Module) else list(parameters)
        )
        # By address. A reference to a storage prevents the reuse of its address.
        self._excluded: dict[int, torch.UntypedStorage] = {}
        self._held: dict[int, list[int]] = {}  # by address: [saved tensors, bytes]
        # Autograd runs one thread per device. The lock is reentrant, because the garbage collector
        # may free a saved tensor while the same thread saves another.
        self._lock = threading.RLock()
        self._hooks = ExitStack()
        self.now = self.peak = 0

    def __enter__(self) -> Self:
        storages = (parameter.untyped_storage() for parameter in self._parameters)
        self._excluded = {storage._cdata: storage for storage in storages}
        self._hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()
        self._excluded = {}

    @property
    def storages(self) -> Collection[int]:
        """Addresses (`_cdata`) of the storages that are held now."""
        return self._held.keys()

    def _pack(self, tensor: Tensor) -> "_SavedTensor":
        storage = tensor.untyped_storage()
        address = storage._cdata  # unique while the storage exists
        if address in self._excluded:
            return _SavedTensor(tensor, None, 0)
        saved = _SavedTensor(tensor, self, address)
        with self._lock:
            if address in self._held:
                self._held[address][0] += 1
            else:
                self._held[address] = [1, storage.nbytes()]
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return saved

    def _release(self, address: int) -> None:
        with self._lock:
            entry = self._held[address]
            entry[0] -= 1
            if entry[0] == 0:
                del self._held[address]
                self.now -= entry[1]


class _SavedTensor:
    """Replaces a saved tensor in autograd's graph, and tells its counter when autograd frees it.

    It holds a detached alias. A node may save its own output, and the output refers to the node, so
    without the alias nothing would free this cycle.
    """

    __slots__ = ("address", "counter", "tensor", "version")

    def __init__(self, tensor: Tensor, counter: SavedBytes | None, address: int) -> None:
        self.tensor = tensor.detach()  # shares the version counter of the original
        self.version = tensor._version
        self.counter = counter
        self.address = address

    def __del__(self) -> None:
        if self.counter is not None:
            # The storage is freed later, so no other storage has its address yet.
            self.counter._release(self.address)


def _unpack(saved: _SavedTensor) -> Tensor:
    # torch 2.13 skips its version check if hooks are set (saved_variable.cpp). A measured batch
    # must fail where a plain one does, so the check is repeated here.
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: [{saved.tensor.type()} {list(saved.tensor.shape)}] is at version"
            f" {saved.tensor._version}; expected version {saved.version} instead"
        )
    return saved.tensor


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes that one worker holds for training, in addition to saved tensors and states."""

    parameters: int
    buffers: int
    gradients: int  # of all trained parameters; needed only within a batch
    optimizer: int  # state such as momentum; under ZeRO, the state of this worker's share


def held_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> HeldBytes:
    """The worker's held bytes. The optimizer must have made a step, which creates its state."""
    state = (value for values in optimizer.state.values() for value in values.values())
    return HeldBytes(
        parameters=storage_bytes(network.parameters()),
        buffers=storage_bytes(network.buffers()),
        gradients=sum(weight.nbytes for weight in network.parameters() if weight.requires_grad),
        optimizer=storage_bytes(value for value in state if isinstance(value, Tensor)),
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage whole and once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
