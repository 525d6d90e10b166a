from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.submit.order import OWN, Order

ORDER = Order(
    words=("recipes/fashion/sltt.py", "--set", "optimizer.lr=0.05"),
    name="fashion-sltt",
    workers=2,
    image="",
    runs="/shared/runs",
    infra=Path("infra"),
)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("words", (), "words must begin with a recipe; got none"),
        ("words", ("--set", "a=b"), "words must begin with a recipe; got --set a=b"),
        ("words", ("recipe.py", "a\nb"), "words must be free of control characters; got 'a\\nb'"),
        ("words", ("recipe.py", "\x7f"), "words must be free of control characters; got '\\x7f'"),
        ("runs", "/shared\nrm -rf /", "runs must be free of control characters; got '/shared\\nrm -rf /'"),
        ("image", "a:1\x00", "image must be free of control characters; got 'a:1\\x00'"),
        ("workers", 0, "workers must be 1 or more; got 0"),
        ("workers", True, "workers must be 1 or more; got True"),
        ("workers", 2.0, "workers must be 1 or more; got 2.0"),
        ("workers", (), "workers must be 1 or more; got ()"),
        ("workers", (0, 1), "workers must be 1 or more; got (0, 1)"),
    ],
)
def test_a_bad_field_is_refused_in_one_line(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        replace(ORDER, **{field: value})
    assert str(refused.value) == f"order: {said}"


@pytest.mark.parametrize("option", [*OWN, "--workers=4"])
def test_what_follows_from_the_order_is_not_among_its_words(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^order: {option.partition('=')[0]} is the job's own to say; got it among"):
        replace(ORDER, words=(*ORDER.words, option))


def test_a_training_without_ray_is_no_job() -> None:
    with pytest.raises(ValueError, match=r"^order: a job trains with workers of Ray; got --inline, which trains in one process"):
        replace(ORDER, words=(*ORDER.words, "--inline"))
