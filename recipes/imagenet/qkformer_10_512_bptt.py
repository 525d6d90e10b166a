"""QKFormer-10-512 on ImageNet by BPTT at T = 2: the baseline of its study.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg --max-resolution 500
          spiketrain launch recipes/imagenet/qkformer_10_512_bptt.py --workers 8
Source:   Zhou et al. 2024 (QKFormer), arXiv:2403.16552: AdamW 6e-4 for a batch of 256, weight decay 0.05, 200 epochs, batch 512.
Result:   not run (target, published at T = 4: 82.04 % top-1)
The published log at T = 4 has, after epochs 1, 2, 5, 10, 25, 100 and 200, 5.4, 16.1, 39.2, 56.1, 64.8, 74.8, 82.0 % top-1.
"""

from __future__ import annotations

from pipeline.recipe import Recipe
from recipes.imagenet.qkformer_base import qkformer


def recipe() -> Recipe:
    return qkformer(512, batch_size=512)
