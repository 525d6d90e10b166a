"""What the training loop asks of a backend: hold the model and its optimizer, differentiate shares
of a batch, step.

Every backward call of the product goes through `Backend.backward`, so that the rules about several
backward calls per optimizer step (which fail silently when broken) live in one place for each
backend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]


class Backend(Protocol):
    """One process's view of a model that all ranks train together."""

    name: str
    """also the name of the folder that it keeps in a checkpoint"""
    network: nn.Module
    """the bare network inside: its `state_dict` is what is evaluated and published"""
    optimizer: torch.optim.Optimizer
    """what a schedule sets learning rates on"""

    @property
    def model(self) -> nn.Module:
        """What is called in training: maps [T,B,...] to [T,B,K] in the recipe's precision."""
        ...

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradient of `share * loss`. Shares sum to 1 over the ranks and micro-batches of a
        global batch.
        """
        ...

    def gradients(self) -> list[Tensor]:
        """What `backward` has left so far on this rank, of the parameters that have any; before
        `step`, to look at.

        Where ZeRO divides the gradients among ranks each has some of them, summed: all of them
        together have every one."""
        ...

    def discard(self) -> None:
        """Forget the gradients; the weights stay. Not where ZeRO holds gradients of its own."""
        ...

    def step(self) -> None:
        """Sum the gradients over ranks, clip them where the recipe says so, move the weights,
        forget the gradients.
        """
        ...

    def forget(self) -> None:
        """Give the optimizer the state and the settings back that it was made with, no momentum
        among them; weights stay.
        """
        ...

    def published(self) -> AbstractContextManager[None]:
        """Inside, `network` holds what is evaluated and published: its weights, or an average of
        them. No step is made there.
        """
        ...

    def replicated(self) -> list[Tensor]:
        """What every rank holds alike, bit for bit: the weights, and an average of them where there
        is one.
        """
        ...

    def capture(self) -> dict[str, Any]:
        """A copy on the CPU of weights and optimizer state; every rank calls it.

        What this rank has to write, by the name of the file that `torch.save` shall write it to. A
        name may hold folders."""
        ...

    def load(self, folder: Path) -> None:
        """Read the files of every rank's `capture`; every rank calls it."""
        ...


def forgetter(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What makes `optimizer`, which has not stepped yet, as it is now again.

    Inside DeepSpeed's ZeRO wrappers (0.19.8) is a torch optimizer of this rank's share of the
    parameters, inside timm's Lookahead (1.0.31) the one that keeps the state.
    """
    for inside in ("optimizer", "_base_optimizer"):
        optimizer = getattr(optimizer, inside, optimizer)
    states = {
        parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()
    }  # Adagrad begins with sums
    settings = [_settings(group) for group in optimizer.param_groups]

    def forget() -> None:
        optimizer.state.clear()
        optimizer.state.update(
            {parameter: copy.deepcopy(state) for parameter, state in states.items()}
        )
        for group, made in zip(optimizer.param_groups, settings, strict=True):
            for name in group.keys() - made.keys() - {"params"}:  # LAMB counts its steps here
                del group[name]
            group.update(copy.deepcopy(made))

    return forget


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in group.items() if name != "params"})
