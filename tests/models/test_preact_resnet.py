import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.preact_resnet import preact_resnet18, preact_resnet18_small
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, RateLIF, RateNeuron, WeightedRates
from tests.helpers.rule_networks import outputs, refusals


def test_parameter_counts():
    """Published: 11.69 M on ImageNet; the ANN of torchvision's ResNet-18 has 11,689,512, and here
    norms stand elsewhere.
    """
    with torch.device("meta"):
        network, ann, small = (
            preact_resnet18(),
            preact_resnet18(neuron=nn.ReLU()),
            preact_resnet18_small(100),
        )
    count = sum(p.numel() for p in ann.parameters())
    assert count == 11_689_512 - 2 * (64 + 128 + 256) + 2 * 512 + 2 * 1000
    neurons = [m for m in network.modules() if isinstance(m, RateNeuron)]
    assert len(neurons) == 1 + 16 + 1 + 2
    assert sum(p.numel() for p in network.parameters()) == count + len(neurons) == 11_691_660
    assert len([m for m in small.modules() if isinstance(m, RateNeuron)]) == 19


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_against_an_independent_forward(stem):
    """Rates of the ANN: every layer written out once more, weights and statistics moved off their
    initial values.
    """
    build = preact_resnet18 if stem == "imagenet" else preact_resnet18_small
    model = build(5, in_channels=2, neuron=nn.ReLU()).double().eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    w = model.state_dict()

    def norm(h, name):
        return F.batch_norm(
            h, *(w[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        )

    x_BCHW = torch.randn(2, 2, 33, 40, dtype=torch.float64)
    if stem == "imagenet":
        h = F.conv2d(x_BCHW, w["stem.0.weight"], stride=2, padding=3)
        h = F.avg_pool2d(norm(h, "stem.1").relu(), 3, stride=2, padding=1)
    else:
        h = F.conv2d(x_BCHW, w["stem.0.weight"], padding=1)
    for stage in range(4):
        for block in range(2):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            a = norm(h, f"{name}.norm1").relu()
            h = norm(
                F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.norm2"
            ).relu()
            h = F.conv2d(h, w[f"{name}.conv2.weight"], padding=1)
            if stride == 2:
                a = F.conv2d(a, w[f"{name}.shortcut.0.weight"], stride=2)
                a = norm(a, f"{name}.shortcut.1") if stem == "imagenet" else a
            h = h + a
    h = norm(h, "norm").relu().mean((2, 3)).relu()
    h = norm(
        h @ w["classifier.linear.weight"].T + w["classifier.linear.bias"], "classifier.norm"
    ).relu()
    with torch.no_grad():
        got = model(x_BCHW.expand(2, -1, -1, -1, -1))
    assert h.std() > 1e-2
    assert torch.allclose(got, h.expand(2, -1, -1), rtol=1e-9)


def test_the_spiking_network_approaches_the_ann():
    """Same weights, thresholds above every activation: the longer the sequence, the nearer the
    rates to the activations.
    """
    ann, network = (
        preact_resnet18_small(4, width=4, blocks=(1, 1), neuron=neuron).eval()
        for neuron in (nn.ReLU(), RateIF(threshold=6.0))
    )
    nn.init.uniform_(ann.get_parameter("classifier.norm.bias"), 0.5, 1.5)
    network.load_state_dict(ann.state_dict(), strict=False)
    x_BCHW = torch.randn(3, 3, 8, 8)
    expected = outputs(ann, x_BCHW.unsqueeze(0))[0]
    rates = (outputs(network, x_BCHW.expand(steps, -1, -1, -1, -1)).mean(0) for steps in (16, 512))
    few, many = (((rate - expected).abs().mean() / expected.mean()).item() for rate in rates)
    assert many < 0.05 and many < few / 4


@pytest.mark.parametrize(("head", "where"), [("rate", "classifier.readout"), ("linear", "readout")])
def test_lif_logits_are_weighted(head, where):
    model = preact_resnet18_small(3, width=2, blocks=(1,), head=head, neuron=RateLIF())
    assert [name for name, m in model.named_modules() if isinstance(m, WeightedRates)] == [where]


test_refuses = refusals(
    [
        (
            lambda: preact_resnet18_small(0),
            r"PreActResNet: classes must be a whole number >= 1; got classes=0",
        ),
        (
            lambda: preact_resnet18_small(blocks=()),
            r"PreActResNet: blocks must be whole numbers >= 1; got blocks=\(\)",
        ),
        (
            lambda: preact_resnet18_small(head="none"),  # type: ignore[arg-type]
            r"PreActResNet: head must be 'rate' or 'linear'; got head='none'",
        ),
    ]
)


def test_with_a_linear_head_it_is_slTTs_network():
    """Published: 11.18 M with the biases of its convolutions; those that a batch norm takes away
    are left out here.
    """
    with torch.device("meta"):
        model = preact_resnet18_small(10, head="linear", over="step", neuron=LIF(1 / 11))
    biases = 64 + 2 * 2 * (64 + 128 + 256 + 512) + 128 + 256 + 512  # stem, blocks, shortcuts
    assert round((sum(p.numel() for p in model.parameters()) + biases) / 1e6, 2) == 11.18
    assert sum(isinstance(m, LIF) for m in model.modules()) == 17
