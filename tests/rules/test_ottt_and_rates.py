"""OTTT's descent against that of rates: its inner product with the gradient of DSR, feed-forward,
and of IDE, with feedback.

Both gradients are written out here: rates r = clamp(current, 0, 1) on constant input, with the
weighted rates that the simulation ended in taken for r. Xiao et al. 2022 (arXiv 2210.04195),
theorems 1 and 2, say that the inner product is positive where the errors of this approximation are
small. Inputs lie in 0..1 here: twice as large they drive currents far outside the clamp, and at
decay 0.5 one first layer in 60 had a cosine of -0.03.
"""

# T time, B batch, C channels, K classes

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.vgg import Feedback
from pipeline.rules.dsr import DSR
from pipeline.rules.ide import IDE
from pipeline.rules.ottt import OTTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.rate import RateIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import cross_entropy, gradients, spikes_of

NETWORKS, BATCH, INPUTS, HIDDEN, CLASSES = 30, 16, 12, 20, 5


class Recurrent(nn.Module):
    """u[t] = decay v[t-1] + F x[t] + W s[t-1]; o[t] = R s[t]."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.inputs, self.lateral = Linear(INPUTS, HIDDEN), Linear(HIDDEN, HIDDEN, bias=False)
        self.neuron, self.spikes, self.readout = (
            LIF(decay, surrogate=Sigmoid()),
            Feedback(),
            Linear(HIDDEN, CLASSES),
        )

    def forward(self, x_TBC: Tensor) -> Tensor:
        logits = []
        for x_1BC in x_TBC.split(1):
            current, before = self.inputs(x_1BC), self.spikes.recall()
            s_1BC = self.neuron(
                current + self.lateral(torch.zeros_like(current) if before is None else before)
            )
            self.spikes.keep(s_1BC)
            logits.append(self.readout(s_1BC))
        return torch.cat(logits)


def feed_forward(decay: float) -> nn.Sequential:
    neurons = [LIF(decay, surrogate=Sigmoid()) for _ in range(2)]
    return nn.Sequential(
        Linear(INPUTS, HIDDEN),
        neurons[0],
        Linear(HIDDEN, HIDDEN),
        neurons[1],
        Linear(HIDDEN, CLASSES),
    )


def drawn(model: nn.Module, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with random weights that let it spike, an input, targets; in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(
                noise * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3 + 0.2 * noise
            )
        if isinstance(model, Recurrent):
            # A contraction, so that the rates have one fixed point.
            model.lateral.weight.mul_(0.8 / torch.linalg.matrix_norm(model.lateral.weight, 2))
    x_BC = torch.rand(BATCH, INPUTS, generator=generator, dtype=torch.float64)
    return model, x_BC, torch.randint(CLASSES, (BATCH,), generator=generator)


def weighted_rates(model: nn.Module, x_TBC: Tensor, decay: float) -> list[Tensor]:
    """sum_t decay^(T-t) s[t] / sum_t decay^(T-t) of every neuron, simulated."""
    record = spikes_of(model)
    with torch.no_grad(), fresh_state(model):
        model(x_TBC)
    weights_T = decay ** torch.arange(len(x_TBC) - 1, -1, -1, dtype=torch.float64)
    return [
        torch.einsum("t,tbc->bc", weights_T / weights_T.sum(), torch.cat(spikes))
        for spikes in record.values()
    ]


def error_of_rates(readout: Linear, r_BC: Tensor, target_B: Tensor) -> Tensor:
    return (
        torch.softmax(r_BC @ readout.weight.T + readout.bias, 1)
        - nn.functional.one_hot(target_B, CLASSES)
    ) / BATCH


def is_between_its_bounds(current_BC: Tensor) -> Tensor:
    """The derivative of the clamp."""
    return ((current_BC > 0) & (current_BC < 1)).double()


@torch.no_grad()
def dsr_by_hand(
    model: nn.Sequential, x_BC: Tensor, target_B: Tensor, rates: list[Tensor]
) -> dict[str, Tensor]:
    w1, b1, w2, b2, w3, _ = model.parameters()
    r1, r2 = rates
    e3 = error_of_rates(model[4], r2, target_B)
    e2 = (e3 @ w3) * is_between_its_bounds(r1 @ w2.T + b2)
    e1 = (e2 @ w2) * is_between_its_bounds(x_BC @ w1.T + b1)
    return {"0.weight": e1.T @ x_BC, "2.weight": e2.T @ r1, "4.weight": e3.T @ r2}


@torch.no_grad()
def ide_by_hand(
    model: Recurrent, x_BC: Tensor, target_B: Tensor, rates: list[Tensor]
) -> dict[str, Tensor]:
    """beta = (I - J^T)^-1 dL/dr, per sample, J = diag(slope) W; grad W = (slope beta) r^T."""
    (r,) = rates
    e = error_of_rates(model.readout, r, target_B)
    w = model.lateral.weight
    slope_BC = is_between_its_bounds(r @ w.T + model.inputs(x_BC.unsqueeze(0))[0])
    j_BCC = slope_BC[:, :, None] * w
    beta_BC = torch.linalg.solve(torch.eye(HIDDEN).double() - j_BCC.mT, e @ model.readout.weight)
    g_BC = slope_BC * beta_BC
    return {"inputs.weight": g_BC.T @ x_BC, "lateral.weight": g_BC.T @ r, "readout.weight": e.T @ r}


def test_the_gradients_of_rates_are_those_of_dsr_and_ide():
    """Where the rates have arrived: IF for so long that a rate is its clamped current to within
    1e-3.
    """
    model = feed_forward(1.0)
    _, x_BC, target = drawn(model, seed=0)
    rates = weighted_rates(model, x_BC.expand(4000, -1, -1), 1.0)
    neurons = [RateIF(threshold=1.0, alpha=1.0) for _ in range(2)]
    twin = nn.Sequential(model[0], neurons[0], model[2], neurons[1], model[4]).double()
    got = gradients(DSR(), twin, x_BC.expand(4000, -1, -1), cross_entropy(target), over_time="mean")
    for name, g in dsr_by_hand(model, x_BC, target, rates).items():
        assert torch.allclose(got[name], g, atol=1e-3 * g.abs().max())

    model = Recurrent(1.0)
    _, x_BC, target = drawn(model, seed=0)
    rates = weighted_rates(model, x_BC.expand(4000, -1, -1), 1.0)
    twin = nn.Sequential(
        Equilibrium(inject=model.inputs, feedback=model.lateral, neurons=[IF()]), model.readout
    )
    got = gradients(IDE(), twin, x_BC.expand(4000, -1, -1), cross_entropy(target), over_time="mean")
    names = {
        "0.inject.weight": "inputs.weight",
        "0.feedback.weight": "lateral.weight",
        "1.weight": "readout.weight",
    }
    by_hand = ide_by_hand(model, x_BC, target, rates)
    for ours, theirs in names.items():
        assert torch.allclose(got[ours], by_hand[theirs], atol=1e-3 * by_hand[theirs].abs().max())


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("decay", [0.5, 0.9])
@pytest.mark.parametrize(
    ("build", "of_rates"), [(feed_forward, dsr_by_hand), (Recurrent, ide_by_hand)]
)
def test_it_descends_where_the_rates_do(build, of_rates, decay, steps):
    cosines: dict[str, list[float]] = {}
    for seed in range(NETWORKS):
        model, x_BC, target = drawn(build(decay), seed)
        x_TBC = x_BC.expand(steps, -1, -1)
        rates = weighted_rates(model, x_TBC, decay)
        assert all(0.05 < r.mean() < 0.95 for r in rates)
        wanted = of_rates(model, x_BC, target, rates)
        for first in ("plain", "traced"):
            got = gradients(OTTT(first=first), model, x_TBC, cross_entropy(target))
            for name, g in wanted.items():
                cosine = nn.functional.cosine_similarity(g.flatten(), got[name].flatten(), dim=0)
                cosines.setdefault(name, []).append(float(cosine))
    assert len(cosines) == 3 and all(
        len(values) == 2 * NETWORKS and min(values) > 0 for values in cosines.values()
    ), cosines
