r"""One convolution that feeds back to itself, 512C9s (F512C5), on CIFAR10-DVS by SPIDE, IF at T =
30.

Command:  spiketrain write events cifar10dvs --source tonic --out data/cifar10dvs-30 --slices 30
              --frames-by number \ --size 48 --resize area
          spiketrain launch recipes/events/cifar10dvs_spide.py --workers 1
Source:   Xiao et al. 2023 (SPIDE), arXiv:2302.00232, and the defaults of its code: 30 frames of
          equally many events, 48 pixels, padded by 4 and cropped at all steps alike, 250 steps of
          the backward phase, S = 400, batch 128, 70 epochs, SGD 0.05, times 0.1 after 50 epochs,
          5e-4 / S of weight decay, no dropout; the feedback's Frobenius norm is at most 10.
Result:   not run (the published accuracy could not be had)
"""

from dataclasses import replace

from pipeline.data.datasets.events import Events
from pipeline.recipe import Recipe, spec
from pipeline.train.schedule import milestones
from recipes.cifar.cifar10_alexnet_f_spide import recipe as cifar10


def recipe() -> Recipe:
    shared = cifar10()
    return replace(
        shared,
        name="cifar10dvs-spide",
        family="events",
        model=shared.model.with_(
            in_channels=2,
            size=48,
            layers=((512, 9, 2),),
            kernel=5,
            gain=2.0,
            limit=10.0,
            dropout=0.0,
        ),
        data=spec(
            Events,
            folder="data/cifar10dvs-30",
            classes=10,
            steps=30,
            size=48,
            crop="shift",
            reach=4,
        ),
        schedule=spec(milestones, at=(50 / 70,)),
        epochs=70,
    )
