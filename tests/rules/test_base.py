from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.random import counter_hash
from pipeline.rules.base import LossTerm, Rule, slices
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.rules.spide import SPIDE
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.rate import RateIF
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.plain import Plain
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import (
    FEATURES,
    Network,
    attached,
    batch,
    cross_entropy,
    difference,
    gradients_on,
    lif_network,
    one_batch,
    outputs,
    spikes_of,
)
from tests.rules import test_dsr, test_ide, test_spide


@pytest.mark.parametrize(
    ("state", "first"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)]
)
def test_counter_hash_starts_as_splitmix64(state, first):
    """The first outputs of the reference C code (prng.di.unimi.it/splitmix64.c)."""
    assert counter_hash(state) == first


def test_a_rule_does_not_own_the_network():
    rule, _ = attached(BPTT())
    assert not list(rule.parameters()) and not rule.state_dict() and len(list(rule.modules())) == 1


def loss_terms_of(attached: nn.Module | None, model: nn.Module, x_TB: torch.Tensor) -> None:
    rule = BPTT()
    if attached is not None:
        rule.attach(attached)
    rule.loss_terms(model, x_TB, torch.sum)


def twice(model: nn.Module, first: nn.Module) -> None:
    BPTT().attach(first)
    BPTT().attach(model)


X_TBC = torch.ones(2, 5, 6)
TAKEN = r"BPTT: the model must not be attached to another rule; got BPTT"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: loss_terms_of(None, model, X_TBC),
            r"BPTT: call attach\(model\) before loss_terms",
        ),
        (
            lambda model: BPTT().attach(model, over_time="sum"),
            r"BPTT: over_time must be 'steps' or 'mean'; got over_time='sum'",
        ),
        (
            lambda model: loss_terms_of(model, model, X_TBC[0]),
            r"BPTT: the input must be time first, .* got shape \(5, 6\)",
        ),
        (
            lambda model: loss_terms_of(lif_network(), model, X_TBC),
            r"BPTT: loss_terms needs the attached model",
        ),
        (lambda model: twice(model, model), TAKEN),
        (lambda model: twice(model, model[1]), TAKEN),
        (lambda model: twice(model, nn.Sequential(model)), TAKEN),
    ],
)
def test_refusals_come_at_once(call, message):
    with pytest.raises(ValueError, match=message):
        call(lif_network())


def test_a_wrapper_of_the_attached_model_will_do():
    rule, model, (x_TBC, target) = BPTT(), lif_network(), batch(2)
    rule.attach(model)
    assert len(list(rule.loss_terms(nn.Sequential(model), x_TBC, cross_entropy(target)))) == 1


class Steps(Rule):
    memory = "constant"

    def _loss_terms(self, model, x_TB, loss_fn, step, rows):
        yield LossTerm(
            backward=None, loss=torch.tensor(float(step)), logits=torch.tensor(list(rows))
        )


def test_step_counts_on_and_rows_count_from_zero():
    rule, model = attached(Steps(), nn.Identity())

    def first(**about) -> LossTerm:
        return next(rule.loss_terms(model, torch.zeros(1, 3, FEATURES), torch.sum, **about))

    steps = [first(step=given).loss.item() for given in (None, None, 7, None, 0, None)]
    assert steps == [0, 1, 7, 8, 0, 1]
    assert [first(**rows).logits.tolist() for rows in ({}, {"rows": [4, 9, 2]})] == [
        [0, 1, 2],
        [4, 9, 2],
    ]


def test_slices_own_their_storage_and_a_still_image_stays_still():
    many_B = torch.randn(8, 2, 3)
    recording_TB, still_TB = torch.randn(5, 8, 2, 3)[:, :4], repeat(many_B[:4], 5)
    for x_TB in (recording_TB, still_TB):
        parts = list(slices(x_TB, 2))
        assert torch.equal(torch.cat(parts), x_TB) and [len(part) for part in parts] == [2, 2, 1]
        assert all(is_static(part) == is_static(x_TB) for part in parts)
        assert all(part.untyped_storage().nbytes() <= part.numel() * 4 for part in parts)
    assert len({part.data_ptr() for part in slices(still_TB, 1)}) == 1


