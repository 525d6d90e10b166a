"""SEI-BWSNN on QKFormer-10-768: an FFN of 1-bit weights, a shortcut around each of its synapses, a
timm teacher, T = 2, SLTT.

Command:  spiketrain write folder --source imagenet --out data/imagenet --mode jpg
              --max-resolution 500 --exif ignore
          spiketrain launch recipes/imagenet/qkformer_10_768_sei_bw.py --workers 8
Source:   Meng et al. 2025 (SEI-BWSNN), arXiv:2508.12609, only its abstract is public. A
          reconstruction: backbone, place of the shortcuts (reading A: the membrane stream),
          binariser, teacher, stages, settings are ours, after Zhou et al. 2024 (QKFormer),
          arXiv:2403.16552, and Liu et al. 2020 (ReActNet), arXiv:2003.03488. Reading B:
          qkformer_10_384_sei_bw_reading_b.py.
Result:   not run (published: 82.52 % top-1 at T = 2, for a Transformer that is not named; if it is
          built on the published QKFormer, its answers depend on the batch, see qkformer_base.py)
Plan:     8 H100, estimated: 29.2, 14.7, 13.7 hours for its three runs, 30.3 GB a card; base.py has
          the command, commit 71e17bd1
"""

from pipeline.recipe import Suite
from recipes.imagenet.qkformer_base import sei


def recipe() -> Suite:
    return sei(768, batch_size=576)
