"""A folder of pictures: a run on it, predictions for single files, and a run that is fine-tuned on
other pictures.
"""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.data.datasets.beton import Beton
from pipeline.data.write.images import write_folder
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import launch_run
from pipeline.launch.finetune import finetuning, read_start, write_mistakes
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.published import to_published
from pipeline.models.qkformer import QKFormer
from pipeline.models.vgg import vgg_sws
from pipeline.recipe.recipe import Recipe, spec
from pipeline.report.page import render
from pipeline.report.suite import read_study
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.build import build_optimizer
from pipeline.train.evaluation import read_predictions
from pipeline.train.weights import load_start
from tests.helpers.small import Done, Refused, small_recipe, train_inline

SIZE = 16
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}
MODEL = spec(vgg_sws, classes=3, stages=((8,), (16,)))


def draw(folder: Path, classes: dict[str, tuple[int, int, int]], part: str, each: int) -> None:
    """Noisy pictures of several sizes, as PNG and JPEG, about the colour of their class."""
    rng = np.random.default_rng(len(part))
    for name, colour in classes.items():
        (folder / part / name).mkdir(parents=True)
        for number in range(each):
            shape = (int(rng.integers(20, 40)), int(rng.integers(20, 40)), 3)
            pixels = np.clip(rng.normal(colour, 90, shape), 0, 255).astype(np.uint8)
            suffix = ("png", "jpg")[number % 2]
            Image.fromarray(pixels).save(folder / part / name / f"{number:02}.{suffix}")


