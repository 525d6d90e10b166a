"""Train the tiny form of recipes in one process and write digests of their final weights.

    PYTHONPATH=CHECKOUT python tools/train_tiny.py OUT recipes/fashion/sltt.py ...

OUT/recipes/fashion/sltt.json holds the runs of that recipe file. A recipe that fails leaves its
traceback and no file.

`tools/same_bits` runs this file in two checkouts, each first on the path. Between them modules,
classes, fields and parameters may have other names. So this file asks little of a checkout:
`python -m pipeline launch`, `pipeline.load`, `recipe.json` in the folder of a run, `Recipe.tiny`
with the fields `name`, `seed`, `data`, `protocol`, `tuned` and `searched`, and a class `Synthetic`
in a module `synthetic` under `pipeline.data`.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

RECIPE = "SAME_BITS_RECIPE"
SAMPLED = 64
FROM_FILES = {
    "recipes/fashion/sltt.py": ("fashion", ()),
    "recipes/events/moving_sltt.py": ("events moving", ("--samples", "64", "--val-samples", "16")),
}
"""The recipes that read files, with the words of `spiketrain write`. The others read generated
samples: FFCV compiles its loaders anew for each run, which takes seconds."""


def recipe() -> Any:
    """The recipes of the file that the environment names; `launch` is given this file."""
    path = os.environ[RECIPE]
    made = importlib.import_module(path.removesuffix(".py").replace("/", ".")).recipe()
    members = list(getattr(made, "recipes", made if isinstance(made, list | tuple) else [made]))
    small = [_small(each, from_files=path in FROM_FILES) for each in _first_seeds(members)]
    return small if len(small) > 1 else small[0]  # a suite of one would cost a report page


def _first_seeds(members: list[Any]) -> list[Any]:
    """Those of one seed that are no trials, and every recipe that one of them refers to."""
    kept = [each for each in members if each.seed == members[0].seed and each.protocol != "trial"]
    while more := [
        each for each in members if each not in kept and f"'@{each.name}'" in repr(kept)
    ]:
        kept += more
    return [each for each in members if each in kept]


def _small(full: Any, *, from_files: bool) -> Any:
    tiny = full.tiny()  # before the data is replaced: it sets the T of recordings
    if not from_files:
        data = tiny.data.build()
        most = 64 if len(data.shape) == 4 else 32  # pixels a side
        shape = (*data.shape[:-2], *(min(side, most) for side in data.shape[-2:]))
        about = {"samples": 160, "val_samples": 16, "classes": data.classes, "shape": shape}
        tiny = replace(tiny, data=type(tiny.data)(_synthetic(), about))
    # The name of the whole recipe: other members of a suite refer to it.
    return replace(tiny, name=full.name, protocol="shared", tuned=(), searched=())


def _synthetic() -> Any:
    package = importlib.import_module("pipeline.data")
    for module in pkgutil.walk_packages(package.__path__, "pipeline.data."):
        if module.name.endswith(".synthetic"):
            return importlib.import_module(module.name).Synthetic
    raise LookupError("train_tiny: pipeline.data must hold a module 'synthetic'; found none")


def digest(run: Path) -> dict[str, dict[str, Any]]:
    """Shape, type, SHA-256 and a few values of each parameter and buffer."""
    import torch

    import pipeline

    found = {}
    for name, tensor in pipeline.load(run).state_dict().items():
        values = tensor.detach().cpu().contiguous()
        flat = values.flatten()
        picked = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to(torch.float64)
        found[name] = {
            "shape": list(values.shape),
            "dtype": str(values.dtype),
            "sha256": hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest(),
            "values": picked.tolist(),
        }
    return found


def _spiketrain(*words: str) -> None:
    """Run a command in this process.

    Raises:
        RuntimeError: it ended with another exit code than 0.
    """
    sys.argv = ["spiketrain", *words]
    try:
        runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(
                f"spiketrain {' '.join(words)} ended with exit code {end.code}"
            ) from end


def _train(path: str, runs: Path) -> dict[str, Any]:
    os.environ[RECIPE] = path
    if path in FROM_FILES:
        name, options = FROM_FILES[path]
        _spiketrain("write", *name.split(), "--out", f"data/{name.split()[-1]}", *options)
    before = set(runs.glob("*/recipe.json"))
    _spiketrain("launch", str(Path(__file__)), "--inline", "--device", "cpu", "--runs", str(runs))
    trained = {}
    for file in sorted(set(runs.glob("*/recipe.json")) - before):
        name = json.loads(file.read_text())["recipe"]["name"]
        trained[name] = digest(file.parent)
        shutil.rmtree(file.parent)
    return trained


def main() -> None:
    out, paths = Path(sys.argv[1]).absolute(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for path in paths:
            begun = time.monotonic()
            try:
                trained = _train(path, Path("runs"))
            except Exception:
                traceback.print_exc()  # the caller misses the file
                continue
            result = {"seconds": round(time.monotonic() - begun, 1), "runs": trained}
            file = (out / path).with_suffix(".json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the command line's handlers at exit would end with the code of its last command


if __name__ == "__main__":
    main()
