"""`spiketrain evaluate` with weights from a file: exact, for a recipe or a run, and refused in one
line where they do not fit.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.prepare import write_job
from pipeline.models.published import to_published
from pipeline.models.qkformer import QKFormer
from pipeline.spiking.encode import repeat
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.train.weights import load_start
from tests.helpers.small import Done, Refused, make_run, small_recipe

RECIPE = """
from pipeline.models.qkformer import QKFormer
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe

MODEL = spec(QKFormer, channels=32, depth=4, heads=1, in_channels=1, classes=10)

def recipe():
    return small_recipe(model=MODEL, time_steps=2)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path / "mine.py"


def network(**sizes: Any) -> QKFormer:
    torch.manual_seed(3)
    made = QKFormer(
        **{"channels": 32, "depth": 4, "heads": 1, "in_channels": 1, "classes": 10, **sizes}
    )
    for module in made.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.uniform_(module.bias, 0, 2)
            torch.nn.init.uniform_(module.running_var, 0.2, 1)
    torch.nn.init.normal_(made.classifier.weight)
    return made.eval()


def as_published(weights: dict[str, torch.Tensor], file: Path) -> Path:
    torch.save(
        {
            "model": weights | {"patch_embed1.proj_bn.num_batches_tracked": torch.tensor(5)},
            "epoch": 199,
            "args": argparse.Namespace(model="QKFormer_10_384"),
        },
        file,
    )
    return file


def by_hand(made: QKFormer, steps: int) -> tuple[float, float, float]:
    """Top-1, top-5 and the loss, one sample at a time, in an order of our own."""
    top1, top5, loss = 0, 0, 0.0
    with (
        Synthetic(samples=64, val_samples=20, shape=(1, 8, 8))
        .val(micro_batch=1)
        .epoch(0) as batches
    ):
        for batch in batches:
            with torch.no_grad(), fresh_state(made):
                logits_TBK = made(repeat(batch.x, steps))
            better = int((logits_TBK.mean(0)[0] > logits_TBK.mean(0)[0, batch.target]).sum())
            top1, top5 = top1 + (better < 1), top5 + (better < 5)
            loss += (
                sum(float(F.cross_entropy(logits_BK, batch.target)) for logits_BK in logits_TBK)
                / steps
            )
    return top1 / 20, top5 / 20, loss / 20


@pytest.mark.parametrize("steps", [2, 3])
def test_a_recipe_with_published_weights_or_with_ours(
    done: Done, recipe: Path, tmp_path: Path, steps: int
) -> None:
    made = network()
    published = as_published(to_published(made), tmp_path / "published.pth")
    save_file(made.state_dict(), tmp_path / "ours.safetensors")
    expected = by_hand(made, steps)
    assert len({*expected}) == 3 and 0 < expected[0] < 1
    line = (
        r"T = \d\): top-1 ([\d.]+)%, top-5 ([\d.]+)%, loss ([\d.]+) on 20 samples, firing rate .*;"
        r" evaluated in .*\nan inference: [\d.]+ [nµ]J estimated \(45 nm, fp32\),"
        r" not measured on a CPU\n$"
    )
    for file in (published, tmp_path / "ours.safetensors"):
        said = done("evaluate", recipe, "--weights", file, "--time-steps", steps)
        assert said.startswith(f"small ({file.name}, T = {steps}): ")
        found = re.search(line, said)
        assert found, said
        top1, top5, loss = map(float, found.groups())
        assert (top1 / 100, top5 / 100, loss) == pytest.approx(expected, abs=6e-5)


def test_a_run_with_the_weights_of_a_file(done: Done, refused: Refused, tmp_path: Path) -> None:
    plain = small_recipe()
    write_job(make_run(tmp_path / "run", plain))
    file = tmp_path / "other.safetensors"
    save_file(plain.model.build().state_dict(), file)
    words = ("evaluate", tmp_path / "run")
    assert done(*words, "--weights", file).startswith("run (other.safetensors, T = 3): top-1 ")
    error = refused(*words, "--weights", file, "--which", "best")
    assert "--weights replace the checkpoint, so --which must not be given" in error
    assert error.endswith("; got --which best")
    assert "--set must come with a recipe file" in refused(*words, "--set", "epochs=1")


