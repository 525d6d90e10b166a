"""SLTT's network and settings for CIFAR."""

from dataclasses import replace

from pipeline.models.preact_resnet import preact_resnet18_small
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.train.objective import CrossEntropy
from recipes.cifar.base import CIFAR10, CIFAR100, cifar, images


def sltt(classes: int, *, weight_decay: float) -> Recipe:
    """PreAct-ResNet-18 with batch norm per time step, at T = 6. The published code trains in fp16;
    here the precision is bf16.
    """
    shared = cifar(classes)
    return replace(
        shared,
        model=spec(
            preact_resnet18_small,
            classes=classes,
            head="linear",
            over="step",
            neuron=spec(LIF, decay=1 / 11),
        ),
        rule=spec(SLTT),
        objective=spec(CrossEntropy, mse=0.05),
        data=images(classes, statistics=CIFAR10 if classes == 10 else CIFAR100),
        # The published optimizer decays everything.
        optimizer=shared.optimizer.with_(weight_decay=weight_decay, filter_bias_and_bn=False),
        epochs=200,
        precision="bf16",
    )
