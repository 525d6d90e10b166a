"""`spiketrain finetune`: train a network further, on another data set of pictures.

    recipe = finetuning(read_start("runs/imagenet-sltt"), Path("data/birds"))

The head is new unless the data has the same number of classes as before.
"""

import base64
import inspect
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.optim import create_optimizer_v2

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.data.datasets.beton import IMAGENET_MEAN, IMAGENET_STD, Beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import JPG, read_tables
from pipeline.models.transforms import frozen
from pipeline.recipe.recipe import Evaluation, Recipe, Spec, spec
from pipeline.rules import bptt, ottt, sltt
from pipeline.rules.base import OverTime
from pipeline.train.evaluation import read_predictions
from pipeline.train.export import is_export, read_export
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine

RULES: dict[str, Spec] = {
    "sltt": spec(sltt.SLTT),
    "sltt-1": spec(sltt.SLTT, k=1, rescale=True),
    "ottt": spec(ottt.OTTT),
    "bptt": spec(bptt.BPTT),
}
FAMILY = "finetune"  # of the recipes, by which a resume knows a fine-tuning
MISTAKES = 16  # pictures of a report
THUMBNAIL = 160  # pixels of the longer side


@dataclass(frozen=True)
class Start:
    """A trained network, from which another one starts."""

    weights: Path  # a run's folder, or a file
    model: Spec
    time_steps: int
    data: Spec | None  # a `Beton`; None: it was trained on other data
    over_time: OverTime = "steps"


def read_start(
    weights: Path, recipe: Recipe | None = None, *, trust: tuple[str, ...] = ()
) -> Start:
    """The network of a run's folder, of an export, or with a recipe of any file of weights.

    `recipe`: of the network that the weights belong to, which may have published names.

    Raises: ValueError if the weights need a recipe, or the network's code is not trusted.
    """
    has_recipe = weights.is_dir() or is_export(weights)
    require(
        recipe is None or not has_recipe,
        f"finetune: --model must be left out with a run or an export; got it with {weights}",
    )
    require(
        recipe is not None or has_recipe,
        "finetune: WEIGHTS must be a run or a file of spiketrain export, or published weights with"
        f" --model RECIPE, the recipe of their network; got {weights}",
    )
    if weights.is_dir():
        recipe = Recipe.read(RunFolder(weights).recipe, trust=trust)
    if recipe is not None:
        start = Start(weights, recipe.model, recipe.time_steps, recipe.data, recipe.over_time)
    else:
        model, pretrained = read_export(weights, trust=trust)
        transform = pretrained.transform
        start = Start(weights, model, pretrained.time_steps, transform and transform.data)
    if start.model.target is not frozen:
        return start
    # A head alone was trained. The next training chooses anew.
    return replace(start, model=start.model.kwargs["network"])