@pytest.mark.parametrize(
    ("whole", "sliced", "over_time"),
    [
        *[
            (BPTT(), BPTT(chunk=chunk), over_time)
            for chunk in (1, 2, 5)
            for over_time in ("steps", "mean")
        ],
        *[(OTTT(), OTTT(chunk=chunk), "steps") for chunk in (3, 4, 6)],
        *[(SLTT(), SLTT(chunk=chunk), "steps") for chunk in (2, 4, 6)],
        *[
            (SLTT(), sliced, "steps")
            for sliced in (SLTT(6), SLTT(6, rescale=True), SLTT(6, chunk=3))
        ],
    ],
)
def test_chunks_and_a_choice_of_all_steps_change_nothing(whole, sliced, over_time):
    found = gradients_on(6, lif_network(), whole, sliced, over_time=over_time)
    assert difference(*found) < (1e-14 if isinstance(whole, BPTT) else 1e-15)


@pytest.mark.parametrize(("over_time", "calls"), [("steps", 4), ("mean", 1)])
@pytest.mark.parametrize("make", [BPTT, partial(BPTT, recompute=True), DSR])
def test_both_losses_are_reported_as_they_are_differentiated(make, over_time, calls):
    model = test_dsr.smallest_model(RateIF(), RateIF()).double()
    rule, _ = attached(make(), model, over_time=over_time)
    (x_TBC, target), seen = batch(4), []
    loss_fn = cross_entropy(target)
    (term,) = rule.loss_terms(model, x_TBC, lambda o_BK: seen.append(o_BK) or loss_fn(o_BK))
    losses = torch.stack([loss_fn(o_BK) for o_BK in seen])
    assert len(seen) == calls and torch.allclose(term.loss, losses.mean(), atol=1e-14)
    assert torch.allclose(term.logits, outputs(model, x_TBC).mean(0), atol=1e-14)


def test_labels():
    labels = {
        "BPTT": BPTT(),
        "BPTT-chunk-1": BPTT(1),
        "BPTT-recompute": BPTT(recompute=True),
        "BPTT-truncate-3": BPTT(truncate=3),
        "OTTT-A": OTTT(chunk=2),
        "OTTT-O": OTTT(update="step"),
        "SLTT": SLTT(chunk=2),
        "SLTT-4": SLTT(4),
    }
    assert {name: rule.label for name, rule in labels.items()} == {name: name for name in labels}


# ------------------------------------------------------------------ options of the rules

ROWS = ((3, 4, 3),)
COUNTED = [
    (lambda value: SLTT(k=value), "SLTT: k must be a whole number in 1..T"),
    (lambda value: SLTT(chunk=value), "SLTT: chunk must be a whole number in 1..T"),
    (lambda value: OTTT(chunk=value), "OTTT: chunk must be a whole number in 1..T"),
    (lambda value: BPTT(value), "BPTT: chunk must be a whole number in 1..T"),
    (lambda value: BPTT(truncate=value), "BPTT: truncate must be a whole number in 1..T"),
    (lambda value: DSR(calibrate=value), "DSR: calibrate must be a whole number >= 0"),
    (lambda value: IDE(iterations=value), "IDE: iterations must be a whole number >= 1"),
    (lambda value: SPIDE(steps=value), "SPIDE: steps must be a whole number >= 1"),
    (
        lambda value: HLOP(SLTT(), rows=ROWS, inner_iterations=value),
        "HLOP: inner_iterations must be a whole number >= 1",
    ),
    (
        lambda value: HLOP(SLTT(), rows=ROWS, lateral_steps=value),
        "HLOP: lateral_steps must be a whole number >= 1",
    ),
]
ROWS_MUST = "HLOP: rows must have, for each task, a whole number >= 0 for each synapse"
WRONG_ROWS = ["12", ("12",), (3, 4), ((3, 4.0),), ((3, True),), ((3, -1),), ((),), (), (None,), 12]
OPTIONS = [
    *[(make, rule, value) for make, rule in COUNTED for value in (True, 2.0, 2.5, "2", -1)],
    *[(make, rule, 0) for make, rule in COUNTED if not rule.endswith(">= 0")],
    *[(lambda rows: HLOP(SLTT(), rows=rows), ROWS_MUST, rows) for rows in WRONG_ROWS],
    *[
        (
            lambda rate: HLOP(SLTT(), rows=ROWS, learning_rate=rate),
            "HLOP: learning_rate must be numbers > 0",
            rate,
        )
        for rate in (True, "0.1", ("0.1",), (0.1, 0), (), None, 0.0)
    ],
]


@pytest.mark.parametrize(
    ("make", "rule", "value"),
    OPTIONS,
    ids=[f"{rule[:20]} {value}" for _, rule, value in OPTIONS],
)
def test_an_option_of_the_wrong_type_or_range_is_refused(make, rule, value):
    with pytest.raises(ValueError) as refused:
        make(value)
    assert str(refused.value) == f"{rule}; got {rule.split()[1]}={value!r}"


