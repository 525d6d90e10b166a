"""A readout that listens late: the equation, slices that continue one another, every rule's
contract.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.transforms import LateReadout, late
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import outputs

T, B, K = 6, 5, 3


def network(share: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return late(
        nn.Sequential(Linear(4, 8), LIF(0.9), Linear(8, K)), share=share, time_steps=T
    ).double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(T, B, 4, generator=generator, dtype=torch.float64), torch.arange(B) % K


@pytest.mark.parametrize(("share", "heard"), [(0.5, 3), (1 / 3, 2), (0.01, 1), (1.0, 6)])
def test_the_last_steps_are_scaled_and_the_others_silent(share: float, heard: int) -> None:
    readout, x_TBK = LateReadout(share=share, time_steps=T), torch.randn(T, B, K)
    y_TBK = outputs(readout, x_TBK, grad=True)
    assert torch.equal(y_TBK[: T - heard], torch.zeros(T - heard, B, K))
    torch.testing.assert_close(y_TBK[T - heard :], x_TBK[T - heard :] * T / heard)
    torch.testing.assert_close(y_TBK.mean(0), x_TBK[T - heard :].mean(0))


@pytest.mark.parametrize("sizes", [[1] * T, [2, 3, 1], [5, 1]])
def test_slices_continue_one_another_and_each_batch_begins_anew(sizes: list[int]) -> None:
    readout, x_TBK = LateReadout(share=0.5, time_steps=T), torch.randn(T, B, K)
    whole = outputs(readout, x_TBK, grad=True)
    for _ in range(2):
        with fresh_state(readout):
            assert torch.equal(torch.cat([readout(x_cBK) for x_cBK in x_TBK.split(sizes)]), whole)


@pytest.mark.parametrize(
    "rule",
    [BPTT(), BPTT(recompute=True), SLTT(), OTTT()],
    ids=["BPTT", "recomputed", "SLTT", "OTTT"],
)
def test_the_loss_is_that_of_the_late_steps_and_a_constant(rule: BPTT | SLTT | OTTT) -> None:
    model, (x_TB, target_B) = network(), inputs()
    late_TBK = outputs(model, x_TB, grad=True)[T // 2 :]
    expected = sum(nn.functional.cross_entropy(logits_BK, target_B) for logits_BK in late_TBK) / T
    rule.attach(model)
    shares = list(rule.loss_terms(model, x_TB, CrossEntropy()(target_B)))
    torch.testing.assert_close(
        torch.stack([each.loss for each in shares]).sum(), expected + math.log(K) / 2
    )
    torch.testing.assert_close(
        torch.stack([each.logits for each in shares]).sum(0), late_TBK.detach().sum(0) / T
    )


def test_gradients_reach_the_past_through_time_alone() -> None:
    """The only way back from the late steps to an early input is the membrane: BPTT sees it, SLTT
    does not.
    """
    x_TB, target_B = inputs()
    for rule, sees in ((BPTT(), True), (SLTT(), False)):
        model = network()
        rule.attach(model)
        x = x_TB.clone().requires_grad_()
        for each in rule.loss_terms(model, x, CrossEntropy()(target_B)):
            assert each.backward is not None
            each.backward.backward()
        assert x.grad is not None and bool(x.grad[0].any()) == sees and bool(x.grad[-1].any())


def test_what_cannot_be_is_refused() -> None:
    for share in (0.0, 1.1):
        with pytest.raises(
            ValueError,
            match=rf"LateReadout: share must be in 0\.\.1, 0 excluded; got share={share}",
        ):
            LateReadout(share=share, time_steps=T)
    readout = LateReadout(share=0.5, time_steps=2)
    with (
        pytest.raises(
            ValueError, match="LateReadout: a recording must have 2 time steps; got step 3"
        ),
        fresh_state(readout),
    ):
        readout(torch.zeros(3, B, K))
