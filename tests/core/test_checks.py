import pytest

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.models.convnet import convnet
from pipeline.models.feedback import conv_feedback, fc_feedback, lenet_f
from pipeline.models.mlp import mlp
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.models.qkformer import QKFormer
from pipeline.models.transforms import LateReadout
from pipeline.models.vgg import vgg_sws
from pipeline.spiking.local_learning import Readout


@pytest.mark.parametrize("value", [1, 7, (1,), [2, 3], range(1, 3)], ids=repr)
def test_accepts(value):
    refuse_unless_counts("who", {"size": value})
    refuse_unless_counts("who", {"size": 0, "sizes": (0, 1)}, minimum=0)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        *((one, "a whole number") for one in (0, -1, True, 1.0, None, "1", b"1")),
        *((several, "whole numbers") for several in ((), (1, 0), (1, True), [1.0], ("12",))),
    ],
    ids=repr,
)
def test_refuses(value, what):
    for more, range_ in ({}, ">= 1"), ({"up_to": "T"}, "in 1..T"):
        with pytest.raises(ValueError) as refused:
            refuse_unless_counts("who", {"fine": 1, "size": value}, **more)
        assert str(refused.value) == f"who: size must be {what} {range_}; got size={value!r}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(2.0), "MLP: classes must be a whole number >= 1; got classes=2.0"),
        (
            lambda: mlp(hidden=(8, True)),
            "MLP: hidden must be whole numbers >= 1; got hidden=(8, True)",
        ),
        (lambda: convnet(grid=True), "ConvNet: grid must be a whole number >= 1; got grid=True"),
        (
            lambda: convnet(stages=((8.0,),)),
            "ConvNet: each stage must hold at least one width >= 1; got stages=((8.0,),)",
        ),
        (
            lambda: convnet(kernel=3.0),
            "ConvNet: kernel must be odd, to keep the size of the image; got kernel=3.0",
        ),
        (lambda: vgg_sws(True), "VGG: classes must be a whole number >= 1; got classes=True"),
        (
            lambda: vgg_sws(stem=(3.0, 1)),
            "VGG: stem must be an odd kernel and a stride >= 1; got stem=(3.0, 1)",
        ),
        (
            lambda: fc_feedback(hidden=4.0),
            "fc_feedback: hidden must be a whole number >= 1; got hidden=4.0",
        ),
        (
            lambda: conv_feedback(size=0),
            "conv_feedback: size must be a whole number >= 1; got size=0",
        ),
        (
            lambda: conv_feedback(layers=((8, 3),)),
            "conv_feedback: layers must be (width, kernel, stride), each >= 1; got ((8, 3),)",
        ),
        (lambda: lenet_f(0), "lenet_f: classes must be a whole number >= 1; got classes=0"),
        (
            lambda: LateReadout(share=0.5, time_steps=2.0),
            "LateReadout: time_steps must be a whole number >= 1; got time_steps=2.0",
        ),
        (
            lambda: Readout(4, 2, cells=1.0),
            "Readout: cells must be a whole number >= 1; got cells=1.0",
        ),
        (
            lambda: nf_resnet18_small(blocks=(1, 1.0)),
            "NFResNet: blocks must be whole numbers >= 1; got blocks=(1, 1.0)",
        ),
        (
            lambda: preact_resnet18_small(width=4.0),
            "PreActResNet: width must be a whole number >= 1; got width=4.0",
        ),
        (
            lambda: MSResNet(blocks=(True,), classes=2),
            "MSResNet: blocks must be whole numbers >= 1; got blocks=(True,)",
        ),
        (
            lambda: QKFormer(channels=8, depth=4, heads=True, classes=2),
            "QKFormer: heads must be a whole number >= 1; got heads=True",
        ),
    ],
)
def test_sizes_of_networks(make, message):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value) == message


def test_a_choice_among_values():
    refuse_unless_one_of("LIF", ("subtract", "zero"), reset="zero", other="subtract")
    for accepted, said in (
        (("a", "b"), "'a' or 'b'"),
        ((18, 34, None), "18, 34 or None"),
        ({"only": 1}, "'only'"),
    ):
        with pytest.raises(ValueError) as refused:
            refuse_unless_one_of("net", accepted, first=next(iter(accepted)), size="x")
        assert str(refused.value) == f"net: size must be {said}; got size='x'"
