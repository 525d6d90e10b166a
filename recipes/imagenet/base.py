"""SLTT's two stages on ImageNet: 100 epochs at T = 1, where every rule is the same rule, then 30 at
T = 6 from those weights.

Published accuracies need both; the published hours are those of the second stage alone. As
published, weight decay reaches biases and gains, and the rate changes once an epoch. The published
code trains in fp16; here the precision is bf16.

Each recipe of this folder has the hours and the memory of a card that `spiketrain plan RECIPE
--workers 8 --device h100 --samples 1281167` estimates for its rule: training alone, without
evaluations and checkpoints, at 40 % of the roofline, where no step waits for data. No card has run
them."""

from collections.abc import Callable
from dataclasses import replace

from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.data.datasets.beton import Beton
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

LEAK = 1 / 11  # SLTT's published tau of 1.1


def first_stage(network: Callable[..., nn.Module], name: str) -> Recipe:
    """100 epochs at T = 1."""
    return Recipe(
        name=f"imagenet-{name}-t1",
        family="imagenet",
        model=spec(network, classes=1000, neuron=spec(LIF, decay=LEAK)),
        rule=spec(SLTT),
        data=spec(Beton, folder="data/imagenet", classes=1000, size=224, crop="resized"),
        objective=spec(CrossEntropy),
        optimizer=spec(
            create_optimizer_v2,
            opt="momentum",
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-5,
            filter_bias_and_bn=False,
        ),
        schedule=spec(cosine, update_every="epoch"),
        time_steps=1,
        batch_size=256,
        epochs=100,
        precision="bf16",
        log_every=50,
    )


def second_stage(network: Callable[..., nn.Module], name: str) -> Recipe:
    """30 epochs at T = 6; start it from the first stage with `--set init=runs/...`."""
    stage = first_stage(network, name)
    return replace(
        stage,
        name=f"imagenet-{name}-sltt",
        optimizer=stage.optimizer.with_(lr=0.001, weight_decay=0.0),
        time_steps=6,
        epochs=30,
    )
