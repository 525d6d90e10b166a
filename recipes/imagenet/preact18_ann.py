"""PreAct-ResNet-18 with ReLU on ImageNet: the first of DSR's two stages.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/preact18_ann.py --workers 8 --name preact18-ann
Source:   Meng et al. 2022 (DSR), arXiv:2205.00459: SGD 0.1, weight decay 1e-4, batch 256; epochs
          and schedule are not published with the method, 100 with a cosine are ours.
Result:   not run (no target of its own: preact18_dsr.py, the second stage, has one)
Plan:     8 H100, estimated: 0.459 hours, 0.525 GB a card; base.py has the command, commit 71e17bd1
"""

from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.data.datasets.beton import Beton
from pipeline.models.preact_resnet import preact_resnet18
from pipeline.recipe import Recipe, spec
from pipeline.rules.bptt import BPTT
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine


def recipe() -> Recipe:
    return Recipe(
        name="imagenet-preact18-ann",
        family="imagenet",
        model=spec(preact_resnet18, classes=1000, neuron=spec(nn.ReLU)),
        rule=spec(BPTT),
        data=spec(Beton, folder="data/imagenet", classes=1000, size=224, crop="resized"),
        objective=spec(CrossEntropy),
        optimizer=spec(
            create_optimizer_v2,
            opt="momentum",
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            filter_bias_and_bn=False,
        ),
        schedule=spec(cosine),
        time_steps=1,
        over_time="mean",
        batch_size=256,
        epochs=100,
        precision="bf16",
        log_every=50,
    )
