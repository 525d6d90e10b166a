"""A part that is not what the pipeline takes ends in one line that names what is missing, whatever
command meets it.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.data.base import Batch
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import check_launch
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.recipe import spec
from pipeline.rules.base import LossFn, Rule
from pipeline.rules.bptt import BPTT
from pipeline.train.build import check_recipe
from pipeline.train.distillation import Distillation
from pipeline.train.objective import CrossEntropy
from tests.helpers.small import Refused, small_recipe

RECIPE = """
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe
from tests.train.test_part_checks import WithoutFingerprint

def recipe():
    return small_recipe(data=spec(WithoutFingerprint))
"""


class WithoutFingerprint:
    classes, shape = 10, (1, 8, 8)

    def check(self) -> None: ...
    def train(
        self, *, seed: int, rank: int, world: int, batch_size: int, micro_batch: int, threads: int
    ) -> Any:
        return loader(batch_of("right", micro_batch))

    def val(self, *, rank: int, world: int, micro_batch: int, threads: int) -> Any: ...


class Own(WithoutFingerprint):
    """`kind` says what is wrong with it, or with a batch of its evaluation set."""

    def __init__(self, *, kind: str) -> None:
        self.kind = kind

    def fingerprint(self) -> str:
        return "own" if self.kind != "no hash" else ""

    def val(self, *, rank: int, world: int, micro_batch: int, threads: int) -> Any:
        return object() if self.kind == "no loader" else loader(batch_of(self.kind, micro_batch))


class WithoutShape(Own):
    shape = 64  # pyright: ignore[reportAssignmentType]


class OtherSizes(Own):
    def train(self, *, seed: int, batch: int) -> Any: ...  # type: ignore[override]


def loader(batch: Any) -> Mock:
    """Ten batches of what it is given."""
    batches = [] if batch is None else [batch] * 10
    return Mock(samples=80, steps_per_epoch=10, epoch=lambda epoch: nullcontext(iter(batches)))


def batch_of(kind: str, size: int) -> Any:
    x, target = torch.zeros(size, 1, 8, 8), torch.zeros(size, dtype=torch.int64)
    x = {"bytes": x.byte(), "flat": x.flatten(1), "empty": x[:0]}.get(kind, x)
    target = {"labels": target + 10, "scores": target.float(), "empty": target[:0]}.get(
        kind, target
    )
    batch = Batch(x, target, torch.arange(len(target)))
    return {"tuple": (x, target), "none": None}.get(kind, batch)


class Network(nn.Module):
    """Answers as it is told, for 10 classes of 8 x 8 pixels."""

    def __init__(self, *, form: str) -> None:
        super().__init__()
        self.form, self.classifier = form, nn.Linear(64, 7 if form == "seven" else 10)

    def forward(self, x_TB: Tensor) -> Any:
        logits = self.classifier(x_TB.flatten(2))
        return {
            "mean": logits.mean(0),
            "batch first": logits.transpose(0, 1),
            "tuple": (logits,),
        }.get(self.form, logits)


class WithoutObjectives(Rule):
    memory = "constant"


class WithoutMemory(Rule):
    def _loss_terms(self, *args: Any) -> Iterator[Any]:  # type: ignore[override]
        raise NotImplementedError


class Nothing: ...


class PerSample(CrossEntropy):
    """A loss that is none: it keeps a value for each sample."""

    def __call__(self, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossFn:
        return lambda logits_BK: logits_BK.sum(-1)


class Silent(Teacher):
    label = "silent"


def taught_by(data: Any, *, kind: str) -> Any:
    return Silent() if kind == "silent" else Nothing()


def nothing(*args: Any) -> Nothing:
    return Nothing()


def form(name: str) -> dict[str, Any]:
    return {"model": spec(Network, form=name), "rule": spec(BPTT)}


def teacher(kind: str) -> dict[str, Any]:
    return {"teacher": spec(taught_by, kind=kind), "objective": spec(Distillation)}


MODEL = (
    r"model: Network must map \[T, B, \.\.\.\] to logits \[T, B, K\]; for an input of shape \[3, 1,"
    r" 1, 8, 8\] and 10 classes it "
)
MEMBERS = "classes, shape, fingerprint, check, train, val"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data": spec(WithoutFingerprint)},
            f"data: WithoutFingerprint must have {MEMBERS}; it has no fingerprint",
        ),
        (
            {"data": spec(Nothing)},
            "it has no classes, no shape, no fingerprint, no check, no train, no val",
        ),
        (
            {"data": spec(WithoutShape, kind="")},
            r"data: WithoutShape: shape must be \(C, H, W\), or .*; got 64",
        ),
        (
            {"data": spec(OtherSizes, kind="")},
            (
                r"data: OtherSizes\.train must accept a call with seed, rank, world, batch_size,"
                r" micro_batch, threads; .*argument: 'batch'"
            ),
        ),
        ({"model": spec(Nothing)}, r"model: Nothing must return a torch\.nn\.Module; got Nothing"),
        (form("mean"), MODEL + r"returned float32 \[1, 10\]"),
        (form("batch first"), MODEL + r"returned float32 \[1, 3, 10\]"),
        (form("seven"), MODEL + r"returned float32 \[3, 1, 7\]"),
        (form("tuple"), MODEL + "returned a tuple"),
        (
            {**form(""), "data": spec(Synthetic, shape=(3, 8, 8))},
            (
                r"for an input of shape \[3, 1, 3, 8, 8\] .* it raised RuntimeError: mat1 and mat2"
                r" shapes cannot be multiplied"
            ),
        ),
        (
            {"rule": spec(Nothing)},
            r"rule: Nothing must return a pipeline\.rules\.base\.Rule; got Nothing",
        ),
        ({"rule": spec(WithoutObjectives)}, "rule: WithoutObjectives must override _loss_terms"),
        (
            {"rule": spec(WithoutMemory)},
            "rule: WithoutMemory: memory must be 'constant' or 'linear'; got None",
        ),
        (
            {"objective": spec(Nothing)},
            "objective: Nothing must have __call__, labels, is_stateful, check; it has no __call__",
        ),
        (
            {"objective": spec(PerSample)},
            r"objective: PerSample must map logits \[B, K\] to a scalar, .*; got float32 \[2\]",
        ),
        (
            {"optimizer": spec(nothing)},
            r"optimizer: nothing must return a torch\.optim\.Optimizer; got Nothing",
        ),
        (
            {"schedule": spec(nothing)},
            "schedule: nothing must return a function of the step, .*; got Nothing",
        ),
        (
            {"mixing": spec(nothing)},
            r"mixing: nothing must return a pipeline\.data\.mixing\.Mixing; got Nothing",
        ),
        (
            teacher("none"),
            (
                r"teacher: taught_by must return a pipeline\.models\.teachers\.base\.Teacher; got"
                r" Nothing"
            ),
        ),
        (teacher("silent"), "teacher: taught_by must override forward; it does not"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_recipe(small_recipe(**changes), 1)


def test_a_network_of_one_time_step_is_tried_on_two_samples() -> None:
    said = (
        r"for an input of shape \[1, 2, 1, 8, 8\] and 10 classes it returned float32 \[2, 1, 10\]"
    )
    with pytest.raises(ValueError, match=said):
        check_recipe(small_recipe(time_steps=1, **form("batch first")), 1)
    check_recipe(small_recipe(time_steps=1, **form("")), 1)


def test_trying_a_network_leaves_no_trace() -> None:
    recipe = small_recipe(**form("fresh"))
    found = []
    for make in (recipe.model.build, lambda: check_recipe(recipe, 1)):
        torch.manual_seed(3)
        found.append({**make().state_dict(), "drawn": torch.rand(3)})
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert check_recipe(recipe, 1).training


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no hash", "data: Own.fingerprint must return a hash as text; got ''"),
        (
            "no loader",
            (
                "data: the loader of Own.val must have samples, steps_per_epoch, epoch, close; it"
                " has no samples"
            ),
        ),
        ("none", "data: an epoch of Own.val must have 10 batches; got none"),
        ("tuple", r"data: a batch of Own\.val must be a pipeline\.data\.base\.Batch; got tuple"),
        (
            "bytes",
            (
                r"data: a batch of Own\.val: x must be float32 \[B, 1, 8, 8\]; got uint8 \[8, 1,"
                r" 8, 8\]"
            ),
        ),
        ("flat", r"x must be float32 \[B, 1, 8, 8\]; got float32 \[8, 64\]"),
        ("empty", r"data: a batch of Own\.val must have samples; got none"),
        ("scores", r"target must be int64 \[B\]; got float32 \[8\]"),
        ("labels", r"target must be in 0\.\.9, of 10 classes; got 10 to 10"),
    ],
)
def test_a_batch_of_ones_own_is_tried_before_a_launch(kind: str, said: str) -> None:
    wrong, right = (small_recipe(data=spec(Own, kind=each)) for each in (kind, "right"))
    with pytest.raises(ValueError, match=said):
        check_launch(wrong, Cluster(workers=1, inline=True), trust=("tests",))
    check_launch(right, Cluster(workers=1, inline=True), trust=("tests",))


# ----------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "words",
    [
        "show",
        "probe",
        "sweep",
        "plan --device h100",
        "launch --trust tests --runs RUNS",
        "evaluate --weights WEIGHTS",
    ],
)
def test_every_command_refuses_it_in_one_line(words: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    name, *options = (
        words.replace("RUNS", str(tmp_path / "runs"))
        .replace("WEIGHTS", str(tmp_path / "weights.safetensors"))
        .split()
    )
    wanted = f"data: WithoutFingerprint must have {MEMBERS}; it has no fingerprint"
    assert refused(name, str(tmp_path / "mine.py"), *options) == wanted
    assert not (tmp_path / "runs").exists()


def test_evaluate_tries_the_network_first(tmp_path: Path, refused: Refused) -> None:
    made = "small_recipe(model=spec(Network, form='mean'), rule=spec(BPTT))"
    content = RECIPE.replace("small_recipe(data=spec(WithoutFingerprint))", made)
    imports = content.replace("import WithoutFingerprint", "import BPTT, Network")
    (tmp_path / "mine.py").write_text(imports)
    weights = tmp_path / "weights.safetensors"
    save_file(Network(form="mean").state_dict(), weights)
    said = refused("evaluate", str(tmp_path / "mine.py"), "--weights", str(weights))
    assert re.fullmatch(MODEL + r"returned float32 \[1, 10\]", said), said
