"""Weights that are made of the parameters, made once for all slices of a batch, against each slice
making its own.

Outputs for a static input are tested in test_static_input.py.
"""

# T time, B batch

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules import bptt, ottt, sltt
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking import synapse
from pipeline.spiking.binary import Binarization, binarize
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.slice_cache import SliceCache, StaticInput
from pipeline.spiking.state import State, fresh_state, state_bytes
from pipeline.spiking.synapse import Conv2d, Linear, effective_weight
from tests.helpers.rule_networks import attached, cross_entropy
from tests.spiking.test_static_input import NEURON, distance, head, images, learn, lively, peaks

STEPS = 4


def small(weights: str = "standardized", *, once_per_image: bool = False) -> nn.Module:
    torch.manual_seed(0)
    made = "standardized" if weights == "standardized" else "plain"
    first, second = (Conv2d(channels, 4, 3, padding=1, weights=made) for channels in (2, 4))
    last = Linear(4, 3, weights=made)
    if made == "plain":
        for each in (first, second, last):
            binarize(each, weights)  # type: ignore[arg-type]
    stem = StaticInput(first) if once_per_image else first
    return lively(nn.Sequential(stem, LIF(**NEURON), second, LIF(**NEURON), head(), last))


def check_alone(rule: Callable[[], Rule], model: nn.Module, x_TB: Tensor, target_B: Tensor) -> None:
    """The gradients of a batch are those of slices that share nothing; no parameter lacks one."""
    twin = copy.deepcopy(model)
    got = trained(rule(), model, x_TB, target_B)
    with each_slice_its_own():
        expected = trained(rule(), twin, x_TB, target_B)
    assert distance(got, expected) < 1e-12
    assert all(float(got[name].abs().max()) > 1e-4 for name, _ in model.named_parameters())


class Sum(nn.Module):
    """Stems see the image, and a neuron the sum of their currents and a shift, whose gradient
    autograd gives all as one tensor.

    `early`: at the first time step alone.
    """

    def __init__(self, *, stems: int, early: bool) -> None:
        super().__init__()
        self.early, self.state = early, State("Sum")
        self.stems = nn.ModuleList(StaticInput(Conv2d(2, 4, 3, padding=1)) for _ in range(stems))
        self.shift = nn.Parameter(torch.zeros(2, 4, 6, 6))

    def forward(self, x_TB: Tensor) -> Tensor:
        if self.early and self.state.read("seen") is not None:
            return self.shift.unsqueeze(0)
        self.state.write("seen", torch.ones(()))
        return sum((stem(x_TB) for stem in self.stems), self.shift.unsqueeze(0))


