"""NF-ResNet-101 on ImageNet by SLTT-2 at T = 6: the second of two stages, fine-tuning a network
trained at T = 1.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/nf_resnet101_t1.py --workers 8 --name nf101-t1
          spiketrain launch recipes/imagenet/nf_resnet101_sltt_k.py --workers 8 --set
              init=runs/nf101-t1
Source:   Meng et al. 2023 (SLTT-2), arXiv:2302.14311: batch 256, 30 epochs, SGD 0.001, no weight
          decay, decay 1/11, k = 2 of the 6 steps, not rescaled.
Result:   not run (target, unconfirmed: 69.26 % top-1)
Plan:     8 H100, estimated: 2.58 hours, 4.18 GB a card; base.py has the command, commit 71e17bd1
"""

from dataclasses import replace

from pipeline.models.nf_resnet import nf_resnet101
from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.imagenet.base import second_stage


def recipe() -> Recipe:
    stage = second_stage(nf_resnet101, "nf-resnet101")
    return replace(stage, name="imagenet-nf-resnet101-sltt-2", rule=spec(SLTT, k=2))
