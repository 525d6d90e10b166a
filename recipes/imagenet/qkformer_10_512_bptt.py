"""QKFormer-10-512 on ImageNet by BPTT at T = 2: the baseline of its study.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/qkformer_10_512_bptt.py --workers 8
Source:   Zhou et al. 2024 (QKFormer), arXiv:2403.16552: AdamW 6e-4 for a batch of 256, weight decay
          0.05, 200 epochs, batch 512.
Result:   not run (published of another setting, see qkformer_base.py: 82.04 % top-1)
Plan:     8 H100, estimated: 11.2 hours, 18.1 GB a card; base.py has the command, commit 71e17bd1
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.imagenet.qkformer_base import SETTING, qkformer

PUBLISHED = (
    (1, 0.054),
    (2, 0.161),
    (5, 0.392),
    (10, 0.561),
    (25, 0.648),
    (100, 0.748),
    (200, 0.820),
)
"""epochs done and top-1 of the published log"""


def recipe() -> Recipe:
    return replace(qkformer(512, batch_size=512), published=PUBLISHED, published_setting=SETTING)
