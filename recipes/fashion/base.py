"""What the Fashion-MNIST recipes share: the data, the optimizer, the schedule, and the feed-forward
network of the study.

These recipes read the test set once, after the last epoch. Learning rates were chosen on a held-out
tenth of the training set (`--set data.held_out=0.1`), the rules of a study on the same grid, and
they share the one that was best on their mean; docs/LOG.md has the figures, and says where a
reading of the test set led to another search on the held-out tenth: once for this network (the
shifts), once for OPZO's study. At decay 0.5 that is 0.3: `--set model.neuron.decay=0.5 --set
optimizer.lr=0.3`."""

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.beton import Beton
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Evaluation, Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.spiking.neuron import LIF
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

LEAK = 1 / 11  # SLTT's published tau of 1.1


def fashion() -> Recipe:
    """A small VGG with standardised weights on Fashion-MNIST at T = 4, trained by BPTT."""
    return Recipe(
        name="fashion",
        family="fashion",
        model=spec(
            vgg_sws,
            classes=10,
            in_channels=1,
            stages=((32,), (64,), (128,)),
            stem=(5, 2),
            neuron=spec(LIF, decay=LEAK),
        ),
        rule=spec(BPTT),
        data=spec(
            Beton,
            folder="data/fashion",
            classes=10,
            channels=1,
            size=28,
            crop="shift",
            reach=0,
            mean=(0.286,),
            std=(0.353,),
        ),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="momentum", lr=0.6, momentum=0.9, weight_decay=0.0),
        schedule=spec(cosine, warmup=0.05),
        time_steps=4,
        batch_size=128,
        epochs=10,
        evaluation=Evaluation(every=0),
    )
