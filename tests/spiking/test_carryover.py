"""The reading is exact: what is replayed fires the same spikes, and its gradient is SLTT's, to 1e-12 in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.binarized import binarized
from pipeline.models.feedback import fc_feedback
from pipeline.models.qkformer import QKFormer
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import WINDOWS, binary_synapses
from pipeline.spiking.carryover import CarryOver, Gaussian, record, replaying
from pipeline.spiking.neuron import IF, LIF, named_neurons
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import ATan, Sigmoid
from pipeline.spiking.synapse import Linear
from tests.rules.small import batch, cross_entropy, difference, gradients, lif_network, spikes_of

EXACT = 1e-12

NEURONS = [
    {},
    {"leak": 0.9, "surrogate": Sigmoid(4.0)},
    {"leak": 0.3, "reset": "zero", "decay_input": True, "surrogate": ATan()},
    {"leak": 0.7, "reset_gradient": "kept", "threshold": 0.6, "subtract": 0.8},
    {"leak": 1.0, "reset": "zero", "reset_gradient": "kept"},
]


def transformer(shortcut: str, **choices) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = QKFormer(channels=16, depth=4, heads=1, classes=3, in_channels=2, shortcut=shortcut, **choices).double()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 1, 3)
            nn.init.uniform_(module.bias, 0.5, 2)
    for name, parameter in model.named_parameters():
        if "skip_gain" in name:
            nn.init.ones_(parameter)
    return model, torch.randn(3, 4, 2, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


def replayed_gradients(model: nn.Module, carry_over: CarryOver, x_TB: Tensor, loss_of) -> dict[str, Tensor]:
    """Of the mean over time of the loss, by plain backpropagation through the network of binary activations."""
    model.zero_grad()
    with replaying(model, carry_over), fresh_state(model):
        torch.stack([loss_of(logits_BK) for logits_BK in model(x_TB)]).mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def check(model: nn.Module, x_TB: Tensor, target_B: Tensor) -> CarryOver:
    loss_of = cross_entropy(target_B)
    by_sltt = gradients(SLTT(), model, x_TB, loss_of)
    by_bptt = gradients(BPTT(), model, x_TB, loss_of)
    spikes = spikes_of(model)
    logits_TBK, carry_over = record(model, x_TB)
    with torch.no_grad(), replaying(model, carry_over), fresh_state(model):
        again_TBK = model(x_TB)
    assert torch.equal(logits_TBK, again_TBK)
    assert sum(run.any() for run, _ in spikes.values()) > len(spikes) / 2
    for name, (run, replayed) in spikes.items():
        assert torch.equal(run, replayed), name
    found = replayed_gradients(model, carry_over, x_TB, loss_of)
    assert difference(found, by_sltt) < EXACT
    # Not because there is nothing to differ: the past, which both leave out, matters.
    assert difference(found, by_bptt) > 1e-4
    return carry_over


@pytest.mark.parametrize("neuron", NEURONS, ids=str)
def test_a_perceptron(neuron):
    x_TBC, target_B = batch(4)
    check(lif_network(**neuron), x_TBC, target_B)


@pytest.mark.parametrize("weights", WINDOWS)
def test_a_perceptron_of_1_bit_weights(weights):
    model = binarized(lif_network(), part="all_but_ends", weights=weights)
    ((name, synapse),) = binary_synapses(model).items()
    assert name == "2" and synapse.binarizer is not None
    assert all(len(row.abs().unique()) == 1 and len(row.unique()) == 2 for row in synapse.binarizer(synapse.weight))
    x_TBC, target_B = batch(4)
    check(model, x_TBC, target_B)


@pytest.mark.parametrize(
    ("shortcut", "choices"),
    [
        ("multiple", {"norm": "batch", "over": "step"}),
        ("multiple_all", {"norm": "batch", "over": "step"}),
        ("multiple", {"norm": "sws"}),
        ("sew", {}),
    ],
)
def test_a_transformer_in_training(shortcut, choices):
    check(*transformer(shortcut, **choices))


def test_a_transformer_with_a_1_bit_ffn_and_multiple_shortcuts():
    model, x_TB, target_B = transformer("multiple")
    assert len(binary_synapses(binarized(model, part="ffn"))) == 8
    check(model, x_TB, target_B)


@pytest.mark.parametrize("leak", [0.5, 0.9])
def test_against_a_network_of_binary_activations_written_out(leak):
    """One time step after another, in torch's own functions, by the equation u = W s + b + n."""
    model = lif_network(leak=leak, surrogate=Sigmoid(2.0))
    x_TBC, target_B = batch(3)
    _, carry_over = record(model, x_TBC)
    spikes = spikes_of(model)
    with torch.no_grad(), fresh_state(model):
        model(x_TBC)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    losses = []
    for t, s in enumerate(x_TBC):
        for synapse, neuron in (("0", "1"), ("2", "3")):
            n = leak * carry_over.membranes[neuron][t]
            above = F.linear(s, weights[f"{synapse}.weight"], weights[f"{synapse}.bias"]) + n - 1.0
            smooth = torch.sigmoid(2.0 * above)  # whose derivative is the surrogate's
            s = (above >= 0).double() + smooth - smooth.detach()
            assert torch.equal(s.detach().round(), spikes[neuron][0][t])
        losses.append(F.cross_entropy(F.linear(s, weights["4.weight"], weights["4.bias"]), target_B))
    torch.stack(losses).mean().backward()
    by_hand = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    assert difference(by_hand, gradients(SLTT(), model, x_TBC, cross_entropy(target_B))) < EXACT


