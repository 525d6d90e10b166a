import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.rules.bptt import BPTT
from pipeline.spiking.surrogate import Triangle
from tests.rules.small import batch, cross_entropy, difference, gradients, learn, lif_network


def smallest_model() -> nn.Sequential:
    return lif_network()


def contract_rules() -> list[BPTT]:
    return [BPTT(), BPTT(chunk=1)]


def by_autograd(model: nn.Sequential, x_TBC, *, keep_reset: bool, over_time: str, target_B) -> dict:
    """BPTT of a soft-reset network, step after step, written without the pipeline's layers."""
    w1, b1, w2, b2, w3, b3 = model.parameters()
    triangle, leak = Triangle(), 0.5
    v1 = v2 = torch.zeros((), dtype=torch.float64)
    logits = []
    for x in x_TBC:
        u1 = leak * v1 + x @ w1.T + b1
        s1 = triangle(u1 - 1)
        v1 = u1 - (s1 if keep_reset else s1.detach())
        u2 = leak * v2 + s1 @ w2.T + b2
        s2 = triangle(u2 - 1)
        v2 = u2 - (s2 if keep_reset else s2.detach())
        logits.append(s2 @ w3.T + b3)
    if over_time == "mean":
        loss = F.cross_entropy(torch.stack(logits).mean(0), target_B)
    else:
        loss = torch.stack([F.cross_entropy(o, target_B) for o in logits]).mean()
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("reset_gradient", ["kept", "detached"])
def test_gradient_is_autograds_through_an_independent_loop(over_time, reset_gradient):
    model = lif_network(leak=0.5, reset_gradient=reset_gradient)
    x_TBC, target = batch(5)
    expected = by_autograd(model, x_TBC, keep_reset=reset_gradient == "kept", over_time=over_time, target_B=target)
    got = gradients(BPTT(), model, x_TBC, cross_entropy(target), over_time=over_time)
    assert difference(got, expected) < 1e-13


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunk_changes_nothing(chunk, over_time):
    model = lif_network()
    x_TBC, target = batch(5)
    whole, sliced = (gradients(r, model, x_TBC, cross_entropy(target), over_time=over_time) for r in (BPTT(), BPTT(chunk=chunk)))
    assert difference(whole, sliced) < 1e-14


@pytest.mark.parametrize("over_time", ["steps", "mean"])
def test_both_losses_are_reported_as_they_are_differentiated(over_time):
    model, rule = lif_network(), BPTT()
    x_TBC, target = batch(4)
    seen_logits = []
    rule.attach(model, over_time=over_time)

    def loss_of(logits_BK):
        seen_logits.append(logits_BK.detach())
        return F.cross_entropy(logits_BK, target)

    (objective,) = learn(rule.objectives(model, x_TBC, loss_of))
    assert len(seen_logits) == (4 if over_time == "steps" else 1)
    assert objective.loss.item() == pytest.approx(sum(F.cross_entropy(o, target).item() for o in seen_logits) / len(seen_logits))
    assert not objective.loss.requires_grad and not objective.logits.requires_grad
    assert torch.allclose(objective.logits, sum(seen_logits) / len(seen_logits))


def test_the_two_losses_have_different_gradients():
    model = lif_network()
    x_TBC, target = batch(5)
    steps, mean = (gradients(BPTT(), model, x_TBC, cross_entropy(target), over_time=o) for o in ("steps", "mean"))
    assert difference(steps, mean) > 1e-2


def test_refuses_a_chunk_out_of_range():
    with pytest.raises(ValueError, match=r"BPTT: chunk must be in 1\.\.T; got chunk=0"):
        BPTT(chunk=0)
    rule, model = BPTT(chunk=4), lif_network()
    rule.attach(model)
    with pytest.raises(ValueError, match=r"BPTT: chunk must be in 1\.\.T; got chunk=4, T=3"):
        next(rule.objectives(model, batch(3)[0], torch.sum))


def test_a_model_without_neurons_is_plain_backpropagation():
    model = nn.Sequential(lif_network()[0])
    x_TBC, target = batch(3, classes=8)
    got = gradients(BPTT(), model, x_TBC, cross_entropy(target))
    loss = torch.stack([F.cross_entropy(o, target) for o in model(x_TBC)]).mean()
    assert torch.allclose(got["0.weight"], torch.autograd.grad(loss, list(model.parameters()))[0])
