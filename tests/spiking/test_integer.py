"""Integer neurons against numbers, and a network of them against binary steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.attention import SelfAttention
from pipeline.spiking.integer import IntegerNeuron
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.families import TRANSFORMERS
from tests.helpers.rule_networks import outputs, refusals


def test_numbers_and_their_gradient() -> None:
    """A half goes to the even number; both ends of 0..4 have a gradient."""
    x = torch.tensor([-1, 0, 0.5, 1.5, 1.6, 3.5, 4, 4.1], dtype=torch.float64, requires_grad=True)
    y = IntegerNeuron()(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    assert x.grad is not None and x.grad.tolist() == [0, *[0.25] * 6, 0]
    assert IntegerNeuron(6, unit=1)(x).tolist() == [0, 0, 0, 2, 2, 4, 4, 4]


def test_binary_steps_sum_to_the_number() -> None:
    neuron = IntegerNeuron(3)
    y_TB = neuron(torch.tensor([[0.2, 1.2, 2.2, 3.2]]))
    steps_DTB = neuron.binary_steps(y_TB)
    assert steps_DTB.tolist() == [[[0, 1, 1, 1]], [[0, 0, 1, 1]], [[0, 0, 0, 1]]]


def run_in_binary_steps(network: nn.Module) -> None:
    """Every synapse but the first reads 4 binary steps, and the products of an attention are those
    of the steps of q, k and v.
    """
    rates, counts = IntegerNeuron(4), IntegerNeuron(4, unit=1)

    def conv(synapse: Conv2d, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        steps = rates.binary_steps(inputs[0])
        y = F.conv2d(
            steps.flatten(0, 2),
            synapse.weight,
            None,
            synapse.stride,
            synapse.padding,
            1,
            synapse.groups,
        )
        y_TBCHW = y.unflatten(0, steps.shape[:3]).sum(0) / 4
        return y_TBCHW if synapse.bias is None else y_TBCHW + synapse.bias[:, None, None]

    def linear(synapse: Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        return F.linear(counts.binary_steps(inputs[0]), synapse.weight).sum(0) + synapse.bias

    def mix(attention: SelfAttention, *projected: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (
            rates.binary_steps(each).flatten(4).unflatten(3, (attention.heads, -1))
            for each in projected
        )
        a = torch.einsum("xTBhcm,yTBhdm,zTBhdn->TBhcn", v, k, q) / 4**3 * attention.scale
        a = a.reshape(projected[2].shape)
        return a, attention.attention_neuron(a)

    for name, module in network.named_modules():
        if isinstance(module, Conv2d) and name != "features.0.downsample.synapse":
            module.register_forward_hook(conv)
        elif isinstance(module, Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, SelfAttention):
            module._mix = mix.__get__(module)  # type: ignore[method-assign]


def test_a_network_of_them_equals_4_binary_steps_to_the_bit() -> None:
    """Weights are multiples of 2^-12, so that every sum of currents is exact in float64."""
    network, in_steps = (TRANSFORMERS["e-spikeformer"]().double().eval() for _ in range(2))
    for module in network.modules():
        if isinstance(module, Conv2d | Linear):
            for p in module.parameters():
                p.data = (p.data * 2**12).round() / 2**12
    in_steps.load_state_dict(network.state_dict())
    run_in_binary_steps(in_steps)
    x_TBCHW = torch.randn(1, 2, 3, 32, 32, dtype=torch.float64)
    logits_TBK = outputs(network, x_TBCHW)
    assert logits_TBK.std(1).min() > 0 and torch.equal(logits_TBK, outputs(in_steps, x_TBCHW))


test_refuses = refusals(
    [
        (lambda: IntegerNeuron(0), "levels must be a whole number >= 1; got levels=0"),
        (lambda: IntegerNeuron(unit=0), "unit must be a whole number >= 1; got unit=0"),
    ]
)
