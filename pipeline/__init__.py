"""spiketrain: train spiking neural networks by the rule a recipe names, on one machine or many,
measured against BPTT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import os
    from collections.abc import Collection

    from torch import nn

__all__ = ["load"]


def load(
    run: str | os.PathLike[str],
    *,
    which: Literal["last", "best"] = "last",
    trust: Collection[str] = (),
) -> nn.Module:
    """The trained network of a run, ready for evaluation, without Ray or DeepSpeed.

    The network is time first, `[T,B,...]` to `[T,B,K]`, and is called inside `fresh_state`:

        network = pipeline.load("runs/fashion-sltt")
        with torch.no_grad(), fresh_state(network):
            logits_BK = network(repeat(x_BCHW, 6)).mean(0)

    One with a head for each task answers with the first head until `models.heads.select_head`
    chooses another.

    Args:
        run: the run's folder, or a file of `spiketrain export`.
        which: the newest checkpoint, or the one with the best top-1.
        trust: packages outside spiketrain that the recipe may import from.

    Raises:
        ValueError: the folder is no run, none of its checkpoints verifies, or the file is damaged
        or of another kind.
    """
    from pathlib import Path

    if Path(run).is_file():
        from pipeline.train.export import load_export

        if which != "last":
            raise ValueError(
                f"load: which chooses a checkpoint, and the file {run} has none; got"
                f" which={which!r}"
            )
        return load_export(Path(run), trust=trust)
    from pipeline.train.weights import (
        load_run,
    )  # keeps `import pipeline`, and so `spiketrain --help`, free of torch

    return load_run(run, which=which, trust=trust)
