"""A network of this pipeline as a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.models.mlp import mlp
from pipeline.models.teachers.network import NetworkTeacher, network_teacher
from pipeline.recipe.recipe import spec
from pipeline.spiking.encode import repeat
from pipeline.spiking.state import fresh_state
from tests.helpers.rule_networks import outputs


def teacher(file: Path, **more: Any) -> NetworkTeacher:
    model = spec(mlp, in_features=64, hidden=(8,))
    return spec(network_teacher, model=model, weights=str(file), time_steps=3, **more).build(
        Synthetic(shape=(1, 8, 8))
    )


def test_it_answers_with_the_mean_logits_of_the_network_that_was_saved(tmp_path: Path) -> None:
    network = mlp(in_features=64, hidden=(8,))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    x_BCHW = torch.randn(4, 1, 8, 8)
    wanted = outputs(network, repeat(x_BCHW, 3)).mean(0)
    found = teacher(tmp_path / "model.safetensors")
    assert torch.equal(found(x_BCHW), wanted)
    assert torch.equal(found(x_BCHW), wanted)  # the membranes begin anew
    assert not any(p.requires_grad for p in found.parameters())
    with fresh_state(found):  # as `evaluate` opens it to know the teacher's own accuracy
        assert torch.equal(found(x_BCHW), wanted)
        with pytest.raises(ValueError, match="must not be inside another fresh_state"):
            found(x_BCHW)


def test_in_bf16_it_answers_in_fp32_and_nearly_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(mlp(in_features=64, hidden=(8,)).state_dict(), file)
    x_BCHW = torch.randn(16, 1, 8, 8)
    full, half = teacher(file), teacher(file, precision="bf16")
    found, in_full = half(x_BCHW), full(x_BCHW)
    assert found.dtype == torch.float32 and not torch.equal(found, in_full)
    assert (found - in_full).abs().mean() < 0.1 * in_full.std()
    assert half.identity() != full.identity()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as around a student in bf16
        assert torch.equal(half(x_BCHW), found) and torch.equal(full(x_BCHW), in_full)


def build(file: Path, *, saved: dict, asked: dict, time_steps: int = 3) -> None:
    save_file(mlp(**({"in_features": 64, "hidden": (8,)} | saved)).state_dict(), file)
    model = spec(mlp, **({"in_features": 64, "hidden": (8,)} | asked))
    how = {"model": model, "weights": str(file), "time_steps": time_steps}
    spec(network_teacher, **how).build(Synthetic(shape=(1, 8, 8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda file: build(file, saved={}, asked={"hidden": (9,)}),
            r"the weights in .* must have the model's keys and shapes; got .* shape",
        ),
        (
            lambda file: build(file, saved={"classes": 3}, asked={"classes": 3}),
            "network_teacher: model and data must have the same number of classes; got 3 and 10",
        ),
        (
            lambda file: build(file, saved={"in_features": 63}, asked={"in_features": 63}),
            r"network_teacher: the model must accept the data's samples of 1 x 8 x 8; it does not",
        ),
        (
            lambda file: build(file, saved={}, asked={}, time_steps=0),
            "network_teacher: time_steps must be a whole number >= 1; got time_steps=0",
        ),
        (
            lambda file: NetworkTeacher(mlp(), time_steps=1, cache=None).features(torch.zeros(1)),
            "a probe needs a teacher with features; this one has none",
        ),
    ],
)
def test_refuses(tmp_path: Path, call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "model.safetensors")
