import pytest
import torch
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateLIF
from tests.helpers.rule_networks import outputs, refusals


@pytest.mark.parametrize(("norm", "stride"), [("batch", 1), ("none", 1), ("none", 2)])
def test_against_an_independent_forward(norm, stride):
    model = convnet(
        4,
        in_channels=2,
        stages=((3, 5), (6,)),
        kernel=5,
        stem_stride=stride,
        norm=norm,
        grid=2,
        neuron=LIF(0.25),
    )
    model.double().eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    x_TBCHW = 3 * torch.randn(3, 2, 2, 9 * stride, 8 * stride, dtype=torch.float64)
    w = model.state_dict()
    names = ["stages.0.0", "stages.0.1", "stages.1.0"]
    v = dict.fromkeys(names, 0.0)
    expected = []
    for h in x_TBCHW:
        for name in names:
            if name == "stages.1.0":
                h = nn.functional.avg_pool2d(h, 2)
            h = nn.functional.conv2d(
                h,
                w[f"{name}.conv.weight"],
                w.get(f"{name}.conv.bias"),
                stride if name == names[0] else 1,
                padding=2,
            )
            if norm == "batch":
                mean, var, gain, bias = (
                    w[f"{name}.norm.{key}"].view(-1, 1, 1)
                    for key in ("running_mean", "running_var", "weight", "bias")
                )
                h = gain * (h - mean) / (var + 1e-5).sqrt() + bias
            u = 0.25 * v[name] + h
            h = (u >= 1).double()
            v[name] = u - h
        h = torch.stack(
            [h[..., i : i + 2, j : j + 2].mean((-2, -1)) for i in (0, 2) for j in (0, 2)], -1
        )
        expected.append(h.flatten(1) @ w["classifier.weight"].T + w["classifier.bias"])
    got = outputs(model, x_TBCHW)
    assert got.std() > 1e-2
    assert torch.allclose(got, torch.stack(expected), atol=1e-12)


@pytest.mark.parametrize("mask", ["batch", "step"])
def test_dropout_stands_behind_each_neuron_with_one_mask_for_a_batch_or_each_step(mask):
    model = convnet(stages=((8,), (8, 8)), dropout=0.5, mask=mask, neuron=nn.ReLU())
    dropped = []
    for module in model.modules():
        if isinstance(module, (Dropout, nn.Dropout)):
            module.register_forward_hook(
                lambda _module, x, y: dropped.append((y == 0)[x[0] > 0].float())
            )
    # The same image at each step.
    outputs(model, torch.randn(4, 3, 16, 16).expand(4, -1, -1, -1, -1))
    assert len(dropped) == 3 and all(0.42 < each.mean() < 0.58 for each in dropped)
    first_T = dropped[0].view(4, -1)
    assert all(torch.equal(first_T[0], each) for each in first_T[1:]) == (mask == "batch")


def test_the_rate_head_ends_in_rates():
    """linear -> batch norm -> neuron behind a neuron; the mean over time of the logits is LIF's
    weighted rate.
    """
    model = convnet(4, stages=((3,),), head="rate", neuron=RateLIF(threshold=0.05)).eval()
    found = {}
    for name in ("neuron_in", "neuron_out"):
        module = model.classifier.get_submodule(name)
        module.register_forward_hook(lambda _module, _x, y, name=name: found.update({name: y}))
    logits_TBK = outputs(model, 3 * torch.randn(1, 2, 3, 6, 6).expand(8, -1, -1, -1, -1) + 1)
    levels = {name: out_TBC.unique().tolist() for name, out_TBC in found.items()}
    assert levels == {name: pytest.approx([0.0, 1.0]) for name in ("neuron_in", "neuron_out")}
    w = torch.exp(-0.05 * torch.arange(7.0, -1, -1)).view(-1, 1, 1)
    expected = (w * found["neuron_out"]).sum(0) / w.sum()
    assert torch.allclose(logits_TBK.mean(0), expected, atol=1e-6)


test_refuses = refusals(
    [
        (
            {"stages": ((4,), ())},
            r"ConvNet: each stage must hold at least one width >= 1; got stages=\(\(4,\), \(\)\)",
        ),
        ({"grid": 0}, r"ConvNet: grid must be a whole number >= 1; got grid=0"),
        (
            {"kernel": 4},
            r"ConvNet: kernel must be odd, to keep the size of the image; got kernel=4",
        ),
        ({"norm": "layer"}, r"ConvNet: norm must be 'batch' or 'none'; got norm='layer'"),
        (
            {"norm": "none", "over": "time"},
            r"ConvNet: over must be 'step' without batch norm; got over='time'",
        ),
        ({"head": "spike"}, r"ConvNet: head must be 'linear' or 'rate'; got head='spike'"),
        (
            {"dropout": 1.0},
            r"ConvNet: dropout must be in 0\.\.1, 1 excluded; got dropout=1\.0",
        ),
        ({"mask": "time"}, r"ConvNet: mask must be 'batch' or 'step'; got mask='time'"),
        (
            {"mask": "step"},
            r"ConvNet: mask must be 'batch' without dropout; got mask='step'",
        ),
    ],
    convnet,
)


test_refuses_an_image_too_small_for_the_pools = refusals(
    [
        (
            lambda: outputs(convnet(grid=2), torch.zeros(1, 1, 3, 7, 9)),
            r"ConvNet: .* at least 8 pixels a side for 3 stages, grid=2 .* got \(7, 9\)",
        ),
        (
            lambda: outputs(convnet(grid=2, stem_stride=2), torch.zeros(1, 1, 3, 14, 16)),
            r"at least 15 pixels a side .* got \(14, 16\)",  # the stem makes 8 of 15
        ),
    ]
)
