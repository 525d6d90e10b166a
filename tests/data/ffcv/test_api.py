"""What importing FFCV must leave alone."""

import importlib
from pathlib import Path

import pytest
import torch

from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import api


def test_reading_asks_for_no_cuda_stream_where_there_is_a_gpu(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's thread starts on device 0: a stream there would cost every rank a context on
    that card.
    """

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("FFCV asked for CUDA")

    monkeypatch.setattr(
        api.epoch_iterator, "IS_CUDA", True
    )  # as FFCV 1.0.2 sets it where torch finds a GPU
    for name in ("current_stream", "stream", "Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    importlib.reload(api)
    with (
        Beton(photos, classes=2, size=32)
        .train(seed=5, batch_size=12, micro_batch=12)
        .epoch(0) as batches
    ):
        assert len(list(batches)) == 5


def test_importing_it_compiles_nothing() -> None:
    """The name is that of FFCV 1.0.2."""
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert type(IMAGE_MODES) is dict and IMAGE_MODES == {"jpg": 0, "raw": 1}
