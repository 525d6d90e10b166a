"""What the Fashion-MNIST recipes share: the data, the optimizer, the schedule."""

from __future__ import annotations

from timm.optim import create_optimizer_v2

from pipeline.data.beton import Beton
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.objective import CrossEntropy
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.schedule import cosine
from pipeline.spiking.neuron import LIF

LEAK = 1 / 11  # SLTT's published tau of 1.1


def fashion() -> Recipe:
    """A small NF-ResNet on Fashion-MNIST at T = 6, trained by SLTT."""
    return Recipe(
        name="fashion",
        model=spec(
            nf_resnet18_small, classes=10, in_channels=1, width=16, blocks=(1, 1, 1), stem_stride=2, neuron=spec(LIF, leak=LEAK)
        ),
        rule=spec(SLTT),
        data=spec(
            Beton, folder="data/fashion", classes=10, channels=1, size=28, crop="shift", reach=2, mean=(0.286,), std=(0.353,)
        ),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.4, momentum=0.9, weight_decay=0.0),
        schedule=spec(cosine, warmup=0.05),
        time_steps=6,
        batch_size=128,
        epochs=3,
    )
