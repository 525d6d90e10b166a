"""A small QKFormer by BPTT on stamps: the baseline, with shortcuts as published and labels alone.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/qkformer_bptt.py --workers 2
Source:   the small twin of recipes/imagenet/qkformer_10_384_bptt.py; the size is ours.
Result:   not run
"""

from __future__ import annotations

from pipeline.recipe import Recipe
from recipes.stamps.base import qkformer


def recipe() -> Recipe:
    return qkformer()
