"""An exponential moving average (EMA) of the weights, around any backend.

    a <- d a + (1 - d) w         after every step; w are parameters and running statistics

The average is evaluated and published. The weights train, and are the backend's state in a
checkpoint.

At every ZeRO stage up to 2 each rank holds all weights after a step, so each rank keeps the whole
average, in the weights' precision (fp32). Running statistics differ between ranks, and so do their
averages. A checkpoint holds the averages of each rank, and their mean for a resume with another
number of ranks.

Source: Polyak and Juditsky 1992. The form is that of timm's ModelEmaV3 (1.0.31) without warm-up; a
test compares the two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.train.backend.base import Backend, cloned, copied, replaced
from pipeline.train.backend.collectives import world

WHOLE = "average.pt"


class Averaged:
    """A backend with an average that begins at its current weights. `decay`: d, between 0 and 1."""

    def __init__(self, backend: Backend, *, decay: float) -> None:
        self.backend, self.decay = backend, decay
        self.name, self.network, self.model = backend.name, backend.network, backend.model
        self.optimizer = backend.optimizer
        self.backward, self.gradients = backend.backward, backend.gradients
        self.discard = backend.discard
        self.average = {name: value.clone() for name, value in self._values().items()}
        self._update = get_ema_multi_avg_fn(decay)

    def step(self) -> None:
        self.backend.step()
        values = self._values()
        self._update([self.average[name] for name in values], list(values.values()), 0)

    def forget(self) -> None:
        """Also restart the average: a task must not be evaluated with the weights of the previous
        task.
        """
        self.backend.forget()
        for name, value in self._values().items():
            self.average[name].copy_(value)

    @contextmanager
    def published(self) -> Iterator[None]:
        with replaced(self._values(), self.average):
            yield

    def replicated(self) -> list[Tensor]:
        return [
            *self.backend.replicated(),
            *(self.average[name] for name, _ in self.network.named_parameters()),
        ]

    def capture(self) -> dict[str, Any]:
        files = self.backend.capture()
        rank, ranks = world()
        own = {name: self.average[name] for name in self._buffers()}
        mean = cloned(own)
        if ranks > 1:
            for value in mean.values():
                distributed.all_reduce(value)
                value /= ranks
        if rank == 0:
            files[WHOLE] = copied({**self.average, **mean})
        files[f"average_rank{rank}.pt"] = copied(own)
        return files

    def load(self, folder: Path) -> None:
        self.backend.load(folder)
        rank, ranks = world()
        files = [WHOLE]
        if len([*folder.glob("average_rank*.pt")]) == ranks:
            files.append(f"average_rank{rank}.pt")
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
