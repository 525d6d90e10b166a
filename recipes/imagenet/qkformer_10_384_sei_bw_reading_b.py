"""Reading B of SEI-BWSNN on QKFormer-10-384: a 1-bit FFN, a shortcut around each of its synapses, a
teacher, T = 2, SLTT.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/qkformer_10_384_sei_bw_reading_b.py --workers 8
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, only its abstract is public. A
          reconstruction as qkformer_10_384_sei_bw.py is, but the stream holds sums of spikes and
          their means over groups.
Result:   not run (target, none is published for this width)
Plan:     8 H100, estimated: 16.1, 8.09, 7.61 hours for its three runs, 13.7 GB a card; base.py has
          the command, commit 71e17bd1
"""

from pipeline.recipe import Suite
from recipes.imagenet.qkformer_base import sei


def recipe() -> Suite:
    return sei(384, batch_size=512, shortcut="sew_multiple", name="sei-reading-b")
