"""HLOP: what it keeps, how tasks follow one another, what it learns from and what it refuses.

Its lateral neurons are tested in tests/spiking/test_subspace.py.
"""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.data.datasets.tasks import Permuted
from pipeline.models.mlp import mlp
from pipeline.models.parts import copy_neuron
from pipeline.recipe.recipe import Phase, Recipe, spec
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.error_feedback import FixedFeedback, sign_symmetric
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.norm_limit import SpectralLimit
from pipeline.spiking.rate import RateIF, RateLIF, WeightedRates
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.train.build import check_recipe
from tests.helpers.references import summed, three_factors
from tests.helpers.rule_networks import (
    Network,
    attached,
    batch,
    cross_entropy,
    difference,
    drawn,
    gradients_on,
    learn,
    lif_network,
    outputs,
    refusals,
)
from tests.helpers.small import small_recipe
from tests.helpers.traces import traces_of
from tests.rules.test_opzo import smallest_model as with_readouts

ROWS = ((3, 4, 3), (1, 2, 2))
SIZES = ((12, 60), (60, 60), (60, 3))
# Batches of the old task: after 80 the rows of the last synapse still miss 4e-10 of its inputs
LEARNING = 160


def contract_rules() -> list[HLOP]:
    return [
        HLOP(SLTT(), rows=ROWS),
        HLOP(BPTT(), rows=ROWS, learn_from="rates"),
        HLOP(OTTT(), rows=ROWS, learn_from="traces", learning_rate=(0.001, 0.01, 0.01)),
    ]


def train(
    rule: Rule,
    model: nn.Module,
    x_TB: Tensor,
    target_B: Tensor,
    *,
    step: int,
    optimizer: Any = None,
) -> None:
    model.zero_grad()
    learn(rule.loss_terms(model, x_TB, cross_entropy(target_B), step=step))
    rule.end_of_batch()
    if optimizer is not None:
        optimizer.step()


def rows_of(rule: HLOP, index: int, *, name: str = "old") -> Tensor:
    return rule.subspaces[index].get_buffer(name)


def moments_of(rule: HLOP, index: int) -> Tensor:
    """S of the last batch."""
    return rule._recorders[index].last.second_CC  # type: ignore[union-attr]


def second_moment(x: Tensor) -> Tensor:
    """S of inputs, whatever their time and samples."""
    x_NC = x.flatten(0, -2)
    return x_NC.T @ x_NC / len(x_NC)


def gradient(module: nn.Module, name: str = "weight") -> Tensor:
    return module.get_parameter(name).grad  # type: ignore[return-value]


def inputs_of(model: nn.Module, names: Sequence[str]) -> list[list[Tensor]]:
    """Fills with what each of the modules is given."""
    seen: list[list[Tensor]] = [[] for _ in names]

    def note(found: list[Tensor], _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].detach())

    for found, name in zip(seen, names, strict=True):
        model.get_submodule(name).register_forward_pre_hook(partial(note, found))
    return seen


def wide_network(neuron: nn.Module = LIF()) -> nn.Sequential:
    neurons = [copy_neuron(neuron) for _ in range(2)]
    synapses = [drawn(Linear(*size), seed=size[1], scale=1.0) for size in SIZES]
    for synapse in synapses:
        synapse.weight.data.div_(synapse.weight.shape[1] ** 0.5)
        synapse.bias.data.div_(2)
    return nn.Sequential(synapses[0], neurons[0], synapses[1], neurons[1], synapses[2]).double()


def old_task() -> tuple[Tensor, Tensor]:
    """4 samples of 4 steps; inputs in 5 of 12 directions, spikes of a layer in at most 16 of 60."""
    x_TB, target_B = batch(4, size=4, features=12)
    basis, _ = torch.linalg.qr(
        (x_TB[0, :, :].repeat(2, 1)[:5] + 0.1 * x_TB[1].repeat(2, 1)[:5].flip(0)).T
    )
    return 2 * x_TB @ basis @ basis.T, target_B


