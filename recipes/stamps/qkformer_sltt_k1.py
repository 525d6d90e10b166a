"""A small QKFormer by SLTT-1 on stamps: one time step of two is differentiated.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/qkformer_sltt_k1.py --workers 2
Source:   the small twin of recipes/imagenet/qkformer_10_384_sltt_k1.py; the size is ours.
Result:   .2240 on unseen objects of split 0, one seed; 288 s, 59 MB kept for backward; with
          --inline --device cpu; commit 7cdd4aacacbe, one thread of 2 cores of an AMD EPYC, under
          other load, torch 2.13
"""

from dataclasses import replace

from pipeline.recipe import Recipe, spec
from pipeline.rules.sltt import SLTT
from recipes.stamps.base import qkformer


def recipe() -> Recipe:
    return replace(qkformer(), name="stamps-qkformer-sltt-k1", rule=spec(SLTT, k=1))