# ------------------------------------------------------------- norms of torch and timm


def folded(norm: nn.Module) -> nn.Module:
    """A norm for `[N, C]` on `[T, B, C]`, as code for other libraries has it."""
    return Network(lambda m, x: m.norm(x.flatten(0, 1)).view_as(x), norm=norm)


class StaysInEvaluation(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> "StaysInEvaluation":
        return super().train(False)


def normed(norm: nn.Module) -> nn.Sequential:
    first, *rest = lif_network()
    return nn.Sequential(first, folded(norm), *rest).double()


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        (BPTT(1), normed),
        (BPTT(recompute=True), normed),
        (SLTT(), normed),
        (SLTT(2), normed),
        (OTTT(), normed),
        (OPZO(), normed),
        (HLOP(SLTT(), rows=ROWS), normed),
        (HLOP(OTTT(), rows=ROWS, skip=("1",)), normed),
        (IDE(), lambda norm: nn.Sequential(test_ide.smallest_model(), folded(norm))),
        (SPIDE(), lambda norm: nn.Sequential(test_spide.smallest_model(), folded(norm))),
    ],
    ids=lambda each: each.label if isinstance(each, Rule) else "",
)
def test_a_foreign_norm_is_refused_by_name_where_steps_are_differentiated_apart(rule, model):
    """Such a norm folds time into the batch."""
    with pytest.raises(ValueError) as refused:
        rule.attach(model(nn.BatchNorm1d(8)))
    said = str(refused.value)
    assert said.split(":")[0] in rule.label and "1.norm" in said
    assert "pipeline.spiking.norm" in said or "weights='standardized'" in said


@pytest.mark.parametrize(
    ("rule", "norm", "terms"),
    [(BPTT(), nn.BatchNorm1d(8), 1), (SLTT(), StaysInEvaluation(8), 3)],
)
def test_bptt_of_all_steps_and_norms_that_rest_are_accepted(rule, norm, terms) -> None:
    model = normed(norm)
    assert len(one_batch(rule, model, 3)) == terms and model.training


# --------------------------------------------------------------------------------------- precision


ROWS_OF_PRECISION = ((3, 4, 3), (1, 2, 2))
RULES: dict[str, Callable[[], Rule]] = {
    "BPTT": BPTT,
    "OTTT": OTTT,
    "DFA": lambda: OPZO("random"),
    "HLOP": lambda: HLOP(SLTT(), rows=ROWS_OF_PRECISION),
    "HLOP, sign-symmetric": lambda: HLOP(SLTT(), rows=ROWS_OF_PRECISION, error="sign_symmetric"),
    "HLOP, feedback": lambda: HLOP(SLTT(), rows=ROWS_OF_PRECISION, error="feedback"),
}


def gradients(rule: Rule, precision: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Of every parameter, as a backend gets them, and the spikes. Weights are quarters, inputs
    halves: currents are eighths.
    """
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(Linear(6, 8), LIF(), Linear(8, 7), LIF(), Linear(7, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=draw) / 4)
    x_TBC, target_B = (
        torch.randint(-2, 3, (4, 32, 6), generator=draw) / 2,
        torch.randint(3, (32,), generator=draw),
    )
    backend = Plain(
        network, lambda network: torch.optim.SGD(network.parameters(), lr=0.1), precision=precision
    )
    rule.attach(network)
    record = spikes_of(network)
    for objective in rule.loss_terms(backend.model, x_TBC, CrossEntropy()(target_B)):
        assert objective.backward is not None
        backend.backward(objective.backward, 1.0)
    spikes = [torch.cat(slices).float() for slices in record.values()]
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, spikes


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_in_bf16_is_within_two_per_cent(name: str) -> None:
    full, spikes = gradients(RULES[name](), "fp32")
    half, same = gradients(RULES[name](), "bf16")
    assert all(
        torch.equal(one, other) and 0.1 < one.mean() < 0.6
        for one, other in zip(spikes, same, strict=True)
    )
    assert len(full) == 6 and full.keys() == half.keys()
    apart = {key: float((half[key] - g).norm() / g.norm()) for key, g in full.items()}
    assert max(apart.values()) < 0.02 and min(apart[f"{layer}.weight"] for layer in (0, 2, 4)) > 0


def test_a_rule_may_declare_its_label() -> None:
    class Mine(Rule):
        label = "mine"

    assert Mine().label == "mine"
