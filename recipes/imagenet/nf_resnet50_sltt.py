"""NF-ResNet-50 on ImageNet by SLTT at T = 6: the second of two stages, fine-tuning a network
trained at T = 1.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/nf_resnet50_t1.py --workers 8 --name nf50-t1
          spiketrain launch recipes/imagenet/nf_resnet50_sltt.py --workers 8 --set init=runs/nf50-t1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: batch 256, 30 epochs, SGD 0.001, no weight
          decay, decay 1/11.
Result:   not run (target, unconfirmed: 67.02 % top-1)
Plan:     8 H100, estimated: 2.52 hours, 2.64 GB a card; base.py has the command, commit 71e17bd1
"""

from pipeline.models.nf_resnet import nf_resnet50
from pipeline.recipe import Recipe
from recipes.imagenet.base import second_stage


def recipe() -> Recipe:
    return second_stage(nf_resnet50, "nf-resnet50")
