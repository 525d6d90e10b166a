"""An exponential moving average (EMA) of the weights, around any backend.

    a <- d a + (1 - d) w         after every step; w: parameters and floating-point buffers

The average is evaluated and published. The optimizer moves the weights. A checkpoint holds the
average, and the weights as the backend's state.

At every ZeRO stage up to 2 each rank holds all weights after a step. So each rank keeps the average
of all weights, in their precision (fp32). Buffers, such as running statistics, differ between
ranks, and so do their averages. A checkpoint holds each rank's averages of the buffers. It also
holds the mean of these averages over ranks, for a resume with another number of ranks.

Source: Polyak and Juditsky 1992. The update is that of timm's ModelEmaV3 (1.0.31) without warm-up;
a test compares the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.train.backend.base import (
    Backend,
    clone_tensors,
    cpu_copy,
    restore_where,
    temporary_values,
)
from pipeline.train.backend.collectives import rank_and_world_size

AVERAGE_FILE = "average.pt"


class EMABackend:
    """A backend with an average, which begins at the current weights.

    Args:
        decay: d in the formula above, between 0 and 1.
    """

    def __init__(self, backend: Backend, *, decay: float) -> None:
        self.backend, self.decay = backend, decay
        self.rank, self.world_size = rank_and_world_size()
        self.name, self.network, self.model = backend.name, backend.network, backend.model
        self.optimizer, self.skips_on_device = backend.optimizer, backend.skips_on_device
        self.backward, self.gradients = backend.backward, backend.gradients
        self.zero_grad = backend.zero_grad
        self.average = {name: value.clone() for name, value in self._values().items()}
        self._update = get_ema_multi_avg_fn(decay)

    def step(self, bad: Tensor | bool = False) -> None:
        self.backend.step(bad)
        if bad is True:
            return
        kept = clone_tensors(self.average) if isinstance(bad, Tensor) else {}
        values = self._values()
        self._update([self.average[name] for name in values], list(values.values()), 0)
        if isinstance(bad, Tensor):
            restore_where(bad, self.average, kept)

    def reset_optimizer(self) -> None:
        """Also restart the average at the current weights: a new task must not be evaluated with
        an average of the weights of the previous task.
        """
        self.backend.reset_optimizer()
        for name, value in self._values().items():
            self.average[name].copy_(value)

    @contextmanager
    def published(self) -> Iterator[None]:
        with temporary_values(self._values(), self.average):
            yield

    def replicated(self) -> list[Tensor]:
        return [
            *self.backend.replicated(),
            *(self.average[name] for name, _ in self.network.named_parameters()),
        ]

    def capture(self) -> dict[str, Any]:
        files = self.backend.capture()
        own = {name: self.average[name] for name in self._buffers()}
        mean = clone_tensors(own)
        if self.world_size > 1:
            for value in mean.values():
                distributed.all_reduce(value)
                value /= self.world_size
        if self.rank == 0:
            files[AVERAGE_FILE] = cpu_copy({**self.average, **mean})
        files[f"average_rank{self.rank}.pt"] = cpu_copy(own)
        return files

    def load(self, folder: Path) -> None:
        self.backend.load(folder)
        files = [AVERAGE_FILE]
        if len([*folder.glob("average_rank*.pt")]) == self.world_size:
            files.append(f"average_rank{self.rank}.pt")
        for file in files:
            state = torch.load(folder / file, map_location="cpu", weights_only=True)
            for name, value in state.items():
                self.average[name].copy_(value)

    def _values(self) -> dict[str, Tensor]:
        """The values that are averaged, by name. A parameter with two names occurs once."""
        return {
            **{name: value.detach() for name, value in self.network.named_parameters()},
            **self._buffers(),
        }

    def _buffers(self) -> dict[str, Tensor]:
        return {
            name: buffer
            for name, buffer in self.network.named_buffers()
            if buffer.is_floating_point()
        }
