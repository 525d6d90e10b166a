"""NF-ResNet-34 on ImageNet at T = 1: the first of SLTT's two stages.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/nf_resnet34_t1.py --workers 8 --name nf34-t1
Source:   Meng et al. 2023 (SLTT), arXiv:2302.14311: batch 256, 100 epochs, SGD 0.1, weight decay
          1e-5, decay 1/11.
Result:   not run (no target of its own: nf_resnet34_sltt.py, the second stage, has one)
Plan:     8 H100, estimated: 0.725 hours, 1.23 GB a card; base.py has the command, commit 71e17bd1
"""

from pipeline.models.nf_resnet import nf_resnet34
from pipeline.recipe import Recipe
from recipes.imagenet.base import first_stage


def recipe() -> Recipe:
    return first_stage(nf_resnet34, "nf-resnet34")
