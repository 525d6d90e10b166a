r"""VGG-11 with batch norm on CIFAR10-DVS by DSR, leaky neurons at T = 20.

Command:  spiketrain write events cifar10dvs --source tonic --out data/cifar10dvs-20 --slices 20
              --frames-by number \ --size 48 --resize area
          spiketrain launch recipes/events/cifar10dvs_dsr.py --workers 1
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459: T = 20, 48 pixels, padded by 4 and cropped,
          batch 128, 300 epochs, SGD 0.05, dropout 0.1 with a mask for each step, the rest as for
          CIFAR-10. The published classifier reads the one place that five pools leave, 49 times
          over; here it reads the global pool behind four, through a neuron.
Result:   not run (target, published: 77.3 % top-1)
"""

from dataclasses import replace

from pipeline.data.datasets.events import Events
from pipeline.models.convnet import convnet
from pipeline.recipe import Recipe, spec
from pipeline.spiking.rate import RateLIF
from pipeline.train.schedule import cosine
from recipes.cifar.cifar10_dsr_lif import WARMUP_STEPS
from recipes.cifar.cifar10_dsr_lif import recipe as cifar10

EPOCHS, SAMPLES = 300, 9000


def recipe() -> Recipe:
    shared = cifar10()
    return replace(
        shared,
        name="cifar10dvs-dsr",
        family="events",
        model=spec(
            convnet,
            classes=10,
            in_channels=2,
            stages=((64,), (128,), (256, 256), (512, 512), (512, 512)),
            over="time",
            dropout=0.1,
            mask="step",
            head="rate",
            neuron=spec(RateLIF),
        ),
        data=spec(
            Events,
            folder="data/cifar10dvs-20",
            classes=10,
            steps=20,
            size=48,
            crop="shift",
            reach=4,
        ),
        optimizer=shared.optimizer.with_(lr=0.05),
        schedule=spec(
            cosine,
            warmup=WARMUP_STEPS / (EPOCHS * (SAMPLES // shared.batch_size)),
            update_every="epoch",
        ),
        epochs=EPOCHS,
    )
