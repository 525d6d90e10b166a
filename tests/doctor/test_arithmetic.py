"""Our ops agree with the reference, and one that computes something else does not."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.doctor import arithmetic
from pipeline.doctor.arithmetic import differences
from pipeline.doctor.findings import MOST_OFF
from pipeline.spiking import binary, neuron, pool, surrogate, synapse

NAMES = ("convolution", "linear", "neuron", "pool", "1-bit")


def test_all_agree() -> None:
    found = differences("cpu")
    assert tuple(found) == NAMES
    assert all(isinstance(each, float) and each < MOST_OFF / 10 for each in found.values()), found


def test_random_numbers_of_others_stay_what_they_are() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    differences("cpu")
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize(
    ("owner", "name", "change", "off"),
    [
        (synapse, "STANDARDIZATION_EPS", lambda eps: 100 * eps, {"convolution", "linear"}),
        (synapse, "carrier", lambda of: lambda weight, downward: weight, {"convolution", "linear"}),
        (synapse._ConvWithSeams, "backward", lambda of: lambda ctx, g: of(ctx, 1.001 * g), {"convolution"}),
        (synapse._LinearWithSeams, "backward", lambda of: lambda ctx, g: of(ctx, 1.001 * g), {"linear"}),
        (neuron.LIF, "step", lambda of: lambda lif, x, v: of(lif, x, 0.999 * v), {"neuron"}),
        *(
            (each, "derivative", lambda of: lambda psi, x: of(psi, x) * 1.001, {"neuron"})
            for each in (surrogate.Triangle, surrogate.Sigmoid, surrogate.Rectangle, surrogate.ATan)
        ),
        (neuron, "fire", lambda of: lambda u, **about: of(u * (1.001 if len(u) == 1 else 1), **about), {"neuron"}),
        (pool, "mean_of_slices", lambda of: lambda x, size: 1.001 * of(x, size), {"pool"}),
        (pool, "into_slices", lambda of: lambda share, *about: of(1.001 * share, *about), {"pool"}),
        (binary._Signs, "backward", lambda of: lambda ctx, g: of(ctx, 1.001 * g), {"1-bit"}),
        (binary, "VARIANCE_EPS", lambda eps: 1e-2, {"1-bit"}),
        (binary, "_mean_size", lambda of: lambda V: 1.001 * of(V), {"1-bit"}),
    ],
)
def test_one_that_is_another(owner: object, name: str, change: object, off: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = change(getattr(owner, name))  # type: ignore[operator]
    monkeypatch.setattr(owner, name, staticmethod(changed) if name == "backward" else changed)
    assert {each for each, by in differences("cpu").items() if isinstance(by, str) or by > MOST_OFF} == off


def test_what_cannot_be_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> arithmetic.Pairs:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(arithmetic, "_neuron", broken)
    assert differences("cpu")["neuron"] == "failed: RuntimeError: no kernel image is available"


def test_what_is_no_number_is_off() -> None:
    assert arithmetic._off(torch.tensor([math.nan, 1.0]), torch.ones(2).double()) == math.inf
