# T time, B batch, C channels, H W pixels, K classes

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.vgg import vgg_sws, vgg_sws_f
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import IF, LIF, identity
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.norm_limit import SpectralLimit
from pipeline.spiking.state import State, state_bytes, states_of
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.references import sigmoid_window, summed, three_factors
from tests.helpers.rule_networks import (
    Network,
    attached,
    batch,
    cross_entropy,
    difference,
    gradients,
    gradients_on,
    learn,
    lif_network,
    one_batch,
    outputs,
    refusals,
    spikes_of,
)
from tests.helpers.traces import traces_of


def contract_rules() -> list[OTTT]:
    return [OTTT(), OTTT(chunk=2), OTTT(update="step"), OTTT(first="traced", readout="plain")]


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("decay", [0.5, 0.9])
@pytest.mark.parametrize("more", [{}, {"scale_input": True}, {"subtract": 1.3}])
def test_the_last_weight_that_feeds_a_lif_learns_as_under_bptt(decay, more):
    got, full = gradients_on(6, lif_network(decay=decay, **more), OTTT(first="traced"), BPTT())
    largest = {name: g.abs().max() for name, g in full.items()}
    apart = {name: (g - full[name]).abs().max() for name, g in got.items()}
    assert largest["2.weight"] > 1e-3 and apart["2.weight"] < 1e-12
    # What a layer does to later steps of the next is not seen; a bias has no trace.
    assert all(apart[name] > 0.05 * largest[name] for name in ("0.weight", "2.bias"))


@pytest.mark.parametrize("neuron", [{"reset": "zero"}, {"reset_gradient": "kept"}])
def test_no_weight_does_where_the_reset_depends_on_the_potential(neuron):
    got, full = gradients_on(6, lif_network(**neuron), OTTT(first="traced"), BPTT())
    assert all((got[name] - full[name]).abs().max() > 1e-3 for name in ("0.weight", "2.weight"))


def test_one_hidden_layer_with_a_plain_readout_is_bptt_in_every_weight():
    model = nn.Sequential(Linear(6, 8, bias=False), LIF(), Linear(8, 3)).double()
    x_TBC, target = batch(6)
    got, full = (
        gradients(rule, model, 2 * x_TBC, cross_entropy(target))
        for rule in (OTTT(first="traced", readout="plain"), BPTT())
    )
    assert full["0.weight"].abs().max() > 1e-2
    assert difference(got, full) < 1e-12


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_readout(decay):
    """Traced: sum_t e[t] a[t]^T; plain: BPTT's, sum_t e[t] s[t]^T."""
    model = lif_network(decay=decay)
    s_TBC, _, e_TBK = three_factors(model, *batch(6), decay=decay)["4"]
    rules = (OTTT(readout="traced"), OTTT(readout="plain"), BPTT())
    traced, plain, full = (g["4.weight"] for g in gradients_on(6, model, *rules))
    by_trace = torch.einsum("tbk,tbc->kc", e_TBK, traces_of(s_TBC, decay))
    by_spike = torch.einsum("tbk,tbc->kc", e_TBK, s_TBC)
    assert (traced - by_trace).abs().max() < 1e-12 and (plain - by_spike).abs().max() < 1e-12
    assert (plain - full).abs().max() < 1e-12 and (traced - full).abs().max() > 1e-2


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 6), (0.5, 1), (0.9, 1)])
@pytest.mark.parametrize("rule", [OTTT(), OTTT(first="traced"), OTTT(readout="plain")])
def test_without_leak_or_at_one_step_it_is_sltt(decay, steps, rule):
    got, expected = gradients_on(steps, lif_network(decay=decay), rule, SLTT())
    assert expected["0.weight"].abs().max() > 1e-3 and difference(got, expected) < 1e-14


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_an_update_is_trace_times_surrogate_times_error(decay):
    model = lif_network(decay=decay, surrogate=Sigmoid())
    traced, plain = gradients_on(6, model, OTTT(first="traced"), OTTT())
    factors = three_factors(model, *batch(6), decay=decay, window=sigmoid_window)
    for layer, (x, psi, e) in factors.items():
        by_trace = torch.einsum("tbo,tbo,tbi->oi", e, psi, traces_of(x, decay))
        assert (traced[f"{layer}.weight"] - by_trace).abs().max() < 1e-12
    assert (plain["0.weight"] - summed(factors)["0.weight"]).abs().max() < 1e-12


