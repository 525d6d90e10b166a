"""QKFormer-10-384 on ImageNet by BPTT at T = 2: the baseline of its study.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/qkformer_10_384_bptt.py --workers 8
Source:   Zhou et al. 2024 (QKFormer), arXiv:2403.16552: AdamW 6e-4 for a batch of 256, weight decay
          0.05, 200 epochs, batch 512.
Result:   not run (published of another setting, see qkformer_base.py: 78.80 % top-1)
Plan:     8 H100, estimated: 7.95 hours, 13.5 GB a card; base.py has the command, commit 71e17bd1
"""

from dataclasses import replace

from pipeline.recipe import Recipe
from recipes.imagenet.qkformer_base import SETTING, qkformer

PUBLISHED = (
    (1, 0.038),
    (2, 0.153),
    (5, 0.357),
    (10, 0.506),
    (25, 0.616),
    (100, 0.711),
    (200, 0.789),
)
"""epochs done and top-1 of the published log"""


def recipe() -> Recipe:
    return replace(qkformer(384, batch_size=512), published=PUBLISHED, published_setting=SETTING)
