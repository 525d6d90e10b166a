# T time, B batch, C channels, H W pixels, K classes

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.vgg import vgg_sws, vgg_sws_f
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.limit import SpectralLimit
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import State, fresh_state, state_bytes, states_of
from pipeline.spiking.surrogate import Sigmoid
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import (
    attached,
    batch,
    cross_entropy,
    difference,
    gradients,
    gradients_on,
    learn,
    lif_network,
)
from tests.helpers.traces import traces_of


def smallest_model() -> nn.Sequential:
    return lif_network()


def contract_rules() -> list[OTTT]:
    return [OTTT(), OTTT(chunk=2), OTTT(update="step"), OTTT(first="traced", readout="plain")]


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("decay", [0.5, 0.9])
@pytest.mark.parametrize("more", [{}, {"scale_input": True}, {"subtract": 1.3}])
def test_the_last_weight_that_feeds_a_lif_learns_as_under_bptt(decay, more):
    model = lif_network(decay=decay, **more)
    got, full = gradients_on(6, model, OTTT(first="traced"), BPTT())
    largest = {name: g.abs().max() for name, g in full.items()}
    apart = {name: (g - full[name]).abs().max() for name, g in got.items()}
    assert largest["2.weight"] > 1e-3 and apart["2.weight"] < 1e-12
    assert (
        apart["0.weight"] > 0.05 * largest["0.weight"]
    )  # what a layer does to later steps of the next is not seen
    assert apart["2.bias"] > 0.05 * largest["2.bias"]  # a bias has no trace


@pytest.mark.parametrize("neuron", [{"reset": "zero"}, {"reset_gradient": "kept"}])
def test_no_weight_does_where_the_reset_depends_on_the_potential(neuron):
    model = lif_network(decay=0.5, **neuron)
    got, full = gradients_on(6, model, OTTT(first="traced"), BPTT())
    assert all((got[name] - full[name]).abs().max() > 1e-3 for name in ("0.weight", "2.weight"))


