"""A backend of a few numbers, and a rule with state of its own."""

from typing import Any

import torch
from torch import nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.plain import Plain
from pipeline.train.checkpoint import Checkpoints, CheckpointStore, SavedCheckpoint

FILES = {
    "model.safetensors",
    "plain/state.pt",
    "buffers_rank0.pt",
    "rule.pt",
    "trainer.json",
    "manifest.json",
}
TRAINER: dict[str, Any] = {"world_size": 1, "zero": 0, "score": None}


def backend(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    network = nn.Sequential(Linear(3, 4), LIF(), Linear(4, 2))
    made = Plain(network, lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    step(made)  # the optimizer has a momentum worth saving
    return made


def step(made: Plain) -> None:
    for p in made.network.parameters():
        p.grad = torch.ones_like(p)
    made.step()


class Counting(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("feedback", torch.full((3,), value))


def save(
    checkpoints: Checkpoints,
    step: int,
    made: Plain,
    rule: nn.Module,
    trainer: dict[str, Any],
    **more: Any,
) -> SavedCheckpoint:
    assert checkpoints.save(step, made, rule, trainer, **more) is None
    told = checkpoints.wait()
    assert told is not None
    return told


def feedback(place: CheckpointStore, *, made: Plain | None = None) -> float:
    """What the rule of the newest checkpoint has counted, as another attempt finds it."""
    rule = Counting()
    restore(Checkpoints(place, attempt="another"), made or backend(), rule)
    return float(rule.get_buffer("feedback")[0])


def restore(checkpoints: Checkpoints, backend: Plain, rule: nn.Module) -> dict[str, Any]:
    path = checkpoints.newest()
    assert path is not None
    return checkpoints.load(path, backend, rule)


def content(place: CheckpointStore) -> set[str]:
    """The files in a place, without the owner's."""
    if place.folder is not None:
        files = {
            str(path.relative_to(place.folder))
            for path in place.folder.rglob("*")
            if path.is_file()
        }
    else:
        root = place.root.strip("/")
        files = {path.strip("/").removeprefix(f"{root}/") for path in place.fs.find(place.root)}
    return files - {"owner.json"}
