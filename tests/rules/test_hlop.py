"""HLOP the rule: what it holds still, and how tasks follow one another.

Its lateral neurons are in tests/spiking/test_subspace.py, what they record in test_hlop_hears.py,
what it refuses in test_hlop_refuses.py.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.parts import copy_neuron
from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, RateLIF
from pipeline.spiking.subspace import SecondMoments, orthonormal
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import batch, cross_entropy, gradients, learn, lif_network, outputs

ROWS = ((3, 4, 3), (1, 2, 2))
LEARNING = 160
"""batches of the old task: after 80 the rows of the last synapse still miss 4e-10 of its inputs"""


def smallest_model() -> nn.Sequential:
    return lif_network()


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


def logits(model: nn.Module, x_TB: Tensor) -> Tensor:
    return outputs(model, x_TB)


def rows_of(rule: HLOP, index: int, *, name: str = "old") -> Tensor:
    return rule.subspaces[index].get_buffer(name)


def moments_of(rule: HLOP, index: int) -> Tensor:
    """S of the last batch."""
    last = rule._recorders[index].last
    assert isinstance(last, SecondMoments)
    return last.second_CC


def gradient(module: nn.Module, name: str = "weight") -> Tensor:
    found = module.get_parameter(name).grad
    assert found is not None
    return found


def inputs_of(model: nn.Module, names: Sequence[str]) -> list[list[Tensor]]:
    """Fills with what each of the modules is given."""
    seen: list[list[Tensor]] = [[] for _ in names]

    def note(found: list[Tensor], _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].detach())

    for found, name in zip(seen, names, strict=True):
        model.get_submodule(name).register_forward_pre_hook(partial(note, found))
    return seen


def batch_and_loss(steps: int) -> tuple[Tensor, Any]:
    x_TB, target_B = batch(steps)
    return x_TB, cross_entropy(target_B)


def distance_moved(model: nn.Module, before: dict[str, Tensor], name: str) -> float:
    """How far a weight moved, relative to its length."""
    return ((model.get_parameter(name) - before[name]).norm() / before[name].norm()).item()


def wide_network(neuron: nn.Module = LIF()) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    layers = (
        Linear(12, 60),
        copy_neuron(neuron),
        Linear(60, 60),
        copy_neuron(neuron),
        Linear(60, 3),
    )
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in (p for layer in layers[::2] for p in layer.parameters()):
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=torch.float64)
                / (p.shape[-1] ** 0.5 if p.dim() > 1 else 2)
            )
    return model


def old_task() -> tuple[Tensor, Tensor]:
    """4 samples of 4 steps; inputs in 5 of 12 directions, spikes of a layer in at most 16 of 60."""
    x_TB, target_B = batch(4, size=4, features=12)
    basis = orthonormal(
        x_TB[0, :, :].repeat(2, 1)[:5] + 0.1 * x_TB[1].repeat(2, 1)[:5].flip(0),
        x_TB.new_zeros(0, 12),
    )
    return 2 * x_TB @ basis.T @ basis, target_B


def with_the_old_task_learnt(
    inner: Rule, model: nn.Module, *, learning_rate: Sequence[float] = (0.1, 0.3, 1.5)
) -> HLOP:
    """A rule whose rows know the inputs of the old task to the last bits; the weights stay where
    they are.
    """
    rule = HLOP(
        inner, rows=((5, 20, 20), (2, 4, 4)), learning_rate=learning_rate, inner_iterations=25
    )
    rule.attach(model, over_time=rule.over_time_choices[0])
    for step in range(LEARNING):
        train(rule, model, *old_task(), step=step)
    return rule


@pytest.mark.parametrize("inner", [BPTT, SLTT, OTTT, DSR, OPZO])
def test_old_outputs_stay_where_rows_span_the_old_inputs(inner):
    if inner is DSR:  # fires more, so its inputs are larger
        model = wide_network(RateIF(threshold=1.0))
        rule = with_the_old_task_learnt(DSR(), model, learning_rate=(0.1, 0.2, 0.4))
    else:
        model = wide_network()
        rule = with_the_old_task_learnt(inner(), model)
    rule.start_task(model, 1)
    before = copy.deepcopy(model.state_dict())
    old = logits(model, old_task()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(40):
        x_TB, target_B = batch(5 + step % 7, size=8, features=12)
        train(rule, model, x_TB, target_B, step=LEARNING + step, optimizer=optimizer)
    for name in ("0.weight", "2.weight", "4.weight"):
        assert distance_moved(model, before, name) > 0.05
    assert (logits(model, old_task()[0]) - old).abs().max() < 1e-10


@pytest.mark.parametrize("leaves", ["adam", "weight_decay", "momentum"])
def test_what_is_refused_or_must_be_fresh_moves_old_outputs(leaves):
    """Why: the same run as above with Adam, with weight decay, or with the old task's momentum."""
    model = wide_network()
    rule = with_the_old_task_learnt(BPTT(), model)
    make = {"adam": torch.optim.Adam, "weight_decay": torch.optim.SGD, "momentum": torch.optim.SGD}[
        leaves
    ]
    more = {
        "adam": {"lr": 1e-3},
        "weight_decay": {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4},
    }
    optimizer = make(model.parameters(), **more.get(leaves, {"lr": 0.2, "momentum": 0.9}))
    if leaves == "momentum":
        at = copy.deepcopy(model.state_dict())
        train(rule, model, *old_task(), step=LEARNING, optimizer=optimizer)
        model.load_state_dict(at)
    rule.start_task(model, 1)
    old = logits(model, old_task()[0])
    for step in range(10):
        x_TB, target_B = batch(5 + step % 7, size=8, features=12)
        train(rule, model, x_TB, target_B, step=81 + step, optimizer=optimizer)
    assert (logits(model, old_task()[0]) - old).norm() / old.norm() > 1e-3


