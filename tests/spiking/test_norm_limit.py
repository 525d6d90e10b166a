import copy
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.spiking import norm_limit as limit_module
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm_limit import (
    STEPS,
    FrobeniusLimit,
    SpectralLimit,
    singular_value,
    top_singular_vectors,
)
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import gradients_on, outputs, refusals


def spectral_norm(V: Tensor) -> Tensor:
    u, v = top_singular_vectors(V, steps=STEPS)
    return singular_value(u, V, v)


def exact(V: Tensor) -> float:
    return torch.linalg.matrix_norm(V.double().flatten(1), 2).item()


def limited(kind: str) -> SpectralLimit:
    torch.manual_seed(0)
    return SpectralLimit(
        Linear(60, 70, bias=False) if kind == "linear" else Conv2d(6, 8, 3, 1, 1, bias=False)
    )


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_norm_is_at_most_one_after_any_update(kind):
    synapse = limited(kind)
    for size in (0.0, 1e-3, 0.1, 10.0, 1e4):
        with torch.no_grad():
            for parameter in synapse.parameters():
                parameter.add_(size * torch.randn(parameter.shape))
        assert exact(synapse.weight()) <= 1 + 1e-3
    nn.init.constant_(synapse.gain, -0.25)
    assert exact(synapse.weight()) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("gain", [0.7, -3.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_output_is_that_of_the_limited_weight(kind, gain):
    synapse = limited(kind).double()
    nn.init.constant_(synapse.gain, gain)
    assert exact(synapse.weight()) == pytest.approx(min(1, abs(gain)), rel=1e-3)
    x_TB = torch.randn(2, 3, *([60] if kind == "linear" else [6, 5, 5]), dtype=torch.float64)
    plain = copy.deepcopy(synapse.synapse)
    with torch.no_grad():
        plain.weight.copy_(synapse.weight())  # type: ignore[operator]
    assert torch.allclose(synapse(x_TB), plain(x_TB), atol=1e-14)


def test_the_gradient_is_that_of_the_whole_map():
    synapse = SpectralLimit(Linear(5, 6, bias=False)).double()
    x_TB = torch.randn(1, 3, 5, dtype=torch.float64)
    names = ("synapse.weight", "gain")
    values = [dict(synapse.named_parameters())[name].detach().clone() for name in names]
    values[1].fill_(0.6)

    def out(*changed):
        return torch.func.functional_call(synapse, dict(zip(names, changed, strict=True)), (x_TB,))

    assert torch.autograd.gradcheck(out, tuple(value.requires_grad_() for value in values))


test_refuses = refusals(
    [
        ({"synapse": synapse}, r"SpectralLimit: the synapse must be one of .* without bias; got")
        for synapse in (
            Linear(3, 3),
            nn.ReLU(),
            nn.Linear(3, 3, bias=False),
            Linear(3, 3, bias=False, weights="standardized"),
        )
    ],
    SpectralLimit,
)


def test_a_weight_of_zeros_can_leave_zero():
    synapse = SpectralLimit(Linear(4, 3, bias=False))
    nn.init.zeros_(synapse.synapse.weight)
    y_TB = synapse(torch.ones(1, 2, 4))
    y_TB.sum().backward()
    assert torch.equal(y_TB, torch.zeros(1, 2, 3))
    assert torch.equal(synapse.synapse.weight.grad, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("limit", [SpectralLimit, lambda synapse: FrobeniusLimit(synapse, 0.5)])
def test_a_trace_reaches_whatever_the_weight_is_made_of(limit):
    """The last weight that feeds a LIF with soft reset learns under OTTT exactly as under BPTT,
    limited or not.
    """
    limited = limit(Linear(6, 4, bias=False))
    if isinstance(limited, SpectralLimit):
        nn.init.constant_(limited.gain, 0.9)
    model = nn.Sequential(limited, LIF(decay=0.7, threshold=0.1), Linear(4, 3)).double()
    ottt, bptt = gradients_on(6, model, OTTT(first="traced"), BPTT())
    for name, _ in limited.named_parameters(prefix="0"):
        assert bptt[name].abs().max() > 1e-4
        assert torch.allclose(ottt[name], bptt[name], rtol=0, atol=1e-12)


def test_a_weight_that_moves_within_a_batch_is_limited_anew():
    synapse = limited("linear")
    x_TB = torch.eye(60).unsqueeze(0)
    with fresh_state(synapse), torch.no_grad():
        for _ in range(3):  # as between the steps of OTTT-O
            assert exact(synapse(x_TB)[0].T) <= 1 + 1e-3
            synapse.synapse.weight.add_(torch.randn(70, 60))  # type: ignore[operator]


def test_keeps_the_type_under_autocast():
    synapse = limited("linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert synapse(repeat(torch.randn(2, 60), 1).float()).dtype == torch.bfloat16


def test_a_batch_seeks_its_singular_vectors_once(monkeypatch):
    seek = Mock(wraps=limit_module.top_singular_vectors)
    monkeypatch.setattr(limit_module, "top_singular_vectors", seek)
    synapse = Linear(40, 50, bias=False).double()
    limit, x_TBC = SpectralLimit(synapse).double(), torch.randn(6, 2, 40, dtype=torch.float64)
    alone, together = limit(x_TBC), outputs(limit, *x_TBC.split(1))
    assert seek.call_count == 2 and torch.allclose(together, alone, atol=1e-12)
    synapse.weight.data.mul_(2)  # the next batch's weight
    assert torch.allclose(outputs(limit, x_TBC), alone, atol=1e-12) and seek.call_count == 3


# --------------------------------------------------------------------------- largest singular value


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


ORTHOGONAL = torch.linalg.qr(random(200, 200))[0]
HARD = {
    "square": random(400, 400),
    "wide": random(96, 2304),
    "tall": random(1152, 128),
    "uniform spectrum": ORTHOGONAL @ torch.diag(torch.linspace(0, 1, 200)) @ ORTHOGONAL.T,
    "diagonal": torch.diag(torch.arange(400.0)),
    "orthogonal": ORTHOGONAL,
    "identity": torch.eye(200),
    "common direction": torch.ones(200, 200) + 0.01 * random(200, 200),
    "no common direction": torch.eye(200) - torch.ones(200, 200) / 200,
    "rank 3": random(200, 3) @ random(3, 200),
    "rank 1": torch.outer(random(30), random(50)),
    "one by one": torch.full((1, 1), -2.0),
}


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", HARD)
def test_the_largest_singular_value(name, scale):
    V = HARD[name] * scale
    assert 1 - 1e-3 < spectral_norm(V).item() / exact(V) < 1 + 1e-5


def test_exact_for_small_matrices_and_so_is_its_gradient():
    V = torch.randn(
        9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    assert spectral_norm(V).item() == pytest.approx(exact(V), rel=1e-14)
    assert torch.autograd.gradcheck(spectral_norm, (V,))


def test_a_pure_function_of_the_weight():
    V = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert torch.equal(spectral_norm(V), spectral_norm(V.clone()))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(spectral_norm(V), spectral_norm(V.clone()))
            and spectral_norm(V).dtype == torch.float32
        )
