"""What a teacher is: a frozen network that is shown what the student is shown, once a batch."""

# B batch, C channels, H W pixels, K classes

from __future__ import annotations

import hashlib
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pipeline.core.torch_settings import Precision
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe


@runtime_checkable
class ImageData(Protocol):
    """A data set of still pictures, whose batches hold `(pixels - mean) / std`, a value a channel,
    of pixels scaled to 0..1.
    """

    classes: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Teacher(nn.Module):
    """From pictures `[B,C,H,W]` as the student gets them to logits `[B,K]`, in fp32 and without a
    graph.

    It is built with its weights, and stays frozen and in eval whatever is asked of it. A subclass
    answers in `forward`, and says in `identity` what its answers depend on. `probe`, where there is
    one, fits `head` to the data set's classes before the first question (pipeline.train.teaching);
    `cache` keeps answers.
    """

    label: str
    probe: Probe | None = None
    cache: Cache | None = None
    precision: Precision = "fp32"
    """in which it computes"""

    def __init__(self) -> None:
        super().__init__()
        self.head: nn.Linear | None = None

    def identity(self) -> dict[str, Any]:
        """Everything that decides an answer to given pixels but the fitted head, as plain
        values.
        """
        raise NotImplementedError(f"{type(self).__name__} must override identity")

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What a probe is fitted on, `[B,D]`.

        Raises: ValueError for a teacher that shows none.
        """
        raise ValueError(f"{self.label}: shows no features, so no probe can be fitted")

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval: dropout and batch statistics would make other answers of the same
        picture.
        """
        del mode
        return super().train(False)

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)


def content_hash(module: nn.Module) -> str:
    """sha256 of names, shapes and bytes of all that a module's `state_dict` holds."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