def test_what_truncated_rows_miss_bounds_the_change():
    """Without neurons the outputs are W x: their change is dW (x - x H^T H)."""
    x_TB, target_B = batch(4, size=6, features=12)
    projected, free = (Linear(12, 3, bias=False).double() for _ in range(2))
    free.load_state_dict(projected.state_dict())
    rule, baseline = HLOP(BPTT(), rows=((4,),), learning_rate=0.1), BPTT()
    rule.attach(projected)
    for step in range(100):
        train(rule, projected, x_TB, target_B, step=step)
    rule.start_task(projected, 1)
    baseline.attach(free)
    residual = (x_TB - x_TB @ rows_of(rule, 0).T @ rows_of(rule, 0)).norm(dim=-1)
    found = []
    for each, linear in ((rule, projected), (baseline, free)):
        old, weight = logits(linear, x_TB), linear.weight.detach().clone()
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
        for step in range(30):
            train(
                each, linear, *batch(5, size=8, features=12), step=100 + step, optimizer=optimizer
            )
        change = (logits(linear, x_TB) - old).norm(dim=-1)
        found.append(
            (change, residual * torch.linalg.matrix_norm(linear.weight.detach() - weight, 2))
        )
    change, bound = found[0]
    assert (change <= bound + 1e-12).all() and change.max() > 0.3 * bound.max() > 1e-3
    change, bound = found[1]
    assert (change > bound).any()


class ConvNet(nn.Module):
    def __init__(self, **geometry: Any) -> None:
        super().__init__()
        self.conv = Conv2d(2, 4, **geometry)
        self.norm = BatchNorm(4)
        self.neuron = LIF()
        self.classifier = Linear(4, 3)

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.classifier(self.neuron(self.norm(self.conv(x_TB))).mean((3, 4)))


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
    model, (x_TB, target_B) = ConvNet(**geometry).double(), images()
    conv = model.conv
    rule = HLOP(BPTT(), rows=((4, 2), (1, 1)))
    rule.attach(model)
    train(rule, model, x_TB, target_B, step=0)
    patches_NC = torch.cat(
        [
            p.T
            for x in x_TB
            for p in nn.functional.unfold(
                x, conv.kernel_size, conv.dilation, conv.padding, conv.stride
            )
        ]
    )
    assert torch.allclose(
        moments_of(rule, 0), patches_NC.T @ patches_NC / len(patches_NC), atol=1e-12
    )
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


