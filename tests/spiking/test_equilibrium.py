import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.equilibrium import Equilibrium, Linearized, weighted_mean
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF
from pipeline.spiking.state import fresh_state, state_bytes
from pipeline.spiking.surrogate import Triangle, spike
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import outputs, refusals


def network(
    *, decay: float = 1.0, seed: int = 0, norm: bool = False, dropout: float = 0.0
) -> Equilibrium:
    torch.manual_seed(seed)
    equilibrium = Equilibrium(
        inject=nn.Sequential(Linear(4, 6), BatchNorm(6)) if norm else Linear(4, 6),
        feedback=nn.Sequential(Dropout(dropout), Linear(5, 6, bias=False)),
        neurons=[LIF(decay), LIF(decay, threshold=0.5, subtract=0.8)],
        synapses=[nn.Sequential(Linear(6, 5), BatchNorm(5)) if norm else Linear(6, 5)],
    ).double()
    for parameter in equilibrium.parameters():
        parameter.data.mul_(2 if parameter.dim() > 1 else 1)
    return equilibrium


def frames(steps: int, *, size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(steps)
    return 2 * torch.randn(steps, size, 4, generator=generator, dtype=torch.float64)


def by_hand(e: Equilibrium, x_TB: Tensor) -> Tensor:
    """The spikes of the last layer, without the pipeline's layers, with graph."""
    (f, b), w = e.inject.parameters(), e.feedback[1].weight  # type: ignore[index]
    s1, c1 = e.synapses[0].parameters()
    decay = e.decay
    v1 = v2 = torch.zeros((), dtype=torch.float64)
    s, found = torch.zeros(x_TB.shape[1], 5, dtype=torch.float64), []
    for x in x_TB:
        u1 = decay * v1 + x @ f.T + b + s @ w.T
        z = spike(u1 - 1, surrogate=Triangle())
        v1 = u1 - z.detach()
        u2 = decay * v2 + z @ s1.T + c1
        s = spike(u2 - 0.5, surrogate=Triangle())
        v2 = u2 - 0.8 * s.detach()
        found.append(s)
    return torch.stack(found)


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
def test_without_an_adjoint_it_is_a_recurrent_network(decay):
    e, x_TB = network(decay=decay), frames(7)
    s_TB, out_TB = by_hand(e, x_TB), outputs(e, x_TB, grad=True)
    rate_B = weighted_mean(s_TB, decay)[0]
    assert 0.1 < s_TB.mean() < 0.7 and (decay < 1 or torch.equal(out_TB, s_TB))
    assert torch.allclose(out_TB.mean(0), rate_B, atol=1e-14)
    got, expected = (
        torch.autograd.grad(rate.square().sum(), list(e.parameters()))
        for rate in (out_TB.mean(0), rate_B)
    )
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_mean_of_the_first_steps_is_their_rate_however_they_are_sliced(decay):
    e, x_TB = network(decay=decay), frames(9)
    whole_TB = outputs(e, x_TB)
    assert torch.equal(whole_TB, outputs(e, *x_TB.split([1, 3, 5])))
    assert torch.equal(whole_TB[:4], outputs(e, x_TB[:4]))


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_adjoint_leaves_the_simulation_as_it_is(decay, still):
    e = network(decay=decay)
    x_TB = repeat(frames(1)[0], 7) if still else frames(7)
    rate_B = outputs(e, x_TB).mean(0)
    e.adjoint = lambda g_B, vjp: g_B
    (a_B,) = outputs(e, x_TB, grad=True)
    assert a_B.requires_grad and torch.allclose(a_B, rate_B, atol=1e-15)
    assert len(outputs(e, x_TB)) == 7  # no gradient wanted: the plain network


def test_linearized_is_the_transposed_jacobian_of_the_map_and_touches_no_parameter():
    e, x_TB = network(), frames(1)
    a_1B = torch.rand(1, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        current_1B = e.inject(x_TB)

    def f(a_B: Tensor) -> Tensor:
        z_1B = e.rate(0, current_1B + e.feedback(a_B.unsqueeze(0)))
        return e.rate(1, e.synapses[0](z_1B)).squeeze(0)

    touched = []
    for parameter in e.parameters():
        parameter.register_hook(lambda g: touched.append(g))
        parameter.register_post_accumulate_grad_hook(touched.append)
    v_B = torch.randn(3, 5, dtype=torch.float64)
    vjp = Linearized(e, a_1B, current_1B)
    got = vjp(v_B)
    assert not touched and all(p.grad is None for p in e.parameters())
    expected = torch.autograd.functional.vjp(f, a_1B.squeeze(0), v_B)[1]
    assert got.abs().max() > 1e-3 and torch.allclose(got, expected, atol=1e-15)
    # The same, layer by layer, by the matrices.
    parameters = dict(e.named_parameters())
    w, s = parameters["feedback.1.weight"], parameters["synapses.0.weight"]
    d2_B = vjp.masks[1] * v_B / 0.8
    assert torch.equal(vjp.transposed(1, d2_B), d2_B @ s)
    d1_B = vjp.masks[0] * (d2_B @ s) / 1.0
    assert torch.equal(vjp.transposed(0, d1_B), d1_B @ w)
    assert all(
        0.1 < mask.mean() < 1 and set(mask.flatten().tolist()) == {0.0, 1.0} for mask in vjp.masks
    )


def gradients_by(e: Equilibrium, adjoint, x_TB: Tensor) -> dict[str, Tensor]:
    e.zero_grad()
    e.adjoint = adjoint
    with fresh_state(e):
        e(x_TB).square().sum().backward()
    e.adjoint = None
    return {name: p.grad.clone() for name, p in e.named_parameters() if p.grad is not None}


def test_each_layer_may_take_its_own_solution():
    """The chain's own gradients handed back layer by layer change nothing; others stay where they
    are put.
    """

    def first(g_B: Tensor, vjp: Linearized) -> Tensor:
        """The gradient of the first layer's rate."""
        return vjp.transposed(1, vjp.masks[1] * g_B / 0.8)

    e, x_TB = network(), frames(6)
    chained = gradients_by(e, lambda g, vjp: g, x_TB)
    own = gradients_by(e, lambda g, vjp: [first(g, vjp), g], x_TB)
    assert all(torch.allclose(chained[name], own[name], atol=1e-15) for name in chained)
    assert min(g.abs().max() for g in chained.values()) > 1e-3
    cut = gradients_by(e, lambda g, vjp: [0 * first(g, vjp), g], x_TB)
    assert all((cut[name] == 0).all() == (not name.startswith("synapses")) for name in cut)
    only_first = gradients_by(e, lambda g, vjp: [first(g, vjp), 0 * g], x_TB)
    assert (only_first["synapses.0.weight"] == 0).all()
    assert torch.allclose(only_first["inject.weight"], chained["inject.weight"], atol=1e-15)


@pytest.mark.parametrize("still", [True, False])
def test_batch_norm_moves_once_a_batch(still):
    """Its statistics are those of the one application of the map; the simulation evaluates."""
    e = network(norm=True)
    x_TB = repeat(frames(1, size=8)[0], 7) if still else frames(7, size=8)
    norms = {name: m for name, m in e.named_modules() if isinstance(m, BatchNorm)}
    moved = {name: [] for name in norms}
    for name, norm in norms.items():
        norm.register_forward_hook(
            lambda m, i, o, name=name: (
                moved[name].append(i[0].detach().mean((0, 1))) if m.training else None
            )
        )
    before = copy.deepcopy(e.state_dict())
    gradients_by(e, lambda g, vjp: g + vjp(g), x_TB)
    assert {name: len(calls) for name, calls in moved.items()} == {"inject.1": 1, "synapses.0.1": 1}
    for name, norm in norms.items():
        expected = 0.9 * before[f"{name}.running_mean"] + 0.1 * moved[name][0]
        assert torch.allclose(norm.running_mean, expected, atol=1e-14)
        assert not torch.equal(norm.running_mean, before[f"{name}.running_mean"])
        assert norm.training


def test_samples_do_not_mix_in_the_jacobian_of_a_network_with_batch_norm():
    e, v_B = network(norm=True), torch.randn(4, 5, dtype=torch.float64)
    a_1B, current_1B = torch.rand(1, 4, 5).double(), e.eval().inject(frames(1, size=4))
    whole = Linearized(e.train(), a_1B, current_1B)(v_B)
    assert torch.equal(whole[1:2], Linearized(e, a_1B[:, 1:2], current_1B[:, 1:2])(v_B[1:2]))
    assert all(m.running_mean.abs().max() == 0 for m in e.modules() if isinstance(m, BatchNorm))


def test_dropout_is_one_mask_in_simulation_map_and_jacobian():
    e, x_TB = network(dropout=0.5), repeat(frames(1)[0], 5)
    inputs: list[Tensor] = []
    feedback: Any = e.feedback
    feedback[1].register_forward_pre_hook(lambda m, i: inputs.append(i[0].detach()))
    masks = []

    def adjoint(g_B, vjp):
        masks.append(vjp.transposed(0, torch.ones(3, 6, dtype=torch.float64)) == 0)
        return g_B

    gradients_by(e, adjoint, x_TB)
    (dropped_B,) = masks
    assert 0.2 < dropped_B.double().mean() < 0.8
    assert len(inputs) == 6 and all(
        (each[0][dropped_B] == 0).all() for each in inputs
    )  # 4 steps, the map, the Jacobian
    e.eval()
    assert torch.equal(outputs(e, x_TB), by_hand(e, x_TB).detach())


def test_conv_and_a_slice_too_many():
    inject, feedback = Conv2d(1, 2, 3, padding=1), Conv2d(2, 2, 3, padding=1, bias=False)
    e, x_TB = (
        Equilibrium(inject=inject, feedback=feedback, neurons=[IF()]),
        torch.randn(4, 2, 1, 5, 5),
    )
    e.adjoint = lambda g, vjp: g + vjp(g)
    with fresh_state(e):
        a_1B = e(x_TB)
        assert a_1B.shape == (1, 2, 2, 5, 5) and state_bytes(e) > 0
        a_1B.sum().backward()
        with pytest.raises(
            ValueError,
            match="Equilibrium: with an adjoint, one call must have all T steps of a batch",
        ):
            e(x_TB)
    assert state_bytes(e) == 0


def test_weighted_mean():
    x_TB = frames(4)
    for decay, weights in ((0.5, [0.125, 0.25, 0.5, 1.0]), (1.0, [1.0] * 4)):
        w_T = torch.tensor(weights, dtype=torch.float64)
        expected = torch.einsum("t,tbc->bc", w_T / w_T.sum(), x_TB)
        assert torch.allclose(weighted_mean(x_TB, decay)[0], expected, atol=1e-15)


def ring(**changes) -> Equilibrium:
    return Equilibrium(
        **{"inject": Linear(2, 3), "feedback": Linear(3, 3, bias=False), "neurons": [IF()]}
        | changes
    )


test_refuses = refusals(
    [
        (call, re.escape(message))
        for call, message in [
            (
                {"neurons": []},
                "there must be N >= 1 neurons and N - 1 synapses between them; got 0 neurons, 0",
            ),
            (
                {"synapses": [Linear(3, 3)]},
                "there must be N >= 1 neurons and N - 1 synapses between them; got 1 neurons, 1",
            ),
            (
                {"neurons": [nn.ReLU()]},
                "Equilibrium: the neurons must be LIF or IF, because their rate has a formula;"
                " got ReLU",
            ),
            (
                {"neurons": [RateIF()]},
                "Equilibrium: the neurons must be LIF or IF, because their rate has a formula;"
                " got RateNeuron",
            ),
            (
                {"neurons": [LIF(reset="zero")]},
                "Equilibrium: the neurons must have reset='subtract' and scale_input=False; got",
            ),
            ({"neurons": [LIF(scale_input=True)]}, "got reset='subtract', scale_input=True"),
            (
                {"neurons": [IF(), LIF(0.9)], "synapses": [Linear(3, 3)]},
                (
                    "Equilibrium: all neurons must have the same decay, because their rates are one"
                    " weighted mean; got [0.9, 1.0]"
                ),
            ),
            (
                {"feedback": nn.Sequential(Linear(3, 3))},
                "Equilibrium: the feedback must be linear, because it does not run at the first"
                " step; got",
            ),
        ]
    ],
    ring,
)
