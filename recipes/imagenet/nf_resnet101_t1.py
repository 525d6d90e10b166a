"""NF-ResNet-101 on ImageNet at T = 1: the first of SLTT's two stages.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/nf_resnet101_t1.py --workers 8 --name nf101-t1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: batch 256, 100 epochs, SGD 0.1, weight decay
          1e-5, decay 1/11.
Result:   not run (no target of its own: nf_resnet101_sltt_k.py, the second stage, has one)
Plan:     8 H100, estimated: 2.38 hours, 4.87 GB a card; base.py has the command, commit 71e17bd1
"""

from pipeline.models.nf_resnet import nf_resnet101
from pipeline.recipe import Recipe
from recipes.imagenet.base import first_stage


def recipe() -> Recipe:
    return first_stage(nf_resnet101, "nf-resnet101")