def recipe(folder: Path, **changes: Any) -> Recipe:
    data = spec(Beton, folder=str(folder), classes=3, size=SIZE)
    return small_recipe(name="first", model=MODEL, data=data, rule=spec(SLTT), **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`, `two` (pictures of two classes), their FFCV files, and `runs/first`."""
    place = tmp_path_factory.mktemp("place")
    for name, classes in (("pictures", COLOURS), ("two", {"dark": (60,) * 3, "pale": (190,) * 3})):
        draw(place / name, classes, "train", 16)
        draw(place / name, classes, "val", 8)
        write_folder(place / name, place / f"{name}-ffcv", mode="jpg")
    first = recipe(place / "pictures-ffcv")
    launch_run(first, Cluster(inline=True, device="cpu"), place / "runs", name="first")
    return place


# ------------------------------------------------------------------------------------------ predict


def test_a_prediction_of_each_picture_is_that_of_the_evaluation(place: Path, done: Done) -> None:
    told = json.loads(
        done("predict", place / "runs" / "first", place / "pictures" / "val", "--format", "json")
    )
    files = [Path(each["file"]) for each in told["pictures"]]
    assert files == sorted((place / "pictures" / "val").rglob("*.*"))
    evaluated = read_predictions(place / "runs" / "first" / "answers.npz")
    names = [*COLOURS]
    assert [file.parent.name for file in files] == [names[each] for each in evaluated.target]
    tops = [[top["class"] for top in each["top"]] for each in told["pictures"]]
    assert tops == [[names[each] for each in top] for top in evaluated.top]
    shares = [[top["probability"] for top in each["top"]] for each in told["pictures"]]
    np.testing.assert_allclose(shares, evaluated.probability, atol=1e-6)
    assert np.allclose(np.sum(shares, axis=1), 1) and told["unreadable"] == {}
    assert told["inference"]["energy_j"] > 0
    for layer in told["layers"]:
        assert layer["spikes"] == pytest.approx(layer["firing_rate"] * layer["neurons"] * 3)


def test_an_export_predicts_as_its_run_and_names_what_it_cannot_read(
    place: Path, tmp_path: Path, done: Done, spiketrain: Any
) -> None:
    file = tmp_path / "first.safetensors"
    done("export", place / "runs" / "first", "--out", file)
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    pictures = [place / "pictures" / "val" / "red" / "00.png", tmp_path / "torn.jpg"]
    printed = [
        spiketrain("predict", *map(str, (source, *pictures)), "--format", "csv")
        for source in (place / "runs" / "first", file)
    ]
    assert printed[0] == printed[1]
    code, out, err = printed[0]
    [row] = csv.DictReader(io.StringIO(out))
    assert code == 0 and row["file"] == str(pictures[0])
    assert {row[f"class_{i}"] for i in (1, 2, 3)} == COLOURS.keys()
    assert f"predict: {tmp_path / 'torn.jpg'} is not read" in err
    table = done("predict", file, pictures[0])
    assert row["class_1"] in table and "Spikes of each layer, T = 3" in table


def test_a_loaded_network_comes_with_what_it_expects(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network: Any = pipeline.load(place / "runs" / "first")
    expects = network.pretrained
    assert (expects.time_steps, expects.class_names) == (3, tuple(COLOURS))
    files = sorted((place / "pictures" / "val" / "green").iterdir())
    x_BCHW = expects.transform(files)
    with (
        recipe(place / "pictures-ffcv")
        .data.build()
        .val(rank=0, world=1, micro_batch=24, threads=1)
        .epoch(0) as batches
    ):
        [batch] = batches
    assert torch.equal(x_BCHW, batch.x[batch.target == 1])
    (tmp_path / "empty.png").touch()
    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "finetune.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for example, ours in (
        ("birds.safetensors", place / "runs" / "first"),
        ("robin.jpg", files[1]),
        ("wren.png", files[0]),
    ):
        code = code.replace(example, str(ours))
    exec(code, {})
    assert len(set(re.findall(r"'(\w+)'", capsys.readouterr().out)) - COLOURS.keys()) == 0
    with pytest.raises(ValueError, match=r"1 picture cannot be read, such as .*empty\.png"):
        expects.transform([files[0], tmp_path / "empty.png"])


def test_what_cannot_be_predicted_is_refused_in_one_line(
    place: Path, tmp_path: Path, refused: Refused
) -> None:
    run = place / "runs" / "first"
    assert "it does not exist" in refused("predict", run, tmp_path / "absent.png")
    assert "must hold pictures" in refused("predict", run, tmp_path)
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    assert "none of 1 file can be read" in refused("predict", run, tmp_path / "torn.jpg")
    said = refused("finetune", run, place / "pictures", "--val", "0.2", "--data", tmp_path / "data")
    assert "it has no effect on the folders train and val" in said
    train_inline(tmp_path / "other", small_recipe(epochs=1))
    said = refused("predict", tmp_path / "other", place / "pictures" / "val" / "red" / "00.png")
    assert "trained on other data" in said


# ----------------------------------------------------------------------------------------- finetune


def test_a_run_is_fine_tuned_on_pictures_of_other_classes(
    place: Path, tmp_path: Path, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = done(
        *("finetune", place / "runs" / "first", place / "two", "--trains", "head"),
        *("--runs", tmp_path / "runs", "--name", "tuned", "--inline", "--device", "cpu"),
        *("--epochs", 2, "--batch-size", 8),
    )
    run = tmp_path / "runs" / "tuned"
    assert (tmp_path / "data" / "two" / "train.beton").exists()
    before, after = (
        pipeline.load(folder).state_dict() for folder in (place / "runs" / "first", run)
    )
    changed = {
        key.removeprefix("network.")
        for key in after
        if not torch.equal(after[key], before.get(key, torch.empty(0)))
    }
    assert changed == {"classifier.weight", "classifier.bias"}
    assert read_start(run).model == MODEL.with_(classes=2)  # the next one may train all again
    found = json.loads((run / "mistakes.json").read_text())
    evaluated = read_predictions(run / "answers.npz")
    assert np.trace(found["confusion"]) == evaluated.is_correct.sum()
    assert np.sum(found["confusion"]) == 16 and found["class_names"] == ["dark", "pale"]
    wrong = 16 - np.trace(found["confusion"])
    assert len(found["mistakes"]) == wrong and ("mistook" in said) == (wrong > 0)
    shares = [each["probability"] for each in found["mistakes"]]
    assert shares == sorted(shares, reverse=True)
    page = (run / "report.html").read_text()
    assert all(each["picture"] in page for each in found["mistakes"]) and "Confusion" in page


def test_the_worst_mistakes_are_the_surest_ones(place: Path, tmp_path: Path) -> None:
    """Fifteen of 24 answers are made wrong, with known probabilities."""
    run = tmp_path / "runs" / "first"
    run.parent.mkdir()
    for file in ("recipe.json", "job.json", "summary.json", "journal.jsonl", "answers.npz"):
        run.mkdir(exist_ok=True)
        (run / file).write_bytes((place / "runs" / "first" / file).read_bytes())
    with np.load(run / "answers.npz") as stored:
        arrays = dict(stored)
    wrong = np.arange(24) < 20
    arrays["top"][:, 0] = np.where(wrong, (arrays["target"] + 1) % 3, arrays["target"])
    arrays["probability"][:, 0] = np.linspace(0.4, 0.9, 24)
    np.savez(run / "answers.npz", **arrays)
    found = write_mistakes(run)
    assert np.array_equal(found["confusion"], [[0, 8, 0], [0, 0, 8], [4, 0, 4]])
    shares = [each["probability"] for each in found["mistakes"]]
    assert shares == pytest.approx(arrays["probability"][4:20, 0][::-1])
    assert found["mistakes"][0]["class"] == "red" and found["mistakes"][0]["answer"] == "blue"
    assert render(read_study(run.parent, ["first"]).study).count("<img src=") == 16


def test_a_class_of_another_name_does_not_get_the_files_of_before(
    place: Path, tmp_path: Path, refused: Refused
) -> None:
    draw(tmp_path / "kept", COLOURS, "train", 4)
    draw(tmp_path / "kept", COLOURS, "val", 4)
    write_folder(tmp_path / "kept", tmp_path / "ffcv", mode="jpg")
    for part in ("train", "val"):
        (tmp_path / "kept" / part / "red").rename(tmp_path / "kept" / part / "scarlet")
    run = place / "runs" / "first"
    said = refused("finetune", run, tmp_path / "kept", "--data", tmp_path / "ffcv")
    assert "use --existing replace" in said


def test_settings_of_a_fine_tuning_follow_the_earlier_run(place: Path) -> None:
    start = read_start(place / "runs" / "first")
    made, reason = finetuning(start, place / "two-ffcv", layer_decay=0.5, epochs=1, batch_size=8)
    assert reason == "" and made.rule == spec(SLTT) and made.time_steps == 3
    assert made.model.kwargs["classes"] == made.data.kwargs["classes"] == 2
    assert made.data.kwargs["size"] == SIZE and made.init == str(place / "runs" / "first")
    network = made.model.build()
    rule = made.rule.build()
    rule.attach(network)
    optimizer = build_optimizer(made, network, rule)
    schedule = made.schedule.build(optimizer, 100, 10)
    rates, first_layer = {}, next(iter(dict(network.named_parameters())))
    for step in (5, 10):  # inside the warm-up, and at its end
        schedule(step)
        rates[step] = {
            name: group["lr"]
            for group in optimizer.param_groups
            for name, parameter in network.named_parameters()
            if any(parameter is each for each in group["params"])
        }
    first, head = rates[10][first_layer], rates[10]["classifier.weight"]
    assert first == pytest.approx(0.25 * head) and 0.9e-3 < head <= 1e-3
    assert rates[5][first_layer] / rates[5]["classifier.weight"] == pytest.approx(first / head)


def test_a_network_that_sltt_cannot_train_is_trained_by_bptt(place: Path) -> None:
    start = read_start(place / "runs" / "first")
    model = spec(MSResNet, blocks=(1,), width=8, classes=3, over="time")
    made, reason = finetuning(replace(start, model=model), place / "two-ffcv")
    assert made.rule == spec(BPTT) and "trained by BPTT, because" in reason


def test_published_weights_start_with_the_recipe_of_their_network(
    place: Path, tmp_path: Path
) -> None:
    of = replace(
        recipe(place / "pictures-ffcv"),
        model=spec(QKFormer, channels=32, depth=4, heads=1, classes=3, over="step"),
    )
    network = of.model.build()
    torch.save(to_published(network), tmp_path / "published.pth")
    start = read_start(tmp_path / "published.pth", of)
    made, _ = finetuning(start, place / "two-ffcv", batch_size=8, epochs=1)
    tuned = made.model.build()
    assert made.init is not None
    fresh = load_start(tuned, Path(made.init))
    assert fresh == ("classifier.weight", "classifier.bias")
    assert made.data.kwargs["size"] == SIZE and made.time_steps == 3
    with pytest.raises(ValueError, match="--model must be left out with a run"):
        read_start(place / "runs" / "first", of)
    ours = network.state_dict()
    kept = [key for key in ours if not key.startswith("classifier.")]
    assert all(torch.equal(tuned.state_dict()[key], ours[key]) for key in kept)


def test_what_cannot_be_fine_tuned_is_refused_in_one_line(
    place: Path, tmp_path: Path, refused: Refused
) -> None:
    assert "no run" in refused("finetune", tmp_path / "absent", place / "two-ffcv")
    (tmp_path / "weights.pth").write_bytes(b"")
    said = refused("finetune", tmp_path / "weights.pth", place / "two-ffcv")
    assert "or published weights with --model RECIPE" in said
    start = read_start(place / "runs" / "first")
    with pytest.raises(ValueError, match="must have an argument `classes`"):
        finetuning(replace(start, model=spec(torch.nn.Identity)), place / "two-ffcv")
    with pytest.raises(ValueError, match="--size must be given"):
        finetuning(replace(start, data=None), place / "two-ffcv")


def test_init_of_a_launch_is_the_recipes_init(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Done
) -> None:
    started: list[Recipe] = []
    monkeypatch.setattr("pipeline.launch.driver.launch_run", lambda *a, **_: started.append(a[0]))
    monkeypatch.setattr("pipeline.cli.launch._end_run", lambda run: None)
    done("launch", "recipes/fashion/sltt.py", "--init", place / "runs" / "first")
    assert started[0].init == str(place / "runs" / "first")
