"""What HLOP learns from, what it reports of it, and the other weights that may carry errors
down.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.base import World
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.error_feedback import FixedFeedback, sign_symmetric
from pipeline.spiking.rate import RateLIF, WeightedRates
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients,
    learn,
    lif_network,
)
from tests.rules.test_hlop import ROWS, gradient, inputs_of, logits, moments_of, rows_of, train
from tests.rules.test_opzo import smallest_model as with_readouts


def test_the_rows_learn_from_the_inputs_of_every_synapse_at_every_step():
    """Against a plain forward; accumulated micro-batches are one batch, whether steps are
    differentiated or not.
    """
    x_TB, target_B = batch(4, size=6)
    model = lif_network()
    seen = inputs_of(model, ("0", "2", "4"))
    logits(model, x_TB)
    rules = [
        HLOP(inner, rows=ROWS) for inner in (BPTT(), BPTT(recompute=True), SLTT(), SLTT(1), OTTT())
    ]
    for rule in rules:
        model = lif_network()
        rule.attach(model)
        for part in (slice(0, 2), slice(2, 6)):
            learn(rule.loss_terms(model, x_TB[:, part], cross_entropy(target_B[part]), step=0))
        rule.end_of_batch()
        for index, (x,) in enumerate(seen):
            x_NC = x.flatten(0, 1)
            assert torch.allclose(moments_of(rule, index), x_NC.T @ x_NC / len(x_NC), atol=1e-13)
            assert torch.allclose(
                rows_of(rule, index, name="new"), rows_of(rules[0], index, name="new"), atol=1e-12
            )


def test_traces_and_rates():
    x_TB, target_B = batch(4)
    rule, model = HLOP(OTTT(), rows=ROWS, learn_from="traces"), lif_network()
    rule.attach(model)
    (spikes,) = inputs_of(model, ("2",))
    train(rule, model, x_TB, target_B, step=0)
    s_TB = torch.cat(spikes)
    trace_TB = torch.stack([sum(0.5 ** (t - k) * s_TB[k] for k in range(t + 1)) for t in range(4)])  # type: ignore[misc]
    for index, factor_TB in ((0, x_TB), (1, trace_TB)):  # the first synapse has no trace
        f_NC = factor_TB.flatten(0, 1)
        assert torch.allclose(moments_of(rule, index), f_NC.T @ f_NC / len(f_NC), atol=1e-13)

    model = nn.Sequential(
        Linear(6, 8), RateLIF(), Linear(8, 3), WeightedRates(RateLIF().decay)
    ).double()
    rule = HLOP(DSR(), rows=((3, 4), (1, 1)), learn_from="rates")
    rule.attach(model, over_time="mean")
    (spikes,) = inputs_of(model, ("2",))
    train(rule, model, x_TB, target_B, step=0)
    w_T = [math.exp(-0.05 * (3 - t)) for t in range(4)]
    for index, z_TB in ((0, x_TB), (1, spikes[0])):
        rate_BC = torch.stack([w * z_BC for w, z_BC in zip(w_T, z_TB, strict=True)]).sum(0) / sum(
            w_T
        )
        assert torch.allclose(
            moments_of(rule, index), rate_BC.T @ rate_BC / len(rate_BC), atol=1e-12
        )


@pytest.mark.parametrize("learn_from", ["spikes", "rates"])
def test_a_repeated_frame_is_heard_once(learn_from):
    x_B, target_B = batch(1)[0][0], batch(1)[1]
    rule, model = HLOP(BPTT(), rows=ROWS, learn_from=learn_from), lif_network()
    rule.attach(model)
    train(rule, model, x_B.expand(5, *x_B.shape), target_B, step=0)
    assert torch.allclose(moments_of(rule, 0), x_B.T @ x_B / len(x_B), atol=1e-14)


def test_rows_stay_in_single_precision_under_autocast():
    rule, model = HLOP(BPTT(), rows=ROWS), lif_network().float()
    rule.attach(model)
    for step in range(2):
        x_TB, target_B = batch(4)
        with torch.autocast("cpu", torch.bfloat16):
            learn(rule.loss_terms(model, x_TB.float(), cross_entropy(target_B), step=step))
        rule.end_of_batch()
        x_NC = x_TB.float().flatten(0, 1)
        assert torch.allclose(moments_of(rule, 0), x_NC.T @ x_NC / len(x_NC), rtol=1e-6, atol=1e-6)
        if step == 0:
            rule.start_task(model, 1)
            model.zero_grad()
    old = rows_of(rule, 2)
    assert old.dtype == torch.float32 and (gradient(model, "4.weight") @ old.T).abs().max() < 1e-6


def test_evaluation_and_broken_batches_are_not_heard():
    rule, model = HLOP(SLTT(), rows=ROWS), lif_network()
    rule.attach(model)

    def broken(logits_BK: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        list(rule.loss_terms(model, 100 * batch(4)[0], broken, step=0))
    train(rule, model, *batch(4), step=1)
    logits(model, 100 * batch(5)[0])
    x_NC = batch(4)[0].flatten(0, 1)
    assert torch.allclose(moments_of(rule, 0), x_NC.T @ x_NC / len(x_NC), atol=1e-13)


READOUTS = [
    {},
    {"local_readouts": True},
    {"intermediate": (1,)},
    {"feedback": "random", "local_readouts": True},
]


@pytest.mark.parametrize("options", READOUTS)
def test_every_synapse_with_rows_is_heard(options):
    """A readout, which stands beside the network, hears the spikes that the synapse behind it in
    the network hears.
    """
    rule, model = HLOP(OPZO(**options), rows=((2,) * 5, (1,) * 5)), with_readouts()
    rule.attach(model)
    train(rule, model, *batch(4), step=0)
    assert [recorder.name for recorder in rule._recorders] == [
        "0",
        "2.linear",
        "3",
        "5.linear",
        "6",
    ]
    assert all(recorder.last is not None for recorder in rule._recorders)
    for readout, onward in ((1, 2), (3, 4)):
        assert torch.allclose(moments_of(rule, readout), moments_of(rule, onward), atol=1e-14)
    assert moments_of(rule, 1).any() and moments_of(rule, 3).any()


def test_figures_say_what_is_kept_and_what_is_free():
    rule, model = HLOP(SLTT(), rows=ROWS), lif_network()
    rule.attach(model)
    assert {name for name in rule.figures() if name.startswith("free")} == {
        "free_0",
        "free_2",
        "free_4",
    }
    for step in range(50):
        train(rule, model, *batch(4), step=step)
    figures, x_NC = rule.figures(), batch(4)[0].flatten(0, 1)
    rows = rows_of(rule, 0, name="new")
    assert figures["energy_0"] == pytest.approx(
        float((x_NC @ rows.T).square().sum() / x_NC.square().sum()), abs=1e-12
    )
    assert 0.5 < figures["energy_0"] < 1 and figures["free_0"] == 3
    rule.start_task(model, 1)
    assert rule.figures()["free_0"] == 2


# -------------------------------------------------------------------------------------- error paths


def carriers_of(model: nn.Sequential) -> list[Tensor]:
    """What carries the error down, by synapse."""
    synapses = [module for module in model if isinstance(module, Linear)]
    assert all(synapse.backward_weight is not None for synapse in synapses)
    return [synapse.backward_weight(synapse.weight.detach()) for synapse in synapses]  # type: ignore[misc]


@pytest.mark.parametrize("error", ["sign_symmetric", "feedback"])
def test_another_weight_carries_the_error_down(error):
    """Every factor written out: the synapse that carries the error differs, the weights' own
    gradients follow from it.
    """
    model, (x_TB, target_B) = lif_network(), batch(4)
    rule = HLOP(SLTT(), rows=ROWS, error=error)
    got = gradients(rule, model, x_TB, cross_entropy(target_B), world=World(seed=5))
    rule.attach(model, world=World(seed=5))
    _, carrier2, carrier3 = carriers_of(model)
    rule.release()
    found = {name: torch.zeros_like(value) for name, value in got.items()}
    with torch.no_grad():
        w1, b1, w2, b2, w3, b3 = model.parameters()
        v1, v2 = torch.zeros(5, 8, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)
        for x in x_TB:
            u1 = 0.5 * v1 + x @ w1.T + b1
            s1 = (u1 >= 1).double()
            u2 = 0.5 * v2 + s1 @ w2.T + b2
            s2 = (u2 >= 1).double()
            v1, v2 = u1 - s1, u2 - s2
            g3 = (torch.softmax(s2 @ w3.T + b3, 1) - nn.functional.one_hot(target_B, 3)) / 20
            g2 = g3 @ carrier3 * (1 - (u2 - 1).abs()).clamp(min=0)
            g1 = g2 @ carrier2 * (1 - (u1 - 1).abs()).clamp(min=0)
            for layer, g, s in ((4, g3, s2), (2, g2, s1), (0, g1, x)):
                found[f"{layer}.weight"] += g.T @ s
                found[f"{layer}.bias"] += g.sum(0)
    assert difference(got, found) < 1e-12
    assert difference(got, gradients(SLTT(), model, x_TB, cross_entropy(target_B))) > 1e-2


def test_the_carriers_have_the_published_scales():
    """Signs: 1 / sqrt(in) of a matrix, sqrt(2 / (k^2 out)) of a convolution. At random:
    kaiming_uniform(sqrt 5).
    """
    weight, kernels = (
        torch.randn(300, 100, dtype=torch.float64),
        torch.randn(8, 11, 5, 5, dtype=torch.float64),
    )
    assert torch.equal(sign_symmetric(weight), 0.1 * weight.sign())
    assert torch.equal(sign_symmetric(kernels), 0.1 * kernels.sign())
    for shape in (weight, kernels):
        published = torch.nn.init.kaiming_uniform_(torch.empty(shape.shape), a=math.sqrt(5))
        matrix = FixedFeedback(shape, key=2**64 - 1)(shape)
        assert matrix.shape == shape.shape and matrix.dtype == shape.dtype
        assert (
            matrix.std().item() == pytest.approx(published.std().item(), rel=0.05)
            and abs(matrix.mean().item()) < 0.002
        )
        bound = 1 / math.sqrt(shape[0].numel())
        assert 0.99 * bound < matrix.abs().max().item() <= bound


def test_feedback_depends_on_the_seed_and_the_layer_alone():
    def matrices(seed: int) -> list[Tensor]:
        model, rule = lif_network(), HLOP(SLTT(), rows=ROWS, error="feedback")
        rule.attach(model, world=World(seed=seed))
        return carriers_of(model)

    one, again, other = matrices(1), matrices(1), matrices(2)
    assert all(
        torch.equal(a, b) and not torch.allclose(a, c, atol=0.1)
        for a, b, c in zip(one, again, other, strict=True)
    )
    assert not torch.allclose(one[0][:7, :3], one[1][:7, :3], atol=0.1)


# -------------------------------------------------------------------------------------------- bytes

SYNAPSES = ((6, 3), (8, 4), (7, 3))
"""inputs, and rows of the first task, of each"""


@pytest.mark.parametrize("lateral_steps", [None, 40])
def test_its_own_bytes_are_the_rows_and_the_moments_of_two_batches(lateral_steps: int | None):
    """By hand, in fp64; while a batch runs, what it adds up lies beside what the last one came
    to.
    """
    rule, model, (x_TB, target_B) = (
        HLOP(SLTT(), rows=ROWS, lateral_steps=lateral_steps),
        lif_network(),
        batch(4),
    )
    rule.attach(model)
    train(rule, model, x_TB, target_B, step=0)
    learn(rule.loss_terms(model, x_TB, cross_entropy(target_B), step=1))
    numbers_of = (
        (lambda C, K: C * C) if lateral_steps is None else (lambda C, K: 2 * K * C + K * K + 1)
    )
    moments = sum(8 * numbers_of(C, K) for C, K in SYNAPSES)
    for name in ("pending", "last"):
        there = [vars(getattr(recorder, name)).values() for recorder in rule._recorders]
        assert (
            sum(each.nbytes for values in there for each in values if isinstance(each, Tensor))
            == moments
        )
    own = (
        8 + sum(8 * (2 * K * C + 1) for C, K in SYNAPSES) + 2 * moments
    )  # the task; rows, their velocity, the energy
    assert rule.bytes() == own
    rule.end_of_batch()
    assert rule.bytes() == own


def test_its_own_bytes_have_the_inner_rules_and_the_feedback_that_is_fixed():
    x_TB, target_B = batch(4)
    opzo = OPZO()

    def own(rule: HLOP) -> int:
        model = lif_network()
        rule.attach(model)
        train(rule, model, x_TB, target_B, step=0)
        return rule.bytes()

    plain = own(HLOP(SLTT(), rows=ROWS))
    assert own(HLOP(opzo, rows=ROWS)) == plain + opzo.bytes() == plain + 2 * (8 + 7) * 3 * 8 + 8
    assert own(HLOP(SLTT(), rows=ROWS, error="feedback")) == plain + 8 * (6 * 8 + 8 * 7 + 7 * 3)
    assert own(HLOP(SLTT(), rows=ROWS, error="sign_symmetric")) == plain
