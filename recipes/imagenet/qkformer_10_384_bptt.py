"""QKFormer-10-384 on ImageNet by BPTT at T = 2: the baseline of its study.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg --max-resolution 500
          spiketrain launch recipes/imagenet/qkformer_10_384_bptt.py --workers 8
Source:   Zhou et al. 2024 (QKFormer), arXiv:2403.16552: AdamW 6e-4 for a batch of 256, weight decay 0.05, 200 epochs, batch 512.
Result:   not run (target, published at T = 4: 78.80 % top-1)
The published log at T = 4 has, after epochs 1, 2, 5, 10, 25, 100 and 200, 3.8, 15.3, 35.7, 50.6, 61.6, 71.1, 78.9 % top-1.
"""

from __future__ import annotations

from pipeline.recipe import Recipe
from recipes.imagenet.qkformer_base import qkformer


def recipe() -> Recipe:
    return qkformer(384, batch_size=512)