@contextmanager
def each_slice_its_own() -> Iterator[None]:
    """Nothing is shared, by any rule."""

    @contextmanager
    def alone(model: nn.Module, **about: object) -> Iterator[SliceCache]:
        yield SliceCache(**about)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        for module in (bptt, ottt, sltt):
            patch.setattr(module, "slice_cache", alone)
        yield


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """How often the weights of the second synapse are made, and how often a gradient comes back to
    its parameter.
    """
    counts: Counter[str] = Counter()

    def noted(each: Linear | Conv2d) -> Tensor:
        counts["made"] += each is model[2]  # type: ignore[index]
        return effective_weight(each)

    weight: Any = model[2].weight  # type: ignore[index]
    hook = weight.register_hook(lambda g: counts.update(backwards=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synapse, "effective_weight", noted)
        yield counts
    hook.remove()


def trained(rule: Rule, model: nn.Module, x_TB: Tensor, target_B: Tensor) -> dict[str, Tensor]:
    """Gradients, loss and logits of one batch in two unequal micro-batches, every gradient times
    1/512 as of a scaled loss.
    """
    rule.attach(model)
    found = {}
    for first, end in ((0, 2), (2, len(target_B))):
        seen = learn(
            rule,
            model,
            x_TB[:, first:end],
            cross_entropy(target_B[first:end]),
            share=(end - first) / len(target_B) / 512,
            step=3,
            rows=(first, end),
        )
        found[f"loss {first}"] = torch.stack([o.loss for o in seen]).sum()
        found[f"logits {first}"] = torch.stack([o.logits for o in seen]).sum(0)
    return found | {
        name: 512 * p.grad for name, p in model.named_parameters() if p.grad is not None
    }


# Of two micro-batches: how often weights are made and met by a gradient; BPTT in one slice and what
# is computed again differ.
RULES: dict[str, tuple[Callable[[], Rule], tuple[int, int]]] = {
    "BPTT": (BPTT, (2, 2)),
    "BPTT in slices": (lambda: BPTT(chunk=1), (2, 2)),
    "BPTT in uneven slices": (lambda: BPTT(chunk=3), (2, 2)),
    "BPTT recomputed": (lambda: BPTT(recompute=True), (4, 4)),
    "BPTT truncated": (lambda: BPTT(truncate=1), (2, 2)),
    "SLTT": (SLTT, (2, 2)),
    "SLTT in slices": (lambda: SLTT(chunk=3), (2, 2)),
    "SLTT-1": (lambda: SLTT(k=1), (2, 2)),
    "SLTT-2": (lambda: SLTT(k=2, rescale=True), (2, 2)),
    "OTTT-A": (OTTT, (2, 2)),
    "OTTT-A, all traced": (lambda: OTTT(first="traced", readout="traced"), (2, 2)),
}


@pytest.mark.parametrize(
    ("name", "early"),
    [("SLTT", False), ("SLTT", True), ("SLTT-2", False), ("BPTT truncated", True)],
)
@pytest.mark.parametrize("stems", [1, 2])
def test_gradients_that_autograd_leaves_as_one_add_up_apart(
    name: str, early: bool, stems: int
) -> None:
    """Of stems and of a parameter with the shape of their currents, where a micro-batch has two
    samples.
    """
    stem, conv = Sum(stems=stems, early=early), Conv2d(4, 4, 3, padding=1)
    model = lively(nn.Sequential(stem, LIF(**NEURON), conv, LIF(**NEURON), head(), Linear(4, 3)))
    x_BCHW, target_B = images(4)
    check_alone(RULES[name][0], model, repeat(x_BCHW, STEPS), target_B)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("weights", ["standardized", "scaled", "learnable"])
@pytest.mark.parametrize("image", ["recording", "still", "still, its first synapse once"])
def test_made_once_is_made_by_each(name: str, weights: Binarization, image: str) -> None:
    rule, (made, backwards) = RULES[name]
    model, (x_BCHW, target_B) = small(weights, once_per_image="once" in image), images()
    x_TB = repeat(x_BCHW, STEPS)
    if image == "recording":
        x_TB = x_TB * torch.arange(1, STEPS + 1, dtype=torch.float64).view(-1, 1, 1, 1, 1) / STEPS
    twin = copy.deepcopy(model)
    with counted(model) as counts:
        trained(rule(), model, x_TB, target_B)
    assert counts == {"made": made, "backwards": backwards}
    check_alone(rule, twin, x_TB, target_B)
    assert state_bytes(model) == 0
    assert all(m.slice_cache is None for m in model.modules() if hasattr(m, "slice_cache"))


def test_weights_that_move_within_a_batch_are_made_at_each_step() -> None:
    """OTTT-O."""
    (x_BCHW, target_B), (rule, model) = images(), attached(OTTT(update="step"), small())
    with counted(model) as counts:
        learn(rule, model, repeat(x_BCHW, STEPS), cross_entropy(target_B))
    assert counts == {"made": STEPS, "backwards": STEPS}


class Early(nn.Module):
    """Adds what its synapse makes of the first two time steps, and nothing after them."""

    def __init__(self, synapse: Linear) -> None:
        super().__init__()
        self.synapse, self.state = synapse, State("Early")

    def forward(self, x_TBC: Tensor) -> Tensor:
        outputs = []
        for x_1BC in x_TBC.split(1):
            passed = self.state.read("passed")
            count = x_1BC.new_zeros(()) if passed is None else passed
            outputs.append(x_1BC + self.synapse(x_1BC) if count < 2 else x_1BC)
            self.state.write("passed", count + 1)
        return torch.cat(outputs)


def wide(weights: str) -> nn.Module:
    """One synapse has many more weights than a micro-batch has inputs and outputs."""
    made: Any = "standardized" if weights == "standardized" else "plain"
    layers = [
        *(Conv2d(2, 4, 3, padding=1), LIF(**NEURON), head(), Linear(4, 60, weights=made)),
        *(LIF(**NEURON), Linear(60, 50, weights=made), LIF(**NEURON), Linear(50, 3)),
    ]
    return lively(nn.Sequential(*layers))


@pytest.mark.parametrize("name", ["SLTT", "SLTT in slices", "SLTT-1", "SLTT-2", "OTTT-A"])
@pytest.mark.parametrize("weights", ["plain", "standardized"])
@pytest.mark.parametrize("packs", [False, True])
def test_gradients_of_large_weights_are_computed_together(
    name: str, weights: str, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for them counts as state, and takes no more than the weights."""
    model, (x_BCHW, target_B) = wide(weights), images(3)
    if packs:
        synapse.pack_spikes(model)
    gradients: Counter[tuple[int, int]] = Counter()
    computed = synapse._weight_gradient

    def counted(factors: Any, gs: Any, weight: Tensor, geometry: Any) -> Tensor:
        gradients[tuple(weight.shape)[:2]] += 1  # type: ignore[index]
        return computed(factors, gs, weight, geometry)

    with monkeypatch.context() as patch:
        patch.setattr(synapse, "_weight_gradient", counted)
        trained(RULES[name][0](), copy.deepcopy(model), repeat(x_BCHW, STEPS), target_B)
    assert gradients[50, 60] == (0 if name == "SLTT-1" else 2)  # one for each micro-batch
    check_alone(RULES[name][0], copy.deepcopy(model), repeat(x_BCHW, STEPS), target_B)
    states = peaks(RULES[name][0](), copy.deepcopy(model), repeat(x_BCHW, STEPS), target_B)[1]
    with each_slice_its_own():
        alone = peaks(RULES[name][0](), model, repeat(x_BCHW, STEPS), target_B)[1]
    shared = 2 if weights == "standardized" else 0  # weights and the gradients that they collect
    assert states - alone <= (1 + shared) * 8 * (60 * 50 + 4 * 60)


class Sizes(nn.Module):
    """One synapse at two sizes, and with a weight that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv2d(4, 16, 7, padding=3)
        self.linear = Linear(16, 64)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        small_TB = self.conv(x_TBCHW[..., ::3, ::3]).mean((-2, -1))
        tiny_TB = self.conv(x_TBCHW[..., :1, :1]).mean((-2, -1))
        both_TB = small_TB + tiny_TB
        return self.linear(both_TB) + self.linear(both_TB, self.linear.weight.abs())


def test_postponed_gradients_of_a_synapse_at_two_sizes_and_with_a_given_weight() -> None:
    x_BCHW, target_B = images(3)
    layers = (Conv2d(2, 4, 3, padding=1), LIF(**NEURON), Sizes(), Linear(64, 3))
    check_alone(SLTT, lively(nn.Sequential(*layers)), repeat(x_BCHW, STEPS), target_B)


@pytest.mark.parametrize("weights", ["plain", "standardized"])
def test_no_gradient_of_large_weights_is_lost_if_the_last_slice_does_not_run_them(
    weights: Any,
) -> None:
    early = Early(Linear(96, 96, weights=weights))
    conv, widen = Conv2d(2, 4, 3, padding=1), Linear(4, 96)
    layers = (conv, LIF(**NEURON), head(), widen, LIF(**NEURON), early, Linear(96, 3))
    x_BCHW, target_B = images(3)
    check_alone(SLTT, lively(nn.Sequential(*layers)), repeat(x_BCHW, STEPS), target_B)


@pytest.mark.parametrize(
    "rule",
    [SLTT, lambda: SLTT(chunk=3), lambda: BPTT(truncate=1)],
    ids=["SLTT", "in slices", "truncated"],
)
def test_nothing_is_lost_of_what_the_last_slice_does_not_read(rule: Callable[[], Rule]) -> None:
    early, conv = Early(Linear(4, 4, weights="standardized")), Conv2d(2, 4, 3, padding=1)
    model = lively(nn.Sequential(conv, LIF(**NEURON), head(), early, Linear(4, 3)))
    x_BCHW, target_B = images()
    check_alone(rule, model, repeat(x_BCHW, STEPS), target_B)


def test_plain_weights_are_nobodys_state() -> None:
    """The parameter itself is what every slice reads, and its own gradient adds up."""
    plain = nn.Sequential(Conv2d(2, 4, 3, padding=1), LIF(**NEURON), head(), Linear(4, 3))
    (rule, model), (x_BCHW, target_B) = attached(SLTT(), plain.double()), images()
    for objective in rule.loss_terms(model, repeat(x_BCHW, STEPS), cross_entropy(target_B)):
        assert state_bytes(model) == 6 * 4 * 6 * 6 * 8  # the membranes
        objective.backward.backward()


@pytest.mark.parametrize(
    ("rule", "held"), [(SLTT, 2), (lambda: SLTT(k=1), 1), (lambda: BPTT(chunk=1), 1)]
)
def test_memory(rule: Callable[[], Rule], held: int) -> None:
    """What the slices share counts as state, the weights and the gradient that they collect; no
    more is kept for a backward.
    """
    x_BCHW, target_B = images()
    batch = (repeat(x_BCHW, STEPS).contiguous(), target_B)
    saved, states = peaks(rule(), small(), *batch)
    with each_slice_its_own():
        saved_alone, states_alone = peaks(rule(), small(), *batch)
    numbers = 4 * 2 * 9 + 4 * 4 * 9 + 3 * 4
    assert states - states_alone == held * numbers * 8
    assert saved <= saved_alone + numbers * 8


def test_outside_a_rule_each_call_makes_them() -> None:
    model, (x_BCHW, _) = small(), images()
    with counted(model) as counts, torch.no_grad(), fresh_state(model):
        for x_1B in repeat(x_BCHW, STEPS).split(1):
            model(x_1B)
    assert counts == {"made": STEPS}
