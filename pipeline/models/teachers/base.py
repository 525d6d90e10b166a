"""The interface of a teacher: a frozen network that predicts on the student's input."""

# B batch, C channels, H W pixels, D features, K classes

import hashlib
from typing import Any, Self

import torch
from torch import Tensor, nn

from pipeline.core.torch_settings import Precision
from pipeline.models.teachers.cache import Cache
from pipeline.models.teachers.probe import Probe


class Teacher(nn.Module):
    """Maps the student's input, such as normalised images `[B,C,H,W]`, to logits `[B,K]`.

    The logits are fp32 and have no graph. A teacher is created with its weights, and stays frozen
    and in evaluation mode. A subclass implements `forward` and `identity`. A `probe` fits `head` to
    the data set's classes before the first batch (pipeline.train.teaching). `cache` is the place
    for stored predictions. `precision` is the precision of the computation.
    """

    label: str
    probe: Probe | None = None
    cache: Cache | None = None
    precision: Precision = "fp32"

    def __init__(self) -> None:
        super().__init__()
        self.head: nn.Linear | None = None

    def identity(self) -> dict[str, Any]:
        """All settings that determine a prediction for given pixels, except the fitted head.

        The values can be written as JSON.
        """
        raise NotImplementedError(f"{type(self).__name__} must override identity")

    def features(self, x_BCHW: Tensor) -> Tensor:
        """The input of a probe, `[B,D]`.

        Raises: ValueError for a teacher without features.
        """
        raise ValueError(f"{self.label}: a probe needs a teacher with features; this one has none")

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout and batch statistics would change the predictions."""
        return super().train(False)


def content_hash(module: nn.Module) -> str:
    """sha256 of names, shapes and bytes of a module's `state_dict`."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