def test_one_hidden_layer_with_a_plain_readout_is_bptt_in_every_weight():
    model = nn.Sequential(Linear(6, 8, bias=False), LIF(), Linear(8, 3)).double()
    x_TBC, target = batch(6)
    rules = (OTTT(first="traced", readout="plain"), BPTT())
    got, full = (gradients(rule, model, 2 * x_TBC, cross_entropy(target)) for rule in rules)
    assert full["0.weight"].abs().max() > 1e-2
    assert difference(got, full) < 1e-12


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_readout(decay):
    """Traced: sum_t e[t] a[t]^T; plain: BPTT's, sum_t e[t] s[t]^T."""
    model = lif_network(decay=decay)
    x_TBC, target = batch(6)
    with torch.no_grad(), fresh_state(model):
        s_TBC = model[:4](x_TBC)
        e_TBK = (
            (torch.softmax(model[4](s_TBC), -1) - nn.functional.one_hot(target, 3))
            / target.numel()
            / 6
        )
    traces = traces_of(s_TBC, decay)
    got = {
        choice: gradients(OTTT(readout=choice), model, x_TBC, cross_entropy(target))
        for choice in ("traced", "plain")
    }
    assert (
        got["traced"]["4.weight"] - torch.einsum("tbk,tbc->kc", e_TBK, traces)
    ).abs().max() < 1e-12
    assert (
        got["plain"]["4.weight"] - torch.einsum("tbk,tbc->kc", e_TBK, s_TBC)
    ).abs().max() < 1e-12
    full = gradients(BPTT(), model, x_TBC, cross_entropy(target))
    assert (got["plain"]["4.weight"] - full["4.weight"]).abs().max() < 1e-12
    assert (got["traced"]["4.weight"] - full["4.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 6), (0.5, 1), (0.9, 1)])
@pytest.mark.parametrize("rule", [OTTT(), OTTT(first="traced"), OTTT(readout="plain")])
def test_without_leak_or_at_one_step_it_is_sltt(decay, steps, rule):
    model = lif_network(decay=decay)
    got, expected = gradients_on(steps, model, rule, SLTT())
    assert expected["0.weight"].abs().max() > 1e-3
    assert difference(got, expected) < 1e-14


def sigmoid_window(x: Tensor) -> Tensor:
    return 4 * torch.sigmoid(4 * x) * (1 - torch.sigmoid(4 * x))


def three_factors(
    model: nn.Sequential, x_TBC: Tensor, target_B: Tensor, *, decay: float
) -> dict[str, tuple[Tensor, ...]]:
    """Per weight: what came in, its surrogate, and the error from above at every step, each logged
    by itself; no autograd.
    """
    w1, b1, w2, b2, w3, b3 = (p.detach() for p in model.parameters())
    v1, v2 = (torch.zeros(x_TBC.shape[1], w.shape[0], dtype=torch.float64) for w in (w1, w2))
    log: dict[str, list[list[Tensor]]] = {
        name: [[], [], []] for name in ("0.weight", "2.weight", "4.weight")
    }
    onehot = nn.functional.one_hot(target_B, 3).double()
    for x in x_TBC:
        u1 = decay * v1 + x @ w1.T + b1
        s1 = (u1 >= 1).double()
        u2 = decay * v2 + s1 @ w2.T + b2
        s2 = (u2 >= 1).double()
        v1, v2 = u1 - s1, u2 - s2
        e3 = (torch.softmax(s2 @ w3.T + b3, 1) - onehot) / len(x) / len(x_TBC)
        e2 = e3 @ w3
        e1 = (e2 * sigmoid_window(u2 - 1)) @ w2
        windows = (sigmoid_window(u1 - 1), sigmoid_window(u2 - 1), torch.ones_like(e3))
        for name, values in zip(
            log, zip((x, s1, s2), windows, (e1, e2, e3), strict=True), strict=True
        ):
            for place, value in zip(log[name], values, strict=True):
                place.append(value)
    return {name: tuple(torch.stack(place) for place in places) for name, places in log.items()}


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_an_update_is_trace_times_surrogate_times_error(decay):
    model = lif_network(decay=decay, surrogate=Sigmoid())
    x_TBC, target = batch(6)
    got = gradients(OTTT(first="traced"), model, x_TBC, cross_entropy(target))
    for name, (x, psi, e) in three_factors(model, x_TBC, target, decay=decay).items():
        assert (
            got[name] - torch.einsum("tbo,tbo,tbi->oi", e, psi, traces_of(x, decay))
        ).abs().max() < 1e-12
    plain = gradients(OTTT(), model, x_TBC, cross_entropy(target))
    x, psi, e = three_factors(model, x_TBC, target, decay=decay)["0.weight"]
    assert (plain["0.weight"] - torch.einsum("tbo,tbo,tbi->oi", e, psi, x)).abs().max() < 1e-12


def test_under_autocast_the_traces_stay_in_fp32():
    rule, model = OTTT(), lif_network().float()
    x_TBC, target = batch(4)
    rule.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        for objective in rule.loss_terms(model, x_TBC.float(), cross_entropy(target)):
            kept = {
                name: value.dtype
                for state in states_of(model)
                for name, value in state.values.items()
            }
            assert kept == {"v": torch.float32, "a": torch.float32}
            assert objective.backward is not None
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


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
]


@pytest.mark.parametrize("weights", ["plain", "standardized"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_against_two_forwards(geometry, weights):
    convs = [
        Conv2d(2, 4, 3, padding=1),
        Conv2d(4, 6, **geometry, weights=weights),
        Conv2d(6, 3, 1, weights=weights),
    ]
    readout = Linear(3, 3).double()
    for synapse in (*convs, readout):
        nn.init.normal_(synapse.weight)  # large enough to spike
        if synapse.gain is not None:
            nn.init.normal_(synapse.gain, 4)
    first, second, third = (conv.double() for conv in convs)

    def neuron() -> LIF:
        return LIF(surrogate=Sigmoid())

    def network(wrap) -> nn.Sequential:
        return nn.Sequential(
            first, neuron(), wrap(second), neuron(), wrap(third), neuron(), Pool(), wrap(readout)
        )

    x_TBCHW = 3 * torch.randn(5, 2, 2, 7, 6, dtype=torch.float64)
    loss_of = cross_entropy(torch.tensor([0, 2]))
    got = gradients(OTTT(), network(lambda op: op), x_TBCHW, loss_of)
    expected = gradients(SLTT(), network(lambda op: TwoForwards(op, 0.5)), x_TBCHW, loss_of)
    assert all(
        g.abs().max() > 1e-5 for name, g in got.items() if "weight" in name or "gain" in name
    )
    assert difference(got, {name.replace(".op.", "."): g for name, g in expected.items()}) < 1e-12


class Pool(nn.Module):
    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return x_TBCHW.mean((3, 4))


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
    x_TBCHW = 3 * torch.randn(5, 2, 2, 8, 8, dtype=torch.float64)
    loss_of = cross_entropy(torch.tensor([0, 2]))
    got = gradients(OTTT(), model, x_TBCHW, loss_of)
    expected = gradients(SLTT(), reference, x_TBCHW, loss_of)
    assert all(g.abs().max() > 1e-5 for name, g in got.items() if "weight" in name)
    assert difference(got, {name.replace(".op.", "."): g for name, g in expected.items()}) < 1e-12


# ---------------------------------------------------------------------------------- time and memory


def test_state_is_one_step_of_membranes_and_traces():
    for chunk in (1, 3):
        rule, model = OTTT(chunk=chunk), lif_network()
        x_TBC, target = batch(6)
        rule.attach(model)
        for objective in rule.loss_terms(model, x_TBC, cross_entropy(target)):
            assert objective.backward is not None
            assert state_bytes(model) == 5 * 8 * (
                (8 + 7) + (8 + 7)
            )  # membranes; traces of the second and the last synapse
        assert state_bytes(model) == 0


def total_update(rule: OTTT, lr: float) -> dict[str, Tensor]:
    """How far one batch of plain gradient descent moves each parameter, divided by lr."""
    model = lif_network(decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr)
    x_TBC, target = batch(6)
    rule.attach(model)
    for objective in rule.loss_terms(model, x_TBC, cross_entropy(target)):
        assert objective.backward is not None
        objective.backward.backward()
        if rule.update == "step":
            optimizer.step()
            optimizer.zero_grad()
    if rule.update == "batch":
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_moving_at_every_step_differs_in_second_order_of_the_learning_rate():
    gaps = [
        difference(total_update(OTTT(update="step"), lr), total_update(OTTT(), lr))
        for lr in (1e-4, 5e-5, 2.5e-5)
    ]
    assert gaps[0] > 1e-9
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.02) and gaps[1] / gaps[2] == pytest.approx(
        4, rel=0.02
    )


# ----------------------------------------------------------------------------------------- refusals


def test_batch_norm_is_refused_by_every_name():
    model = nn.Sequential(lif_network(), nn.ModuleDict({"a": BatchNorm(3), "b": nn.BatchNorm2d(3)}))
    with pytest.raises(
        ValueError,
        match=r"OTTT-A: a trace cannot pass batch norm; .* got batch norm at 1\.a, 1\.b$",
    ):
        OTTT().attach(model)


def two_decays() -> nn.Sequential:
    return nn.Sequential(Linear(6, 4), LIF(0.5), Linear(4, 4), LIF(0.9), Linear(4, 3))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: OTTT(update="objective"),  # type: ignore[arg-type]
            r"OTTT: update must be 'batch' or 'step'; got update='objective'",
        ),
        (lambda: OTTT(first="none"), r"OTTT: first must be 'plain' or 'traced'; got first='none'"),
        (
            lambda: OTTT(readout="none"),
            r"OTTT: readout must be 'plain' or 'traced'; got readout='none'",
        ),
        (lambda: OTTT(chunk=0), r"OTTT: chunk must be a whole number in 1\.\.T; got chunk=0"),
        (
            lambda: OTTT(update="step", chunk=2),
            r"OTTT: update='step' moves .* so chunk must be 1; got chunk=2",
        ),
        (lambda: OTTT(chunk=5).check_steps(4), r"OTTT: chunk must be in 1\.\.T; got chunk=5, T=4"),
        (
            lambda: OTTT().attach(lif_network(), over_time="mean"),
            r"OTTT-A: the loss of the mean logits needs all T steps",
        ),
        (
            lambda: OTTT().attach(nn.Sequential(Linear(2, 2))),
            r"OTTT-A: the model must have LIF neurons, .* got Sequential",
        ),
        (lambda: OTTT().attach(LIF()), r"OTTT-A: the model must have synapses, .* got LIF"),
        (
            lambda: OTTT().attach(two_decays()),
            r"OTTT-A: the neurons must share one decay; got 0\.5 at 1, 0\.9 at 3$",
        ),
        (
            lambda: OTTT(0.5).attach(two_decays()),
            r"OTTT-A: decay must be that of the neurons, .* got 0\.5 and 0\.9 at 3$",
        ),
        (
            lambda: OTTT(update="step").attach(nn.Sequential(LIF(), nn.Linear(2, 2))),
            (
                r"OTTT-O: the layers with weights must be of pipeline\.spiking\.synapse, .* got"
                r" torch's Linear at 1"
            ),
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_leak_may_be_said():
    OTTT(0.5).attach(lif_network(decay=0.5))


class BackToFront(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.readout, self.neuron, self.hidden = Linear(4, 3), LIF(), Linear(6, 4)

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.readout(self.neuron(self.hidden(x_TB)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            OTTT(),
            (
                r"OTTT-A: first='plain' means readout, by order of registration, but hidden ran in"
                r" its place; .*first='traced'"
            ),
        ),
        (
            OTTT(first="traced", readout="plain"),
            r"readout='plain' means hidden, .* but readout ran in its place",
        ),
    ],
)
def test_a_first_or_last_synapse_that_runs_elsewhere_is_refused(rule, message):
    model = BackToFront()
    rule.attach(model)
    x_TBC, target = batch(4)
    with pytest.raises(ValueError, match=message):
        learn(rule.loss_terms(model, x_TBC.float(), cross_entropy(target)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    rule.release()
    traced = OTTT(first="traced")
    traced.attach(model)
    learn(traced.loss_terms(model, x_TBC.float(), cross_entropy(target)))


@pytest.mark.parametrize("build", [vgg_sws, vgg_sws_f, nf_resnet18_small])
def test_the_networks_run_their_first_and_last_synapse_where_they_are_registered(build):
    small = (
        {"width": 4, "blocks": (1, 1)} if build is nf_resnet18_small else {"stages": ((4,), (4,))}
    )
    rule, model = attached(OTTT(readout="plain"), build(3, in_channels=1, **small))
    learn(rule.loss_terms(model, torch.randn(2, 2, 1, 8, 8), cross_entropy(torch.tensor([0, 2]))))


def test_a_synapse_that_runs_twice_in_a_time_step_is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.lif, self.last = (
                Linear(6, 6),
                Linear(6, 6),
                LIF(),
                Linear(6, 3),
            )

        def forward(self, x_TB: torch.Tensor) -> torch.Tensor:
            return self.last(self.lif(self.again(self.again(self.first(x_TB)))))

    for chunk in (1, 2, 4):
        rule, model = attached(OTTT(chunk=chunk), Twice().double())
        x_TBC, target = batch(4)
        message = (
            rf"OTTT-A: a synapse must run once in a time step, .* got again, which ran {2 * chunk}"
            rf" times in {chunk}$"
        )
        with pytest.raises(ValueError, match=message):
            list(rule.loss_terms(model, x_TBC, cross_entropy(target)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_a_feedback_that_starts_a_step_late_is_not_taken_for_a_second_run(chunk):
    equilibrium = Equilibrium(
        inject=Linear(6, 5), feedback=Linear(5, 5, bias=False), neurons=[IF()]
    )
    model, (x_TBC, target) = nn.Sequential(equilibrium, Linear(5, 3)).double(), batch(4)
    one = gradients(OTTT(), model, x_TBC, cross_entropy(target))
    assert (
        difference(gradients(OTTT(chunk=chunk), model, x_TBC, cross_entropy(target)), one) < 1e-14
    )


def test_a_limited_synapse_is_seen_running():
    model, (x_TBC, target) = (
        nn.Sequential(SpectralLimit(Linear(6, 5, bias=False)), LIF(), Linear(5, 3)).double(),
        batch(4),
    )
    assert gradients(OTTT(), model, x_TBC, cross_entropy(target))
    limited = SpectralLimit(Linear(6, 6, bias=False))
    rule, twice = (
        OTTT(),
        nn.Sequential(Linear(6, 6), limited, LIF(), limited, LIF(), Linear(6, 3)).double(),
    )
    rule.attach(twice)
    with pytest.raises(
        ValueError,
        match=(
            r"OTTT-A: a synapse must run once in a time step, .* got 1.synapse, which ran 2 times"
            r" in 1"
        ),
    ):
        list(rule.loss_terms(twice, x_TBC, cross_entropy(target)))