def test_under_autocast_the_traces_stay_in_fp32():
    (rule, model), (x_TBC, target) = attached(OTTT(), lif_network().float()), batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        for objective in rule.loss_terms(model, x_TBC.float(), cross_entropy(target)):
            dtypes = {
                name: value.dtype
                for state in states_of(model)
                for name, value in state.values.items()
            }
            assert dtypes["v"] == dtypes["a"] == torch.float32
            objective.backward.backward()


# ----------------------------------------------------------------------------- against two forwards


class TwoForwards(nn.Module):
    """The trace as published code takes it: the operation runs on the spikes for its value and on
    the trace for its graph.
    """

    def __init__(self, op: nn.Module, decay: float) -> None:
        super().__init__()
        self.op, self.decay = op, decay
        self.state = State("TwoForwards")

    def forward(self, x_TB: Tensor) -> Tensor:
        before = self.state.read("a")
        a_TB = x_TB.detach() if before is None else self.decay * before + x_TB.detach()
        self.state.write("a", a_TB)
        through_trace = self.op(a_TB + (x_TB - x_TB.detach()))
        return through_trace + (self.op(x_TB) - through_trace).detach()


def check_two_forwards(model: nn.Module, reference: nn.Module, x_TBCHW: Tensor) -> None:
    loss_fn = cross_entropy(torch.tensor([0, 2]))
    got = gradients(OTTT(), model, x_TBCHW, loss_fn)
    expected = gradients(SLTT(), reference, x_TBCHW, loss_fn)
    learnt = [g for name, g in got.items() if "weight" in name or "gain" in name]
    assert all(g.abs().max() > 1e-5 for g in learnt)
    assert difference(got, {name.replace(".op.", "."): g for name, g in expected.items()}) < 1e-12


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
]