def test_after_the_first_task_vectors_and_statistics_rest():
    """Biases, the gain and bias of batch norm, thresholds; its running statistics; and rows of old
    tasks, to the bit.
    """
    norm = BatchNorm(7)
    model = nn.Sequential(Linear(6, 7), norm, RateLIF(), Linear(7, 5), LIF(), Linear(5, 3)).double()
    rule = HLOP(BPTT(), rows=((2, 3, 2), (1, 1, 1)))
    rule.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    for step in range(3):
        train(rule, model, *batch(4), step=step, optimizer=optimizer)
    # The bias in front of batch norm has no gradient but rounding.
    vectors = [
        name for name, value in model.state_dict().items() if value.dim() == 1 and name != "0.bias"
    ]
    assert len(vectors) == 7 and all(
        not torch.equal(model.state_dict()[name], start[name]) for name in vectors
    )
    for task in (1, 2):
        rule.start_task(model, task)
        before, rows = (
            copy.deepcopy(model.state_dict()),
            [rows_of(rule, index).clone() for index in range(3)],
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            train(rule, model, *batch(4 + step), step=3 * task + step, optimizer=optimizer)
        moved = {
            name
            for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert moved == {"0.weight", "3.weight", "5.weight"}
        assert all(torch.equal(rows_of(rule, index), rows[index]) for index in range(3))
        assert all(p.requires_grad for p in model.parameters())
    trained = logits(model, batch(4)[0])
    assert torch.equal(trained, logits(model.eval(), batch(4)[0])) and norm.frozen
    rule.release()
    assert not norm.frozen


def test_modules_in_skip_are_left_alone():
    model = nn.Sequential(*lif_network(), norm := BatchNorm(3).double())
    rule = HLOP(BPTT(), rows=((3, 4), (1, 2)), skip=("4", "5"))
    plain = gradients(BPTT(), model, *batch_and_loss(4))
    rule.attach(model)
    train(rule, model, *batch(4), step=0)
    rule.start_task(model, 1)
    train(rule, model, *batch(4), step=1)
    assert not norm.frozen
    found = {name: gradient(model, name) for name in plain}
    assert torch.equal(found["4.weight"], plain["4.weight"]) and torch.equal(
        found["4.bias"], plain["4.bias"]
    )
    assert not torch.allclose(found["2.weight"], plain["2.weight"], atol=1e-4)
    assert not found["2.bias"].any() and not found["0.bias"].any()


@pytest.mark.parametrize("lateral_steps", [None, 40])
def test_a_fresh_process_goes_on_in_the_middle_of_a_later_task(lateral_steps):
    """The rule is attached, its state loaded, and start_task is not called again."""

    def fresh() -> tuple[HLOP, nn.Sequential]:
        rule = HLOP(BPTT(), rows=ROWS, lateral_steps=lateral_steps)
        torch.manual_seed(0)
        model = nn.Sequential(
            Linear(6, 8), BatchNorm(8), LIF(), Linear(8, 7), LIF(), Linear(7, 3)
        ).double()
        rule.attach(model, world=World(seed=3))
        return rule, model

    def go_on(rule: HLOP, model: nn.Module, steps: range) -> None:
        for step in steps:
            train(
                rule,
                model,
                *batch(2 + step),
                step=step,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            )

    (whole, whole_model), (second, second_model) = fresh(), fresh()
    whole.start_task(whole_model, 0)
    go_on(whole, whole_model, range(2))
    whole.start_task(whole_model, 1)
    go_on(whole, whole_model, range(2, 4))
    whole.figures()
    second_model.load_state_dict(copy.deepcopy(whole_model.state_dict()))
    second.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert second.figures() == whole.figures()
    for rule, model in ((whole, whole_model), (second, second_model)):
        go_on(rule, model, range(4, 6))
        rule.start_task(model, 2)
        go_on(rule, model, range(6, 7))
    expected, got = (
        whole.state_dict() | whole_model.state_dict(),
        second.state_dict() | second_model.state_dict(),
    )
    assert got.keys() == expected.keys() and int(whole.task) == 2
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_each_task_begins_rows_of_its_own():
    rule, model = HLOP(SLTT(), rows=((2, 3, 2), (1, 0, 1))), lif_network()
    rule.attach(model)
    assert [len(rows_of(rule, index, name="new")) for index in range(3)] == [2, 3, 2]
    for task, sizes in ((1, [2, 3, 2]), (2, [3, 3, 3]), (3, [4, 3, 4])):
        train(rule, model, *batch(4), step=task)
        rule.start_task(model, task)
        assert [len(rows_of(rule, index)) for index in range(3)] == sizes
        for index in range(3):
            rows = torch.cat([rows_of(rule, index), rows_of(rule, index, name="new")])
            assert torch.allclose(
                rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-14
            )
