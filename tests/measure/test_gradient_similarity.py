"""Cosines and temporal shares: known gradients, and how the decay decides them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.measure.gradient_similarity import fidelity, gradients
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from tests.helpers.rule_networks import batch, cross_entropy, lif_network
from tests.helpers.rule_networks import gradients as reference


def test_of_known_gradients() -> None:
    values = {
        "bptt": ([3.0, 4.0], [1.0, 0.0], [0.0, 0.0]),
        "sltt": ([3.0, 0.0], [1.0, 0.0], [0.0, 0.0]),
        "other": ([-6.0, -8.0], [0.0, 2.0], [1.0, 1.0]),
        "nothing": ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    }
    bptt, sltt, other, nothing = (
        dict(zip(("a", "b", "silent"), map(torch.tensor, each), strict=True))
        for each in values.values()
    )
    found = fidelity(bptt, sltt, {"SLTT": [sltt], "other": [other], "drawn": [sltt, nothing]})

    def close(a: float, b: float) -> Any:
        return pytest.approx({"a": a, "b": b, "silent": math.nan}, nan_ok=True)

    assert found.temporal_share == close(0.8, 0.0)
    expected = {"SLTT": close(0.6, 1.0), "other": close(-1.0, 0.0), "drawn": close(0.3, 0.5)}
    assert (found.cosines, found.lowest("SLTT")) == (expected, ("a", pytest.approx(0.6)))
    assert fidelity(bptt, None, {}).temporal_share == {}


def test_a_gradient_that_is_not_finite_is_as_far_as_can_be() -> None:
    """A probe must not call safe what it cannot compare; of BPTT's own nothing is known."""
    bptt = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, math.inf])}
    broken = {"a": torch.tensor([3.0, math.nan]), "b": torch.tensor([1.0, 0.0])}
    found = fidelity(bptt, None, {"broken": [broken]})
    assert found.lowest("broken") == ("a", -1.0) and math.isnan(found.cosines["broken"]["b"])


def test_gradients_are_those_of_the_rule() -> None:
    x_TBC, target_B = batch(6, size=32)
    for rule, step in ((BPTT(), 0), (SLTT(k=2), 0), (SLTT(k=2), 5), (OTTT(), 0)):
        found = gradients(lif_network(), rule, x_TBC, lambda: cross_entropy(target_B), step=step)
        expected = reference(rule, lif_network(), x_TBC, cross_entropy(target_B), step=step)
        assert list(found) == ["0", "2", "4"]
        assert all(torch.equal(found[name], expected[f"{name}.weight"]) for name in found)


def test_the_leak_decides_what_comes_through_time() -> None:
    """Of the first layer; the readout has no membrane, so nothing of its gradient comes through
    time.
    """
    x_TBC, target_B = batch(6, size=32)
    shares = []
    for decay in (0.0, 1 / 11, 0.5, 0.9):
        network = lif_network(decay=decay)
        bptt, sltt = (
            gradients(network, rule, x_TBC, lambda: cross_entropy(target_B))
            for rule in (BPTT(), SLTT())
        )
        assert all(parameter.grad is None for parameter in network.parameters())
        found = fidelity(bptt, sltt, {"SLTT": [sltt]})
        assert found.temporal_share["4"] == pytest.approx(0, abs=1e-12)
        shares.append(found.temporal_share["0"])
        assert found.cosines["SLTT"]["0"] >= 1 - shares[-1]
    assert shares[0] == pytest.approx(0, abs=1e-12)
    assert 0 < shares[1] < 0.3 < shares[2] < shares[3]


def test_dropout_and_a_loss_that_remembers_are_no_part_of_it() -> None:
    """At decay 0 nothing comes through time, whatever dropout draws; and each batch has a loss of
    its own.
    """
    network = lif_network(decay=0.0)
    network.insert(2, nn.Dropout(0.5))
    x_TBC, target_B = batch(6, size=32)
    made: list[int] = []

    def loss_for() -> Callable[[torch.Tensor], torch.Tensor]:
        made.append(1)
        return cross_entropy(target_B)

    bptt, sltt = (gradients(network, rule, x_TBC, loss_for) for rule in (BPTT(), SLTT()))
    assert max(fidelity(bptt, sltt, {}).temporal_share.values()) < 1e-12
    gradients(network, SLTT(), x_TBC, loss_for, batches=3)
    assert len(made) == 2 + 3
