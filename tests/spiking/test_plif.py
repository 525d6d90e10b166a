"""A learnt decay: its gradient written out, under rules that let the membrane's graph through time
and that cut it.
"""

# T time, B batch

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import LIF, PLIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients,
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
    generator = torch.Generator().manual_seed(0)
    x_TB = 1.5 * torch.randn(7, 4, generator=generator).double() + (1 if scale_input else 0.3)
    weights_TB = torch.randn(7, 4, generator=generator).double()
    found = {}
    for through_time in (True, False):
        neuron = PLIF(decay, scale_input=scale_input).double()
        if not through_time:
            neuron.carry = torch.detach
        with fresh_state(neuron):
            (neuron(x_TB) * weights_TB).sum().backward()
        about = {"scale_input": scale_input, "through_time": through_time}
        exact = neuron.decay_logit.sigmoid().item()
        alone = zip(x_TB.T.tolist(), weights_TB.T.tolist(), strict=True)
        expected = sum(by_hand(currents, weights, exact, **about) for currents, weights in alone)
        assert neuron.decay_logit.grad is not None
        found[through_time] = neuron.decay_logit.grad.item()
        assert found[through_time] == pytest.approx(expected, abs=1e-14)
    assert abs(found[True] - found[False]) > 1e-3


class Charged(nn.Module):
    """u[t] alone, which is smooth."""

    def __init__(self, neuron: PLIF) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        return self.neuron.charged(x_B, v_B)


@pytest.mark.parametrize("scale_input", [False, True])
def test_the_potential_is_differentiated_as_finite_differences_say(scale_input: bool) -> None:
    charged = Charged(PLIF(0.7, scale_input=scale_input).double())
    operands = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (3, 4), (1,))
    ]
    assert torch.autograd.gradcheck(
        lambda x_B, v_B, w: torch.func.functional_call(
            charged, {"neuron.decay_logit": w}, (x_B, v_B)
        ),
        tuple(operands),
    )


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
    model, (x_TBC, target_B) = learnt(), batch(6)
    bptt, chunked, recomputed, sltt, truncated, protected = (
        gradients(rule, model, x_TBC, cross_entropy(target_B))
        for rule in (
            BPTT(),
            BPTT(chunk=2),
            BPTT(recompute=True),
            SLTT(),
            BPTT(truncate=1),
            HLOP(SLTT(), rows=((3, 4, 3), (1, 1, 1))),
        )
    )
    assert max(difference(bptt, chunked), difference(bptt, recomputed)) < 1e-13
    assert max(difference(sltt, truncated), difference(sltt, protected)) < 1e-13
    for name in ("1.decay_logit", "3.decay_logit"):
        assert (
            bptt[name].abs() > 1e-4
            and sltt[name].abs() > 1e-4
            and (bptt[name] - sltt[name]).abs() > 1e-4
        )


def test_under_sltt_it_costs_one_membrane_whatever_t() -> None:
    few, many = (saved_peak(SLTT(), learnt(), *batch(steps)) for steps in (3, 12))
    assert few == many <= saved_peak(SLTT(), lif_network(), *batch(3)) + 5 * (8 + 7) * 8 + 64


@pytest.mark.parametrize(
    "rule", [OTTT(), OPZO(), HLOP(BPTT(), rows=((3, 4, 3), (1, 1, 1)), learn_from="rates")]
)
def test_rules_that_take_the_leak_for_a_constant_refuse_it_by_name(rule: Rule) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r": traces and rates take the decay for a constant, .* not be learnt; got PLIF at 1, 3"
        ),
    ):
        rule.attach(learnt())
    BPTT().attach(learnt())


def test_so_do_rates_and_equilibria_and_leaks_that_no_weight_gives() -> None:
    for said, refused in (
        (
            "DSR: every neuron must be a RateIF or RateLIF; got PLIF at 1",
            lambda: DSR().attach(learnt(), over_time="mean"),
        ),
        (
            "Equilibrium: the neurons must be LIF or IF, whose rate is known; got PLIF",
            lambda: Equilibrium(
                inject=Linear(6, 4), feedback=Linear(4, 4, bias=False), neurons=[PLIF()]
            ),
        ),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    for decay in (0.0, 1.0):
        with pytest.raises(
            ValueError,
            match=rf"PLIF: decay must be in 0\.\.1, both excluded, .*; got decay={decay}",
        ):
            PLIF(decay)


def test_it_says_what_it_has_learnt() -> None:
    neuron = PLIF(0.9, threshold=0.5)
    assert repr(neuron).startswith("PLIF(decay=0.9, threshold=0.5, ")
    assert list(neuron.state_dict()) == ["decay_logit"] and neuron.decay_logit.shape == (1,)
