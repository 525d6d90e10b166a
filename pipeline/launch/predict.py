"""`spiketrain predict`: the classes of pictures, the spikes of each layer, and the energy."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.checks import require
from pipeline.core.printing import Column, new_console, number, print_table, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import computing
from pipeline.data.pictures import BATCH, Pretrained
from pipeline.data.write.images import files_in
from pipeline.measure.energy import EnergyCounter, describe_inference, joules_per_sample
from pipeline.measure.memory import device_here
from pipeline.recipe.recipe import Recipe
from pipeline.train.backend.collectives import Ranks
from pipeline.train.evaluation import EvaluationOutput, evaluate, evaluation_batches
from pipeline.train.export import load
from pipeline.train.objective import CrossEntropy
from pipeline.train.transfer import move_network


@dataclass(frozen=True)
class Answers:
    """The predictions for some files of pictures."""

    files: Sequence[Path]  # the readable ones, in the order of the rows of `output`
    unreadable: dict[str, str]  # the reasons, by file
    class_names: tuple[str, ...]
    time_steps: int
    output: EvaluationOutput
    on_gpu: bool

    def rows(self) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
        """Each file, and the names and probabilities of its most probable classes."""
        found = self.output.predictions
        for file, top, probability in zip(self.files, found.top, found.probability, strict=True):
            yield (
                file,
                [
                    (self.class_names[each], float(share))
                    for each, share in zip(top, probability, strict=True)
                ],
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "time_steps": self.time_steps,
            "pictures": [
                {
                    "file": str(file),
                    "top": [{"class": name, "probability": share} for name, share in top],
                }
                for file, top in self.rows()
            ],
            "unreadable": self.unreadable,
            "layers": self._layers,
            "inference": self._inference,
        }

    @property
    def _layers(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": layer.name,
                "neurons": layer.neurons,
                "firing_rate": layer.rate,
                "spikes": sum(layer.rates) * layer.neurons,
            }
            for layer in self.output.activity
        ]

    @property
    def _inference(self) -> dict[str, Any]:
        assert self.output.inference is not None, "operations were counted"
        return self.output.inference.to_dict(joules_per_sample([self.output.readings]))

    def print(self, form: Literal["table", "json", "csv"]) -> None:
        if form == "json":
            print(json.dumps(self.to_json(), indent=2), flush=True)
        elif form == "csv":
            self._print_csv()
        else:
            self._print_tables()
        if form != "json":
            for file, reason in self.unreadable.items():
                print(f"predict: {file} is not read: {reason}", file=sys.stderr)

    def _print_csv(self) -> None:
        rows = list(self.rows())
        ranks = range(1, len(rows[0][1]) + 1)
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(
            ["file", *(f"{name}_{i}" for i in ranks for name in ("class", "probability"))]
        )
        for file, top in rows:
            table.writerow([file, *(f"{value}" for pair in top for value in pair)])

    def _print_tables(self) -> None:
        console = new_console()
        print_table(
            console,
            ["picture", Column("class"), number("%"), Column("others, %", wraps=True)],
            [
                (
                    str(file),
                    first[0],
                    f"{first[1]:.1%}"[:-1],
                    ", ".join(f"{n} {p:.1%}"[:-1] for n, p in rest),
                )
                for file, (first, *rest) in self.rows()
            ],
        )
        console.print()
        print_table(
            console,
            ["layer", number("neurons"), number("spikes per picture"), number("firing rate")],
            [
                (
                    each["layer"],
                    f"{each['neurons']:,}",
                    f"{each['spikes']:,.0f}",
                    f"{each['firing_rate']:.4f}",
                )
                for each in self._layers
            ],
            title=f"Spikes of each layer, T = {self.time_steps}, mean over the pictures",
        )
        say(console, describe_inference(self._inference, on_gpu=self.on_gpu))


def predict(
    run: Path,
    pictures: Iterable[Path],
    *,
    which: Literal["last", "best"] = "last",
    trust: tuple[str, ...] = (),
) -> Answers:
    """Predict the classes of pictures with the network of a run or of an export.

    The evaluation of the run saw pictures in the same way (data/pictures.py), so the predictions of
    its evaluation set are those of `evaluate`.

    Args:
        pictures: files, or folders, whose pictures at any depth are read in the order of their
            paths.

    Raises: ValueError if the network cannot be loaded or was not trained on pictures in files, or
    no picture can be read.
    """
    files, left_out = _files(pictures)
    network: Any = load(run, which=which, trust=trust)
    trained: Pretrained = network.pretrained
    if trained.transform is None:
        raise ValueError(
            f"predict: the network must have been trained on pictures in files, without phases;"
            f" {run} was trained on other data"
        )
    device = device_here()
    move_network(network, device)
    recipe = Recipe.read(RunFolder(run).recipe, trust=trust) if run.is_dir() else None
    micro_batch = BATCH if recipe is None else recipe.split(1).micro_batch
    say_stage("reading the pictures; a machine's first start compiles the data loader")
    with (
        trained.transform.loader(files, micro_batch=micro_batch) as (loader, unreadable),
        computing(device, "fp32" if recipe is None else recipe.precision),
    ):
        output = evaluate(
            network,
            evaluation_batches(loader, trained.time_steps, Ranks(device=str(device))),
            CrossEntropy().labels,  # of class 0: nobody reads this loss
            over_time="steps" if recipe is None else recipe.over_time,
            counts_operations=True,
            energy_counter=EnergyCounter(device),
            activity_every=1,
        )
    classes = trained.transform.data.kwargs["classes"]
    return Answers(
        [file for file in files if str(file) not in unreadable],
        left_out | unreadable,
        trained.class_names or tuple(str(each) for each in range(classes)),
        trained.time_steps,
        output,
        device.type == "cuda",
    )


def _files(pictures: Iterable[Path]) -> tuple[list[Path], dict[str, str]]:
    """The pictures, and the reasons of the other files in folders."""
    files, left_out = list[Path](), dict[str, str]()
    for each in pictures:
        require(each.exists(), f"predict: {each} must be a picture or a folder; it does not exist")
        before = len(files)
        for file, reason in files_in(each) if each.is_dir() else [(each, "")]:
            if reason:
                left_out[str(file)] = reason
            else:
                files.append(file)
        require(len(files) > before, f"predict: {each} must hold pictures; it has none")
    return files, left_out
