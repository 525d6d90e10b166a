"""From a trained ANN to the spiking network of the same layers: weights loaded, thresholds from
training batches.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.models.transforms import binarized
from pipeline.recipe.recipe import Recipe, Spec, spec, write_json
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.spiking.neuron import LIF, PLIF
from pipeline.spiking.rate import RateIF
from pipeline.train.checkpoint import Checkpoints, store_at
from pipeline.train.job import Job, RankInfo
from pipeline.train.weights import copy_of_weights, load_start, weights_file
from pipeline.train.worker import run
from tests.helpers.few import TRAINER, Counting, backend, save
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, finished, make_run, small_recipe, state, train_inline

STAGES: Any = ((4,), (6,))


def network(neuron: Spec, **more: Any) -> Spec:
    return spec(
        convnet,
        classes=10,
        in_channels=1,
        stages=STAGES,
        over="time",
        head="rate",
        neuron=neuron,
        **more,
    )


def ann() -> Recipe:
    return small_recipe(
        model=network(spec(nn.ReLU)), rule=spec(BPTT), time_steps=1, over_time="mean"
    )


def still() -> Recipe:
    """One step that moves no weights: what is saved is what calibration found."""
    spiking = {"model": network(spec(RateIF)), "rule": spec(DSR, calibrate=3), "time_steps": 4}
    return replace(ann(), **spiking, stop_after=1).override({"optimizer.lr": 0.0})


def test_a_spiking_run_starts_from_the_ann(tmp_path: Path) -> None:
    train_inline(tmp_path / "ann", ann())
    finished(tmp_path / "snn", replace(still(), init=str(tmp_path / "ann")))
    weights, start = state(tmp_path / "snn"), state(tmp_path / "ann")
    thresholds = {key for key in weights if key.endswith(".threshold")}
    assert set(weights) - set(start) == thresholds and len(thresholds) == 4
    learnt = [key for key in start if "running" not in key]
    assert all(torch.equal(weights[key], start[key]) for key in learnt)
    [told] = events(tmp_path / "snn", "init")
    assert set(told["fresh"]) == thresholds
    # calibrated: neither the bound nor the recipe's 6
    assert all(0.01 < weights[key].item() < 6 for key in thresholds)


def test_weights_that_a_suites_recipe_names_stay_where_others_are_fetched(tmp_path: Path) -> None:
    run, address = tmp_path / "run", f"memory://weights/{tmp_path.name}"
    run.mkdir()
    write_json(run / "job.json", {"checkpoints": address})
    saving = Checkpoints(store_at(address, run), attempt="a")
    save(saving, 1, backend(1), Counting(), TRAINER)
    named = copy_of_weights(run)
    content = named.read_bytes()
    save(saving, 2, backend(2), Counting(), {**TRAINER, "score": 0.5})
    assert weights_file(run).read_bytes() != content  # as of `evaluate`, meanwhile
    assert named.parent == run and named.read_bytes() == content and copy_of_weights(run) == named


@pytest.mark.full
def test_calibrated_thresholds_carry_the_accuracy_over(tmp_path: Path) -> None:
    """No training: at T = 16 the calibrated network answers as the ANN does, the one with the
    recipe's thresholds does not.
    """

    def top1(folder: str, recipe: Recipe) -> float:
        data = recipe.data.with_(val_samples=200)
        return finished(tmp_path / folder, replace(recipe, data=data))["top1"]

    trained = top1("ann", replace(ann(), epochs=8))
    recipe = replace(still(), init=str(tmp_path / "ann"), time_steps=16)
    assert trained > 0.4
    assert top1("calibrated", recipe) > trained - 0.05
    assert top1("as written", replace(recipe, rule=spec(DSR))) < trained - 0.15


def test_a_file_that_lacks_some_thresholds_or_has_others_is_refused(tmp_path: Path) -> None:
    tensors = network(spec(RateIF)).build().state_dict()
    whole, part = tmp_path / "all.safetensors", tmp_path / "some.safetensors"
    save_file(tensors, whole)
    del tensors["stages.0.0.neuron.threshold"]
    save_file(tensors, part)
    for neuron, file, said in (
        (RateIF, part, r"init: .* got 1 missing: stages\.0\.0\.neuron\.threshold$"),
        (nn.ReLU, whole, r"got 4 unknown: classifier\.neuron_in\.threshold, "),
    ):
        with pytest.raises(ValueError, match=said):
            load_start(network(spec(neuron)).build(), file)
    assert load_start(network(spec(RateIF)).build(), whole) == ()


def test_a_head_of_rates_is_replaced_whole(tmp_path: Path) -> None:
    how: Any = {"in_channels": 1, "stages": STAGES, "over": "time", "head": "rate"}
    ten, three = (convnet(classes, **how) for classes in (10, 3))
    save_file(ten.state_dict(), tmp_path / "ten.safetensors")
    before = {key: value.clone() for key, value in three.state_dict().items()}
    start = load_start(three, tmp_path / "ten.safetensors")
    assert start and all(key.startswith("classifier.") for key in start)
    for key, value in three.state_dict().items():
        assert torch.equal(value, before[key] if key in start else ten.state_dict()[key])


def _rank(rank: int, ranks: int, job: Job) -> None:
    run(job, RankInfo(rank, ranks, "cpu", rank))


@pytest.mark.distributed
def test_two_ranks_calibrate_as_one_does(tmp_path: Path) -> None:
    train_inline(tmp_path / "one", still())
    run_ranks(_rank, 2, tmp_path, make_run(tmp_path / "two", still()))
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    thresholds = [key for key in one if key.endswith(".threshold")]
    assert len(thresholds) == 4
    assert all(torch.equal(one[key], two[key]) and one[key] != 6 for key in thresholds)


def test_neurons_that_learn_their_leak_start_from_plain_ones(tmp_path: Path) -> None:
    first, second = (
        convnet(10, in_channels=1, stages=STAGES, neuron=neuron) for neuron in (LIF(), PLIF(0.8))
    )
    save_file(first.state_dict(), tmp_path / "first.safetensors")
    assert load_start(second, tmp_path / "first.safetensors") == tuple(
        f"stages.{n}.0.neuron.decay_logit" for n in (0, 1)
    )
    found = second.state_dict()
    assert all(torch.equal(found[key], value) for key, value in first.state_dict().items())


def bits(weights: str) -> nn.Module:
    inside = convnet(10, in_channels=1, stages=STAGES)
    return binarized(inside, part="all_but_ends", weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["scaled", "learnable"])
def test_one_bit_starts_from_the_weights_of_full_precision(weights: str, tmp_path: Path) -> None:
    """The second stage of a binary network: latent weights are those of the first, a learnable
    scale is that of them.
    """
    first, second = convnet(10, in_channels=1, stages=STAGES), bits(weights)
    save_file(first.state_dict(), tmp_path / "first.safetensors")
    start = load_start(second, tmp_path / "first.safetensors")
    found = second.state_dict()
    assert all(torch.equal(found[key], value) for key, value in first.state_dict().items())
    scale = "stages.1.0.conv.binarizer.scale"
    assert start == ((scale,) if weights == "learnable" else ())
    if weights == "learnable":
        assert torch.allclose(
            found[scale], 2 * found["stages.1.0.conv.weight"].abs().mean((1, 2, 3))
        )
        save_file({**found, scale: found[scale] + 1}, tmp_path / "second.safetensors")
        again = bits(weights)
        assert load_start(again, tmp_path / "second.safetensors") == ()
        assert torch.equal(again.state_dict()[scale], found[scale] + 1)
        with pytest.raises(ValueError, match=r"1 unknown: .*binarizer\.scale"):
            load_start(first, tmp_path / "second.safetensors")
