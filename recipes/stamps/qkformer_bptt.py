"""A small QKFormer by BPTT on stamps: the baseline, with shortcuts as published and labels alone.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/qkformer_bptt.py --workers 2
Source:   the small twin of recipes/imagenet/qkformer_10_384_bptt.py; the size is ours.
Result:   .2202 on unseen objects of split 0, one seed; 327 s, 107 MB kept for backward; with
          --inline --device cpu; commit 7cdd4aacacbe, one thread of 2 cores of an AMD EPYC, under
          other load, torch 2.13
"""

from pipeline.recipe import Recipe
from recipes.stamps.base import qkformer


def recipe() -> Recipe:
    return qkformer()
