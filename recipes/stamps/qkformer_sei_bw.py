"""SEI-BWSNN on a small QKFormer: an FFN of 1-bit weights, a shortcut around each of its synapses, a
timm teacher, T = 2, SLTT.

Command:  spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2
          spiketrain launch recipes/stamps/qkformer_sei_bw.py --workers 2
Source:   the small twin of recipes/imagenet/qkformer_10_384_sei_bw.py, and a reconstruction as that
          is; the size is ours.
Result:   on unseen objects of split 0, one seed: full precision .2942; 1-bit by SLTT .2865 (414 s),
          by BPTT .2846 (522 s); 106 MB kept for backward; the teacher's probe .593; --inline
          --device cpu; commit 4d844037c16b, one thread of 2 cores of an AMD EPYC, under other load,
          torch 2.13
"""

from pipeline.recipe import Suite
from recipes.sei_base import two_stages
from recipes.stamps.base import sei_first_stage


def recipe() -> Suite:
    return two_stages(sei_first_stage(), part="ffn")