def test_what_is_carried_over_of_one_neuron():
    """Current 0.6 at leak 0.5: u = 0.6, 0.9, 1.05, which fires, 0.625."""
    x_TBC = torch.full((4, 1, 1), 0.6, dtype=torch.float64)
    s_TBC, carry_over = record(LIF(0.5), x_TBC)
    assert s_TBC.flatten().tolist() == [0, 0, 1, 0]
    found = torch.stack(list(carry_over.membranes[""])).flatten()
    torch.testing.assert_close(found, torch.tensor([0, 0.6, 0.9, 0.05], dtype=torch.float64), rtol=0, atol=1e-15)


def test_slices_of_a_replay_equal_the_whole():
    model, (x_TBC, _) = lif_network(), batch(4)
    logits_TBK, carry_over = record(model, x_TBC)
    with torch.no_grad(), replaying(model, carry_over), fresh_state(model):
        sliced_TBK = torch.cat([model(x_1BC) for x_1BC in x_TBC.split(1)])
    torch.testing.assert_close(sliced_TBK, logits_TBK, rtol=0, atol=EXACT)


def test_a_run_under_a_rule_is_recorded_and_everything_is_given_back():
    model, (x_TBC, _) = lif_network(), batch(4)
    plain, carry_over = record(model, x_TBC)
    rule = SLTT()
    rule.attach(model)
    under_rule, _ = record(model, x_TBC)
    assert torch.equal(plain, under_rule)
    assert all(neuron.carry is torch.detach for _, neuron in named_neurons(model))
    with pytest.raises(ZeroDivisionError), replaying(model, carry_over):
        raise ZeroDivisionError
    assert all(neuron.gradient is None for _, neuron in named_neurons(model))


def test_it_costs_the_membranes_of_all_steps():
    model, (x_TBC, _) = lif_network(), batch(4)
    assert record(model, x_TBC)[1].bytes == 4 * 5 * (8 + 7) * 8  # steps, samples, neurons, bytes of a float64


def test_others_and_nothing():
    x_TBC, _ = batch(3)
    carry_over = record(lif_network(), x_TBC)[1]
    donors_B = torch.tensor([4, 3, 0, 1, 2])
    for name, steps in carry_over.of_others(donors_B).membranes.items():
        for t, v_B in enumerate(steps):
            assert all(torch.equal(v_B[b], carry_over.membranes[name][t][donor]) for b, donor in enumerate(donors_B))
    assert not any(v_B.any() for steps in carry_over.zero().membranes.values() for v_B in steps)
    assert carry_over.steps == carry_over.zero().steps == 3


def test_gaussian_moments_are_those_of_each_channel_and_step():
    """Channel c at step t has mean c + 10 t and deviation c + 1, over two examples; step 0 is at rest."""
    half_CN = torch.arange(1.0, 3.0).view(2, 1).expand(2, 6)
    centre_C = torch.arange(2.0).view(2, 1)
    examples = [
        CarryOver({"n": [torch.zeros(3, 2, 6), (centre_C + 10 + sign * half_CN).expand(3, 2, 6)]}) for sign in (-1.0, 1.0)
    ]
    gaussian = Gaussian(examples)
    assert gaussian.samples == 6
    mean_C, deviation_C = gaussian.moments["n", 1]
    assert mean_C.tolist() == [10, 11] and deviation_C.tolist() == [1, 2]
    like = CarryOver({"n": [torch.zeros(400, 2, 6), torch.zeros(400, 2, 6)]})
    keys_of = lambda place, t: [1000 * t + row for row in range(400)]
    at_rest, drawn = gaussian.like(like, keys_of).membranes["n"]
    assert not at_rest.any()
    n = 400 * 6
    for c in range(2):
        z_N = ((drawn[:, c] - 10 - c) / (c + 1)).flatten()
        assert abs(z_N.mean()) < 4 / n**0.5 and abs(z_N.std() - 1) < 4 / (2 * n) ** 0.5
    assert torch.equal(gaussian.like(like, keys_of).membranes["n"][1], drawn)
    one = CarryOver({"n": [each[7:8] for each in like.membranes["n"]]})
    assert torch.equal(gaussian.like(one, lambda place, t: [1000 * t + 7]).membranes["n"][1], drawn[7:8])


def test_refuses_what_does_not_fit():
    model, (x_TBC, _) = lif_network(), batch(3)
    _, carry_over = record(model, x_TBC)
    for other_TBC, said in (
        (batch(4)[0], "replaying: 1 must run for the steps recorded; got 4 of 3"),
        (x_TBC[:, :2], r"replaying: 1 must have the shape recorded, \(5, 8\); got \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=said), replaying(model, carry_over), fresh_state(model):
            model(other_TBC)
    with pytest.raises(ValueError, match="got neurons that it lacks: 3"):
        replaying(model[:2], carry_over).__enter__()
    with pytest.raises(ValueError, match="must have LIF neurons"):
        record(Linear(6, 3), x_TBC)
    neuron = IF()
    with pytest.raises(ValueError, match="must run once a time step; got 6 times in 3 steps at 0"):
        record(nn.Sequential(neuron, neuron), x_TBC)
    with pytest.raises(ValueError, match="membranes alone; got Equilibrium, with its own, at equilibrium"):
        record(fc_feedback(classes=3), x_TBC)
    with pytest.raises(ValueError, match="moments need examples"):
        Gaussian([])
    with pytest.raises(ValueError, match="no moments of 1 at step 3"):
        Gaussian([record(model, x_TBC[:2])[1]]).like(carry_over, lambda place, t: range(5))


def test_a_neuron_that_a_rule_replaced_is_refused():
    from pipeline.rules.dsr import DSR

    model = nn.Sequential(Linear(6, 8), RateIF(), Linear(8, 3)).double()
    DSR().attach(model)
    with pytest.raises(ValueError, match="release the rule that replaces it; got one at 1"):
        record(model, batch(3)[0])
