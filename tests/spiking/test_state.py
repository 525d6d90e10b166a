import copy

import pytest
import torch
from torch import nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import (
    State,
    fresh_state,
    set_temporarily,
    state_bytes,
    states_of,
    temporary_hooks,
)
from pipeline.spiking.synapse import Linear
from pipeline.spiking.trace import Trace
from tests.helpers.rule_networks import outputs


def network() -> nn.Sequential:
    return nn.Sequential(Linear(3, 5), LIF(), Linear(5, 4), LIF(), Linear(4, 2))


X_TBC = torch.randn(2, 7, 3)


def test_state_lives_as_long_as_the_block():
    with fresh_state(model := network()):
        assert state_bytes(model) == 0
        model(X_TBC)
        assert state_bytes(model) == 7 * (5 + 4) * 4
    assert state_bytes(model) == 0


def test_state_is_cleared_when_the_block_raises():
    model = nn.Sequential(network(), nn.Flatten(9))
    with pytest.raises(IndexError):
        outputs(model, X_TBC)
    assert state_bytes(model) == 0
    outputs(model[0], X_TBC[:1])


def test_nested_use_is_refused_and_leaves_the_first_intact():
    with fresh_state(model := network()):
        model(X_TBC)
        with pytest.raises(ValueError, match="must not be inside another fresh_state"):
            outputs(nn.Sequential(model), X_TBC)
        assert state_bytes(model) > 0


def test_a_wrapper_and_a_seam_are_found():
    model, wrapper = network(), nn.Module()
    wrapper.module = model
    model[2].presynaptic = Trace(0.5)
    assert len(states_of(wrapper)) == 6  # of three synapses, two neurons and the trace
    with fresh_state(wrapper):
        model(X_TBC)
        assert state_bytes(wrapper) == 7 * (5 + 4 + 5) * 4
    assert state_bytes(wrapper) == 0
    with pytest.raises(ValueError, match=r"Trace: .*with fresh_state\(model\)"):
        Trace(0.5)(X_TBC)


def test_state_is_no_part_of_the_checkpoint_nor_of_a_copy():
    model = network()
    keys = list(model.state_dict())
    with fresh_state(model):
        model(X_TBC).sum().backward()
        assert list(model.state_dict()) == keys and not list(model.buffers())
    twin = copy.deepcopy(model)
    with fresh_state(twin), fresh_state(model):
        twin(X_TBC)
        assert state_bytes(model) == 0


def test_attributes_and_hooks_are_given_back_when_the_block_raises():
    one, other = State("one"), State("other")
    other.is_open = True
    model, ran = nn.ReLU(), []

    def broken() -> None:
        hooks = [model.register_forward_pre_hook(lambda *_: ran.append(1))]
        with set_temporarily([one, other], "is_open", "set"), temporary_hooks(hooks):
            assert one.is_open == other.is_open == "set"
            model(torch.ones(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    model(torch.ones(1))
    assert (one.is_open, other.is_open) == (False, True) and ran == [1]
