"""What the CIFAR recipes share: the data, the optimizer, the schedule, OTTT's network.

CIFAR has no command of its own: `spiketrain write folder` reads it from pictures,
SOURCE/train/CLASS/*.png and SOURCE/val/CLASS/*.png, the test set being val. `--mode raw` keeps the
pixels as they are.
"""

from collections.abc import Mapping

from timm.optim import create_optimizer_v2

from pipeline.data.datasets.beton import Beton
from pipeline.models.vgg import vgg_sws
from pipeline.recipe import Recipe, Spec, spec
from pipeline.rules.ottt import OTTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.surrogate import Sigmoid
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

# Mean and deviation of CIFAR-10's channels. The published codes of OTTT, IDE and SPIDE take them
# for CIFAR-100, too.
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
# The published codes of SLTT and DSR take CIFAR-100's own there.
CIFAR100 = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}


def images(classes: int, *, statistics: Mapping[str, tuple[float, ...]] = CIFAR10) -> Spec:
    """CIFAR-10 or CIFAR-100: crop after padding by 4 pixels, flip. The published Cutout is not part
    of it.
    """
    return spec(
        Beton,
        folder=f"data/cifar{classes}",
        classes=classes,
        size=32,
        crop="shift",
        reach=4,
        **statistics,
    )


def cifar(classes: int = 10) -> Recipe:
    """VGG-sWS at T = 6, trained by OTTT-A with OTTT's published settings."""
    return Recipe(
        name=f"cifar{classes}",
        family="cifar",
        model=spec(
            vgg_sws, classes=classes, neuron=spec(LIF, decay=0.5, surrogate=Sigmoid(alpha=4.0))
        ),
        rule=spec(OTTT),
        data=images(classes),
        objective=spec(CrossEntropy, mse=0.05, goal="one_hot"),
        optimizer=spec(create_optimizer_v2, opt="momentum", lr=0.1, momentum=0.9, weight_decay=0.0),
        schedule=spec(cosine, update_every="epoch"),  # as the published codes of OTTT, SLTT and DSR
        time_steps=6,
        batch_size=128,
        epochs=300,
    )
