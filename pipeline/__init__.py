"""spiketrain trains spiking neural networks by the rule that a recipe names, on one machine or
many, and measures the cost of each rule against BPTT.

`import pipeline` imports neither torch nor a recipe: each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import os
    from collections.abc import Collection

    import pandas as pd
    from torch import nn

    from pipeline.recipe.recipe import Phase, Recipe, Spec, spec
    from pipeline.recipe.suite import Choice, Suite

__all__ = ["Choice", "Phase", "Recipe", "Spec", "Suite", "load", "results", "spec"]

_MODULES = {
    **dict.fromkeys(("Phase", "Recipe", "Spec", "spec"), "pipeline.recipe.recipe"),
    **dict.fromkeys(("Choice", "Suite"), "pipeline.recipe.suite"),
}
"""the module of each public name that is not defined here"""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def load(
    run: str | os.PathLike[str],
    *,
    which: Literal["last", "best"] = "last",
    trust: Collection[str] = (),
) -> nn.Module:
    """Load the trained network of a run or an export, ready for evaluation.

    It needs neither Ray nor DeepSpeed. The network is time first, `[T,B,...]` to `[T,B,K]`, and is
    called inside `fresh_state`:

        network = pipeline.load("runs/fashion-sltt")
        with torch.no_grad(), fresh_state(network):
            logits_BK = network(repeat(x_BCHW, 6)).mean(0)

    A network with a head for each task answers with the first head until
    `models.heads.select_head` chooses another.

    Args:
        run: the run's folder, or a file of `spiketrain export`.
        which: the newest checkpoint, or the one with the best top-1.
        trust: packages outside spiketrain that the recipe may import from.

    Raises:
        ValueError: the folder is not a run's, none of its checkpoints is intact, or the file is
            damaged or not an export.
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
    from pipeline.train.weights import load_run

    return load_run(run, which=which, trust=trust)


def results(source: str | os.PathLike[str] = "runs") -> pd.DataFrame:
    """All runs as a pandas frame: a row for each, with what it is and every quantity measured.

        frame = pipeline.results("runs/")
        frame[frame.state == "finished"].groupby(["study", "rule"])["top1"].agg(["mean", "std"])

    Quantities are in bytes, seconds, joules, and shares in 0..1; NaN where one was not measured.
    `pipeline.report.results.METRICS` lists them. The columns `recipe` and `summary` hold what the
    files of a run say; a store has neither a recipe nor text of a summary.

    Args:
        source: a folder of runs, the SQLite file of an MLflow store or its URI, or the address of
            an MLflow server.

    Raises:
        ValueError: the source cannot be read, or a file of a run is damaged.
    """
    import os
    from pathlib import Path

    from pipeline.report.results import frame, read_runs
    from pipeline.report.stores import open_store, runs_of_store

    place = os.fspath(source)
    if "://" in place or Path(place).is_file():
        return frame(runs_of_store(open_store(place)))
    if not Path(place).is_dir():
        raise ValueError(f"results: source must be a folder of runs or a store; got {place}")
    return frame(read_runs(Path(place)))