def finetuning(
    start: Start,
    folder: Path,
    *,
    rule: Literal["sltt", "sltt-1", "ottt", "bptt"] | None = None,
    trains: Literal["all", "head"] = "all",
    layer_decay: float | None = None,
    lr: float = 1e-3,
    epochs: int = 10,
    batch_size: int | None = None,
    size: int | None = None,
    name: str = "finetune",
) -> tuple[Recipe, str]:
    """The recipe that fine-tunes a network on the pictures in `folder/train.beton`.

    Args:
        rule: None: SLTT, or BPTT if SLTT cannot train the network.
        trains: "head" keeps all weights but those of the `classifier`.
        layer_decay: each layer's learning rate is that of the next layer, times this factor.
        batch_size: None: 32, or all samples if there are fewer.
        size: pixels a side; None: those of the earlier data.

    Returns the recipe, and the reason if the rule is not the usual one, or "".

    Raises: ValueError if the network or the options do not fit.
    """
    manifest = manifests.read(folder / "train.beton")
    model = _with_classes(start.model, len(manifest.classes))
    if model is None:
        raise ValueError(
            "finetune: the model must have an argument `classes` or `num_classes`;"
            f" {start.model.label} has none"
        )
    recipe = Recipe(
        name=name,
        family=FAMILY,
        model=model if trains == "all" else spec(frozen, network=model),
        rule=RULES[rule or "sltt"],
        data=_data(start, folder, len(manifest.classes), size),
        objective=spec(CrossEntropy, label_smoothing=0.1),
        optimizer=spec(
            create_optimizer_v2, opt="adamw", lr=lr, weight_decay=0.05, layer_decay=layer_decay
        ),
        schedule=spec(cosine, warmup=0.1),
        time_steps=start.time_steps,
        batch_size=batch_size or min(32, manifest.samples),
        over_time=start.over_time,
        epochs=epochs,
        init=str(start.weights),
        evaluation=Evaluation(every=0),
    )
    if rule is not None:
        return recipe, ""
    try:
        RULES["sltt"].build().attach(model.build(), over_time=start.over_time)
    except ValueError as error:
        RULES["bptt"].build().attach(model.build(), over_time=start.over_time)
        return replace(recipe, rule=RULES["bptt"]), f"trained by BPTT, because {error}"
    return recipe, ""


def _data(start: Start, folder: Path, classes: int, size: int | None) -> Spec:
    """The pictures in `folder`, of the size and with the normalisation of the earlier ones."""
    earlier = start.data.kwargs if start.data is not None and start.data.target is Beton else {}
    require(
        size is not None or "size" in earlier,
        "finetune: the network was not trained on pictures in files, so --size must be given",
    )
    channels = earlier.get("channels", 3)
    mean, std = ((0.5,), (0.5,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    return spec(
        Beton,
        folder=str(folder),
        classes=classes,
        channels=channels,
        size=size or earlier["size"],
        **{key: earlier[key] for key in ("flip", "resize") & earlier.keys()},
        mean=earlier.get("mean", mean),
        std=earlier.get("std", std),
    )


def _with_classes(part: Spec, classes: int) -> Spec | None:
    """The model with another number of classes, also in the networks inside it.

    None: neither the part nor a part inside it has an argument for this number.
    """
    parameters = inspect.signature(part.target).parameters.keys()
    changed: dict[str, Any] = dict.fromkeys({"classes", "num_classes"} & parameters, classes)
    for key, value in part.kwargs.items():
        if isinstance(value, Spec) and (inner := _with_classes(value, classes)) is not None:
            changed[key] = inner
    return part.with_(**changed) if changed else None


def write_mistakes(run: Path) -> dict[str, Any]:
    """Write the confusion of a finished run and its worst mistakes to the run's folder.

    A mistake is worse if the network gave its wrong answer a higher probability.

    Returns the content of the file.
    """
    found = read_predictions(RunFolder(run).predictions)
    data: Any = Recipe.read(RunFolder(run).recipe).data.build()
    path = data.folder / f"{data.stored_part('val')}.beton"
    names = manifests.read(path).classes
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (found.target, found.answer), 1)
    wrong = np.flatnonzero(~found.is_correct)
    worst = wrong[np.argsort(-found.probability[wrong, 0], kind="stable")][:MISTAKES]
    tables, stored = read_tables(path), np.memmap(path, np.uint8, "r")
    mistakes = []
    for row in worst:
        number = int(found.index[row])
        record, content = tables.records[number], tables.payload(stored, number)
        if record["mode"] == JPG:
            picture = Image.open(io.BytesIO(content))
        else:
            size = (int(record["width"]), int(record["height"]))
            picture = Image.frombytes("RGB", size, content)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=85)
        mistakes.append(
            {
                "picture": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
                "class": names[found.target[row]],
                "answer": names[found.answer[row]],
                "probability": float(found.probability[row, 0]),
            }
        )
    content = {"class_names": names, "confusion": confusion.tolist(), "mistakes": mistakes}
    write_whole(RunFolder(run).mistakes, json.dumps(content).encode())
    return content
