"""One place decides how fp32 products and convolutions are computed on a card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.core.torch_settings import compute_in, computing, products_in
from pipeline.models.teachers.base import Teacher
from pipeline.models.teachers.timm import timm_teacher
from pipeline.models.teachers.weights import Untrained
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


def products() -> list[Any]:
    """Of matrix products, convolutions and recurrent networks."""
    cudnn: Any = torch.backends.cudnn
    return [each.fp32_precision for each in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with products_in("fp32"):
        yield


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.usefixtures("ampere")
def test_products_and_convolutions_are_computed_alike() -> None:
    """By themselves torch computes the one in TF32 and the other not."""
    for precision, wanted in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        compute_in(precision, CARD)  # type: ignore[arg-type]
        assert products() == [wanted] * 3


def test_the_older_settings_agree_with_the_newer() -> None:
    """torch.compile (2.13) reads them, and a read fails where they disagree with the newer ones."""

    def older() -> tuple[object, ...]:
        backends = torch.backends
        return (
            backends.cuda.matmul.allow_tf32,
            backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )

    assert older() == (False, False, "highest")
    with products_in("tf32"):
        assert older() == (True, True, "high")
        with products_in("bf16"):
            assert older() == (False, False, "highest")
        assert older() == (True, True, "high")
    assert older() == (False, False, "highest")


@pytest.mark.usefixtures("ampere")
def test_the_precision_holds_inside_the_context_only() -> None:
    compute_in("tf32", CARD)
    with products_in("fp32"):
        assert products() == ["ieee"] * 3
    assert products() == ["tf32"] * 3
    x = torch.ones(2, 2)
    with computing(CPU, "bf16"):
        assert (x @ x).dtype == torch.bfloat16 and products() == ["ieee"] * 3
    assert (x @ x).dtype == torch.float32 and products() == ["tf32"] * 3


def test_tf32_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"recipe: precision='tf32' must have an NVIDIA card of .* 8\.0 or newer; got cpu: take"
        ),
    ):
        compute_in("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="got Tesla V100"):
        compute_in("tf32", CARD)
    assert products() == ["ieee"] * 3


def test_the_precision_is_part_of_the_study() -> None:
    keys = {
        small_recipe(precision=each).study_key({"data": "x"}) for each in ("fp32", "tf32", "bf16")
    }
    assert len(keys) == 3


@pytest.mark.usefixtures("ampere")
def test_a_teacher_computes_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pictures:
        classes, shape, mean, std = 1000, (3, 32, 32), (0.5,) * 3, (0.2,) * 3

    made: Teacher = spec(timm_teacher, name="test_vit", weights=spec(Untrained), size=160).build(
        Pictures()
    )
    seen: list[list[str]] = []
    made.body.register_forward_pre_hook(lambda *_: seen.append(products()))  # type: ignore[union-attr, operator]
    compute_in("tf32", CARD)
    made(torch.rand(1, 3, 32, 32))
    assert seen == [["ieee"] * 3] and products() == ["tf32"] * 3
