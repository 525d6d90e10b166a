"""NF-ResNet-34 on ImageNet by SLTT at T = 6: the second of two stages, fine-tuning a network
trained at T = 1.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/nf_resnet34_t1.py --workers 8 --name nf34-t1
          spiketrain launch recipes/imagenet/nf_resnet34_sltt.py --workers 8 --set init=runs/nf34-t1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: batch 256, 30 epochs, SGD 0.001, no weight
          decay, decay 1/11.
Result:   not run (target, published: 66.19 % top-1)
Plan:     8 H100, estimated: 1.06 hours, 1.16 GB a card; base.py has the command, commit 71e17bd1
"""

from pipeline.models.nf_resnet import nf_resnet34
from pipeline.recipe import Recipe
from recipes.imagenet.base import second_stage


def recipe() -> Recipe:
    return second_stage(nf_resnet34, "nf-resnet34")
