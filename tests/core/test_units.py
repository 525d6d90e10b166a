import pytest

from pipeline.core.units import counted


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((0, "worker"), "0 workers"),
        ((1, "worker"), "1 worker"),
        ((2, "worker"), "2 workers"),
        ((1, "batch"), "1 batch"),
        ((3, "batch"), "3 batches"),
        ((2, "class"), "2 classes"),
        ((None, "worker"), "? workers"),
    ],
)
def test_a_count_and_its_noun_agree(words: tuple, text: str) -> None:
    assert counted(*words) == text