@pytest.mark.parametrize("weights", ["plain", "standardized"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_against_two_forwards(geometry, weights):
    first = Conv2d(2, 4, 3, padding=1)
    second = Conv2d(4, 6, **geometry, weights=weights)
    third, readout = Conv2d(6, 3, 1, weights=weights), Linear(3, 3)
    for synapse in (first, second, third, readout):
        nn.init.normal_(synapse.weight)  # large enough to spike
        if synapse.gain is not None:
            nn.init.normal_(synapse.gain, 4)
    one, two, three = (LIF(surrogate=Sigmoid()) for _ in range(3))

    def network(wrap) -> nn.Sequential:
        hidden = (first, one, wrap(second), two, wrap(third), three)
        return nn.Sequential(*hidden, POOL, wrap(readout)).double()

    x_TBCHW = 3 * torch.randn(5, 2, 2, 7, 6, dtype=torch.float64)
    wrapped = network(lambda op: TwoForwards(op, 0.5))
    check_two_forwards(network(lambda op: op), wrapped, x_TBCHW)


POOL = Network(lambda m, x_TBCHW: x_TBCHW.mean((3, 4)))


@pytest.mark.parametrize("build", [vgg_sws, vgg_sws_f])
def test_vgg_against_two_forwards(build):
    """Every synapse traced but the first; in VGG-F the one of the feedback, too, whose trace is of
    upsampled features.
    """
    model = build(4, in_channels=2, stages=((3, 5), (6,))).double()
    nn.init.normal_(model.classifier.weight)
    if model.feedback is not None:
        nn.init.normal_(model.feedback.conv.weight, std=0.3)
    reference = copy.deepcopy(model)
    for name, module in list(reference.named_modules()):
        if isinstance(module, (Linear, Conv2d)) and name != "stages.0.0.conv.0":
            parent, _, place = name.rpartition(".")
            wrapped = TwoForwards(module, 0.5)
            wrapped.in_channels = getattr(module, "in_channels", None)
            setattr(reference.get_submodule(parent), place, wrapped)
    check_two_forwards(model, reference, 3 * torch.randn(5, 2, 2, 8, 8).double())


# ---------------------------------------------------------------------------------- time and memory


@pytest.mark.parametrize("chunk", [1, 3])
def test_state_is_one_step_of_membranes_and_traces(chunk):
    (rule, model), (x_TBC, target) = attached(OTTT(chunk=chunk)), batch(6)
    for objective in rule.loss_terms(model, x_TBC, cross_entropy(target)):
        objective.backward.backward()
        # Membranes; traces of the second and the last synapse.
        assert state_bytes(model) == 5 * 8 * ((8 + 7) + (8 + 7))
    assert state_bytes(model) == 0


def total_update(update: str, lr: float) -> dict[str, Tensor]:
    """The parameters after one batch of plain gradient descent."""
    (rule, model), (x_TBC, target) = attached(OTTT(update=update)), batch(6)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for objective in rule.loss_terms(model, x_TBC, cross_entropy(target)):
        objective.backward.backward()
        if update == "step":
            optimizer.step()
            optimizer.zero_grad()
    if update == "batch":
        optimizer.step()
    return dict(model.named_parameters())


def test_moving_at_every_step_differs_in_second_order_of_the_learning_rate():
    gaps = [
        difference(total_update("step", lr), total_update("batch", lr))
        for lr in (1e-4, 5e-5, 2.5e-5)
    ]
    ratios = [one / other for one, other in itertools.pairwise(gaps)]
    assert gaps[0] > 1e-9 and ratios == pytest.approx([4, 4], rel=0.02)


# ----------------------------------------------------------------------------------------- refusals


def two_decays() -> nn.Sequential:
    return nn.Sequential(Linear(6, 4), LIF(0.5), Linear(4, 4), LIF(0.9), Linear(4, 3))


def back_to_front() -> nn.Module:
    return Network(
        lambda m, x: m.readout(m.neuron(m.hidden(x))),
        readout=Linear(4, 3),
        neuron=LIF(),
        hidden=Linear(6, 4),
    ).double()


def runs_twice(*, limit: bool = False) -> nn.Sequential:
    again = SpectralLimit(Linear(6, 6, bias=False)) if limit else Linear(6, 6)
    return nn.Sequential(Linear(6, 6), again, again, LIF(), Linear(6, 3)).double()


test_refuses = refusals(
    [
        (
            lambda: OTTT(update="objective"),
            r"OTTT: update must be 'batch' or 'step'; got update='objective'",
        ),
        (lambda: OTTT(first="none"), r"OTTT: first must be 'plain' or 'traced'; got first='none'"),
        (
            lambda: OTTT(readout="none"),
            r"OTTT: readout must be 'plain' or 'traced'; got readout='none'",
        ),
        (
            lambda: OTTT(update="step", chunk=2),
            r"OTTT: chunk must be 1 with update='step', .*; got chunk=2",
        ),
        (lambda: OTTT(chunk=5).check_steps(4), r"OTTT: chunk must be in 1\.\.T; got chunk=5, T=4"),
        (
            lambda: OTTT().attach(lif_network(), over_time="mean"),
            r"OTTT-A: over_time must be 'steps', because the loss of the mean logits needs"
            r" all T steps",
        ),
        (
            lambda: OTTT().attach(nn.Sequential(Linear(2, 2))),
            r"OTTT-A: the model must have LIF neurons, .* got Sequential",
        ),
        (lambda: OTTT().attach(LIF()), r"OTTT-A: the model must have a synapse .*; got LIF"),
        (
            lambda: OTTT().attach(two_decays()),
            r"OTTT-A: traces and all neurons must share one decay, here 0\.5; got 0\.9 at 3$",
        ),
        (
            lambda: OTTT(0.9).attach(two_decays()),
            r"OTTT-A: traces and all neurons must share one decay, here 0\.9; got 0\.5 at 1$",
        ),
        (
            lambda: OTTT(update="step").attach(nn.Sequential(LIF(), nn.Linear(2, 2))),
            (
                r"OTTT-O: linear layers and convolutions must be those of"
                r" pipeline\.spiking\.synapse, .* got torch's Linear at 1"
            ),
        ),
        (
            lambda: OTTT().attach(
                nn.Sequential(
                    lif_network(), nn.ModuleDict({"a": BatchNorm(3), "b": nn.BatchNorm2d(3)})
                )
            ),
            r"OTTT-A: a trace cannot pass batch norm; .* got batch norm at 1\.a, 1\.b$",
        ),
        (
            lambda: one_batch(OTTT(), back_to_front(), 4),
            (
                r"OTTT-A: first='plain' applies to readout, .* registration; got hidden, which runs"
                r" in its place; .*first='traced'"
            ),
        ),
        (
            lambda: one_batch(OTTT(first="traced", readout="plain"), back_to_front(), 4),
            r"readout='plain' applies to hidden, .*; got readout, which runs in its place",
        ),
        *[
            (
                lambda chunk=chunk: one_batch(OTTT(chunk=chunk), runs_twice(), 4),
                rf"synapse must run once in a time step, .* got {2 * chunk} runs of 1 in"
                rf" {chunk} steps$",
            )
            for chunk in (1, 2, 4)
        ],
        (
            lambda: one_batch(OTTT(), runs_twice(limit=True), 4),
            r"must run once in a time step, .* got 2 runs of 1\.synapse in 1 steps$",
        ),
    ]
)


def test_what_is_refused_for_one_choice_is_accepted_for_another():
    OTTT(0.5).attach(lif_network(decay=0.5))
    one_batch(OTTT(first="traced"), back_to_front(), 4)
    limited = SpectralLimit(Linear(6, 5, bias=False))
    one_batch(OTTT(), nn.Sequential(limited, LIF(), Linear(5, 3)).double(), 4)


def test_a_batch_that_is_refused_leaves_no_hooks():
    rule, model = attached(OTTT(), back_to_front())
    with pytest.raises(ValueError, match="which runs in its place"):
        list(rule.loss_terms(model, torch.ones(4, 2, 6).double(), torch.sum))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("build", [vgg_sws, vgg_sws_f, nf_resnet18_small])
def test_the_networks_run_their_first_and_last_synapse_where_they_are_registered(build):
    small = (
        {"width": 4, "blocks": (1, 1)} if build is nf_resnet18_small else {"stages": ((4,), (4,))}
    )
    rule, model = attached(OTTT(readout="plain"), build(3, in_channels=1, **small))
    learn(rule.loss_terms(model, torch.randn(2, 2, 1, 8, 8), cross_entropy(torch.tensor([0, 2]))))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_a_feedback_that_starts_a_step_late_is_not_taken_for_a_second_run(chunk):
    equilibrium = Equilibrium(
        inject=Linear(6, 5), feedback=Linear(5, 5, bias=False), neurons=[IF()]
    )
    model = nn.Sequential(equilibrium, Linear(5, 3)).double()
    assert difference(*gradients_on(4, model, OTTT(), OTTT(chunk=chunk))) < 1e-14


# ------------------------------------------------------------------------------------------- rates


NETWORKS, BATCH, INPUTS, HIDDEN, CLASSES = 30, 16, 12, 20, 5


class Recurrent(nn.Module):
    """u[t] = decay v[t-1] + F x[t] + W s[t-1]; o[t] = R s[t]."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.inputs, self.lateral = Linear(INPUTS, HIDDEN), Linear(HIDDEN, HIDDEN, bias=False)
        self.neuron, self.readout = LIF(decay, surrogate=Sigmoid()), Linear(HIDDEN, CLASSES)
        self.carry, self.state = identity, State("Recurrent")

    def forward(self, x_TBC: Tensor) -> Tensor:
        logits = []
        for x_1BC in x_TBC.split(1):
            current, before = self.inputs(x_1BC), self.state.read("s")
            s_1BC = self.neuron(
                current + self.lateral(torch.zeros_like(current) if before is None else before)
            )
            self.state.write("s", self.carry(s_1BC))
            logits.append(self.readout(s_1BC))
        return torch.cat(logits)


def feed_forward(decay: float) -> nn.Sequential:
    return nn.Sequential(
        Linear(INPUTS, HIDDEN),
        LIF(decay, surrogate=Sigmoid()),
        Linear(HIDDEN, HIDDEN),
        LIF(decay, surrogate=Sigmoid()),
        Linear(HIDDEN, CLASSES),
    )


def drawn(model: nn.Module, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with random weights that let it spike, an input, targets; in float64."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scaled = noise * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3 + 0.2 * noise
        parameter.data.copy_(scaled)
    if isinstance(model, Recurrent):
        # A contraction, so that the rates have one fixed point.
        model.lateral.weight.data.mul_(0.8 / torch.linalg.matrix_norm(model.lateral.weight, 2))
    x_BC = torch.rand(BATCH, INPUTS, generator=generator, dtype=torch.float64)
    return model, x_BC, torch.randint(CLASSES, (BATCH,), generator=generator)


def weighted_rates(model: nn.Module, x_TBC: Tensor, decay: float) -> list[Tensor]:
    """sum_t decay^(T-t) s[t] / sum_t decay^(T-t) of every neuron, simulated."""
    record = spikes_of(model)
    outputs(model, x_TBC)
    w_T = decay ** torch.arange(len(x_TBC) - 1, -1, -1, dtype=torch.float64)
    return [
        torch.einsum("t,tbc->bc", w_T / w_T.sum(), torch.cat(spikes)) for spikes in record.values()
    ]


def is_between_its_bounds(current_BC: Tensor) -> Tensor:
    """The derivative of the clamp."""
    return ((current_BC > 0) & (current_BC < 1)).double()


def error_of_rates(readout: Linear, r_BC: Tensor, target_B: Tensor) -> Tensor:
    return (
        torch.softmax(r_BC @ readout.weight.T + readout.bias, 1)
        - nn.functional.one_hot(target_B, CLASSES)
    ) / BATCH


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


DESCENTS = [
    pytest.param(*network, decay, steps, marks=() if (steps, decay) == quick else pytest.mark.full)
    for *network, quick in (
        (feed_forward, dsr_by_hand, (20, 0.5)),
        (Recurrent, ide_by_hand, (20, 0.9)),
    )
    for decay in (0.5, 0.9)
    for steps in (6, 20)
]


@pytest.mark.parametrize(("build", "of_rates", "decay", "steps"), DESCENTS)
def test_it_descends_where_the_rates_do(build, of_rates, decay, steps):
    for seed in range(NETWORKS):
        model, x_BC, target = drawn(build(decay), seed)
        x_TBC = x_BC.expand(steps, -1, -1)
        rates = weighted_rates(model, x_TBC, decay)
        assert all(0.05 < r.mean() < 0.95 for r in rates)
        wanted = of_rates(model, x_BC, target, rates)
        for first in ("plain", "traced"):
            got = gradients(OTTT(first=first), model, x_TBC, cross_entropy(target))
            cosines = {
                name: nn.functional.cosine_similarity(
                    g.flatten(), got[name].flatten(), dim=0
                ).item()
                for name, g in wanted.items()
            }
            assert len(cosines) == 3 and min(cosines.values()) > 0, cosines
