from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.parts import SPIKE_GAIN
from pipeline.models.vgg import VGG, vgg_sws, vgg_sws_f
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Triangle, spike
from pipeline.spiking.synapse import Conv2d
from tests.helpers.references import gradient_of
from tests.helpers.rule_networks import cross_entropy, difference, gradients, outputs, refusals


def small(build: Callable[..., VGG]) -> VGG:
    """In float64, with a feedback that is there, on 9 pixels a side: the last features are 4 a
    side.
    """
    torch.manual_seed(0)
    model = build(4, in_channels=2, stages=((3, 5), (6,))).double()
    for parameter in model.feedback.parameters() if model.feedback else ():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(model.classifier.weight)
    return model


def images(steps: int) -> Tensor:
    return 3 * torch.randn(
        steps, 2, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def by_hand(model: VGG, x_TBCHW: Tensor, *, detach=lambda h: h) -> Tensor:
    """The network written out, with its own spikes; `detach` is applied to whatever crosses a time
    step.
    """
    p = dict(model.named_parameters())
    names = ["stages.0.0.conv.0", "stages.0.1.conv", "stages.1.0.conv"]
    membranes: dict = dict.fromkeys(names, 0.0)
    last, logits = torch.zeros(2, 6, 4, 4, dtype=torch.float64), []
    nearest = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])  # floor(i 4 / 9)
    for t, h in enumerate(x_TBCHW):
        # As published, the first time step has no feedback at all, not even the bias.
        back = 0
        if t and model.feedback is not None:
            wide = last[:, :, nearest][:, :, :, nearest]
            synapse = (p[f"feedback.conv.{name}"] for name in ("weight", "bias"))
            back = F.conv2d(wide, *synapse, padding=1)  # type: ignore[call-overload]
        for name in names:
            if name == names[2]:
                h = F.avg_pool2d(h, 2)
            w = p[f"{name}.weight"]
            scale = torch.sqrt(w.var((1, 2, 3), keepdim=True) * w[0].numel() + 1e-4)
            w = p[f"{name}.gain"] * (w - w.mean((1, 2, 3), keepdim=True)) / scale
            current = F.conv2d(h, w, p[f"{name}.bias"], padding=1)
            u = 0.5 * membranes[name] + current + (back if name == names[0] else 0)
            s = spike(u - 1, surrogate=Triangle())
            membranes[name] = detach(u - s.detach())
            h = 2.74 * s
        last = detach(h)
        logits.append(F.linear(h.mean((2, 3)), p["classifier.weight"], p["classifier.bias"]))
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("build", "rule", "detach"),
    [
        (vgg_sws, BPTT(), lambda h: h),
        (vgg_sws_f, BPTT(), lambda h: h),
        (vgg_sws_f, BPTT(chunk=2), lambda h: h),
        (vgg_sws_f, SLTT(chunk=2), torch.detach),
    ],
)
def test_against_an_independent_network(build, rule, detach):
    model, x_TBCHW, target = small(build), images(4), torch.tensor([0, 3])
    expected = by_hand(model, x_TBCHW, detach=detach)
    assert torch.allclose(outputs(model, x_TBCHW), expected, atol=1e-12)
    wanted = gradient_of(torch.stack([F.cross_entropy(o, target) for o in expected]).mean(), model)
    assert wanted["stages.0.0.conv.0.weight"].abs().max() > 1e-3
    assert build is vgg_sws or wanted["feedback.conv.weight"].abs().max() > 1e-3
    assert difference(gradients(rule, model, x_TBCHW, cross_entropy(target)), wanted) < 1e-12


def test_feedback_starts_at_zero():
    plain, fed_back = (
        build(4, in_channels=2, stages=((3,), (6,))) for build in (vgg_sws, vgg_sws_f)
    )
    assert fed_back.state_dict().keys() - plain.state_dict().keys() == {
        "feedback.conv.weight",
        "feedback.conv.bias",
    }
    fed_back.load_state_dict(plain.state_dict(), strict=False)
    # At the end are 16 and 9 places: a sum of 9 rounds.
    for x_TBCHW in (images(4).float(), 3 * torch.rand(4, 2, 2, 6, 6)):
        assert torch.equal(outputs(plain, x_TBCHW), outputs(fed_back, x_TBCHW))


def test_slices_of_a_network_with_feedback_continue_one_another():
    model = small(vgg_sws_f)
    assert torch.equal(outputs(model, *images(4).split(1)), outputs(model, images(4)))


def test_start_of_the_classifier():
    assert vgg_sws().classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


SMALL = {"classes": 2, "in_channels": 1, "neuron": LIF()}
STEM = {"stages": ((3, 5), (6,)), "stem": (5, 2), "in_channels": 1}


test_refuses = refusals(
    [
        (
            lambda: vgg_sws(stages=((4,), ())),
            r"VGG: each stage must hold at least one width >= 1; got stages=\(\(4,\), \(\)\)",
        ),
        (lambda: vgg_sws(0), r"VGG: classes must be a whole number >= 1; got classes=0"),
        (
            lambda: VGG(stages=((2,),), feedback="all", **SMALL),
            r"VGG: feedback must be 'none' or 'last'; got feedback='all'",
        ),
        (
            lambda: outputs(vgg_sws(stages=((2,), (2,), (2,))), torch.zeros(1, 1, 3, 3, 8)),
            r"VGG: .* at least 4 pixels a side for 3 stages and this stem; got \(3, 8\)",
        ),
        (
            lambda: outputs(vgg_sws(4, **STEM), torch.zeros(1, 1, 1, 3, 8)),
            r"VGG: .* at least 4 pixels a side for 2 stages and this stem; got \(3, 8\)",
        ),
        (
            lambda: vgg_sws(stem=(4, 2)),
            r"VGG: stem must be an odd kernel and a stride >= 1; got stem=\(4, 2\)",
        ),
        (
            lambda: VGG(stages=((4,),), stem=(5, 2), feedback="last", **SMALL),
            r"VGG: the stride of stem must be 1 .* got stem=\(5, 2\)",
        ),
    ]
)


def test_the_stem_has_a_kernel_and_a_stride_of_its_own():
    model = vgg_sws(4, **STEM)
    convs = [m for m in model.modules() if isinstance(m, Conv2d)]
    shapes = [(*m.weight.shape[1:], *m.stride) for m in convs]
    assert shapes == [(1, 5, 5, 2, 2), (3, 3, 3, 1, 1), (5, 3, 3, 1, 1)]
    assert outputs(model, torch.zeros(2, 1, 1, 28, 28)).shape == (2, 1, 4)


def test_dropout_drops_the_same_neurons_at_every_step():
    model, record = vgg_sws(4, in_channels=2, stages=((16,), (8,)), dropout=0.5), []
    first = model.get_submodule("stages.0.0")
    hook: Any = lambda _module, _x, h_TBCHW: record.append(h_TBCHW)
    first.register_forward_hook(hook)
    outputs(model, *images(6).float().split(3))
    fired = torch.cat(record) > 0
    dropped = ~fired.any(0)
    outputs(model.eval(), images(6).float())
    would_fire = (record[-1] > 0).any(0)
    # Inputs are the same, so in the first layer a neuron that fires without dropout, and never with
    # it, was dropped.
    assert (fired == ((record[-1] > 0) & ~dropped)).all()
    assert (dropped & would_fire).sum() / would_fire.sum() == pytest.approx(0.5, abs=0.06)
    assert torch.allclose(torch.cat(record[:2]).unique(), torch.tensor([0.0, 2 * SPIKE_GAIN]))
