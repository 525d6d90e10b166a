"""NF-ResNet-34 on ImageNet at T = 1: the first of SLTT's two stages (at one time step every rule is the same rule).

Command:  spiketrain launch recipes/imagenet/nf_resnet34_t1.py --workers 8 --name nf34-t1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: batch 256, 100 epochs, SGD 0.1, weight decay 1e-5, leak 1/11.
Result:   not run
"""

from __future__ import annotations

from timm.optim import create_optimizer_v2

from pipeline.data.beton import Beton
from pipeline.models.nf_resnet import nf_resnet34
from pipeline.objective import CrossEntropy
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.schedule import cosine
from pipeline.spiking.neuron import LIF


def recipe() -> Recipe:
    return Recipe(
        name="imagenet-nf-resnet34-t1",
        model=spec(nf_resnet34, classes=1000, neuron=spec(LIF, leak=1 / 11)),
        rule=spec(SLTT),
        data=spec(Beton, folder="data/imagenet", classes=1000, size=224, crop="resized"),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-5),
        schedule=spec(cosine),
        time_steps=1,
        batch_size=256,
        epochs=100,
        precision="bf16",
        log_every=50,
    )
