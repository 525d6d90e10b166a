import pytest
import torch
from torch import nn

from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.feedback import Feedback
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state, state_bytes


def test_recalls_the_step_before_and_forgets_between_batches():
    feedback = Feedback()
    for _ in range(2):
        with fresh_state(feedback):
            assert feedback.recall() is None
            for t in range(3):
                feedback.keep(torch.full((1, 2), float(t)))
                assert torch.equal(feedback.recall(), torch.full((1, 2), float(t)))
            assert state_bytes(feedback) == 8
    assert state_bytes(feedback) == 0


@pytest.mark.parametrize(("rule", "has_graph"), [(BPTT(), True), (SLTT(), False)])
def test_the_graph_crosses_the_step_under_bptt_alone(rule, has_graph):
    feedback = Feedback()
    rule.attach(nn.ModuleList([feedback, LIF()]))
    with fresh_state(feedback):
        feedback.keep(torch.ones(1, 2, requires_grad=True) * 2)
        kept = feedback.recall()
    assert kept is not None and kept.requires_grad == has_graph


def test_refuses():
    feedback = Feedback()
    with (
        fresh_state(feedback),
        pytest.raises(ValueError, match=r"Feedback: keep must be handed one time step, .* shape \(2, 3\)"),
    ):
        feedback.keep(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"Feedback: its membrane or trace exists only inside fresh_state"):
        feedback.recall()
