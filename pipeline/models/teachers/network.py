"""A network of this pipeline as a teacher, with weights from the checkpoint of another run.

teacher=spec(network_teacher, model=spec(...), time_steps=2,
             weights="runs/x/checkpoints/step_00001000/model.safetensors")
"""

# T time, B batch, K classes

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, require
from pipeline.core.tensor_file import describe_mismatch, read_state
from pipeline.core.torch_settings import Precision, computing
from pipeline.data.base import Data
from pipeline.models.teachers.base import Teacher, content_hash
from pipeline.models.teachers.cache import Cache
from pipeline.spiking.encode import to_time_first
from pipeline.spiking.state import fresh_state, states_of


class NetworkTeacher(Teacher):
    def __init__(
        self,
        body: nn.Module,
        *,
        time_steps: int,
        cache: Cache | None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.label, self.body, self.time_steps = type(body).__name__, body, time_steps
        self.cache, self.precision = cache, precision
        self.requires_grad_(False).eval()

    def identity(self) -> dict[str, Any]:
        return {
            "network": self.label,
            "weights": content_hash(self.body),
            "time_steps": self.time_steps,
            "precision": self.precision,
        }

    @torch.no_grad()
    def forward(self, x_B: Tensor) -> Tensor:
        states = states_of(self.body)
        # In an evaluation the states are open already. They are fresh if they are empty.
        is_fresh = bool(states) and all(state.is_open and not state.values for state in states)
        with (
            computing(x_B.device, self.precision),
            nullcontext() if is_fresh else fresh_state(self.body),
        ):
            return self.body(to_time_first(x_B, self.time_steps)).mean(0).float()


def network_teacher(
    data: Data,
    *,
    model: nn.Module,
    weights: Path,
    time_steps: int,
    precision: Precision = "fp32",
    cache: Cache | None = None,
) -> NetworkTeacher:
    """`model` with weights from a file, frozen.

    The teacher sees the student's input. Its prediction is the mean of its logits over time.

    Args:
        data: the data set, for its shape and classes.
        model: as in the recipe that trained it.
        weights: a file of its weights, such as a checkpoint's `model.safetensors`.
        time_steps: number of time steps of the teacher.
        precision: precision of its computation; predictions are fp32.
        cache: place for stored predictions; None: they are not stored.

    Raises: ValueError for `time_steps` below 1, weights that do not fit, a model that does not
    accept the data's samples, or a model whose classes differ from the data's.
    """
    refuse_unless_counts("network_teacher", {"time_steps": time_steps})
    state = read_state(Path(weights), subject="network_teacher")
    mismatch = describe_mismatch(state, model.state_dict())
    require(
        not mismatch,
        f"network_teacher: the weights in {weights} must have the model's keys and shapes; got"
        f" {mismatch}",
    )
    model.load_state_dict(state)
    teacher = NetworkTeacher(model, time_steps=time_steps, cache=cache, precision=precision)
    try:
        outputs = teacher(torch.zeros(1, *data.shape)).shape[-1]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            "network_teacher: the model must accept the data's samples of"
            f" {' x '.join(map(str, data.shape))}; it does not: {error}"
        ) from error
    require(
        outputs == data.classes,
        "network_teacher: model and data must have the same number of classes; got"
        f" {outputs} and {data.classes}",
    )
    return teacher
