import pytest

from pipeline.core.units import counted


@pytest.mark.parametrize(
    ("count", "noun", "told"),
    [
        (0, "worker", "0 workers"),
        (1, "worker", "1 worker"),
        (2, "worker", "2 workers"),
        (1, "batch", "1 batch"),
        (3, "batch", "3 batches"),
        (2, "class", "2 classes"),
        (None, "worker", "? workers"),
    ],
)
def test_a_count_and_its_noun_agree(count: int | None, noun: str, told: str) -> None:
    assert counted(count, noun) == told


def test_a_plural_of_its_own() -> None:
    assert counted(2, "study", "studies") == "2 studies"
