"""What the tests of GPUs share. `pytest -m gpu` runs them on a card; on a machine without one they
are skipped with a reason.
"""

import pytest
import torch

# of a test that runs on another device, too, in `make test`
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def device_of(name: str) -> torch.device:
    """Skips the test where the device is a card, and torch finds none."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip(
            "needs a GPU that torch can use, and `pytest -m gpu`, which shows it to the tests (make"
            " test-gpu)"
        )
    return torch.device(name)