def test_what_does_not_fit_is_refused_in_one_line(
    refused: Refused, recipe: Path, tmp_path: Path
) -> None:
    weights = to_published(network())
    whole = as_published(weights, tmp_path / "whole.pth")
    (tmp_path / "damaged.pth").write_bytes(whole.read_bytes()[:-1000])
    lacking = {
        name: tensor for name, tensor in weights.items() if name != "stage2.1.mlp.fc2_bn.bias"
    }
    three = as_published(to_published(network(classes=3)), tmp_path / "three.pth")
    two = "[small_recipe(), small_recipe(name='other')]"
    (tmp_path / "several.py").write_text(
        f"from tests.helpers.small import small_recipe\ndef recipe():\n    return {two}\n"
    )
    for words, expected in (
        (
            (recipe, "--weights", tmp_path / "nowhere.pth"),
            "evaluate: .*nowhere.pth must be a file of weights",
        ),
        (
            (recipe, "--weights", tmp_path / "damaged.pth"),
            "evaluate: .*damaged.pth must hold weights; it could not be read",
        ),
        (
            (recipe, "--weights", as_published(lacking, tmp_path / "lacking.pth")),
            (
                r"lacking.pth must fit the network; got 1 missing:"
                r" stages\.1\.2\.ffn\.branch\.2\.norm\.bias$"
            ),
        ),
        (
            (
                recipe,
                "--weights",
                as_published(weights | {"pos_embed": torch.zeros(1)}, tmp_path / "more.pth"),
            ),
            "more.pth must fit the network; got 1 unknown: pos_embed$",
        ),
        (
            (recipe, "--weights", three),
            (
                r"2 of another shape: classifier\.weight \(\[3, 32\] instead of \[10, 32\]\),"
                r" classifier\.bias"
            ),
        ),
        (
            (recipe, "--weights", whole, "--set", "model.channels=64"),
            r"of another shape: stages\.0\.0\.stem",
        ),
        (
            (recipe, "--weights", whole, "--set", "model.shortcut=multiple"),
            "whole.pth must fit .* 170 unknown: patch_embed1",
        ),
        (
            (recipe, "--weights", whole, "--set", "model.shortcut=sew_multiple"),
            "whole.pth must fit .* 170 unknown: patch_embed1",
        ),
        (
            (recipe, "--weights", whole, "--set", "data.classes=3"),
            "same number of classes; got 10 and 3",
        ),
        ((recipe,), "--weights FILE must be given without --which; got no --weights"),
        (
            (recipe, "--weights", whole, "--which", "last"),
            "--weights FILE must be given without --which; got --which last",
        ),
        ((tmp_path / "several.py", "--weights", whole), "must have one recipe; got small, other"),
    ):
        said = refused("evaluate", *words)
        assert re.search(expected, said), said


def test_a_recipe_starts_from_published_weights_with_a_head_of_its_own(
    done: Done, refused: Refused, recipe: Path, tmp_path: Path
) -> None:
    made, three = network(), network(classes=3)
    file = as_published(to_published(made), tmp_path / "published.pth")
    head = {
        name: three.state_dict()[name].clone() for name in ("classifier.weight", "classifier.bias")
    }
    assert load_start(three, file) == tuple(head)
    for name, tensor in three.state_dict().items():
        assert torch.equal(tensor, head[name] if name in head else made.state_dict()[name]), name
    show = ("show", recipe, "--set", f"init={file}", "--set")
    done(*show, "model.classes=3", "--set", "data.classes=3")
    said = "init: .*must fit the network up to the shapes of classifier; got 33 missing: "
    assert re.search(said, refused(*show, "model.depth=5"))
