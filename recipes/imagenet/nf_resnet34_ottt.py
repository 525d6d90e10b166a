"""NF-ResNet-34 on ImageNet by OTTT-A at T = 6, from scratch.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/nf_resnet34_ottt.py --workers 8
Source:   Xiao et al. 2022 (OTTT), arXiv:2210.04195: T = 6, batch 256, 100 epochs, SGD 0.1, weight
          decay 2e-5 on biases and gains, too, decay 0.5, no trace at the first convolution and the
          classifier, cross-entropy alone, fp32. These are the defaults of the published code, the
          cosine among them: the paper's text says a tenth of the learning rate every 30 epochs.
Result:   not run (target, published: 65.15 % top-1)
Plan:     8 H100, estimated: 25.4 hours, 1.6 GB a card; base.py has the command, commit 71e17bd1
"""

from dataclasses import replace

from pipeline.models.nf_resnet import nf_resnet34
from pipeline.recipe import Recipe, spec
from pipeline.rules.ottt import OTTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from recipes.imagenet.nf_resnet34_t1 import recipe as by_sltt


def recipe() -> Recipe:
    shared = by_sltt()
    return replace(
        shared,
        name="imagenet-nf-resnet34-ottt",
        model=spec(
            nf_resnet34, classes=1000, neuron=spec(LIF, decay=0.5, surrogate=Sigmoid(alpha=4.0))
        ),
        rule=spec(OTTT, readout="plain"),
        optimizer=shared.optimizer.with_(
            opt="momentum", weight_decay=2e-5, filter_bias_and_bn=False
        ),
        time_steps=6,
        precision="fp32",
    )