@pytest.mark.parametrize(
    "inner",
    [SLTT, DSR, *(pytest.param(each, marks=pytest.mark.full) for each in (BPTT, OTTT, OPZO))],
)
def test_old_outputs_stay_where_rows_span_the_old_inputs(inner):
    model, rates = wide_network(), (0.1, 0.3, 1.5)
    if inner is DSR:  # fires more, so its inputs are larger
        model, rates = wide_network(RateIF(threshold=1.0)), (0.1, 0.2, 0.4)
    rows = ((5, 20, 20), (2, 4, 4))
    rule = HLOP(inner(), rows=rows, learning_rate=rates, inner_iterations=25)
    rule.attach(model, over_time=rule.over_time_choices[0])
    for step in range(LEARNING):  # the weights stay where they are
        train(rule, model, *old_task(), step=step)
    rule.start_task(model, 1)
    before = copy.deepcopy(model.state_dict())
    old = outputs(model, old_task()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(40):
        x_TB, target_B = batch(5 + step % 7, size=8, features=12)
        train(rule, model, x_TB, target_B, step=LEARNING + step, optimizer=optimizer)
    for name in ("0.weight", "2.weight", "4.weight"):
        assert (model.get_parameter(name) - before[name]).norm() / before[name].norm() > 0.05
    assert (outputs(model, old_task()[0]) - old).abs().max() < 1e-10


def test_what_truncated_rows_miss_bounds_the_change():
    """Without neurons the outputs are W x: their change is dW (x - x H^T H)."""
    x_TB, target_B = batch(4, size=6, features=12)
    rule, projected = attached(
        HLOP(BPTT(), rows=((4,),), learning_rate=0.1), Linear(12, 3, bias=False).double()
    )
    baseline, free = attached(BPTT(), Linear(12, 3, bias=False).double())
    free.load_state_dict(projected.state_dict())
    for step in range(100):
        train(rule, projected, x_TB, target_B, step=step)
    rule.start_task(projected, 1)
    rows = rows_of(rule, 0)
    residual = (x_TB - x_TB @ rows.T @ rows).norm(dim=-1)
    found = []
    for each, linear in ((rule, projected), (baseline, free)):
        old, weight = outputs(linear, x_TB), linear.weight.detach().clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
        for step in range(100, 130):
            train(each, linear, *batch(5, size=8, features=12), step=step, optimizer=optimizer)
        moved = torch.linalg.matrix_norm(linear.weight.detach() - weight, 2)
        found.append(((outputs(linear, x_TB) - old).norm(dim=-1), residual * moved))
    (change, bound), (free_change, free_bound) = found
    assert (change <= bound + 1e-12).all() and change.max() > 0.3 * bound.max() > 1e-3
    assert (free_change > free_bound).any()


def images(size: int = 4, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, size, 2, 7, 6, generator=generator, dtype=torch.float64),
        torch.arange(size) % 3,
    )


