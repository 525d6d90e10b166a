"""A program of torch computes the same in a process that does not know spiketrain."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.models.program import to_program
from pipeline.models.qkformer import QKFormer
from pipeline.models.sew_resnet import SEWResNet
from pipeline.models.vgg import vgg_sws_f
from pipeline.spiking.neuron import PLIF
from pipeline.spiking.norm import batch_norms
from tests.helpers.rule_networks import outputs

SHAPE, STEPS, SAMPLES = (3, 16, 16), 2, 5
ELSEWHERE = """
import sys

import torch

x_TB, logits = torch.load("x.pt"), {}
for name in sys.argv[1:]:
    program = torch.export.load(f"{name}-step.pt2")
    (_, states), _ = program.example_inputs
    states = {key: v_B.new_zeros(x_TB.shape[1], *v_B.shape[1:]) for key, v_B in states.items()}
    steps = []
    for x_B in x_TB:
        logits_BK, states = program.module()(x_B, states)
        steps.append(logits_BK)
    whole = torch.export.load(f"{name}.pt2").module()(x_TB)
    logits[name] = torch.stack([whole, torch.stack(steps)])
assert not any(name.partition(".")[0] == "pipeline" for name in sys.modules)
torch.save(logits, "logits.pt")
"""
NETWORKS = {
    "convnet": convnet(stages=((4,), (8,))),
    "ms_resnet": MSResNet(
        blocks=(1,), classes=10, width=8, stem_stride=1, neuron=PLIF(reset="zero")
    ),
    "nf_resnet": nf_resnet18_small(width=8, blocks=(1,)),
    "sew_resnet": SEWResNet(blocks=(1,), bottleneck=False, classes=10, width=8),
    "preact_resnet": preact_resnet18_small(width=4, blocks=(1,)),
    "qkformer": QKFormer(channels=16, depth=4, heads=2, classes=10),
}


def awake(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for norm in batch_norms(network):
        nn.init.uniform_(norm.bias, 0.5, 1.5)
    for name, parameter in network.named_parameters():
        if "skip_gain" in name or name == "classifier.weight":
            nn.init.normal_(parameter)
    return network.eval()


@pytest.mark.full
def test_the_same_logits_in_another_process(tmp_path: Path) -> None:
    x_TB = 2 * torch.rand(STEPS, SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.save(x_TB, tmp_path / "x.pt")
    for name in NETWORKS:
        network = awake(NETWORKS[name])
        torch.export.save(to_program(network, SHAPE, steps=STEPS), tmp_path / f"{name}.pt2")
        torch.export.save(to_program(network, SHAPE), tmp_path / f"{name}-step.pt2")
    words = [sys.executable, "-P", "-c", ELSEWHERE, *NETWORKS]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, both in torch.load(tmp_path / "logits.pt").items():
        expected = outputs(NETWORKS[name], x_TB)
        assert expected.std() > 0.01, name
        assert (both - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (convnet(), "must be in evaluation mode"),
        (vgg_sws_f(stages=((4,), (4,))).eval(), "got memory of FeedbackConv; set steps"),
    ],
)
def test_what_cannot_be_a_program_is_refused(network: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"to_program: .*{said}"):
        to_program(network, SHAPE)
