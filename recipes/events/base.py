"""What the recipes for event data share: moving shapes and the network that must use time, and
SLTT's settings for recordings.

Of moving shapes the test set is read once, after the last epoch; learning rate and epochs were
chosen on a held-out tenth of the training set (`--set data.held_out=0.1`). The published settings
evaluate as they go, every ten epochs or after each."""

from typing import Literal

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.events import Events
from pipeline.models.convnet import convnet
from pipeline.models.transforms import late
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Evaluation, Recipe, Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

STEPS = 10


def moving(*, lr: float) -> Recipe:
    """A small VGG on moving shapes at T = 10, trained by BPTT on the last five steps.

    Leak 0.9: a trail of ten steps fades to a third, so its two ends differ. `lr` is each rule's
    own, the best of 0.003, 0.01, 0.03 and 0.1 on the held-out tenth.
    """
    network = spec(
        vgg_sws,
        classes=16,
        in_channels=2,
        stages=((16,), (32,), (64,)),
        stem=(5, 2),
        neuron=spec(LIF, decay=0.9),
    )
    return Recipe(
        name="moving",
        family="events",
        model=spec(late, network=network, share=0.5, time_steps=STEPS),
        rule=spec(BPTT),
        data=spec(Events, folder="data/moving", classes=16, steps=STEPS, size=34),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="adam", lr=lr, weight_decay=0.0),
        schedule=spec(cosine, warmup=0.05),
        time_steps=STEPS,
        batch_size=64,
        epochs=6,
        evaluation=Evaluation(every=0),
    )


def sltt_k(
    *,
    name: str,
    k: int,
    data: Spec,
    goal: Literal["ones", "one_hot"],
    lr: float,
    dropout: float,
    batch_size: int,
    grid: int = 1,
) -> Recipe:
    """VGG-11 with batch norm per time step, and what SLTT's settings for recordings have in common.

    As published, the gradient of k steps is not rescaled, weight decay reaches biases and norms,
    and the rate changes once an epoch. The published code trains in fp16; here the precision is
    bf16.
    """
    classes, steps = data.kwargs["classes"], data.kwargs["steps"]
    network = spec(
        convnet,
        classes=classes,
        in_channels=2,
        stages=((64,), (128,), (256, 256), (512, 512), (512, 512)),
        grid=grid,
        dropout=dropout,
        neuron=spec(LIF, decay=1 / 11),
    )
    return Recipe(
        name=name,
        family="events",
        model=network,
        rule=spec(SLTT, k=k),
        data=data,
        objective=spec(CrossEntropy, mse=0.05, goal=goal),
        optimizer=spec(
            create_optimizer_v2,
            opt="momentum",
            lr=lr,
            momentum=0.9,
            weight_decay=5e-4,
            filter_bias_and_bn=False,
        ),
        schedule=spec(cosine, update_every="epoch"),
        time_steps=steps,
        batch_size=batch_size,
        epochs=300,
        precision="bf16",
        evaluation=Evaluation(every=10),
    )