@pytest.mark.parametrize(
    "geometry",
    [{"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (3, 1), "dilation": (2, 1)}],
)
def test_a_projected_convolution_is_one_on_projected_patches(geometry):
    (x_TB, target_B), conv = images(), Conv2d(2, 4, **geometry)
    model = Network(
        lambda m, x: m.classifier(m.neuron(m.norm(m.conv(x))).mean((3, 4))),
        conv=conv,
        norm=BatchNorm(4),
        neuron=LIF(),
        classifier=Linear(4, 3),
    ).double()
    rule, _ = attached(HLOP(BPTT(), rows=((4, 2), (1, 1))), model)
    train(rule, model, x_TB, target_B, step=0)
    about = (conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    patches_NC = torch.stack([nn.functional.unfold(x, *about).mT for x in x_TB]).flatten(0, 2)
    assert torch.allclose(moments_of(rule, 0), second_moment(patches_NC), atol=1e-12)
    rule.start_task(model, 1)
    errors: list[Tensor] = []
    conv.register_forward_hook(
        lambda _module, _inputs, y_TB: y_TB.register_hook(errors.append) and None
    )
    train(rule, model, x_TB, target_B, step=1)
    g_NK = errors[0].flatten(0, 1).flatten(2).transpose(1, 2).flatten(0, 1)
    old = rows_of(rule, 0)
    expected = g_NK.T @ (patches_NC - patches_NC @ old.T @ old)
    assert len(old) == 4 and expected.abs().max() > 1e-4
    assert torch.allclose(gradient(conv).flatten(1), expected, atol=1e-13)


def three_batches(rule: HLOP, model: nn.Module, first: int, **how: float) -> set[str]:
    """The names of what they move."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **how)
    for step in range(3):
        train(rule, model, *batch(4 + step), step=first + step, optimizer=optimizer)
    after = model.state_dict()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_after_the_first_task_vectors_and_statistics_rest():
    """Biases, the gain and bias of batch norm, thresholds; its running statistics; and rows of old
    tasks, to the bit.
    """
    norm = BatchNorm(7)
    model = nn.Sequential(Linear(6, 7), norm, RateLIF(), Linear(7, 5), LIF(), Linear(5, 3)).double()
    rule, _ = attached(HLOP(BPTT(), rows=((2, 3, 2), (1, 1, 1))), model)
    # The bias in front of batch norm has no gradient but rounding.
    assert three_batches(rule, model, 0) | {"0.bias"} == set(model.state_dict())
    for task in (1, 2):
        rule.start_task(model, task)
        rows = [rows_of(rule, index).clone() for index in range(3)]
        moved = three_batches(rule, model, 3 * task, momentum=0.9)
        assert moved == {"0.weight", "3.weight", "5.weight"}
        assert all(torch.equal(rows_of(rule, index), rows[index]) for index in range(3))
        assert all(p.requires_grad for p in model.parameters())
    trained = outputs(model, batch(4)[0])
    assert torch.equal(trained, outputs(model.eval(), batch(4)[0])) and norm.frozen
    rule.release()
    assert not norm.frozen


def test_modules_in_skip_are_left_alone():
    model = nn.Sequential(*lif_network(), norm := BatchNorm(3).double())
    (plain,) = gradients_on(4, model, BPTT())
    rule, _ = attached(HLOP(BPTT(), rows=((3, 4), (1, 2)), skip=("4", "5")), model)
    train(rule, model, *batch(4), step=0)
    rule.start_task(model, 1)
    train(rule, model, *batch(4), step=1)
    found = {name: gradient(model, name) for name in plain}
    assert not norm.frozen and not found["2.bias"].any() and not found["0.bias"].any()
    assert all(torch.equal(found[name], plain[name]) for name in ("4.weight", "4.bias"))
    assert not torch.allclose(found["2.weight"], plain["2.weight"], atol=1e-4)


@pytest.mark.parametrize("lateral_steps", [None, 40])
def test_a_fresh_process_goes_on_in_the_middle_of_a_later_task(lateral_steps):
    """The rule is attached, its state loaded, and start_task is not called again."""

    def fresh() -> tuple[HLOP, nn.Sequential]:
        torch.manual_seed(0)
        first, *rest = lif_network()
        model = nn.Sequential(first, BatchNorm(8), *rest).double()
        rule = HLOP(BPTT(), rows=ROWS, lateral_steps=lateral_steps)
        return attached(rule, model, world=World(seed=3))

    def go_on(rule: HLOP, model: nn.Module, steps: range, *, task: int | None = None) -> None:
        if task is not None:
            rule.start_task(model, task)
        for step in steps:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            train(rule, model, *batch(2 + step), step=step, optimizer=optimizer)

    whole, second = fresh(), fresh()
    go_on(*whole, range(2), task=0)
    go_on(*whole, range(2, 4), task=1)
    whole[0].metrics()
    for stopped, going in zip(whole, second, strict=True):
        going.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert second[0].metrics() == whole[0].metrics()
    for each in (whole, second):
        go_on(*each, range(4, 6))
        go_on(*each, range(6, 7), task=2)
    expected, got = (rule.state_dict() | model.state_dict() for rule, model in (whole, second))
    assert got.keys() == expected.keys() and int(whole[0].task) == 2
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_each_task_begins_rows_of_its_own():
    rule, model = attached(HLOP(SLTT(), rows=((2, 3, 2), (1, 0, 1))))
    assert [len(rows_of(rule, index, name="new")) for index in range(3)] == [2, 3, 2]
    for task, sizes in ((1, [2, 3, 2]), (2, [3, 3, 3]), (3, [4, 3, 4])):
        train(rule, model, *batch(4), step=task)
        rule.start_task(model, task)
        assert [len(rows_of(rule, index)) for index in range(3)] == sizes
        for subspace in rule.subspaces:
            identity = torch.eye(len(subspace.rows), dtype=torch.float64)
            assert torch.allclose(subspace.rows @ subspace.rows.T, identity, atol=1e-14)


# ------------------------------------------------------------------------------------------- hears


def test_the_rows_learn_from_the_inputs_of_every_synapse_at_every_step():
    """Against a plain forward; accumulated micro-batches are one batch, whether steps are
    differentiated or not.
    """
    (x_TB, target_B), model = batch(4, size=6), lif_network()
    seen = inputs_of(model, ("0", "2", "4"))
    outputs(model, x_TB)
    first = None
    for inner in (BPTT(), BPTT(recompute=True), SLTT(), SLTT(1), OTTT()):
        rule, model = attached(HLOP(inner, rows=ROWS))
        first = first or rule
        for part in (slice(0, 2), slice(2, 6)):
            learn(rule.loss_terms(model, x_TB[:, part], cross_entropy(target_B[part]), step=0))
        rule.end_of_batch()
        for index, (x,) in enumerate(seen):
            rows, expected = (rows_of(each, index, name="new") for each in (rule, first))
            assert torch.allclose(moments_of(rule, index), second_moment(x), atol=1e-13)
            assert torch.allclose(rows, expected, atol=1e-12)


def test_traces():
    rule, model = attached(HLOP(OTTT(), rows=ROWS, learn_from="traces"))
    (spikes,) = inputs_of(model, ("2",))
    train(rule, model, *batch(4), step=0)
    # The first synapse has no trace.
    for index, factor_TB in ((0, batch(4)[0]), (1, traces_of(torch.cat(spikes), 0.5))):
        assert torch.allclose(moments_of(rule, index), second_moment(factor_TB), atol=1e-13)


def test_rates():
    model = nn.Sequential(
        Linear(6, 8), RateLIF(), Linear(8, 3), WeightedRates(RateLIF().decay)
    ).double()
    rule = HLOP(DSR(), rows=((3, 4), (1, 1)), learn_from="rates")
    rule.attach(model, over_time="mean")
    (spikes,) = inputs_of(model, ("2",))
    train(rule, model, *batch(4), step=0)
    w_T = torch.exp(-0.05 * torch.arange(3, -1, -1, dtype=torch.float64))
    for index, z_TB in ((0, batch(4)[0]), (1, spikes[0])):
        rate_BC = torch.einsum("t,tbc->bc", w_T / w_T.sum(), z_TB)
        assert torch.allclose(moments_of(rule, index), second_moment(rate_BC), atol=1e-12)


@pytest.mark.parametrize("learn_from", ["spikes", "rates"])
def test_a_repeated_frame_is_heard_once(learn_from):
    (x_1B, target_B), (rule, model) = (
        batch(1),
        attached(HLOP(BPTT(), rows=ROWS, learn_from=learn_from)),
    )
    train(rule, model, x_1B.expand(5, -1, -1), target_B, step=0)
    assert torch.allclose(moments_of(rule, 0), second_moment(x_1B), atol=1e-14)


def test_rows_stay_in_single_precision_under_autocast():
    rule, model = attached(HLOP(BPTT(), rows=ROWS), lif_network().float())
    x_TB, target_B = batch(4)
    for task in range(2):
        rule.start_task(model, task)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            learn(rule.loss_terms(model, x_TB.float(), cross_entropy(target_B), step=task))
        rule.end_of_batch()
        torch.testing.assert_close(
            moments_of(rule, 0), second_moment(x_TB.float()), rtol=1e-6, atol=1e-6
        )
    old = rows_of(rule, 2)
    assert old.dtype == torch.float32 and (gradient(model, "4.weight") @ old.T).abs().max() < 1e-6


def test_evaluation_and_broken_batches_are_not_heard():
    rule, model = attached(HLOP(SLTT(), rows=ROWS))
    with pytest.raises(ZeroDivisionError):
        list(rule.loss_terms(model, 100 * batch(4)[0], lambda logits_BK: 1 / 0, step=0))
    train(rule, model, *batch(4), step=1)
    outputs(model, 100 * batch(5)[0])
    assert torch.allclose(moments_of(rule, 0), second_moment(batch(4)[0]), atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_readouts": True},
        {"intermediate": (1,)},
        {"feedback": "random", "local_readouts": True},
    ],
)
def test_every_synapse_with_rows_is_heard(options):
    """A readout, which stands beside the network, hears the spikes that the synapse behind it in
    the network hears.
    """
    rule, model = attached(HLOP(OPZO(**options), rows=((2,) * 5, (1,) * 5)), with_readouts())
    train(rule, model, *batch(4), step=0)
    names = [recorder.name for recorder in rule._recorders if recorder.last is not None]
    assert names == ["0", "2.linear", "3", "5.linear", "6"]
    for readout, onward in ((1, 2), (3, 4)):
        heard = moments_of(rule, readout)
        assert heard.any() and torch.allclose(heard, moments_of(rule, onward), atol=1e-14)


def test_figures_say_what_is_kept_and_what_is_free():
    rule, model = attached(HLOP(SLTT(), rows=ROWS))
    free = {name: value for name, value in rule.metrics().items() if name.startswith("free")}
    assert list(free) == ["free_0", "free_2", "free_4"]
    for step in range(50):
        train(rule, model, *batch(4), step=step)
    figures, x_TB, rows = rule.metrics(), batch(4)[0], rows_of(rule, 0, name="new")
    kept = float((x_TB @ rows.T).square().sum() / x_TB.square().sum())
    assert figures["energy_0"] == pytest.approx(kept, abs=1e-12)
    assert 0.5 < figures["energy_0"] < 1 and figures["free_0"] == 3
    rule.start_task(model, 1)
    assert rule.metrics()["free_0"] == 2


# -------------------------------------------------------------------------------------- error paths


def carriers_of(model: nn.Sequential) -> list[Tensor]:
    synapses = [module for module in model if isinstance(module, Linear)]
    assert all(synapse.backward_weight is not None for synapse in synapses)
    learnt: Any = synapses
    return [synapse.backward_weight(synapse.weight.detach()) for synapse in learnt]


@pytest.mark.parametrize("error", ["sign_symmetric", "feedback"])
def test_another_weight_carries_the_error_down(error):
    """Every factor written out: the synapse that carries the error differs, the weights' own
    gradients follow from it.
    """
    rule, model = attached(HLOP(SLTT(), rows=ROWS, error=error), world=World(seed=5))
    _, *carriers = carriers_of(model)
    rule.release()
    (got,), (plain,) = (
        gradients_on(4, model, each, world=World(seed=5)) for each in (rule, SLTT())
    )
    assert difference(got, summed(three_factors(model, *batch(4), carriers=carriers))) < 1e-12
    assert difference(got, plain) > 1e-2


@pytest.mark.parametrize("shape", [(300, 100), (8, 11, 5, 5)])
def test_the_carriers_have_the_published_scales(shape):
    """Signs: 1 / sqrt(in) of a matrix, sqrt(2 / (k^2 out)) of a convolution. At random:
    kaiming_uniform(sqrt 5).
    """
    weight = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(sign_symmetric(weight), 0.1 * weight.sign())
    published = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    matrix = FixedFeedback(weight, key=2**64 - 1)(weight)
    assert matrix.shape == shape and matrix.dtype == weight.dtype
    assert matrix.std().item() == pytest.approx(published.std().item(), rel=0.05)
    bound = 1 / math.sqrt(weight[0].numel())
    assert abs(matrix.mean()) < 0.002 and 0.99 * bound < matrix.abs().max() <= bound


def test_feedback_depends_on_the_seed_and_the_layer_alone():
    def matrices(seed: int) -> list[Tensor]:
        _, model = attached(HLOP(SLTT(), rows=ROWS, error="feedback"), world=World(seed=seed))
        return carriers_of(model)

    one, again, other = matrices(1), matrices(1), matrices(2)
    assert all(
        torch.equal(a, b) and not torch.allclose(a, c, atol=0.1)
        for a, b, c in zip(one, again, other, strict=True)
    )
    assert not torch.allclose(one[0][:7, :3], one[1][:7, :3], atol=0.1)


# -------------------------------------------------------------------------------------------- bytes

# inputs, and rows of the first task, of each
SYNAPSES = ((6, 3), (8, 4), (7, 3))


@pytest.mark.parametrize(
    ("lateral_steps", "numbers_of"),
    [(None, lambda C, K: C * C), (40, lambda C, K: 2 * K * C + K * K + 1)],
)
def test_its_own_bytes_are_the_rows_and_the_moments_of_a_batch(lateral_steps, numbers_of):
    """By hand, in fp64."""
    rule, model = attached(HLOP(SLTT(), rows=ROWS, lateral_steps=lateral_steps))
    (x_TB, target_B) = batch(4)
    train(rule, model, x_TB, target_B, step=0)
    learn(rule.loss_terms(model, x_TB, cross_entropy(target_B), step=1))
    moments = sum(8 * numbers_of(C, K) for C, K in SYNAPSES)
    there = [vars(recorder.pending).values() for recorder in rule._recorders]
    tensors = [each for values in there for each in values if isinstance(each, Tensor)]
    assert sum(each.nbytes for each in tensors) == moments
    assert all(recorder.last is None for recorder in rule._recorders)
    # The task; rows, their velocity, the energy.
    own = 8 + sum(8 * (2 * K * C + 1) for C, K in SYNAPSES) + moments
    assert rule.bytes() == own
    rule.end_of_batch()
    assert rule.bytes() == own


def test_its_own_bytes_have_the_inner_rules_and_the_feedback_that_is_fixed():
    def own(inner: Rule, **how: Any) -> int:
        rule, model = attached(HLOP(inner, rows=ROWS, **how))
        train(rule, model, *batch(4), step=0)
        return rule.bytes()

    plain, opzo = own(SLTT()), OPZO()
    assert own(opzo) == plain + opzo.bytes() == plain + 2 * (8 + 7) * 3 * 8 + 8
    assert own(SLTT(), error="feedback") == plain + 8 * (6 * 8 + 8 * 7 + 7 * 3)
    assert own(SLTT(), error="sign_symmetric") == plain


# ----------------------------------------------------------------------------------------- refuses


def sgd(**more: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, **more)  # type: ignore[arg-type]


def network_with(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(Linear(6, 8), LIF(), *modules)


def more_tasks_than_room() -> None:
    rule, model = attached(HLOP(BPTT(), rows=((5, 1, 1), (1, 1, 1))))
    for task in (1, 2):
        rule.start_task(model, task)


def rates_of_an_equilibrium() -> None:
    rest = Equilibrium(
        inject=Linear(6, 4), feedback=Linear(4, 4, bias=False), neurons=[IF()], synapses=[]
    )
    rule = HLOP(IDE(), rows=((1, 1, 1),), learn_from="rates")
    rule.attach(nn.Sequential(rest, Linear(4, 3)), over_time="mean")


def tasks_that_come(tasks: int) -> None:
    model = mlp(3, in_features=6, hidden=(8, 7), bias=False)
    rule, _ = attached(HLOP(SLTT(), rows=((2, 2, 2), (1, 1, 1))), model)
    rule.check_tasks(model, tasks)


def recipe_of(rows: tuple, phases: int, **changes: Any) -> None:
    recipe = small_recipe(
        model=spec(mlp, in_features=64, hidden=(8,)),
        rule=spec(HLOP, inner=spec(SLTT), rows=rows),
        phases=tuple(
            Phase(name=f"order-{task}", data=spec(Permuted, task=task)) for task in range(phases)
        ),
    ).override({"optimizer.weight_decay": 0.0})
    assert Recipe.from_json(recipe.to_json()) == recipe
    check_recipe(recipe.override(changes), 1)


test_refuses = refusals(
    [
        (
            lambda: HLOP(HLOP(SLTT(), rows=ROWS), rows=ROWS),
            r"HLOP: inner must be a rule other than HLOP",
        ),
        (
            lambda: HLOP(SLTT(), rows=(3, 4, 3)),
            r"HLOP: rows must have, for each task, .* got rows=\(3, 4, 3\)",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, learning_rate=0.0),
            r"HLOP: learning_rate must be numbers > 0; got learning_rate=0\.0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, inner_iterations=0),
            r"HLOP: inner_iterations must be a whole number >= 1",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, momentum=1.0),
            r"HLOP: momentum must be in 0\.\.1, 1 excluded; got momentum=1\.0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, lateral_steps=0),
            r"HLOP: lateral_steps must be a whole number >= 1; got lateral_steps=0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, learn_from="all"),
            r"HLOP: learn_from must be 'spikes', 'traces' or 'rates'; got learn_from='all'",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, error="fa"),
            r"HLOP: error must be 'backprop', .* or 'feedback'; got error='fa'",
        ),
        (
            lambda: HLOP(OPZO(), rows=ROWS, error="feedback"),
            r"HLOP: error must be 'backprop' with OPZO, .*; got error='feedback'",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=((3, 4),))),
            r"HLOP\(SLTT\): rows must have a number for each of 0, 2, 4; got \(3, 4\)",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS, learning_rate=(1, 2))),
            r"HLOP\(SLTT\): learning_rate must be one number, or one for each",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=((7, 4, 3), (4, 1, 1)))),
            r"HLOP\(SLTT\): .* rows over tasks 0\.\.0 must be at most the 6 inputs of 0; got 7",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS, learn_from="rates").check_steps(4),
            (
                r"HLOP\(SLTT\): learn_from='rates' needs an inner rule that passes all T steps"
                r" to the model at once; got SLTT, which passes 1 of 4"
            ),
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS, skip=("5",))),
            r"HLOP\(SLTT\): skip must name modules of the model; got '5'",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS, learn_from="traces")),
            r"needs an inner rule with traces, .*; got SLTT",
        ),
        (lambda: attached(HLOP(SLTT(), rows=ROWS), over_time="mean"), r"over_time must be 'steps'"),
        (
            lambda: attached(
                HLOP(BPTT(), rows=((3, 4),), learn_from="rates"),
                nn.Sequential(Linear(6, 5), Linear(5, 3)),
            ),
            (
                r"HLOP\(BPTT\): the model must have LIF neurons, because traces and rates use their"
                r" decay;"
                r" got Sequential"
            ),
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=ROWS), network_with(Linear(8, 3, weights="standardized"))
            ),
            (
                r"HLOP\(SLTT\): every layer must be a Linear or Conv2d of .* got standardized"
                r" weights at 2"
            ),
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=ROWS),
                network_with(nn.utils.parametrizations.weight_norm(Linear(8, 3))),
            ),
            r"got parametrised weights at 2",
        ),
        (
            lambda: attached(
                HLOP(SLTT(), rows=ROWS), network_with(SpectralLimit(Linear(8, 8, False)))
            ),
            r"got SpectralLimit, .* at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(Conv2d(4, 4, 3, groups=2))),
            r"got groups=2 at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(nn.Linear(8, 3))),
            r"got torch's Linear at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(nn.BatchNorm1d(8))),
            r"got BatchNorm1d, which cannot be frozen .* at 2",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), network_with(nn.Bilinear(8, 8, 3))),
            r"every matrix must be .*; got 2\.weight",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS), LIF()),
            r"the model must have synapses, .*; got none",
        ),
        (
            lambda: attached(HLOP(SLTT(), rows=ROWS))[0].start_task(nn.Module(), 2),
            r"tasks must start in order; got task 2 after task 0",
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS).check_optimizer(
                torch.optim.Adam([nn.Parameter(torch.ones(1))])
            ),
            (
                r"HLOP\(SLTT\): the optimizer must be SGD, because its steps are sums of projected"
                r" gradients; got Adam"
            ),
        ),
        (
            lambda: HLOP(SLTT(), rows=ROWS).check_optimizer(sgd(weight_decay=1e-4)),
            (
                r"HLOP\(SLTT\): weight_decay must be 0, because it would change .*; got"
                r" weight_decay=0\.0001"
            ),
        ),
        (
            lambda: train(
                *attached(HLOP(BPTT(chunk=1), rows=ROWS, learn_from="rates")), *batch(4), step=0
            ),
            (
                r"HLOP\(BPTT-chunk-1\): learn_from='rates' needs .* all T steps .*; got"
                r" BPTT-chunk-1, which passes 1 of 4"
            ),
        ),
        (more_tasks_than_room, r"got 1 rows for 0 free directions of synapse 0"),
        (
            rates_of_an_equilibrium,
            r"HLOP\(IDE\): learn_from must not be 'rates' for a model with an Equilibrium, whose",
        ),
        (
            lambda: tasks_that_come(6),
            r"HLOP\(SLTT\): the sum of rows over tasks 0\.\.5 must be at most the 6 inputs of"
            r" layers\.0; got 7",
        ),
        (
            lambda: recipe_of(((3, 2),), 0),
            r"HLOP\(SLTT\): a recipe must have at least 2 phases, .*; got 1",
        ),
        *[
            (lambda changes=changes: recipe_of(((3, 2), (1, 1)), 2, **changes), message)
            for changes, message in (
                (
                    {"optimizer.weight_decay": 1e-4},
                    r"HLOP\(SLTT\): weight_decay must be 0, .*; got weight_decay=0\.0001",
                ),
                (
                    {"optimizer.opt": "adam"},
                    r"HLOP\(SLTT\): the optimizer must be SGD, .*; got Adam",
                ),
                (
                    {"optimizer.opt": "lamb"},
                    r"HLOP\(SLTT\): the optimizer must be SGD, .*; got Lamb",
                ),
                (
                    {"model.weights": "standardized"},
                    r"every layer must be a Linear or .*; got standardized weights at layers\.0",
                ),
                (
                    {"rule.rows": ((3, 8), (1, 2))},
                    r"rows over tasks 0\.\.1 must be at most the 8 inputs of classifier; got 10",
                ),
            )
        ],
    ]
)


def test_as_many_rows_as_there_is_room_for_are_accepted():
    tasks_that_come(5)
    recipe_of(((3, 2), (1, 1)), 2)


def test_a_refused_model_is_free_again():
    model = lif_network()
    with pytest.raises(ValueError, match="traces"):
        HLOP(SLTT(), rows=ROWS, learn_from="traces").attach(model)
    BPTT().attach(model)


def test_sgd_of_every_kind_is_welcome():
    for optimizer in (sgd(), sgd(momentum=0.9), sgd(momentum=0.9, nesterov=True)):
        HLOP(SLTT(), rows=ROWS).check_optimizer(optimizer)


def test_labels_are_distinct():
    made = [
        HLOP(SLTT(), rows=ROWS),
        HLOP(SLTT(), rows=ROWS, lateral_steps=40),
        HLOP(OTTT(), rows=ROWS, error="sign_symmetric"),
    ]
    assert [rule.label for rule in made] == [
        "HLOP(SLTT)",
        "HLOP(SLTT, spiking)",
        "HLOP(OTTT-A, sign-symmetric)",
    ]
    assert [rule.memory for rule in made] == ["constant"] * 3 and HLOP(
        OTTT(update="step"), rows=ROWS
    ).update == "step"
