"""A learnt decay: its gradient written out, under rules that let the membrane's graph through time
and that cut it.
"""

# T time, B batch

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import LIF, PLIF
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    batch,
    difference,
    gradients_on,
    lif_network,
    outputs,
    saved_peak,
)


def learnt(**neuron) -> nn.Sequential:
    model = lif_network(**neuron)
    model[1], model[3] = PLIF(0.6, **neuron).double(), PLIF(0.8, **neuron).double()
    return model


def by_hand(
    currents: list[float],
    weights: list[float],
    decay: float,
    *,
    scale_input: bool,
    through_time: bool,
) -> float:
    """dL/dw of one neuron and L = sum_t weights[t] s[t], with a detached reset by subtraction and
    the triangle.
    """
    v, dv, found = 0.0, 0.0, 0.0
    for x, weight in zip(currents, weights, strict=True):
        u = decay * v + ((1 - decay) * x if scale_input else x)
        du = (v - x if scale_input else v) + (decay * dv if through_time else 0.0)
        found += weight * max(0.0, 1 - abs(u - 1)) * du
        v, dv = u - (u >= 1), du
    return found * decay * (1 - decay)


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("decay", [0.2, 0.5, 0.9])
def test_the_gradient_of_the_leak_with_and_without_what_comes_through_time(
    decay: float, scale_input: bool
) -> None:
    x_TB, weights_TB = torch.randn(2, 7, 4).double()
    x_TB = 1.5 * x_TB + (1 if scale_input else 0.3)
    alone, found = list(zip(x_TB.T.tolist(), weights_TB.T.tolist(), strict=True)), []
    for through_time in (True, False):
        neuron = PLIF(decay, scale_input=scale_input).double()
        if not through_time:
            neuron.carry = torch.detach
        (outputs(neuron, x_TB, grad=True) * weights_TB).sum().backward()
        about = {"scale_input": scale_input, "through_time": through_time}
        exact = neuron.decay_logit.sigmoid().item()
        found.append(neuron.decay_logit.grad.item())
        expected = sum(by_hand(currents, weights, exact, **about) for currents, weights in alone)
        assert found[-1] == pytest.approx(expected, abs=1e-14)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("scale_input", [False, True])
def test_the_potential_is_differentiated_as_finite_differences_say(scale_input: bool) -> None:
    """u[t] alone, which is smooth."""
    neuron = PLIF(0.7, scale_input=scale_input).double()
    neuron.forward = neuron.charged  # type: ignore[method-assign]

    def charged(x_B: Tensor, v_B: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(neuron, {"decay_logit": w}, (x_B, v_B))

    operands = [torch.randn(*shape).double().requires_grad_() for shape in ((3, 4), (3, 4), (1,))]
    assert torch.autograd.gradcheck(charged, tuple(operands))


@pytest.mark.parametrize(
    "neuron",
    [{}, {"scale_input": True}, {"reset": "zero"}, {"subtract": 1.3}, {"reset_gradient": "kept"}],
)
def test_it_fires_and_hands_down_as_the_lif_of_its_leak(neuron: dict) -> None:
    x_TB = 2 * torch.randn(6, 5, 4, dtype=torch.float64)
    found = []
    for lif in (LIF(0.5, **neuron), PLIF(0.5, **neuron).double()):
        leaf_TB = x_TB.clone().requires_grad_()
        s_TB = outputs(lif, leaf_TB, grad=True)
        found.append((s_TB, *torch.autograd.grad((s_TB * x_TB).sum(), leaf_TB)))
    (plain, g_plain), (parametric, g_parametric) = found
    assert torch.equal(plain, parametric) and 0.05 < plain.mean() < 0.5
    assert torch.allclose(g_plain, g_parametric, atol=1e-13) and g_plain.any()


def test_rules_agree_on_it_as_on_any_weight() -> None:
    protected = HLOP(SLTT(), rows=((3, 4, 3), (1, 1, 1)))
    through_time = (BPTT(), BPTT(chunk=2), BPTT(recompute=True))
    rules = (*through_time, SLTT(), BPTT(truncate=1), protected)
    bptt, chunked, recomputed, sltt, truncated, hlop = gradients_on(6, learnt(), *rules)
    assert max(difference(bptt, chunked), difference(bptt, recomputed)) < 1e-13
    assert max(difference(sltt, truncated), difference(sltt, hlop)) < 1e-13
    for name in ("1.decay_logit", "3.decay_logit"):
        one, other = bptt[name], sltt[name]
        assert min(one.abs(), other.abs(), (one - other).abs()) > 1e-4


def test_under_sltt_it_costs_one_membrane_whatever_t() -> None:
    few, many = (saved_peak(SLTT(), learnt(), *batch(steps)) for steps in (3, 12))
    assert few == many <= saved_peak(SLTT(), lif_network(), *batch(3)) + 5 * (8 + 7) * 8 + 64


def equilibrium_of(neuron: PLIF) -> None:
    Equilibrium(inject=Linear(6, 4), feedback=Linear(4, 4, bias=False), neurons=[neuron])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[
            (
                lambda rule=rule: rule.attach(learnt()),
                r": traces and rates take the decay for a constant, .* not be learnt; got PLIF at"
                r" 1, 3",
            )
            for rule in (
                OTTT(),
                OPZO(),
                HLOP(BPTT(), rows=((3, 4, 3), (1, 1, 1)), learn_from="rates"),
            )
        ],
        (
            lambda: DSR().attach(learnt(), over_time="mean"),
            "DSR: every neuron must be a RateIF or RateLIF; got PLIF at 1",
        ),
        (
            lambda: equilibrium_of(PLIF()),
            "Equilibrium: the neurons must be LIF or IF, whose rate is known; got PLIF",
        ),
        *[
            (
                lambda decay=decay: PLIF(decay),
                rf"PLIF: decay must be in 0\.\.1, both excluded, .*; got decay={decay}",
            )
            for decay in (0.0, 1.0)
        ],
    ],
)
def test_refuses(call, message) -> None:
    """Rules and neurons that take the decay for a constant, and decays that no weight gives."""
    with pytest.raises(ValueError, match=message):
        call()


def test_it_says_what_it_has_learnt() -> None:
    neuron = PLIF(0.9, threshold=0.5)
    assert repr(neuron).startswith("PLIF(decay=0.9, threshold=0.5, ")
    assert list(neuron.state_dict()) == ["decay_logit"] and neuron.decay_logit.shape == (1,)
